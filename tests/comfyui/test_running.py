"""What a person is told while a graph runs, and what stopping, repeating and freeing it does."""

import io
import time

import pytest
from PIL import Image

from tests.comfyui.prompts import example, id_of, node_of


def test_every_stage_moves_the_progress_bar_of_its_node(comfy, prompt):
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    node_of(prompt, "CogVideoX15Sampler")["seed"] = 11
    node_of(prompt, "CogVideoX15ModelLoader")["scan_weights"] = True
    told = comfy.listen(prompt)
    kinds = ("ModelLoader", "TextEncode", "Sampler", "VAEDecode", "BlackFrameCheck")
    bars = {kind: told.progress(id_of(prompt, f"CogVideoX15{kind}")) for kind in kinds}
    # ComfyUI passes on one message each tenth of a second at most, and the last. Bytes of the scan; T5's layers, whose
    # weights are mapped; bytes of the transformer and then the steps; latent frames; frames.
    assert all(bars.values()), bars
    assert bars["TextEncode"][-1] == (2, 2)
    assert bars["Sampler"][-1] == (3, 3)
    assert bars["Sampler"][0][1] > 1000
    assert bars["VAEDecode"][-1] == (5, 5)
    assert bars["BlackFrameCheck"][-1] == (17, 17)
    # The node that works is the one that is highlighted.
    running = [event["data"]["node"] for event in told.events if event["type"] == "executing"]
    assert [node for node in running if node is not None] == list(
        dict.fromkeys(node for node in running if node is not None)
    )
    assert set(prompt) == set(running) - {None}


def test_image_to_video_moves_the_bar_while_it_encodes(comfy, files):
    prompt = example("image_to_video")
    node_of(prompt, "CogVideoX15ImageToVideo")["length"] = 33
    assert comfy.listen(prompt).progress(id_of(prompt, "CogVideoX15ImageToVideo"))


@pytest.mark.parametrize("method", ["auto", "latent2rgb", "none"])
def test_the_sampler_previews_under_comfyuis_setting(comfy, prompt, method):
    node_of(prompt, "CogVideoX15Sampler")["seed"] = hash(method) % 1000
    told = comfy.listen(prompt, previews=method)
    assert told.history["status"]["status_str"] == "success"
    if method == "none":
        assert told.previews == []
        return
    assert len(told.previews) == 3
    for described, file in told.previews:
        assert described["node_id"] == id_of(prompt, "CogVideoX15Sampler")
        assert described["image_type"] == "image/png"
        with Image.open(io.BytesIO(file)) as picture:
            assert (picture.format, picture.size, picture.n_frames) == ("PNG", (20, 12), 5)
            # One latent frame is four frames of a video of 16 a second.
            picture.seek(1)
            assert picture.info["duration"] == 250


def test_cancel_takes_effect_within_one_step(comfy, prompt):
    node_of(prompt, "CogVideoX15Sampler").update(steps=1000, seed=int(time.time()))
    sampler, at = id_of(prompt, "CogVideoX15Sampler"), []

    def cancel_early(event):
        if event["type"] == "progress" and event["data"]["node"] == sampler and event["data"]["max"] == 1000 and not at:
            at.append(event["data"]["value"])
            comfy.post("/interrupt", {})

    told = comfy.listen(prompt, on_event=cancel_early)
    assert told.events[-1]["type"] == "execution_interrupted"
    # The message takes its time to the server, during which tiny steps go on.
    assert told.progress(sampler)[-1][0] < at[0] + 50


def test_free_model_and_node_cache_frees_everything(comfy, prompt):
    """A node of the tests' own counts what is alive in the server."""
    assert comfy.run(prompt)["status"]["status_str"] == "success"
    alive = comfy.get("/cogvideox15_test/alive")
    assert alive == {"weights": 3, "modules": 3}
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    end = time.monotonic() + 20
    while comfy.get("/cogvideox15_test/alive") != {"weights": 0, "modules": 0}:
        assert time.monotonic() < end, comfy.get("/cogvideox15_test/alive")
        time.sleep(0.3)


def test_a_long_video_counts_its_windows_and_previews_all_of_it(comfy, files):
    prompt = example("long_video")
    node_of(prompt, "CogVideoX15EmptyLatent")["length"] = 33
    node_of(prompt, "CogVideoX15ContextWindows")["overlap"] = 2
    told = comfy.listen(prompt, previews="auto")
    assert told.history["status"]["status_str"] == "success"
    assert told.progress(id_of(prompt, "CogVideoX15Sampler"))[-1] == (6, 6)
    assert len(told.previews) == 6
    with Image.open(io.BytesIO(told.previews[-1][1])) as picture:
        assert picture.n_frames == 9
    assert "made in 2 windows of 17 frames" in str(told.texts[id_of(prompt, "CogVideoX15Sampler")])


def test_a_video_is_extended_by_the_new_frames(comfy, files):
    prompt = example("extend")
    # What is joined is asked for as a node's own output.
    prompt["90"] = {"class_type": "PreviewImage", "inputs": {"images": [id_of(prompt, "CogVideoX15JoinClips"), 0]}}
    prompt["91"] = {"class_type": "PreviewImage", "inputs": {"images": [id_of(prompt, "ImageScale"), 0]}}
    history = comfy.run(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    joined, clip = (len(history["outputs"][node]["images"]) for node in ("90", "91"))
    assert joined == clip + 16
