"""The example super_resolution runs in a real ComfyUI, with a tiny checkpoint: first with T5, then without."""

import copy
import json
import shutil

import av
import pytest

from tests.comfyui.prompts import error_of, example, id_of, node_of
from tests.tiny_checkpoint import build_checkpoint

KIND = "CogVideoX15SuperResolution"


@pytest.fixture
def models(comfy, files):
    """Checkpoints that are called DOVE and SparkVSR, beside the others."""
    folder = comfy.base / "models" / "CogVideo"
    # The page's tests may have left the embedding that is kept.
    shutil.rmtree(folder / "prompt_embeddings", ignore_errors=True)
    for name, variant in (("DOVE", "1.5"), ("SparkVSR", "1.5-i2v")):
        build_checkpoint(folder / name, variant)
    listed = comfy.get("/object_info/CogVideoX15ModelLoader")["CogVideoX15ModelLoader"]["input"]["required"]["model"][0]
    yield {name: next(label for label in listed if label.startswith(name)) for name in ("DOVE", "SparkVSR")}
    for name in ("DOVE", "SparkVSR", "prompt_embeddings"):
        shutil.rmtree(folder / name, ignore_errors=True)


def film_of(comfy, prompt, history):
    assert history["status"]["status_str"] == "success", history["status"]
    saved = history["outputs"][id_of(prompt, "SaveVideo")]["images"][0]
    with av.open(str(comfy.base / "output" / saved["subfolder"] / saved["filename"])) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height, sum(1 for _ in container.decode(video=0))


def refusal(comfy, prompt):
    answer = comfy.post("/prompt", {"prompt": prompt})
    assert "prompt_id" not in answer
    return json.dumps(answer)


def test_it_runs_and_then_needs_no_text_encoder(comfy, models):
    prompt = example("super_resolution")
    node_of(prompt, "CogVideoX15ModelLoader")["model"] = models["DOVE"]
    with av.open(str(comfy.base / "input" / "input.mp4")) as container:
        stream = container.streams.video[0]
        expected = 2 * stream.width, 2 * stream.height, sum(1 for _ in container.decode(video=0))
    history, told = comfy.run_listening(prompt)
    assert film_of(comfy, prompt, history) == expected
    kept = "The empty prompt's embedding is now in"
    assert any(text.startswith(kept) for text in told[id_of(prompt, KIND)])
    del node_of(prompt, KIND)["text_encoder"]
    history, told = comfy.run_listening(prompt)
    assert film_of(comfy, prompt, history) == expected
    assert not any(text.startswith(kept) for texts in told.values() for text in texts)


def test_references_are_shown_to_sparkvsr(comfy, models):
    prompt = example("super_resolution")
    node_of(prompt, "CogVideoX15ModelLoader")["model"] = models["SparkVSR"]
    parts = id_of(prompt, "GetVideoComponents")
    prompt["frames"] = {
        "class_type": "ImageFromBatch",
        "inputs": {"image": [parts, 0], "batch_index": 0, "length": 2},
    }
    node_of(prompt, KIND).update(references=["frames", 0], reference_frames="0, 8", reference_guidance=2.0)
    film_of(comfy, prompt, comfy.run(prompt))
    wrong = copy.deepcopy(prompt)
    node_of(wrong, KIND)["reference_frames"] = "0"
    assert "There are 2 reference images" in error_of(comfy.run(wrong))["exception_message"]


def test_what_cannot_run_is_said_when_it_is_queued(comfy, models):
    prompt = example("super_resolution")
    node_of(prompt, "CogVideoX15ModelLoader")["model"] = models["DOVE"]
    for change, said in (
        ({"kind": "sparkvsr"}, "kind is sparkvsr"),
        ({"reference_frames": "0, 2"}, "4 or more apart"),
        ({"scale": 9}, "1 to 8 times"),
        ({"references": [id_of(prompt, "GetVideoComponents"), 0]}, "which reads none"),
    ):
        wrong = copy.deepcopy(prompt)
        node_of(wrong, KIND).update(change)
        assert said in refusal(comfy, wrong), said
    del node_of(prompt, KIND)["text_encoder"]
    assert "Connect the text_encoder of the model loader once" in refusal(comfy, prompt)
