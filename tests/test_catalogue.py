"""The lists to choose from hold each CogVideoX checkpoint and part once, with what it is, and nothing else."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from cogvideox.checkpoint import catalogue
from cogvideox.checkpoint.catalogue import find_entry, list_checkpoints, list_parts
from cogvideox.handles import open_handles
from tests import layouts
from tests.conftest import CPU

SIZE = "(custom size: 2 layers x 2 heads)"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return layouts.build_modules(tmp_path_factory.mktemp("catalogue") / "diffusers", "1.5-i2v")


@pytest.fixture
def models(tmp_path, source):
    """A models folder with a checkpoint in every layout, and what else lies there."""
    folder, modules = source
    for name in ("CogVideo", "diffusion_models/wan", "text_encoders", "vae"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "CogVideo" / "CogVideoX1.5-5B-I2V")
    shutil.copytree(folder, tmp_path / "CogVideo" / "both")
    (tmp_path / "CogVideo" / "both" / "transformer").rename(tmp_path / "CogVideo" / "both" / "transformer_I2V")
    shutil.copytree(tmp_path / "CogVideo" / "both" / "transformer_I2V", tmp_path / "CogVideo" / "both" / "transformer_T2V")
    layouts.write_sat(tmp_path / "CogVideo" / "sat", modules)
    state = layouts.comfy_names(modules["transformer"].state_dict())
    layouts.write_file(tmp_path / "diffusion_models" / "cog.safetensors", state)
    fp8 = {name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for name, value in state.items()}
    layouts.write_file(tmp_path / "diffusion_models" / "wan" / "CogVideoX1.5_fp8.safetensors", fp8)
    layouts.write_file(tmp_path / "text_encoders" / "t5xxl.safetensors", modules["text_encoder"].state_dict())
    layouts.write_file(tmp_path / "vae" / "cog_vae.safetensors", modules["vae"].state_dict())
    for place in ("diffusion_models", "text_encoders", "vae"):
        save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(3)}, tmp_path / place / "flux.safetensors")
        (tmp_path / place / "broken.safetensors").write_bytes(b"patch_embed.text_proj.weight" * 9)
        (tmp_path / place / "notes.txt").write_text("x")
    return tmp_path


def listed(models):
    return list_checkpoints([models / "CogVideo", models / "diffusers"], [models / "CogVideo", models / "diffusion_models"])


def test_every_checkpoint_is_listed_once_with_what_it_is(models):
    assert [entry.label for entry in listed(models)] == [
        f"CogVideoX1.5-5B-I2V · CogVideoX1.5-I2V {SIZE} · bf16 · diffusers",
        f"both/transformer_T2V · CogVideoX1.5-I2V {SIZE} · bf16 · diffusers",
        f"both/transformer_I2V · CogVideoX1.5-I2V {SIZE} · bf16 · diffusers",
        f"sat · CogVideoX1.5-I2V {SIZE} · bf16 · SAT",
        f"cog.safetensors · CogVideoX1.5-I2V {SIZE} · bf16 · ComfyUI",
        f"wan/CogVideoX1.5_fp8.safetensors · CogVideoX1.5-I2V {SIZE} · fp8 · ComfyUI",
    ]


def test_a_transformers_name_does_not_depend_on_the_other_beside_it(models):
    shutil.rmtree(models / "CogVideo" / "both" / "transformer_T2V")
    (entry,) = [entry for entry in listed(models) if entry.name.startswith("both")]
    assert entry.name == "both/transformer_I2V"
    assert open_handles(entry.path, "fp32", CPU).model.variant.image_to_video


def test_text_encoders_and_vaes_are_listed_where_they_lie(models):
    assert [entry.label for entry in list_parts("text_encoder", [models / "text_encoders"])] == [
        "t5xxl.safetensors · T5 encoder · fp32 · single file"
    ]
    assert [entry.label for entry in list_parts("vae", [models / "vae"])] == ["cog_vae.safetensors · CogVideoX VAE · fp32 · diffusers"]


def test_a_released_model_is_not_named_twice():
    assert catalogue._without("CogVideoX1.5-5B-I2V · bf16 · diffusers", "CogVideoX1.5-5B-I2V") == "bf16 · diffusers"
    assert catalogue._without("CogVideoX1.5-5B · bf16 · ComfyUI", "cog.safetensors") == "CogVideoX1.5-5B · bf16 · ComfyUI"


def test_an_entry_is_found_by_its_name_whatever_it_is_now(models):
    entries = listed(models)
    assert find_entry(entries, "sat").path == models / "CogVideo" / "sat"
    assert find_entry(entries, "sat · CogVideoX1.5-5B · fp16 · SAT").path == models / "CogVideo" / "sat"
    assert find_entry(entries, "gone") is None


def test_a_file_is_looked_into_once_and_again_when_it_changes(models, monkeypatch):
    seen, real = [], catalogue._describe_file
    monkeypatch.setattr(catalogue, "_describe_file", lambda path: seen.append(path.name) or real(path))
    monkeypatch.setattr(catalogue, "_known", {})
    first = listed(models)
    assert len(seen) == len(set(seen))
    seen.clear()
    assert listed(models) == first
    assert seen == []
    (models / "diffusion_models" / "cog.safetensors").unlink()
    save_file({"x": torch.ones(3)}, models / "diffusion_models" / "cog.safetensors")
    assert "cog.safetensors" not in [entry.name for entry in listed(models)]
    assert seen == ["cog.safetensors"]
