"""One ComfyUI for all tests of this folder."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cogvideox.video import write_mp4
from tests.comfyui.prompts import example
from tests.comfyui.server import from_environment
from tests.tiny_checkpoint import build_checkpoint


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    server = from_environment(tmp_path_factory.mktemp("comfyui"))
    if server is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH to a checkout and COMFYUI_PYTHON to its interpreter to run these tests")
    yield server
    server.close()


@pytest.fixture
def prompt():
    """The text-to-video example, small and short."""
    return example("text_to_video")


@pytest.fixture
def files(comfy):
    """What the other examples need: an image-to-video checkpoint, a picture, a clip and a LoRA."""
    models, name = comfy.base / "models", "transformer.transformer_blocks.0.attn1.to_out.0"
    if not (models / "CogVideo" / "CogVideoX1.5-5B-I2V").exists():
        build_checkpoint(models / "CogVideo" / "CogVideoX1.5-5B-I2V", "1.5-i2v")
        Image.new("RGB", (200, 100), (200, 120, 40)).save(comfy.base / "input" / "example.png")
        write_mp4(torch.rand(20, 64, 96, 3), comfy.base / "input" / "input.mp4", 16)
        (models / "loras").mkdir(exist_ok=True)
        for file in ("my_cogvideox_lora", "another"):
            halves = {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)}
            save_file(halves, models / "loras" / f"{file}.safetensors")
        save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}, models / "loras" / "sd15.safetensors")
    yield
    shutil.rmtree(models / "CogVideo" / "CogVideoX1.5-5B-I2V")
