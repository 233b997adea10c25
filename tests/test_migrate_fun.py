"""Workflows of VideoX-Fun's own nodes become workflows of this pack: what is carried over, what is said, what is
refused."""

import ast
import copy
import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interop.check import check_config
from interop.kinds import KINDS
from interop.migrate import migrate_workflow
from interop.tables import FUN_SHARED, ORDERS, SOCKETS
from interop.videox_fun import bucket, fun_length
from tests import workflows
from tests.fun_workflows import USES, image_to_video, text_to_video, video_to_video
from tests.test_migrate import FILES, node_of, nodes_of, said, source_of, values_of

CHECKOUT = Path(os.environ.get("VIDEOX_FUN_PATH", "/nowhere"))
there = pytest.mark.skipif(not CHECKOUT.is_dir(), reason="VIDEOX_FUN_PATH names no checkout of VideoX-Fun")
OLD = (*SOCKETS, *FUN_SHARED)


@pytest.fixture
def migrate(tmp_path):
    """``migrate(workflow)``: the new workflow of an old one, and the report."""

    def run(old):
        source, target = tmp_path / "old.json", tmp_path / "new.json"
        source.write_text(json.dumps(old if isinstance(old, dict) else old.page()), encoding="utf-8")
        target.unlink(missing_ok=True)
        report = migrate_workflow(source, target)
        return json.loads(target.read_text(encoding="utf-8")), report

    return run


def with_chain(*nodes):
    """Text to video whose model goes through ``nodes``: pairs of a kind and its widgets."""
    w, before = text_to_video(), "loader"
    for number, (kind, values) in enumerate(nodes):
        name = "cogvideoxfun_model" if kind == "LoadCogVideoXFunLora" else "funmodels"
        w.add(kind, f"chain {number}", **{name: (before, 0)}, **values)
        before = f"chain {number}"
    w.change("sampler", cogvideoxfun_model=(before, 0))
    return w


def essence(prompt, page):
    """A workflow for the API without its nodes' numbers: those of ours, with what each is given by what."""
    kinds = {str(node["id"]): node["type"] for node in page["nodes"]}
    kinds |= {id_: node["class_type"] for id_, node in prompt.items()}
    return sorted(
        str(
            (
                node["class_type"],
                sorted(
                    (name, (kinds[value[0]], value[1]) if isinstance(value, list) else value)
                    for name, value in node["inputs"].items()
                ),
            )
        )
        for node in prompt.values()
        if node["class_type"] in KINDS
    )


# --- The whole ---


@pytest.mark.parametrize("use", USES)
def test_pages_of_every_age_and_the_api_give_the_same_workflow(migrate, pack, use):
    w = USES[use]()
    pages = [migrate(w.page(age))[0] for age in ("old", "new", "named")]
    for page in pages:
        workflows.check(page, pack, FILES)
        assert not {node["type"] for node in page["nodes"]} & set(OLD)
        # The video goes where it went.
        assert source_of(page, node_of(page, "VHS_VideoCombine"), "images") == ("CogVideoX15VAEDecode", "images")
    prompt, report = migrate(w.api())
    for page in pages:
        drawn = {**page, "nodes": [node for node in page["nodes"] if node["type"] in KINDS]}
        drawn["links"] = workflows.links_of(page)
        assert essence(workflows.to_api(drawn), page) == essence(prompt, page)
    assert report.replaced == 4
    assert len(report.differs) == len(set(report.differs))
    assert said(report, "drawn on the card there", "CPU here")


@there
@pytest.mark.parametrize("use", ["t2v", "i2v", "v2v"])
def test_the_examples_of_videox_fun_become_workflows_of_this_pack(migrate, pack, use):
    file = CHECKOUT / f"comfyui/cogvideox_fun/v1.5/cogvideoxfunv1.5_workflow_{use}.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    page, report = migrate(old)
    workflows.check(page, pack, FILES)
    assert not {node["type"] for node in page["nodes"]} & set(OLD)
    assert {node["id"] for node in old["nodes"]} <= {node["id"] for node in page["nodes"]}
    prompts = {node["widgets_values"][0] for node in old["nodes"] if node["type"] == "FunTextBox"}
    assert {node["widgets_values"][0] for node in nodes_of(page, "CogVideoX15TextEncode")} == prompts
    values = values_of(page, "CogVideoX15Sampler")
    assert (values["seed"], values["steps"], values["cfg"], values["scheduler"]) == (43, 50, 6, "ddim_origin")
    assert (values["denoise"], values_of(page, "CogVideoX15Inpaint")["length"]) == {
        "t2v": (1.0, 85),
        "i2v": (1.0, 85),
        "v2v": (0.7, 45),
    }[use]
    # The example has another widget's value there.
    assert bool(said(report, "is_image is 'model_cpu_offload'")) == (use == "t2v")


@there
@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_its_examples_for_cogvideox_1_0_are_refused_with_the_reason(migrate, version):
    files = sorted((CHECKOUT / "comfyui/cogvideox_fun" / version).glob("*.json"))
    assert files
    for file in files:
        reason = "reads a control video" if "control" in file.name else "an inpainting model of CogVideoX 1.0"
        with pytest.raises(ValueError, match=f"{reason}.*Choose CogVideoX-Fun-V1.5-5b-InP"):
            migrate(json.loads(file.read_text(encoding="utf-8")))


@there
def test_the_tables_have_its_nodes_as_they_are():
    found = {}
    for file in ("cogvideox_fun/nodes.py", "comfyui_nodes.py"):
        tree = ast.parse((CHECKOUT / "comfyui" / file).read_text(encoding="utf-8"))
        for node in (node for node in tree.body if getattr(node, "name", "") in SOCKETS.keys() | FUN_SHARED.keys()):
            types = next(part for part in node.body if getattr(part, "name", "") == "INPUT_TYPES")
            inputs = [pair for part in types.body[-1].value.values for pair in zip(part.keys, part.values, strict=True)]
            found[node.name] = {key.value: spec.elts[0] for key, spec in inputs}
    assert len(found) == 8
    for kind in found:
        sockets = {
            name
            for name, type_ in found[kind].items()
            if isinstance(type_, ast.Constant) and type_.value not in ("INT", "FLOAT", "STRING")
        }
        widgets = tuple(name for name in found[kind] if name not in sockets)
        order = FUN_SHARED[kind] if kind in FUN_SHARED else ORDERS[kind][0]
        assert tuple(name for name in order if name != "control_after_generate") == widgets, kind
        assert kind in FUN_SHARED or set(SOCKETS[kind]) == sockets, kind


def test_each_sampler_becomes_three_nodes_that_hang_together(migrate):
    page, _ = migrate(image_to_video())
    sampler, inpaint = node_of(page, "CogVideoX15Sampler"), node_of(page, "CogVideoX15Inpaint")
    assert source_of(page, sampler, "model") == ("CogVideoX15ModelLoader", "model")
    for name, output in (("positive", "positive"), ("negative", "negative"), ("latent_image", "latent")):
        assert source_of(page, sampler, name) == ("CogVideoX15Inpaint", output)
    for name in ("start_image", "end_image"):
        assert source_of(page, inpaint, name) == ("LoadImage", "IMAGE")
    prompts = {
        name: next(link for link in page["links"] if link[3] == inpaint["id"] and link[4] == slot)[1]
        for slot, name in enumerate(("positive", "negative"))
    }
    texts = {node["id"]: node["widgets_values"][0] for node in nodes_of(page, "CogVideoX15TextEncode")}
    assert {name: texts[id_] for name, id_ in prompts.items()} == {
        "positive": "A panda plays the guitar.",
        "negative": "blurry",
    }
    for node in (inpaint, node_of(page, "CogVideoX15VAEDecode")):
        assert source_of(page, node, "vae") == ("CogVideoX15ModelLoader", "vae")
    assert values_of(page, "CogVideoX15Sampler") == {
        "seed": 43,
        "control_after_generate": "randomize",
        "steps": 30,
        "cfg": 5.0,
        "scheduler": "ddim_origin",
        "denoise": 1.0,
        "dynamic_cfg": False,
        "on_nan": "heal",
        "cfg_start": 0.0,
        "cfg_end": 1.0,
    }


def test_a_clip_is_what_a_run_with_denoise_starts_from(migrate):
    page, report = migrate(video_to_video())
    assert source_of(page, node_of(page, "CogVideoX15Inpaint"), "video") == ("VHS_LoadVideo", "IMAGE")
    assert values_of(page, "CogVideoX15Sampler")["denoise"] == 0.7
    assert said(report, "its last frame is repeated")


def test_nodes_that_are_added_begin_where_the_taller_sampler_ends(migrate):
    """ComfyUI 0.33 draws our sampler 354 pixels tall below its title, however low its place was."""
    page, _ = migrate(image_to_video().page("new"))
    sampler = node_of(page, "CogVideoX15Sampler")
    added = [node for node in page["nodes"] if node["pos"][0] == sampler["pos"][0] and node is not sampler]
    assert len(added) == 4
    assert min(node["pos"][1] for node in added) >= sampler["pos"][1] + 354 + 30


# --- Sizes and lengths ---

#: ``get_closest_ratio`` of videox_fun/data/bucket_sampler.py, as its nodes call it, for the pictures of ``pictures()``.
RECORDED = [
    *((1312, 656), (672, 384), (1536, 384), (432, 1248), (1792, 576), (2048, 512), (384, 1536), (864, 624)),
    *((768, 720), (512, 2048), (256, 992), (1024, 1024)),
]


def pictures(seed=5, count=12):
    """Draw resolutions and pictures' sizes: (base_resolution, width, height)."""
    draw = random.Random(seed)
    sides = range(count)
    return [(draw.choice([512, 768, 960, 1024]), draw.randint(64, 2000), draw.randint(64, 2000)) for _ in sides]


def test_a_size_is_that_of_the_bucket():
    assert [bucket(*picture) for picture in pictures()] == RECORDED


@there
def test_the_recorded_sizes_are_those_of_videox_fun():
    wanted = ("ASPECT_RATIO_512", "get_closest_ratio")
    tree = ast.parse((CHECKOUT / "videox_fun/data/bucket_sampler.py").read_text(encoding="utf-8"))
    named = [
        node
        for node in tree.body
        if getattr(node, "name", "") in wanted
        or any(getattr(target, "id", "") in wanted for target in getattr(node, "targets", ()))
    ]
    theirs: dict = {}
    exec(compile(ast.Module(named, []), "bucket_sampler", "exec"), theirs)
    for base, width, height in [*pictures(), *pictures(6, 1000)]:
        ratios = {key: [side / 512 * base for side in sides] for key, sides in theirs["ASPECT_RATIO_512"].items()}
        closest, _ = theirs["get_closest_ratio"](height, width, ratios=ratios)
        assert bucket(base, width, height) == tuple(int(side / 16) * 16 for side in closest[::-1])


def test_a_picture_whose_size_stands_in_the_file_gives_that_size(migrate):
    w = image_to_video()
    w.add("ImageScale", "scale", image=("picture", 0), width=900, height=1600)
    w.change("sampler", start_img=("scale", 0), base_resolution=768)
    page, report = migrate(w)
    values = values_of(page, "CogVideoX15Inpaint")
    assert (values["width"], values["height"]) == bucket(768, 900, 1600) == (576, 1008)
    assert not nodes_of(page, "GetImageSize")
    assert not said(report, "base_resolution")


@pytest.mark.parametrize(("draw", "input_"), [(image_to_video, "start_img"), (video_to_video, "validation_video")])
def test_a_picture_of_any_size_gives_its_shape_when_it_runs(migrate, draw, input_):
    w = draw()
    w.change("sampler", base_resolution=768)
    page, report = migrate(w)
    inpaint = node_of(page, "CogVideoX15Inpaint")
    assert source_of(page, inpaint, "width") == ("GetImageSize", "width")
    assert source_of(page, inpaint, "height") == ("GetImageSize", "height")
    scale = node_of(page, "ImageScaleToTotalPixels")
    assert source_of(page, node_of(page, "GetImageSize"), "image") == ("ImageScaleToTotalPixels", "IMAGE")
    assert scale["widgets_values_named"] == {
        "upscale_method": "nearest-exact",
        "megapixels": 768**2 / 1024**2,
        "resolution_steps": 16,
    }
    # One frame of a clip tells its shape.
    first = ("LoadImage", "IMAGE") if draw is image_to_video else ("ImageFromBatch", "IMAGE")
    assert source_of(page, scale, "image") == first
    assert said(report, "base_resolution 768", input_, "1008x576", "Get Image Size")


def test_a_clip_has_as_many_frames_as_came_out_there(migrate):
    """The pipeline takes (frames - 1) // 4 + 1 latent frames, one fewer if that is odd."""
    for frames in range(1, 90):
        latent = (frames - 1) // 4 + 1
        assert fun_length(frames) == (1 if latent == 1 else 4 * (latent // 2 * 2) - 3)
    assert [fun_length(frames) for frames in (1, 5, 9, 13, 17, 45, 49, 81, 85)] == [1, 5, 5, 13, 13, 45, 45, 77, 85]
    w = text_to_video()
    w.change("sampler", video_length=49)
    page, report = migrate(w)
    assert values_of(page, "CogVideoX15Inpaint")["length"] == 45
    assert said(report, "video_length 49 became length 45")
    w.change("sampler", is_image=True)
    assert values_of(migrate(w)[0], "CogVideoX15Inpaint")["length"] == 1


@there
@pytest.mark.parametrize("frames", [9, 13, 25])
def test_its_pipeline_makes_that_many_frames(checkpoints, frames):
    """Of a text alone, as its sampler calls the pipeline: a black clip, all of it masked."""
    from tests.family import draw_prompts
    from tests.fun_reference import build_pipeline, run

    pipeline, _ = build_pipeline(CHECKOUT, checkpoints("fun-inp"))
    clip = torch.zeros(frames, 16, 16, 3)
    latents = run(pipeline, draw_prompts(), clip, torch.full(clip.shape[:3], 255.0), steps=1)
    assert 4 * latents.shape[2] - 3 == fun_length(frames)


# --- Links and widgets ---


def test_what_comes_over_links_still_does_where_there_is_such_an_input(migrate, pack):
    w = text_to_video()
    for name, value in (("seed", 7), ("video_length", 13), ("width", 320), ("height", 321)):
        w.add("INTConstant", name, value=value)
        w.change("sampler", **{name: (name, 0)})
    w.add("StringConstant", "words")
    w.change("positive", prompt=("words", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "seed") == ("INTConstant", "value")
    inpaint = node_of(page, "CogVideoX15Inpaint")
    for name in ("length", "width"):
        assert source_of(page, inpaint, name) == ("INTConstant", "value")
    # A size that the model cannot make is set.
    assert source_of(page, inpaint, "height") is None
    assert inpaint["widgets_values_named"]["height"] == 320
    assert said(report, "height 321 became 320")
    texts = nodes_of(page, "CogVideoX15TextEncode")
    assert [source_of(page, node, "prompt") for node in texts] == [("StringConstant", "STRING"), None]
    w.change("sampler", is_image=("seed", 0))
    w.change("loader", precision=("words", 0))
    report = migrate(w)[1]
    assert said(report, "is_image came over a link")
    assert said(report, "precision came over a link")


def test_a_resolution_or_a_length_over_a_link_is_said(migrate):
    w = image_to_video()
    w.add("INTConstant", "base", value=960)
    w.add("VHS_LoadVideo", "clip")
    w.change("sampler", base_resolution=("base", 0), video_length=("clip", 1))
    page, report = migrate(w)
    assert said(report, "base_resolution came over a link", "960 was taken")
    assert said(report, "video_length came over a link", "8N+5")
    assert source_of(page, node_of(page, "CogVideoX15Inpaint"), "length") == ("VHS_LoadVideo", "frame_count")
    w.change("sampler", base_resolution=None)
    w.change("sampler", base_resolution=16)
    assert said(migrate(w)[1], "base_resolution 16 became 128")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": "many"}, "steps is 'many', which is not a value that it takes; 50 was taken"),
        ({"video_length": 3.5}, "video_length is 3.5, which is not a value that it takes; 49 was taken"),
        ({"width": None}, ""),
        ({"width": "wide"}, "width is 'wide', which is no number of pixels; 1008 was taken"),
        ({"scheduler": 5}, "scheduler is 5, which is not a value that it takes; 'DDIM' was taken"),
        ({"prompt": 5}, "nothing is connected to positive"),
        ({"eta": 0.3}, "eta 0.3 is not known here and was left out"),
    ],
)
def test_values_of_a_wrong_type_are_said(migrate, changes, words):
    prompt = text_to_video().api()
    node = next(node for node in prompt.values() if node["class_type"] == "CogVideoXFunT2VSampler")
    node["inputs"] |= changes
    report = migrate(prompt)[1]
    assert not words or said(report, words), report.text


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DDIM", "ddim_origin"),
        ("DDIM_Cog", "ddim"),
        ("Euler", "ddim_origin"),
        ("DPM++", "dpm"),
        ("PNDM", "ddim_origin"),
    ],
)
def test_schedulers(migrate, theirs, ours):
    w = text_to_video()
    w.change("sampler", scheduler=theirs)
    page, report = migrate(w)
    assert values_of(page, "CogVideoX15Sampler")["scheduler"] == ours
    assert bool(said(report, f"scheduler {theirs} is not here")) == (not theirs.startswith("DDIM"))


# --- The model ---


@pytest.mark.parametrize(
    ("mode", "memory", "quantized"),
    [
        ("model_full_load", "auto", False),
        ("model_cpu_offload", "auto", False),
        ("model_full_load_and_qfloat8", "auto", False),
        ("model_cpu_offload_and_qfloat8", "auto", True),
        ("sequential_cpu_offload", "offload_layers", False),
        ("something new", "auto", False),
    ],
)
def test_where_the_weights_are(migrate, pack, mode, memory, quantized):
    w = with_chain(("LoadCogVideoXFunLora", {}))
    w.change("loader", GPU_memory_mode=mode)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert values_of(page, "CogVideoX15ModelLoader")["memory"] == memory
    before = source_of(page, node_of(page, "CogVideoX15LoraLoader"), "model")
    assert before == ("CogVideoX15Quantize" if quantized else "CogVideoX15ModelLoader", "model")
    if quantized:
        assert values_of(page, "CogVideoX15Quantize") == {"method": "fp8_weight_only"}
    assert said(report, mode) or any(mode in line for line in report.not_needed)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bf16"), ("fp16", "auto")])
def test_plain_fp16_becomes_auto(migrate, precision, dtype):
    w = text_to_video()
    w.change("loader", precision=precision)
    page, report = migrate(w)
    assert values_of(page, "CogVideoX15ModelLoader")["dtype"] == dtype
    assert bool(said(report, "fp16 became dtype auto")) == (precision == "fp16")
    assert said(report, "models/CogVideo/CogVideoX-Fun-V1.5-5b-InP", "models/Fun_Models")


def test_loras_compiling_and_attention_stand_where_they_stood(migrate, pack):
    w = with_chain(
        ("LoadCogVideoXFunLora", {"lora_name": "fun\\first.safetensors", "strength_model": 0.4}),
        ("FunAttention", {"attention_type": "sage"}),
        ("FunCompile", {}),
        ("LoadCogVideoXFunLora", {"lora_name": "second.safetensors", "strength_model": 500.0, "mode": 4}),
        ("FunAttention", {"attention_type": "flash"}),
    )
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    first, second = nodes_of(page, "CogVideoX15LoraLoader")
    assert first["widgets_values"] == ["fun/first.safetensors", 0.4]
    assert second["widgets_values"] == ["second.safetensors", 100.0]
    assert said(report, "strength 500.0 became 100.0")
    # A node that is bypassed stays so.
    assert second["mode"] == 4
    chain = [first, node_of(page, "CogVideoX15Attention"), node_of(page, "CogVideoX15Compile"), second]
    before = ["CogVideoX15ModelLoader", *(node["type"] for node in chain)]
    for node, kind in zip([*chain, node_of(page, "CogVideoX15Sampler")], before, strict=True):
        assert source_of(page, node, "model") == (kind, "model")
    assert values_of(page, "CogVideoX15Attention") == {"attention": "sage"}
    assert any("attention_type flash" in line for line in report.not_needed)


def test_nodes_that_the_page_replaced_already_are_gone_on_from(migrate, pack):
    w = with_chain(("LoadCogVideoXFunLora", {}))
    prompt = w.api()
    for node in prompt.values():
        if node["class_type"] == "LoadCogVideoXFunModel":
            node |= {"class_type": "CogVideoX15ModelLoader", "inputs": {"model": "x", "dtype": "auto"}}
            loader = copy.deepcopy(node)
        elif node["class_type"] == "LoadCogVideoXFunLora":
            model = node["inputs"].pop("cogvideoxfun_model")
            node |= {"class_type": "CogVideoX15LoraLoader", "inputs": {"model": model, "lora_name": "y"}}
    new, report = migrate(prompt)
    ours = {node["class_type"]: node["inputs"] for node in new.values()}
    assert loader in new.values()
    assert ours["CogVideoX15LoraLoader"]["model"] == [*ours["CogVideoX15VAEDecode"]["vae"][:1], 0]
    assert not said(report, "nothing is connected")


def test_compiling_that_was_left_out_there_is_left_out_here(migrate, pack):
    w = with_chain(("FunCompile", {}), ("LoadCogVideoXFunLora", {}))
    w.change("loader", GPU_memory_mode="sequential_cpu_offload")
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert not nodes_of(page, "CogVideoX15Compile")
    assert source_of(page, node_of(page, "CogVideoX15LoraLoader"), "model") == ("CogVideoX15ModelLoader", "model")
    assert said(report, "FunCompile", "nothing was compiled there either")


# --- Nodes that serve others too, and nodes of other ages ---


def test_nodes_that_serve_other_models_too_stay(migrate):
    w = text_to_video()
    w.add("WanFunT2VSampler", "wan", prompt=("positive", 0))
    w.add("FunTextBox", "for wan")
    w.add("FunAttention", "for wan too")
    w.change("wan", funmodels=("for wan too", 0))
    w.add("ImageMaximumNode", "most", video_1=("sampler", 0), video_2=("wan", 0))
    page, report = migrate(w)
    kept = {node["id"] for node in page["nodes"] if node["type"] in ("FunTextBox", "FunAttention", "ImageMaximumNode")}
    assert kept == {w.names[name] for name in ("positive", "for wan", "for wan too", "most")}
    # Its text is in a node beside it.
    texts = {node["id"]: node["widgets_values"][0] for node in nodes_of(page, "CogVideoX15TextEncode")}
    assert set(texts.values()) == {"A panda plays the guitar.", "blurry"}
    assert w.names["positive"] not in texts
    assert w.names["negative"] in texts
    assert source_of(page, node_of(page, "ImageMaximumNode"), "video_1") == ("CogVideoX15VAEDecode", "images")
    for name in ("positive", "most"):
        assert said(report, f"node {w.names[name]} ", "keep that pack installed")


def test_two_samplers_share_a_prompt_of_the_same_loader_only(migrate, pack):
    w = text_to_video()
    given = {"prompt": ("positive", 0), "negative_prompt": ("positive", 0)}
    w.add("CogVideoXFunT2VSampler", "second", cogvideoxfun_model=("loader", 0), **given)
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert len(nodes_of(page, "CogVideoX15TextEncode")) == 2
    w.add("LoadCogVideoXFunModel", "other")
    w.change("second", cogvideoxfun_model=("other", 0))
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert len(nodes_of(page, "CogVideoX15TextEncode")) == 3


def test_a_sampler_that_takes_anothers_video_has_it_whatever_the_order(migrate, pack):
    w = video_to_video()
    given = {"prompt": ("positive", 0), "negative_prompt": ("negative", 0)}
    w.add("CogVideoXFunT2VSampler", "first", cogvideoxfun_model=("loader", 0), **given)
    w.change("sampler", validation_video=("first", 0))
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    with_video = next(node for node in nodes_of(page, "CogVideoX15Inpaint") if source_of(page, node, "video"))
    assert source_of(page, with_video, "video") == ("CogVideoX15VAEDecode", "images")


@pytest.mark.parametrize("age", ["Fun", "FUN"])
def test_the_names_of_earlier_ages_are_read_too(migrate, pack, age):
    w = image_to_video()
    names = {
        "LoadCogVideoXFunModel": f"LoadCogVideoX_{age}_Model",
        "CogVideoXFunInpaintSampler": f"CogVideoX_{age}_I2VSampler",
        "FunTextBox": "TextBox" if age == "FUN" else "CogVideoX_FUN_TextBox",
    }
    page = w.page()
    for node in page["nodes"]:
        node["type"] = names.get(node["type"], node["type"])
        if node["type"].startswith("Load") and node["type"].endswith("Model"):
            node["widgets_values"] = ["CogVideoX-Fun-V1.5-5b-InP", *(["Inpaint"] if age == "Fun" else []), True, "bf16"]
    new, _ = migrate(page)
    workflows.check(new, pack, FILES)
    assert values_of(new, "CogVideoX15ModelLoader")["memory"] == "offload_layers"
    assert {node["widgets_values"][0] for node in nodes_of(new, "CogVideoX15TextEncode")} == {
        "A panda plays the guitar.",
        "blurry",
    }
    assert values_of(new, "CogVideoX15Inpaint")["length"] == 85


def test_links_through_reroutes_stay_there(migrate):
    w = text_to_video()
    for name, input_ in (("loader", "cogvideoxfun_model"), ("positive", "prompt")):
        w.add("Reroute", f"past {name}", **{"": (name, 0)})
        w.change("sampler", **{input_: (f"past {name}", 0)})
    page, report = migrate(w)
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "model")[0] == "Reroute"
    assert source_of(page, node_of(page, "CogVideoX15Inpaint"), "positive")[0] == "Reroute"
    types = {node["outputs"][0]["type"] for node in nodes_of(page, "Reroute")}
    assert types == {"COGVIDEOX_MODEL", "CONDITIONING"}
    assert not said(report, "nothing is connected")


def test_a_text_that_stands_in_the_sampler_or_comes_from_elsewhere(migrate):
    prompt = text_to_video().api()
    sampler = next(node for node in prompt.values() if node["class_type"] == "CogVideoXFunT2VSampler")
    prompt["90"] = {"class_type": "AnotherText", "inputs": {}}
    sampler["inputs"] |= {"prompt": "A cat.", "negative_prompt": ["90", 0]}
    new, report = migrate(prompt)
    texts = [node["inputs"]["prompt"] for node in new.values() if node["class_type"] == "CogVideoX15TextEncode"]
    assert texts == ["A cat.", ["90", 0]]
    assert said(report, "negative_prompt comes from node 90", "is a text")


# --- What is missing, switched off, or refused ---


def test_what_is_not_connected_is_said(migrate):
    for draw, name, words in (
        (text_to_video, "prompt", "nothing is connected to positive"),
        (text_to_video, "cogvideoxfun_model", "nothing is connected to model"),
        (image_to_video, "start_img", "start_img is not connected"),
        (video_to_video, "validation_video", "validation_video is not connected"),
    ):
        w = draw()
        w.change("sampler", **{name: None})
        assert said(migrate(w)[1], words), name
        w = draw()
        before, _ = w.nodes[w.names["sampler"]]["links"][name]
        w.nodes[before]["mode"] = 2
        report = migrate(w)[1]
        assert said(report, "nothing is connected to vae" if name == "cogvideoxfun_model" else words), name


def test_a_picture_that_is_switched_off_stays_connected(migrate):
    w = image_to_video()
    w.change("last", mode=2)
    page, _ = migrate(w)
    assert source_of(page, node_of(page, "CogVideoX15Inpaint"), "end_image") == ("LoadImage", "IMAGE")


def test_a_bypassed_sampler_passes_no_picture_on(migrate):
    w = image_to_video()
    w.change("sampler", mode=4)
    page, report = migrate(w)
    assert said(report, "it is bypassed")
    assert {node_of(page, kind)["mode"] for kind in ("CogVideoX15Sampler", "CogVideoX15VAEDecode")} == {4}


def test_several_pictures_at_a_start_are_said(migrate):
    w = image_to_video()
    w.add("VHS_LoadVideo", "clip")
    assert not said(migrate(w)[1], "several pictures")
    w.change("sampler", start_img=("clip", 0))
    assert said(migrate(w)[1], "if start_img brings several pictures")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "CogVideoX-Fun-V1.1-5b-InP"}, "an inpainting model of CogVideoX 1.0, of which this pack runs V1.5"),
        ({"model": "CogVideoX-Fun-2b-InP"}, "an inpainting model of CogVideoX 1.0, of which this pack runs V1.5"),
        ({"model": "CogVideoX-Fun-V1.1-2b-Pose"}, "a model that reads a control video"),
        ({"model_type": "Control"}, "a model that reads a control video"),
    ],
)
def test_other_models_are_refused_and_said_where_they_are_switched_off(migrate, tmp_path, changes, reason):
    w = video_to_video()
    w.change("loader", **changes)
    with pytest.raises(ValueError, match=f"{reason}.*nothing was written. Choose CogVideoX-Fun-V1.5-5b-InP"):
        migrate(w)
    assert not (tmp_path / "new.json").exists()
    w.change("sampler", mode=2)
    assert said(migrate(w)[1], reason, "It is switched off")


def test_a_control_video_that_was_not_read_is_left_out(migrate):
    w = video_to_video()
    w.change("sampler", control_video=("clip", 0))
    page, report = migrate(w)
    assert said(report, "control_video was left out")
    without, nothing_said = migrate(video_to_video())
    assert not said(nothing_said, "control_video")
    assert len([link for link in page["links"] if link[5] == "IMAGE"]) == len(
        [link for link in without["links"] if link[5] == "IMAGE"]
    )


def test_inputs_and_loaders_that_are_not_known_are_refused(migrate):
    prompt = text_to_video().api()
    number = next(id_ for id_, node in prompt.items() if node["class_type"] == "CogVideoXFunT2VSampler")
    prompt["90"] = {"class_type": "Another", "inputs": {}}
    for name, reason in (("teacache", "is given teacache by node 90"), ("cogvideoxfun_model", "a loader that is not")):
        changed = copy.deepcopy(prompt)
        changed[number]["inputs"][name] = ["90", 0]
        with pytest.raises(ValueError, match=reason):
            migrate(changed)


def test_nodes_of_videox_fun_in_a_subgraph_are_refused(migrate):
    page = text_to_video().page("new")
    inner = {"id": "x", "name": "Inner", "nodes": [{"id": 1, "type": "CogVideoXFunT2VSampler"}], "links": []}
    page["definitions"] = {"subgraphs": [inner]}
    page["nodes"].append({"id": 900, "type": "x"})
    with pytest.raises(ValueError, match="nodes of VideoX-Fun in a subgraph.*Unpack Subgraph"):
        migrate(page)
    # A text box there may be anyone's.
    inner["nodes"][0]["type"] = "TextBox"
    assert migrate(page)


def test_the_check_reads_the_loaders_list_of_values_whatever_its_age(tmp_path):
    file = tmp_path / "old.json"
    for values in (["Inpaint", "model_cpu_offload"], ["Inpaint", True], [False]):
        node = {
            "id": 1,
            "type": "LoadCogVideoXFunModel",
            "widgets_values": ["CogVideoX-Fun-V1.5-5b-InP", *values, "fp16"],
        }
        file.write_text(json.dumps({"nodes": [node]}))
        assert check_config(file).verdict == "mismatch"
        node["widgets_values"][-1] = "bf16"
        file.write_text(json.dumps({"nodes": [node]}))
        assert check_config(file).verdict == "ok"


def test_what_is_no_node_keeps_its_number(migrate):
    page = video_to_video().page()
    last = page["nodes"][-1]
    del last["type"]
    new, _ = migrate(page)
    assert len({node["id"] for node in new["nodes"]}) == len(new["nodes"])
    assert last["id"] in {node["id"] for node in new["nodes"] if "type" not in node}


_ODD = st.sampled_from([None, True, -1, 2**70, 1.5, float("1e300"), "", "x", [], {}, ["1", 0]])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_whatever_a_page_holds_it_is_migrated_or_refused_and_nothing_is_lost(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mutated")
    page = data.draw(st.sampled_from(list(USES.values())))().page(data.draw(st.sampled_from(["old", "new"])))
    for _ in range(data.draw(st.integers(1, 4))):
        node = data.draw(st.sampled_from(page["nodes"]))
        match data.draw(st.sampled_from(["mode", "value", "link", "values", "kind"])):
            case "mode":
                node["mode"] = data.draw(st.sampled_from([2, 4]))
            case "value" if node["widgets_values"] and isinstance(node["widgets_values"], list):
                place = data.draw(st.integers(0, len(node["widgets_values"]) - 1))
                node["widgets_values"][place] = data.draw(_ODD)
            case "link" if page["links"]:
                page["links"].pop(data.draw(st.integers(0, len(page["links"]) - 1)))
            case "values" if isinstance(node["widgets_values"], list):
                node["widgets_values"] = node["widgets_values"][: data.draw(st.integers(0, 3))]
            case "kind":
                node["type"] = data.draw(st.sampled_from(["FunTextBox", "CogVideoXFunV2VSampler", "Reroute", "Other"]))
    (folder / "old.json").write_text(json.dumps(page), encoding="utf-8")
    try:
        report = migrate_workflow(folder / "old.json", folder / "new.json")
    except ValueError:
        return
    new = json.loads((folder / "new.json").read_text(encoding="utf-8"))
    left = {node["id"] for node in page["nodes"]} - {node["id"] for node in new["nodes"]}
    lines = [*report.differs, *report.not_needed]
    assert all(any(f"node {id_} " in line for line in lines) for id_ in left)
