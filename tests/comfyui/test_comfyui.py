"""The pack in a real ComfyUI: listed, executed through the HTTP API, cached, cancelled, and its errors read."""

import copy
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from math import prod

import av
import pytest
from PIL import Image
from safetensors import safe_open

from interop.kinds import KINDS
from interop.migrate import migrate_workflow
from tests import fun_workflows, layouts, locales, workflows, wrapper_workflows
from tests.comfyui.prompts import error_of, example, id_of, node_of, small
from tests.conftest import ROOT
from tests.loud_models import loud_stream
from tests.tiny_checkpoint import build_text_encoder, build_transformer, build_vae


def enlarge(folder, layers=512, wide=1 << 20):
    """Make a tiny text encoder in shards one of hundreds of gigabytes: more and wider layers, which are holes in a
    file."""
    config, index = json.loads((folder / "config.json").read_text()), next(folder.glob("*.index.json"))
    listed = json.loads(index.read_text())
    header, end = {}, 0
    for layer in range(layers):
        # The first layer alone holds the relative positions.
        for name in [name for name in listed["weight_map"] if name.startswith(f"encoder.block.{min(layer, 1)}.")]:
            with safe_open(folder / listed["weight_map"][name], "pt") as file:
                shape = [wide if side == config["d_ff"] else side for side in file.get_slice(name).get_shape()]
            size = 4 * prod(shape)
            header[re.sub(r"\d+", str(layer), name, count=1)] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size
    text = json.dumps(header).encode()
    # Of two shards that have a tensor, the last by name counts.
    with (folder / "model-large.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        # Zeros alone are taken for what was never written.
        for entry in header.values():
            file.seek(8 + len(text) + entry["data_offsets"][0])
            file.write(struct.pack("<f", 1.0))
    index.write_text(
        json.dumps({"weight_map": listed["weight_map"] | dict.fromkeys(header, "model-large.safetensors")})
    )
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": layers, "d_ff": wide}))


def test_the_nodes_are_listed_with_the_checkpoint(comfy, pack):
    for node_id in pack.NODE_CLASS_MAPPINGS:
        info = comfy.get(f"/object_info/{node_id}")[node_id]
        assert info["category"] == "CogVideoX-1.5"
        assert info["search_aliases"]
        assert info["output_tooltips"]
    listed = comfy.get("/object_info/CogVideoX15ModelLoader")["CogVideoX15ModelLoader"]["input"]["required"]["model"][0]
    assert len(listed) == 1
    assert listed[0].startswith("CogVideoX1.5-5B · ")
    assert "IMPORT FAILED" not in comfy.log.read_text()


def test_the_examples_are_in_the_template_list(comfy):
    assert sorted(comfy.get("/workflow_templates")["a pack with spaces"]) == sorted(
        path.stem for path in workflows.FILES
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_words_of_both_languages_reach_the_page(comfy, language):
    served = comfy.get("/i18n")[language]["nodeDefs"]
    assert {node_id: served[node_id] for node_id in locales.read(language)} == locales.read(language)


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("/extensions/{}/docs/CogVideoX15Sampler.md", "web/docs/CogVideoX15Sampler.md"),
        ("/extensions/{}/docs/CogVideoX15Sampler/zh.md", "web/docs/CogVideoX15Sampler/zh.md"),
        ("/api/workflow_templates/{}/text_to_video.json", "example_workflows/text_to_video.json"),
        ("/api/workflow_templates/{}/text_to_video.jpg", "example_workflows/text_to_video.jpg"),
    ],
)
def test_help_pages_and_templates_are_served_from_a_folder_with_spaces(comfy, address, file):
    """As the page asks for them; it takes HTML for "not found"."""
    answer = comfy.open(address.format("a%20pack%20with%20spaces"))
    assert answer.headers.get_content_type() != "text/html"
    assert answer.read() == (ROOT / file).read_bytes()


@pytest.mark.parametrize(
    "address",
    [
        "/extensions/{}/docs/..%2f..%2fpyproject.toml",
        "/extensions/{}/docs/%2e%2e/%2e%2e/README.md",
        "/extensions/{}/docs/",
    ],
)
def test_nothing_else_of_the_folder_is_served(comfy, address):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        comfy.open(address.format("a%20pack%20with%20spaces"))


def test_the_workflow_runs_and_the_saved_video_opens(comfy, prompt):
    history = comfy.run(prompt)
    assert history["status"]["status_str"] == "success"
    saved = next(output["images"][0] for output in history["outputs"].values() if "images" in output)
    with av.open(str(comfy.base / "output" / saved["subfolder"] / saved["filename"])) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (160, 96, 16)
        assert sum(1 for _ in container.decode(video=0)) == 17


def test_a_second_run_with_another_prompt_loads_nothing_again(comfy, prompt):
    comfy.run(prompt)
    before = comfy.log.read_text().count("Loading the ")
    prompt["2"]["inputs"]["prompt"] = "a city at night"
    history = comfy.run(prompt)
    cached = next(message[1]["nodes"] for message in history["status"]["messages"] if message[0] == "execution_cached")
    assert {"1", "3", "4"} <= set(cached)
    assert comfy.log.read_text().count("Loading the ") == before


def test_the_loader_shows_its_report_on_the_node_and_scans_when_asked(comfy, prompt):
    node_of(prompt, "CogVideoX15ModelLoader").update(dtype="fp16", scan_weights=True)
    history, shown = comfy.run_listening(prompt)
    assert history["status"]["status_str"] == "success"
    loader = next(key for key, node in prompt.items() if node["class_type"] == "CogVideoX15ModelLoader")
    (report,) = shown[loader]
    assert "[mismatch, fixed] transformer: stored bf16" in report
    assert report.count("no NaN") == 3
    assert "changed: runs in range-safe fp16 instead of fp16" in comfy.log.read_text()


def test_the_wrappers_nodes_are_replaced_where_they_are_missing(comfy, prompt):
    """By the page that opens such a workflow, and here by the server that is given one."""
    offered = comfy.get("/node_replacements")
    assert {old: offered[old][0]["new_node_id"] for old in offered if "Cog" in old} == {
        "CogVideoTextEncode": "CogVideoX15TextEncode",
        "CogVideoDecode": "CogVideoX15VAEDecode",
        "LoadCogVideoXFunModel": "CogVideoX15ModelLoader",
        "LoadCogVideoXFunLora": "CogVideoX15LoraLoader",
    }
    decode = next(node for node in prompt.values() if node["class_type"] == "CogVideoX15VAEDecode")
    decode["class_type"] = "CogVideoDecode"
    decode["inputs"]["enable_vae_tiling"] = True
    assert comfy.run(prompt)["status"]["status_str"] == "success"


def test_stop_refuses_fp16_for_weights_trained_in_bf16_in_the_dialog(comfy, prompt):
    node_of(prompt, "CogVideoX15ModelLoader").update(dtype="fp16", on_mismatch="stop")
    assert "was trained in bf16" in str(comfy.post("/prompt", {"prompt": prompt})["node_errors"])


def test_plain_fp16_that_overflows_is_healed_and_the_sampler_says_so_on_the_node(comfy, prompt):
    comfy.replace_checkpoint(change=lambda parts: loud_stream(parts["transformer"], 3e4, gate=10.0))
    node_of(prompt, "CogVideoX15ModelLoader").update(dtype="fp16", on_mismatch="warn")
    history, shown = comfy.run_listening(prompt)
    assert history["status"]["status_str"] == "success"
    sampler = next(key for key, node in prompt.items() if node["class_type"] == "CogVideoX15Sampler")
    told = shown[sampler][-1]
    assert told.startswith(
        "step 1 of 3: the transformer in fp16 gave NaN or Inf; the first module whose output was not finite is "
        "transformer_blocks"
    )
    assert told in comfy.log.read_text()
    node_of(prompt, "CogVideoX15Sampler").update(on_nan="stop")
    assert "on_nan is stop" in error_of(comfy.run(prompt))["exception_message"]
    comfy.replace_checkpoint()


def test_a_single_file_with_a_text_encoder_and_a_vae_in_files_of_their_own(comfy, prompt):
    """ComfyUI's names in models/diffusion_models, found parts where the loader says auto, and ComfyUI's own
    tokenizer."""
    models = comfy.base / "models"
    for name in ("diffusion_models", "text_encoders", "vae"):
        (models / name).mkdir(exist_ok=True)
    state = layouts.comfy_names(build_transformer("1.5").bfloat16().state_dict())
    layouts.write_file(models / "diffusion_models" / "cog.safetensors", state, "model.diffusion_model.")
    layouts.write_file(
        models / "text_encoders" / "t5xxl_tiny.safetensors", build_text_encoder(vocabulary=32128).state_dict()
    )
    layouts.write_file(models / "vae" / "cog_vae.safetensors", build_vae((32, 32, 32, 64), 32).state_dict())
    listed = comfy.get("/object_info/CogVideoX15ModelLoader")["CogVideoX15ModelLoader"]["input"]
    choice = next(label for label in listed["required"]["model"][0] if label.startswith("cog.safetensors"))
    assert choice.endswith(" · bf16 · ComfyUI")
    assert listed["optional"]["text_encoder_name"][0] == [
        "auto",
        "t5xxl_tiny.safetensors · T5 encoder · fp32 · single file",
    ]
    node_of(prompt, "CogVideoX15ModelLoader").update(model=choice)
    history, shown = comfy.run_listening(prompt)
    assert history["status"]["status_str"] == "success"
    assert any(
        "text encoder: the checkpoint has none, so t5xxl_tiny.safetensors" in text
        for texts in shown.values()
        for text in texts
    )
    for name in ("diffusion_models", "text_encoders", "vae"):
        shutil.rmtree(models / name)


@pytest.mark.parametrize(
    "name", ["image_to_video", "video_to_video", "text_to_video_lora", "inpaint", "object_removal"]
)
def test_every_other_example_runs_too(comfy, files, name):
    prompt = example(name)
    history, shown = comfy.run_listening(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    saved = next(
        output["images"][0] for key, output in history["outputs"].items() if prompt[key]["class_type"] == "SaveVideo"
    )
    with av.open(str(comfy.base / "output" / saved["subfolder"] / saved["filename"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == (13 if name in ("inpaint", "object_removal") else 17)
    texts = [text for told in shown.values() for text in told]
    if name == "video_to_video":
        assert any("the last 3 were cut: 17 are left" in text for text in texts)
    if name == "text_to_video_lora":
        assert any(
            text.startswith("LoRA my_cogvideox_lora.safetensors: strength 1, rank 2, 1 layers") for text in texts
        )


def test_the_block_runs_through_the_api_as_the_page_takes_it_apart(comfy):
    (path,) = workflows.BLOCKS
    assert path.stem in {
        entry["name"] for entry in comfy.get("/global_subgraphs").values() if entry["source"] == "custom_node"
    }
    prompt = small(workflows.to_api(workflows.read(path)))
    video = next(key for key, node in prompt.items() if node["class_type"] == "CreateVideo")
    prompt["save"] = {
        "class_type": "SaveVideo",
        "inputs": {"video": [video, 0], "filename_prefix": "video/block", "format": "auto", "codec": "auto"},
    }
    history = comfy.run(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    saved = history["outputs"]["save"]["images"][0]
    with av.open(str(comfy.base / "output" / saved["subfolder"] / saved["filename"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17


@pytest.mark.parametrize(
    ("use", "model", "made"),
    [
        ("text_to_video", "zai-org/CogVideoX1.5-5B", 17),
        ("image_to_video", "zai-org/CogVideoX1.5-5B-I2V", 17),
        ("inpaint", "alibaba-pai/CogVideoX-Fun-V1.5-5b-InP", 21),
    ],
)
def test_a_workflow_migrated_from_the_wrapper_runs(comfy, files, tmp_path, use, model, made):
    """Small, with what plain ComfyUI has around it, and with the checkpoint's own text encoder, as ComfyUI's loader
    knows no tiny T5."""
    w = getattr(wrapper_workflows, use)()
    w.change("loader", model=model, precision="fp16")
    w.change("sampler", num_frames=18, steps=3)
    w.nodes.pop(w.names["save"])
    w.add("SaveWEBM", "saved", images=("decode", 0))
    w.add("CogVideoLoraSelect", "lora", lora="another.safetensors", strength=0.5)
    w.change("loader", lora=("lora", 0))
    if use == "text_to_video":
        w.change("size", width=160, height=96)
    else:
        w.add("ImageScale", "scale", image=("picture", 0), width=160, height=96)
        w.change("encode", start_image=("scale", 0))
        w.nodes.pop(w.names["resize"])
    (tmp_path / "old.json").write_text(json.dumps(w.api()))
    migrate_workflow(tmp_path / "old.json", tmp_path / "new.json")
    prompt = json.loads((tmp_path / "new.json").read_text())
    loader = str(w.names["loader"])
    for node in prompt.values():
        if node["class_type"] == "CogVideoX15TextEncode":
            node["inputs"]["text_encoder"] = [loader, 1]
    prompt.pop(str(w.names["CLIPLoader"]))
    history, shown = comfy.run_listening(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    saved = history["outputs"][str(w.names["saved"])]["images"][0]
    with av.open(str(comfy.base / "output" / saved["subfolder"] / saved["filename"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == made
    assert any("LoRA another.safetensors: strength 0.5" in text for told in shown.values() for text in told)


@pytest.mark.parametrize(("use", "made"), [("text", 13), ("images", 13), ("video", 5)])
def test_a_workflow_migrated_from_videox_fun_runs(comfy, files, tmp_path, use, made):
    """Small, with what plain ComfyUI has around it: a clip of one frame, which is held."""
    w = fun_workflows.USES[use]()
    w.change("sampler", video_length=made + 4 if use == "text" else made, steps=3, cfg=2.0)
    w.change("sampler", **({"width": 160, "height": 96} if use == "text" else {"base_resolution": 128}))
    if use == "video":
        w.nodes[w.names["clip"]] = {"kind": "LoadImage", "mode": 0, "values": {"image": "example.png"}, "links": {}}
    w.nodes.pop(w.names["save"])
    w.add("SaveWEBM", "saved", images=("sampler", 0))
    w.add("LoadCogVideoXFunLora", "lora", lora_name="another.safetensors", cogvideoxfun_model=("loader", 0))
    w.change("sampler", cogvideoxfun_model=("lora", 0))
    (tmp_path / "old.json").write_text(json.dumps(w.api()))
    migrate_workflow(tmp_path / "old.json", tmp_path / "new.json")
    history, shown = comfy.run_listening(json.loads((tmp_path / "new.json").read_text()))
    assert history["status"]["status_str"] == "success", history["status"]
    saved = history["outputs"][str(w.names["saved"])]["images"][0]
    with av.open(str(comfy.base / "output" / saved["subfolder"] / saved["filename"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == made
    # As many pixels as base_resolution squared, in the shape of the picture.
    height, width = frames[0].shape[:2]
    assert (width, height) == (160, 96) if use == "text" else abs(width * height / 128**2 - 1) < 0.15
    assert any("LoRA another.safetensors: strength 0.7" in text for told in shown.values() for text in told)


def test_the_nodes_of_comfyui_that_a_migration_writes_are_as_its_table_says(comfy):
    for kind in (kind for kind in KINDS if not kind.startswith("CogVideoX15")):
        info = comfy.get(f"/object_info/{kind}")[kind]
        assert [(entry.name, entry.type) for entry in KINDS[kind].inputs] == [
            (name, spec[0]) for name, spec in info["input"]["required"].items()
        ]
        assert list(KINDS[kind].outputs) == list(zip(info["output_name"], info["output"], strict=True))


def test_the_lora_list_holds_those_of_cogvideox(comfy, files):
    listed = comfy.get("/object_info/CogVideoX15LoraLoader")["CogVideoX15LoraLoader"]["input"]["required"]["lora_name"][
        0
    ]
    assert sorted(listed) == ["another.safetensors", "my_cogvideox_lora.safetensors"]


def test_a_quantized_model_and_text_encoder_run_and_the_node_says_how_far_off_they_are(comfy, prompt):
    loader = next(key for key, node in prompt.items() if node["class_type"] == "CogVideoX15ModelLoader")
    for node in prompt.values():
        for name, number in (("model", 0), ("text_encoder", 1)):
            if node["inputs"].get(name) == [loader, number]:
                node["inputs"][name] = ["quantize", number]
    inputs = {"model": [loader, 0], "text_encoder": [loader, 1], "method": "int8_dynamic"}
    prompt["quantize"] = {"class_type": "CogVideoX15Quantize", "inputs": inputs}
    history, shown = comfy.run_listening(prompt)
    assert history["status"]["status_str"] == "success"
    (report,) = shown["quantize"]
    assert report.startswith("transformer: int8_dynamic, ")
    assert "text encoder: int8_weight_only, " in report
    inputs["method"] = "int4"
    assert "The method is 'int4', which is not known here" in str(
        comfy.post("/prompt", {"prompt": prompt})["node_errors"]
    )


def test_an_end_image_is_said_to_be_untrained_on_the_sampler(comfy, files):
    prompt = example("image_to_video")
    image = next(key for key, node in prompt.items() if node["class_type"] == "LoadImage")
    node_of(prompt, "CogVideoX15ImageToVideo")["end_image"] = [image, 0]
    history, shown = comfy.run_listening(prompt)
    assert history["status"]["status_str"] == "success"
    assert any("trained with a start image only" in text for told in shown.values() for text in told)


@pytest.mark.parametrize("mix", ["ConditioningAverage", "ConditioningConcat"])
def test_cores_mixing_of_prompts_works_between_our_nodes(comfy, prompt, mix):
    """Average keeps the length; Concat makes the positive prompt twice as long as the negative one."""
    sampler = node_of(prompt, "CogVideoX15Sampler")
    encoder = prompt[sampler["positive"][0]]["inputs"]["text_encoder"]
    prompt["90"] = {
        "class_type": "CogVideoX15TextEncode",
        "inputs": {"text_encoder": encoder, "prompt": "the sun rises over the sea"},
    }
    inputs = {"conditioning_to": sampler["positive"], "conditioning_from": ["90", 0]}
    if mix == "ConditioningAverage":
        inputs["conditioning_to_strength"] = 0.5
    prompt["91"] = {"class_type": mix, "inputs": inputs}
    sampler["positive"] = ["91", 0]
    assert comfy.run(prompt)["status"]["status_str"] == "success"


def test_the_downloader_does_nothing_until_it_is_switched_on(comfy):
    choice = comfy.get("/object_info/CogVideoX15Downloader")["CogVideoX15Downloader"]["input"]["required"][
        "checkpoint"
    ][0][0]
    history, shown = comfy.run_listening(
        {"1": {"class_type": "CogVideoX15Downloader", "inputs": {"checkpoint": choice, "download": False}}}
    )
    assert history["status"]["status_str"] == "success"
    assert "Nothing was downloaded" in shown["1"][0]
    assert [path.name for path in (comfy.base / "models" / "CogVideo").iterdir()] == ["CogVideoX1.5-5B"]


def test_comfyuis_own_t5_gives_our_embeddings_whatever_type_its_loader_has_and_our_video(comfy):
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        str(ROOT / "tests" / "comfyui" / "clip_script.py"),
        str(ROOT),
        "--cpu",
    ]
    done = subprocess.run(command, cwd=os.environ["COMFYUI_PATH"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *embeddings, video = [line for line in done.stdout.splitlines() if "relative L2" in line]
    assert len(embeddings) == 9
    assert all(re.match(r"(cogvideox|sd3|mochi) \d+: \[1, 226, 4096\] relative L2 ", line) for line in embeddings)
    assert video.startswith("CLIP Text Encode into the sampler: relative L2 ")


def test_comfyuis_memory_management_and_ours_are_one(comfy):
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        str(ROOT / "tests" / "comfyui" / "memory_script.py"),
        str(ROOT),
        "--cpu",
    ]
    done = subprocess.run(command, cwd=os.environ["COMFYUI_PATH"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory is one" in done.stdout


def test_cancel_stops_the_scan(comfy, prompt):
    """A sparse checkpoint of 200 gigabytes would take minutes; the scan ends as soon as Cancel is pressed."""
    comfy.replace_checkpoint()
    folder = comfy.base / "models" / "CogVideo" / "CogVideoX1.5-5B"
    enlarge(folder / "text_encoder")
    node_of(prompt, "CogVideoX15ModelLoader").update(scan_weights=True, dtype="fp32")
    queued = comfy.post("/prompt", {"prompt": prompt})
    time.sleep(2)
    comfy.post("/interrupt", {})
    history = comfy.wait(queued["prompt_id"], 10)
    assert "execution_interrupted" in [message[0] for message in history["status"]["messages"]]
    comfy.replace_checkpoint()


def test_cancel_stops_the_sampler_between_steps(comfy, prompt):
    node_of(prompt, "CogVideoX15Sampler").update(steps=1000, seed=int(time.time()))
    queued = comfy.post("/prompt", {"prompt": prompt})
    time.sleep(4)
    comfy.post("/interrupt", {})
    history = comfy.wait(queued["prompt_id"], 30)
    assert "execution_interrupted" in [message[0] for message in history["status"]["messages"]]
    node_of(prompt, "CogVideoX15Sampler").update(steps=2)
    assert comfy.run(prompt)["status"]["status_str"] == "success"


BAD_WIDGETS = [
    ("ModelLoader", "model", "CogVideoX-Nonsense", "There is no CogVideoX checkpoint called 'CogVideoX-Nonsense'"),
    ("ModelLoader", "dtype", "fp64", "Choose one of auto, bf16, fp16, fp32"),
    ("EmptyLatent", "length", 80, "Set it to 65 or 81"),
    ("EmptyLatent", "width", 100, "Set it to 96 or 112"),
    ("Sampler", "denoise", 0.1, "leaves no step to run"),
    ("Sampler", "scheduler", "euler", "Choose one of ddim, dpm"),
    ("BlackFrameCheck", "picture_black_ratio", 98, "it is a share between 0 and 1"),
]


@pytest.mark.parametrize(("kind", "widget", "value", "said"), BAD_WIDGETS)
def test_a_bad_widget_is_refused_when_queued_with_the_engines_sentence(comfy, prompt, kind, widget, value, said):
    loader = node_of(prompt, "CogVideoX15ModelLoader")
    (loader["model"],) = comfy.get("/object_info/CogVideoX15ModelLoader")["CogVideoX15ModelLoader"]["input"][
        "required"
    ]["model"][0]
    node_of(prompt, f"CogVideoX15{kind}")[widget] = value
    answer = comfy.post("/prompt", {"prompt": prompt})
    (error,) = [error for node in answer["node_errors"].values() for error in node["errors"]]
    (key,) = answer["node_errors"]
    assert key == id_of(prompt, f"CogVideoX15{kind}")
    assert error["extra_info"]["input_name"] == widget
    assert said in error["details"]


def chain(prompt, *nodes):
    """Put nodes between the loader and the sampler."""
    sampler = node_of(prompt, "CogVideoX15Sampler")
    for number, (kind, inputs) in enumerate(nodes, 300):
        prompt[str(number)] = {"class_type": f"CogVideoX15{kind}", "inputs": inputs | {"model": sampler["model"]}}
        sampler["model"] = [str(number), 0]


CACHE, COMPILE = {"strength": 0.5, "start": 0.0, "end": 1.0}, {"mode": "default", "dynamic": False}
TOGETHER = [
    ([("Cache", CACHE | {"method": "pab"}), ("Compile", COMPILE)], "The cache pab and compiling do not work together"),
    (
        [("Compile", COMPILE), ("Cache", CACHE | {"method": "faster_cache"})],
        "The cache faster_cache and compiling do not work together",
    ),
    ([("Cache", CACHE | {"method": "taylorseer"})] * 2, "The model has a cache already (taylorseer)"),
    ([("Quantize", {"method": "int8_weight_only"})] * 2, "The transformer is quantized already (int8_weight_only)"),
    ([("SecondGPU", {"device": "cuda:7"})], "The second device is cuda:7"),
]


@pytest.mark.parametrize(("nodes", "said"), TOGETHER)
def test_what_does_not_work_together_is_refused_when_queued(comfy, prompt, nodes, said):
    chain(prompt, *nodes)
    answer = comfy.post("/prompt", {"prompt": prompt})
    (error,) = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert said in error["details"]


def test_what_makes_it_faster_works_together(comfy, prompt):
    chain(
        prompt,
        ("Attention", {"attention": "fastest"}),
        ("Quantize", {"method": "int8_weight_only"}),
        ("Cache", CACHE | {"method": "teacache"}),
        ("SecondGPU", {"device": "none"}),
    )
    node_of(prompt, "CogVideoX15Sampler")["cfg_end"] = 0.8
    told = comfy.listen(prompt)
    assert told.history["status"]["status_str"] == "success", told.history["status"]
    texts = told.texts[id_of(prompt, "CogVideoX15Sampler")]
    assert any("TeaCache skipped" in text for text in texts)
    assert any("sdpa is the only exact kernel here" in text for text in texts)
    assert any("At 50 steps: TeaCache will skip" in text for text in told.texts[id_of(prompt, "CogVideoX15Cache")])


def test_an_error_of_the_run_is_the_engines_sentence(comfy, prompt):
    """A length that another node gives is known only then."""
    prompt["80"] = {"class_type": "StringLength", "inputs": {"string": 80 * "x"}}
    node_of(prompt, "CogVideoX15EmptyLatent")["length"] = ["80", 0]
    error = error_of(comfy.run(prompt))
    assert error["exception_message"].startswith("The clip length is 80 frames")
    assert "Set it to 65 or 81" in error["exception_message"]


def test_a_value_of_a_primitive_node_is_refused_when_the_graph_is_queued(comfy, prompt):
    prompt["80"] = {"class_type": "PrimitiveInt", "inputs": {"value": 80}}
    node_of(prompt, "CogVideoX15EmptyLatent")["length"] = ["80", 0]
    with pytest.raises(RuntimeError, match="Set it to 65 or 81"):
        comfy.run(prompt)


def test_a_node_whose_output_goes_nowhere_keeps_no_graph_from_running(comfy, prompt):
    sampler = id_of(prompt, "CogVideoX15Sampler")
    prompt["80"] = copy.deepcopy(prompt[sampler])
    prompt["80"]["inputs"]["steps"] = 0
    assert comfy.run(prompt)["status"]["status_str"] == "success"
    prompt["81"] = {"class_type": "CogVideoX15VAEDecode", "inputs": {"samples": ["80", 0], "vae": ["1", 2]}}
    prompt["82"] = {"class_type": "PreviewImage", "inputs": {"images": ["81", 0]}}
    # With an output of its own it is told of, beside what runs.
    queued = comfy.post("/prompt", {"prompt": prompt})
    assert "steps is 0" in str(queued["node_errors"]["80"])


def test_the_black_frame_check_sits_behind_any_node(comfy):
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 5, "color": 0}},
        "2": {"class_type": "CogVideoX15BlackFrameCheck", "inputs": {"images": ["1", 0], "action": "stop"}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    told = comfy.listen(prompt)
    assert "5 of 5 frames are black: 0-4" in error_of(told.history)["exception_message"]
    # The picture is on the node although it gave an error, ...
    (shown,) = [event["data"]["output"] for event in told.events if event["type"] == "executed"]
    sheet = shown["images"][0]
    query = urllib.parse.urlencode(sheet)
    with urllib.request.urlopen(f"{comfy.url}/view?{query}", timeout=30) as answer, Image.open(answer) as picture:
        assert picture.getpixel((20, 60)) == (0, 0, 0)
    assert "verdict: black" in told.texts["2"][-1]
    # ... and where it gives none.
    prompt["2"]["inputs"]["action"] = "pass"
    history = comfy.run(prompt)
    assert history["status"]["status_str"] == "success"
    assert history["outputs"]["2"]["images"][0]["type"] == "temp"
    prompt["1"]["inputs"]["color"] = 0xFFFFFF
    assert "2" not in comfy.run(prompt)["outputs"]


def test_the_checkpoint_can_change_on_disk_between_runs(comfy, prompt):
    assert comfy.run(prompt)["status"]["status_str"] == "success"
    comfy.replace_checkpoint("1.5-i2v")
    assert "image-to-video model" in str(comfy.post("/prompt", {"prompt": prompt})["node_errors"])
    comfy.replace_checkpoint()
