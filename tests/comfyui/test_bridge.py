"""CogVideoX-1.5 to ComfyUI, Model Check and core's VAE in a real ComfyUI: in its process (``bridge_script``), and as a
graph that is queued."""

import io
import os
import re
import subprocess
import sys
import time

import pytest
from PIL import Image, ImageStat

from tests.comfyui.prompts import error_of, example, id_of, node_of
from tests.conftest import ROOT

#: Sections of ``bridge_script``, each in a process of its own, and what they are about.
SECTIONS = {
    "parity": "KSampler's ddim on the simple schedule is our sampler's, for every variant, odd and even, with an image",
    "core": "with core's parameterisation it is core's own model",
    "loud": "in fp16 a loud model is finite where core's is NaN",
    "core_nodes": "core's nodes run, or are refused in words",
    "conditionings": "parts of pictures, batches and runs, and a second model, are right or told",
    "compiling": "core's compiling is the pack's",
    "loras": "core's LoRA loaders work in every storage that can have them",
    "parts": "CLIP and VAE give what our nodes give",
    "core_vae": "our nodes run on the weights of core's VAE",
    "one_run": "one sentinel, one module, one place in core's list",
    "caches": "our step caches work under core's samplers",
    "out_of_memory": "running out of memory loses nothing",
    "check": "Model Check names what core computes in, and the module",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_in_comfyuis_process(section):
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("no ComfyUI: set COMFYUI_PATH to a checkout and COMFYUI_PYTHON to its interpreter")
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        str(ROOT / "tests" / "comfyui" / "bridge_script.py"),
        str(ROOT),
        section,
        "--cpu",
    ]
    done = subprocess.run(command, cwd=os.environ["COMFYUI_PATH"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{section} done" in done.stdout


@pytest.fixture
def native():
    """The example with core's nodes, small and short."""
    return example("native_nodes")


def test_the_example_runs_and_previews_in_our_colours(comfy, native):
    told = comfy.listen(native, previews="latent2rgb")
    assert told.history["status"]["status_str"] == "success", error_of(told.history)["exception_message"]
    assert told.progress(id_of(native, "KSampler"))[-1] == (3, 3)
    assert len(told.previews) == 3
    with Image.open(io.BytesIO(told.previews[-1][1])) as picture:
        # Unstretched they are within a few shades of grey.
        assert max(ImageStat.Stat(picture.convert("RGB")).stddev) > 25


def test_a_second_run_takes_everything_from_the_cache_and_another_seed_only_samples(comfy, native):
    node_of(native, "KSampler")["seed"] = 5
    comfy.run(native)
    for seed, wanted in ((5, set()), (6, {"KSampler", "VAEDecode", "CogVideoX15BlackFrameCheck"})):
        node_of(native, "KSampler")["seed"] = seed
        told = comfy.listen(native)
        ran = {event["data"]["node"] for event in told.events if event["type"] == "executing"} - {None}
        assert {native[node]["class_type"] for node in ran} >= wanted
        assert not {native[node]["class_type"] for node in ran} & {"CogVideoX15ToComfyUI", "CLIPTextEncode"}


def test_cancel_takes_effect_within_one_step(comfy, native):
    sampler, at = id_of(native, "KSampler"), []
    node_of(native, "KSampler").update(steps=1000, seed=int(time.time()))

    def cancel_early(event):
        if event["type"] == "progress" and event["data"]["node"] == sampler and event["data"]["max"] == 1000 and not at:
            at.append(event["data"]["value"])
            comfy.post("/interrupt", {})

    told = comfy.listen(native, on_event=cancel_early)
    assert told.events[-1]["type"] == "execution_interrupted"
    assert told.progress(sampler)[-1][0] < at[0] + 50


def test_free_model_and_node_cache_frees_everything(comfy, native):
    assert comfy.run(native)["status"]["status_str"] == "success"
    # Of our own three and of nothing twice.
    assert comfy.get("/cogvideox15_test/alive") == {"weights": 3, "modules": 3}
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    end = time.monotonic() + 20
    while comfy.get("/cogvideox15_test/alive") != {"weights": 0, "modules": 0}:
        assert time.monotonic() < end, comfy.get("/cogvideox15_test/alive")
        time.sleep(0.3)


def test_image_to_video_goes_through_ksampler(comfy, native, files):
    prompt = example("image_to_video")
    loader, into, decoder = (
        id_of(prompt, f"CogVideoX15{kind}") for kind in ("ModelLoader", "ImageToVideo", "VAEDecode")
    )
    sampler = id_of(prompt, "CogVideoX15Sampler")
    settings = {"seed": 1, "steps": 3, "cfg": 6.0, "sampler_name": "ddim", "scheduler": "simple", "denoise": 1.0}
    prompt["80"] = {"class_type": "CogVideoX15ToComfyUI", "inputs": {"model": [loader, 0], "vae": [loader, 2]}}
    links = {"model": ["80", 0], "positive": [into, 0], "negative": [into, 1], "latent_image": [into, 2]}
    prompt[sampler] = {"class_type": "KSampler", "inputs": settings | links}
    # Our nodes take the VAE that the bridge gives, too.
    prompt[into]["inputs"]["vae"] = prompt[decoder]["inputs"]["vae"] = ["80", 2]
    history = comfy.run(prompt)
    assert history["status"]["status_str"] == "success", error_of(history)["exception_message"]


def test_a_refusal_reaches_the_page_as_a_plain_sentence(comfy, native):
    sampler = node_of(native, "KSampler")
    native["80"] = {"class_type": "LazyCache", "inputs": {"model": sampler["model"]}}
    native["80"]["inputs"] |= {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    sampler["model"] = ["80", 0]
    error = error_of(comfy.run(native))
    assert "Use EasyCache" in error["exception_message"]
    assert re.fullmatch(r"ValueError|RuntimeError", error["exception_type"])
