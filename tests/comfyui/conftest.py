"""One ComfyUI for all tests of this folder."""

import shutil

import pytest

from tests.comfyui.prompts import example
from tests.comfyui.server import add_example_files, from_environment


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    server = from_environment(tmp_path_factory.mktemp("comfyui"))
    if server is None:
        pytest.skip(
            "no ComfyUI: set COMFYUI_PATH to a checkout and COMFYUI_PYTHON to its interpreter to run these tests"
        )
    yield server
    server.close()


@pytest.fixture
def prompt():
    """The text-to-video example, small and short."""
    return example("text_to_video")


@pytest.fixture
def files(comfy):
    """What the other examples need: an image-to-video checkpoint, a picture, a clip and a LoRA."""
    add_example_files(comfy.base)
    yield
    shutil.rmtree(comfy.base / "models" / "CogVideo" / "CogVideoX1.5-5B-I2V")
