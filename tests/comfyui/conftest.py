"""One ComfyUI for all tests of this folder."""

import os
from pathlib import Path

import pytest

from tests.comfyui.page import HOW, Page, available
from tests.comfyui.prompts import example
from tests.comfyui.server import add_example_files, from_environment, remove_example_checkpoints


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
    remove_example_checkpoints(comfy.base)


@pytest.fixture(scope="module")
def browser(comfy):
    if not available():
        pytest.skip(f"no browser: {HOW} to run these tests")
    # Whatever the tests of other files left.
    comfy.replace_checkpoint()
    add_example_files(comfy.base)
    page = Page(comfy)
    yield page
    page.close()
    remove_example_checkpoints(comfy.base)


@pytest.fixture
def page(browser):
    """The page; what it complains of is the test's business from here on."""
    browser.problems()
    return browser


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """Where screenshots go: SCREENSHOTS, or a temporary folder."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def previews(page):
    """The page with live previews on. ComfyUI passes on every step with one, and without only what comes 0.1 s after
    the step before."""
    page.reload(**{"Comfy.Execution.PreviewMethod": "latent2rgb"})
    page.problems()
    yield
    page.reload(**{"Comfy.Execution.PreviewMethod": "default"})
