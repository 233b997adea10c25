"""ComfyUI's own nodes between, before and behind ours."""

import shutil

import av
import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file, save_file

from benchmarks.vae_decode import build as build_released_vae
from tests.comfyui.prompts import error_of, id_of, node_of


def succeed(comfy, prompt):
    history = comfy.run(prompt)
    assert history["status"]["status_str"] == "success", error_of(history)["exception_message"]
    return history["outputs"]


def files_of(comfy, output):
    """The paths of what a node saved or previews."""
    return [
        comfy.base / {"output": "output", "temp": "temp"}[file["type"]] / file["subfolder"] / file["filename"]
        for file in output["images"]
    ]


def without_the_end(prompt):
    """The text-to-video example up to its decoder, with its frames saved as PNG by node 60."""
    for kind in ("CogVideoX15BlackFrameCheck", "CreateVideo", "SaveVideo", "PreviewAny"):
        for key in [key for key, node in prompt.items() if node["class_type"] == kind]:
            del prompt[key]
    prompt["60"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [id_of(prompt, "CogVideoX15VAEDecode"), 0], "filename_prefix": "frames"},
    }
    return prompt


def same_pictures(one, other, within=0):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        with Image.open(left) as a, Image.open(right) as b:
            assert a.size == b.size
            assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= within


def test_our_latent_goes_through_save_and_load_latent_unchanged(comfy, prompt):
    prompt = without_the_end(prompt)
    sampler, decoder = id_of(prompt, "CogVideoX15Sampler"), id_of(prompt, "CogVideoX15VAEDecode")
    prompt["61"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "latents/cog"}}
    straight = files_of(comfy, succeed(comfy, prompt)["60"])
    (saved,) = (comfy.base / "output" / "latents").glob("cog_*.latent")
    samples = load_file(saved)["latent_tensor"]
    assert (samples.shape, samples.dtype) == ((1, 16, 5, 12, 20), torch.float32)
    shutil.move(saved, comfy.base / "input" / "cog.latent")
    prompt["62"] = {"class_type": "LoadLatent", "inputs": {"latent": "cog.latent"}}
    node_of(prompt, "CogVideoX15VAEDecode")["samples"] = ["62", 0]
    for key in (sampler, "61"):
        del prompt[key]
    same_pictures(straight, files_of(comfy, succeed(comfy, prompt)["60"]))
    assert decoder in prompt


def test_cores_empty_video_latent_is_ours(comfy, prompt):
    prompt = without_the_end(prompt)
    ours = files_of(comfy, succeed(comfy, prompt)["60"])
    prompt[id_of(prompt, "CogVideoX15EmptyLatent")]["class_type"] = "EmptyHunyuanLatentVideo"
    same_pictures(ours, files_of(comfy, succeed(comfy, prompt)["60"]))


def test_a_latent_of_an_image_model_is_refused_with_a_sentence(comfy, prompt):
    prompt[id_of(prompt, "CogVideoX15EmptyLatent")] = {
        "class_type": "EmptyLatentImage",
        "inputs": {"width": 160, "height": 96, "batch_size": 1},
    }
    assert "Image latents do not fit" in error_of(comfy.run(prompt))["exception_message"]


def test_cores_zeroed_conditioning_is_a_negative_prompt(comfy, prompt):
    sampler = node_of(prompt, "CogVideoX15Sampler")
    prompt["70"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": sampler["positive"]}}
    sampler["negative"] = ["70", 0]
    succeed(comfy, prompt)


def test_our_frames_go_into_cores_savers_and_previews(comfy, prompt):
    prompt = without_the_end(prompt)
    frames = [id_of(prompt, "CogVideoX15VAEDecode"), 0]
    prompt |= {
        "71": {
            "class_type": "SaveWEBM",
            "inputs": {"images": frames, "filename_prefix": "clip", "codec": "vp9", "fps": 16.0, "crf": 20.0},
        },
        "72": {"class_type": "PreviewImage", "inputs": {"images": frames}},
        "73": {
            "class_type": "SaveAnimatedWEBP",
            "inputs": {
                "images": frames,
                "filename_prefix": "clip",
                "fps": 16.0,
                "lossless": True,
                "quality": 80,
                "method": "fastest",
            },
        },
        "74": {"class_type": "CreateVideo", "inputs": {"images": frames, "fps": 16.0}},
        "75": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["74", 0], "filename_prefix": "video/clip", "format": "auto", "codec": "auto"},
        },
    }
    outputs = succeed(comfy, prompt)
    assert len(outputs["72"]["images"]) == 17
    same_pictures(files_of(comfy, outputs["60"]), files_of(comfy, outputs["72"]))
    for saver in ("71", "75"):
        with av.open(str(files_of(comfy, outputs[saver])[0])) as container:
            assert sum(1 for _ in container.decode(video=0)) == 17
    with Image.open(files_of(comfy, outputs["73"])[0]) as picture:
        assert (picture.size, picture.n_frames) == ((160, 96), 17)


@pytest.fixture
def released_vae(comfy):
    """A VAE of the released shapes with random weights, as one file: ComfyUI's own class knows no other."""
    folder = comfy.base / "models" / "vae"
    folder.mkdir(exist_ok=True)
    save_file(build_released_vae("cpu", torch.float32).state_dict(), folder / "cogvideox_vae.safetensors")
    yield "cogvideox_vae.safetensors"
    (folder / "cogvideox_vae.safetensors").unlink()


def test_cores_vae_and_ours_are_interchangeable(comfy, prompt, released_vae):
    """Core VAE Decode makes our decoder's frames from one latent frame, nearly so from more, and our sampler starts
    from core VAE Encode's.

    Ours is diffusers' decode (tests/test_vae.py): whole, two latent frames at a time. ComfyUI's class has the same
    layers, but runs the first of them on the whole video and the last on four frames at a time, so its group norms see
    other frames; random weights make the most of that.
    """
    prompt = without_the_end(prompt)
    # Small and short, as this VAE is large: 9 frames, which core's node makes too.
    empty = {"width": 48, "height": 32, "length": 9, "batch_size": 1}
    prompt[id_of(prompt, "CogVideoX15EmptyLatent")] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": empty}
    loader, decoder, sampler = (id_of(prompt, f"CogVideoX15{kind}") for kind in ("ModelLoader", "VAEDecode", "Sampler"))
    listed = comfy.get("/object_info/CogVideoX15ModelLoader")["CogVideoX15ModelLoader"]["input"]["optional"][
        "vae_name"
    ][0]
    prompt[loader]["inputs"].update(
        dtype="fp32", vae_name=next(label for label in listed if label.startswith(released_vae))
    )
    prompt |= {
        "81": {"class_type": "VAELoader", "inputs": {"vae_name": released_vae}},
        "82": {"class_type": "VAEDecode", "inputs": {"samples": [sampler, 0], "vae": ["81", 0]}},
        "83": {"class_type": "PreviewImage", "inputs": {"images": ["82", 0]}},
        "84": {"class_type": "LatentCut", "inputs": {"samples": [sampler, 0], "dim": "t", "index": 0, "amount": 1}},
        "85": {"class_type": "VAEDecode", "inputs": {"samples": ["84", 0], "vae": ["81", 0]}},
        "86": {"class_type": "PreviewImage", "inputs": {"images": ["85", 0]}},
        "87": {"class_type": "CogVideoX15VAEDecode", "inputs": dict(prompt[decoder]["inputs"], samples=["84", 0])},
        "88": {"class_type": "PreviewImage", "inputs": {"images": ["87", 0]}},
    }
    outputs = succeed(comfy, prompt)

    def differences(ours, cores):
        for one, other in zip(files_of(comfy, outputs[ours]), files_of(comfy, outputs[cores]), strict=True):
            with Image.open(one) as a, Image.open(other) as b:
                yield ImageStat.Stat(ImageChops.difference(a, b))

    (still,) = differences("88", "86")
    assert max(high for _, high in still.extrema) <= 1
    assert max(max(frame.mean) for frame in differences("60", "83")) < 10
    # The other way: frames through core's encoder into our sampler.
    prompt["90"] = {"class_type": "VAEEncode", "inputs": {"pixels": [decoder, 0], "vae": ["81", 0]}}
    prompt["92"] = {
        "class_type": "CogVideoX15Sampler",
        "inputs": dict(prompt[sampler]["inputs"], latent_image=["90", 0], denoise=0.4),
    }
    prompt["93"] = {"class_type": "SaveLatent", "inputs": {"samples": ["92", 0], "filename_prefix": "latents/again"}}
    succeed(comfy, prompt)
    resampled = load_file(next((comfy.base / "output" / "latents").glob("again_*.latent")))["latent_tensor"]
    assert resampled.shape == (1, 16, 3, 4, 6)
