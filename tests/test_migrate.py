"""Workflows of ComfyUI-CogVideoXWrapper become workflows of this pack: what is carried over, what is said, and what is
refused."""

import copy
import json
import os
import re
import subprocess
import sys
import time
import zlib

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox.combinations import check_combination
from cogvideox.variants import identify
from generate import main
from interop.check import check_config
from interop.kinds import KINDS
from interop.migrate import migrate_workflow
from interop.pictures import texts_in
from interop.workflow import WIDGETS
from tests import fun_workflows, nodes_table, workflows
from tests.conftest import ROOT
from tests.wrapper_workflows import NODES, PIPED, image_to_video, inpaint, piped, text_to_video, video_to_video

USES = {
    "text to video": text_to_video,
    "image to video": image_to_video,
    "video to video": video_to_video,
    "inpaint": inpaint,
}
AGES = ("old", "new", "named")
#: Widgets whose choices are files, or kernels, which are not there in a test.
FILES = ("vae_name", "attention")


@pytest.fixture
def migrate(tmp_path):
    """``migrate(workflow)``: the new workflow of an old one, and the report."""

    def run(old, name="new.json"):
        source, target = tmp_path / "old.json", tmp_path / name
        source.write_text(json.dumps(old if isinstance(old, dict) else old.page()), encoding="utf-8")
        target.unlink(missing_ok=True)
        report = migrate_workflow(source, target)
        return json.loads(target.read_text(encoding="utf-8")), report

    return run


def nodes_of(page, kind):
    return [node for node in page["nodes"] if node["type"] == kind]


def node_of(page, kind):
    (node,) = nodes_of(page, kind)
    return node


def values_of(page, kind):
    return node_of(page, kind)["widgets_values_named"]


def source_of(page, node, name):
    """Where an input comes from: the node's type and the output's name; None if from nowhere."""
    number = next(socket["link"] for socket in node["inputs"] if socket["name"] == name)
    if number is None:
        return None
    link = next(link for link in workflows.links_of(page) if link[0] == number)
    origin = next(other for other in page["nodes"] if other["id"] == link[1])
    return origin["type"], origin["outputs"][link[2]]["name"]


def said(report, *words):
    """The sentences of the report that hold all the words."""
    return [line for line in report.differs if all(word in line for word in words)]


# --- The table of nodes ---


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("CogVideoX15")])
def test_the_table_of_our_nodes_is_that_of_the_nodes(kind, pack):
    node_class = pack.NODE_CLASS_MAPPINGS[kind]
    types = node_class.INPUT_TYPES()
    declared = []
    for group in ("required", "optional"):
        for name, (type_, *options) in types.get(group, {}).items():
            choices = isinstance(type_, list)
            given = options[0].get("default") if options else None
            widget = choices or type_ in ("INT", "FLOAT", "STRING", "BOOLEAN")
            declared.append((name, "COMBO" if choices else type_, widget, given, group == "optional"))
    for entry, (name, type_, widget, given, optional) in zip(KINDS[kind].inputs, declared, strict=True):
        assert (entry.name, entry.type, entry.optional, entry.default is not None) == (name, type_, optional, widget)
        assert given is None or entry.default == given
    assert list(KINDS[kind].outputs) == list(zip(node_class.RETURN_NAMES, node_class.RETURN_TYPES, strict=True))


def test_the_table_of_our_nodes_is_what_the_node_classes_give(pack):
    """After a change of a node: ``python -m tests.nodes_table``."""
    assert nodes_table.FILE.read_text(encoding="utf-8") == nodes_table.text(pack.NODE_CLASS_MAPPINGS)


def test_the_checks_table_of_our_loaders_widgets_is_the_same():
    assert WIDGETS["CogVideoX15ModelLoader"] == tuple(entry.name for entry in KINDS["CogVideoX15ModelLoader"].inputs)


# --- What is carried over ---


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("use", USES)
def test_the_new_workflow_fits_our_nodes(migrate, pack, use, age):
    page, report = migrate(USES[use]().page(age))
    workflows.check(page, pack, FILES)
    # Every one of the old pack was replaced.
    old = {"CLIPLoader", "VHS_VideoCombine", "VHS_LoadVideo", "LoadImage", "ImageResizeKJ", "Note"}
    assert {node["type"] for node in page["nodes"]} - old <= KINDS.keys()
    assert report.replaced + report.kept == len(page["nodes"]) - 1


@pytest.mark.parametrize("use", USES)
def test_pages_of_every_age_give_the_same_workflow(migrate, use):
    def essence(page):
        links = [link[1:] for link in workflows.links_of(page)]
        return {
            node["id"]: (node["type"], node.get("widgets_values_named"))
            for node in page["nodes"]
            if node["type"] in KINDS
        }, sorted(links)

    # Only the order in which older and newer pages list the sockets of other packs' nodes differs, and none of ours.
    old, new, named = (essence(migrate(USES[use]().page(age))[0]) for age in AGES)
    assert old == new == named


@pytest.mark.parametrize("use", USES)
def test_prompts_seed_and_settings_are_carried_over(migrate, use):
    w = USES[use]()
    w.change("sampler", steps=31, cfg=4.5, seed=987654321987654321)
    page, _ = migrate(w)
    prompts = {node["widgets_values_named"]["prompt"] for node in nodes_of(page, "CogVideoX15TextEncode")}
    assert prompts == {"A panda plays the guitar.", "blurry"}
    assert node_of(page, "CogVideoX15Sampler")["widgets_values"] == [
        *(987654321987654321, "increment", 31, 4.5, "dpm"),
        *(0.8 if use == "video to video" else 1.0, False, "heal", 0.0, 1.0),
    ]
    loader = values_of(page, "CogVideoX15ModelLoader")
    assert (loader["dtype"], loader["on_mismatch"], loader["memory"]) == ("bf16", "fix", "auto")


def test_text_to_video_gets_its_size_and_length_from_the_latent(migrate):
    page, _ = migrate(text_to_video())
    assert values_of(page, "CogVideoX15EmptyLatent") == {"width": 1360, "height": 768, "length": 49, "batch_size": 1}
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "latent_image") == ("CogVideoX15EmptyLatent", "latent")
    assert not nodes_of(page, "EmptyLatentImage")


def test_image_to_video_gets_its_image_through_the_conditionings(migrate):
    w = image_to_video()
    w.add("LoadImage", "last")
    w.change("encode", end_image=("last", 0))
    page, _ = migrate(w)
    sampler, node = node_of(page, "CogVideoX15Sampler"), node_of(page, "CogVideoX15ImageToVideo")
    for name, output in (("positive", "positive"), ("negative", "negative"), ("latent_image", "latent")):
        assert source_of(page, sampler, name) == ("CogVideoX15ImageToVideo", output)
    assert (
        source_of(page, node, "positive")
        == source_of(page, node, "negative")
        == ("CogVideoX15TextEncode", "conditioning")
    )
    assert source_of(page, node, "start_image") == ("ImageResizeKJ", "IMAGE")
    assert source_of(page, node, "end_image") == ("LoadImage", "IMAGE")
    # The size stays where the user sets it.
    assert [source_of(page, node, side) for side in ("width", "height")] == [
        ("ImageResizeKJ", "width"),
        ("ImageResizeKJ", "height"),
    ]
    assert values_of(page, "CogVideoX15ImageToVideo") == {"width": 1360, "height": 768, "length": 49, "batch_size": 1}


def test_video_to_video_starts_from_the_encoded_clip(migrate):
    page, report = migrate(video_to_video())
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "latent_image") == ("CogVideoX15VAEEncode", "latent")
    assert source_of(page, node_of(page, "CogVideoX15VAEEncode"), "images") == ("VHS_LoadVideo", "IMAGE")
    assert said(report, "num_frames 49", "as long as the clip")


def test_of_a_clip_that_may_be_longer_as_many_frames_are_taken(migrate, pack):
    w = video_to_video()
    w.change("clip", frame_load_cap=0)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "latent_image") == ("CogVideoX15VAEEncode", "latent")
    assert source_of(page, node_of(page, "CogVideoX15VAEEncode"), "images") == ("ImageFromBatch", "IMAGE")
    assert source_of(page, node_of(page, "ImageFromBatch"), "image") == ("VHS_LoadVideo", "IMAGE")
    assert values_of(page, "ImageFromBatch") == {"batch_index": 0, "length": 49}
    assert not said(report, "num_frames")
    # A number that came over a link still does, and two lengths of one clip are two.
    w.add("INTConstant", "frames", value=33)
    again = dict(model=("loader", 0), positive=("positive", 0), negative=("negative", 0), samples=("encode", 0))
    w.add("CogVideoSampler", "again", **again, denoise_strength=0.8, num_frames=("frames", 0))
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    cuts = nodes_of(page, "ImageFromBatch")
    assert sorted(node["widgets_values_named"]["length"] for node in cuts) == [33, 49]
    assert {source_of(page, node, "length") for node in cuts} == {None, ("INTConstant", "value")}
    assert len(nodes_of(page, "CogVideoX15VAEEncode")) == 2
    # As long as the clip, whatever that is.
    w.change("sampler", num_frames=("clip", 1))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert said(report, "num_frames is not a setting here", "as long as the clip")
    # What a resizer hands on was loaded with a limit.
    w.add("ImageResizeKJ", "resize", image=("clip", 0))
    w.change("clip", frame_load_cap=33)
    w.change("encode", start_image=("resize", 0))
    assert not nodes_of(migrate(w)[0], "ImageFromBatch")


def test_a_vae_that_comes_from_another_pack_stays(migrate, pack):
    """Ours take that of Load VAE too."""
    w = text_to_video()
    w.add("VAELoader")
    w.change("decode", vae=("VAELoader", 0))
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "CogVideoX15VAEDecode"), "vae") == ("VAELoader", "VAE")


def test_start_and_end_images_of_fun_go_to_inpaint(migrate):
    w = inpaint()
    w.change("encode", noise_aug_strength=0.0563)
    page, report = migrate(w)
    sampler, node = node_of(page, "CogVideoX15Sampler"), node_of(page, "CogVideoX15Inpaint")
    for name, output in (("positive", "positive"), ("negative", "negative"), ("latent_image", "latent")):
        assert source_of(page, sampler, name) == ("CogVideoX15Inpaint", output)
    assert source_of(page, node, "start_image") == ("ImageResizeKJ", "IMAGE")
    assert source_of(page, node, "end_image") == ("LoadImage", "IMAGE")
    assert source_of(page, node, "vae") == ("CogVideoX15ModelLoader", "vae")
    assert source_of(page, node, "video") is source_of(page, node, "mask") is None
    values = values_of(page, "CogVideoX15Inpaint")
    assert values == {"width": 1360, "height": 768, "length": 53, "batch_size": 1, "noise_aug": 0.0563}
    assert node["id"] == w.names["encode"]
    assert values_of(page, "CogVideoX15ModelLoader")["model"] == "CogVideoX-Fun-V1.5-5b-InP"
    for words in (
        ("num_frames 49 became length 53", "8N+5"),
        ("the first was cut off",),
        ("end image", "not marked as kept"),
        ("always the same",),
        ("models/CogVideoX_Fun",),
    ):
        assert len(said(report, *words)) == 1, words
    assert any("tiling" in line for line in report.not_needed)


@pytest.mark.parametrize(("frames", "length"), [(1, 1), (2, 5), (13, 13), (49, 53), (81, 85), (85, 85), (1024, 1021)])
def test_a_clip_of_fun_has_as_many_latent_frames_as_it_had_there(migrate, frames, length):
    """``pipeline_cogvideox.py`` there: (frames - 1) // 4 + 1, one more if odd. Ours has (length + 3) / 4."""
    w = inpaint()
    w.change("sampler", num_frames=frames)
    w.change("encode", num_frames=max(2, frames))
    page, report = migrate(w)
    assert values_of(page, "CogVideoX15Inpaint")["length"] == length
    there = (frames - 1) // 4 + 1
    assert frames == 1 or (length + 3) // 4 == there + there % 2
    assert bool(said(report, f"became length {length}")) == (frames != length)
    # A longest length that the widget takes.
    w.change("sampler", num_frames=10**6)
    assert values_of(migrate(w)[0], "CogVideoX15Inpaint")["length"] == 15997


def test_a_length_of_fun_that_comes_over_a_link_still_does(migrate, pack):
    w = inpaint()
    w.add("INTConstant", "frames", value=85)
    w.change("sampler", num_frames=("frames", 0))
    w.change("encode", num_frames=("frames", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "CogVideoX15Inpaint"), "length") == ("INTConstant", "value")
    assert not said(report, "num_frames")
    w.change("encode", num_frames=None)
    assert said(migrate(w)[1], "num_frames 49 is not a setting here", "num_frames 85 of the sampler")


def test_fun_without_an_image_gets_its_size_from_inpaint(migrate, pack):
    w = text_to_video()
    w.change("loader", model="alibaba-pai/CogVideoX-Fun-V1.5-5b-InP")
    w.change("sampler", num_frames=85)
    w.change("size", width=1008, height=576)
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    values = values_of(page, "CogVideoX15Inpaint")
    assert (values["width"], values["height"], values["length"]) == (1008, 576, 85)
    sampler = node_of(page, "CogVideoX15Sampler")
    for name, output in (("positive", "positive"), ("negative", "negative"), ("latent_image", "latent")):
        assert source_of(page, sampler, name) == ("CogVideoX15Inpaint", output)
    assert not nodes_of(page, "CogVideoX15EmptyLatent")
    w.change("sampler", samples=None)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert said(report, "nothing gave it a size: 1008x576")
    # Each sampler's prompts go through a node of its own.
    w.change("sampler", samples=("size", 0))
    w.add("CogVideoSampler", "second", model=("loader", 0), positive=("negative", 0), negative=("positive", 0))
    w.change("second", samples=("size", 0))
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert len(nodes_of(page, "CogVideoX15Inpaint")) == 2
    assert len({link[1] for link in page["links"] if link[5] == "LATENT" and link[2] == 2}) == 2


def test_a_clip_of_fun_starts_from_the_encoded_video(migrate, pack):
    w = video_to_video()
    w.change("loader", model="alibaba-pai/CogVideoX-Fun-V1.5-5b-InP")
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "latent_image") == ("CogVideoX15VAEEncode", "latent")
    assert values_of(page, "CogVideoX15Sampler")["denoise"] == 0.8


@pytest.mark.parametrize(
    ("theirs", "ours"), [("DDIM", "ddim_origin"), ("CogVideoXDDIM", "ddim"), ("CogVideoXDPMScheduler", "dpm")]
)
def test_the_schedulers_of_fun(migrate, theirs, ours):
    w = inpaint()
    w.change("sampler", scheduler=theirs)
    page, report = migrate(w)
    assert values_of(page, "CogVideoX15Sampler")["scheduler"] == ours
    assert not said(report, "scheduler")


def test_noise_and_encoders_of_fun_that_are_left_are_said(migrate, pack):
    w = inpaint()
    w.add("CogVideoImageEncodeFunInP", "spare", vae=("loader", 1), start_image=("picture", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert values_of(page, "CogVideoX15Inpaint")["noise_aug"] == 0.0
    assert said(report, "noise_aug_strength 0 was kept")
    assert said(report, f"node {w.names['spare']} ", "No sampler that is switched on uses it")
    w.change("encode", noise_aug_strength=3.0)
    assert said(migrate(w)[1], "noise_aug_strength 3.0 became 1.0")


def test_the_text_encoder_that_the_user_has_stays(migrate):
    """The negative prompt's came through the positive one's node, which passes none on here."""
    page, _ = migrate(text_to_video())
    for node in nodes_of(page, "CogVideoX15TextEncode"):
        assert source_of(page, node, "text_encoder") == ("CLIPLoader", "CLIP")


def test_loras_stand_behind_the_loader_in_the_order_of_the_chain(migrate, pack):
    w = text_to_video()
    w.add("CogVideoLoraSelect", "first", lora="styles\\first.safetensors", strength=0.7)
    w.add(
        "CogVideoLoraSelect", "second", lora="second.safetensors", strength=-0.3, fuse_lora=True, prev_lora=("first", 0)
    )
    w.change("loader", lora=("second", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    first, second = nodes_of(page, "CogVideoX15LoraLoader")
    assert first["widgets_values"] == ["styles/first.safetensors", 0.7]
    assert second["widgets_values"] == ["second.safetensors", -0.3]
    assert source_of(page, first, "model") == ("CogVideoX15ModelLoader", "model")
    assert source_of(page, second, "model") == ("CogVideoX15LoraLoader", "model")
    link = next(link for link in page["links"] if link[1] == second["id"])
    assert link[3] == w.names["sampler"]
    assert not said(report, "fused")


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("orbit_left_lora_weights.safetensors", 256),
        ("DimensionX\\any.safetensors", 256),
        ("my_orbit_rank64.safetensors", 64),
    ],
)
def test_a_fused_lora_of_dimensionx_keeps_its_strength(migrate, pack, name, rank):
    """That pack divides the strength of fused LoRAs by the rank where one is called orbit or dimensionx, or lies in a
    folder called so."""
    w = image_to_video()
    w.add("CogVideoLoraSelect", "style", strength=0.5)
    w.add("CogVideoLoraSelect", "lora", lora=name, strength=0.8, fuse_lora=True, prev_lora=("style", 0))
    w.change("loader", lora=("lora", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    strengths = [node["widgets_values"][1] for node in nodes_of(page, "CogVideoX15LoraLoader")]
    assert strengths == pytest.approx([0.5 / rank, 0.8 / rank], rel=1e-3)
    step = pack.NODE_CLASS_MAPPINGS["CogVideoX15LoraLoader"].INPUT_TYPES()["required"]["strength"][1]["round"]
    assert [round(value / step) * step for value in strengths] == pytest.approx(strengths)
    assert said(report, "strength / rank", f"divided by {rank}")
    w.change("lora", fuse_lora=False)
    assert [node["widgets_values"][1] for node in nodes_of(migrate(w)[0], "CogVideoX15LoraLoader")] == [0.5, 0.8]


def test_what_is_fused_and_no_dimensionx_keeps_the_strength_it_says(migrate):
    w = text_to_video()
    w.add("CogVideoLoraSelect", "first", lora="orbit.safetensors", strength=0.5, fuse_lora=True)
    w.add("CogVideoLoraSelect", "last", strength=0.8, prev_lora=("first", 0))
    w.change("loader", lora=("last", 0))
    # The last one says for all whether they are fused.
    assert [node["widgets_values"][1] for node in nodes_of(migrate(w)[0], "CogVideoX15LoraLoader")] == [0.5, 0.8]


def test_a_bypassed_lora_stays_bypassed(migrate):
    w = text_to_video()
    w.add("CogVideoLoraSelect", "lora", mode=4)
    w.change("loader", lora=("lora", 0))
    page, _ = migrate(w)
    assert node_of(page, "CogVideoX15LoraLoader")["mode"] == 4


def test_a_muted_lora_switches_off_those_before_it_and_leaves_the_sampler_its_model(migrate, pack):
    w = text_to_video()
    w.add("CogVideoLoraSelect", "first", fuse_lora=True, lora="orbit_rank_64.safetensors")
    w.add("CogVideoLoraSelect", "muted", mode=2, prev_lora=("first", 0))
    w.add("CogVideoLoraSelect", "last", prev_lora=("muted", 0))
    w.change("loader", lora=("last", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    modes = {node["id"]: node["mode"] for node in nodes_of(page, "CogVideoX15LoraLoader")}
    assert modes == {w.names["first"]: 4, w.names["muted"]: 4, w.names["last"]: 0}
    assert said(report, "it is muted", "bypassed")
    assert not said(report, "rank")


def test_two_loaders_with_one_lora_have_one_each(migrate, pack):
    w = text_to_video()
    w.add("CogVideoLoraSelect", "lora")
    w.change("loader", lora=("lora", 0))
    w.add("CogVideoXModelLoader", "other", lora=("lora", 0))
    w.add(
        "CogVideoSampler",
        "again",
        model=("other", 0),
        positive=("positive", 0),
        negative=("negative", 0),
        samples=("size", 0),
    )
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    loras = nodes_of(page, "CogVideoX15LoraLoader")
    assert (
        len({tuple(lora["pos"].values() if isinstance(lora["pos"], dict) else lora["pos"]) for lora in loras})
        == len(loras)
        == 2
    )
    origins = {link[1] for lora in loras for link in page["links"] if link[3] == lora["id"]}
    assert origins == {w.names["loader"], w.names["other"]}


def test_a_vae_in_a_file_of_its_own_is_chosen_in_the_loader(migrate, pack):
    w = text_to_video()
    w.add("CogVideoXVAELoader", "vae", model_name="cog\\vae.safetensors")
    w.change("decode", vae=("vae", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert values_of(page, "CogVideoX15ModelLoader")["vae_name"] == "cog/vae.safetensors"
    assert source_of(page, node_of(page, "CogVideoX15VAEDecode"), "vae") == ("CogVideoX15ModelLoader", "vae")
    assert any("vae_name of node" in line for line in report.not_needed)


@pytest.mark.parametrize(
    ("mode", "kind", "values"),
    [
        ("weighted_average", "ConditioningAverage", [0.75]),
        ("average", "ConditioningAverage", [0.5]),
        ("concatenate", "ConditioningConcat", []),
    ],
)
def test_mixed_prompts_are_mixed_by_comfyuis_own_nodes(migrate, mode, kind, values):
    w = text_to_video()
    w.add(
        "CogVideoTextEncodeCombine",
        "mix",
        conditioning_1=("positive", 0),
        conditioning_2=("negative", 0),
        combination_mode=mode,
    )
    w.change("sampler", positive=("mix", 0))
    page, _ = migrate(w)
    node = node_of(page, kind)
    assert node["widgets_values"] == values
    assert {source_of(page, node, name)[0] for name in ("conditioning_to", "conditioning_from")} == {
        "CogVideoX15TextEncode"
    }
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "positive") == (kind, "CONDITIONING")
    workflows.check_links(page)


def test_numbers_and_prompts_that_come_over_links_still_do(migrate, pack):
    w = text_to_video()
    w.add("INTConstant", "frames", value=81)
    w.add("INTConstant", "seed", value=5)
    w.add("StringConstant", "text")
    w.change("sampler", num_frames=("frames", 0), seed=("seed", 0))
    w.change("positive", prompt=("text", 0))
    for age in AGES:
        page, _ = migrate(w.page(age))
        workflows.check(page, pack, FILES)
        latent, sampler = node_of(page, "CogVideoX15EmptyLatent"), node_of(page, "CogVideoX15Sampler")
        assert source_of(page, latent, "length") == source_of(page, sampler, "seed") == ("INTConstant", "value")
        assert latent["widgets_values_named"]["length"] == 81
        assert ("StringConstant", "STRING") in {
            source_of(page, node, "prompt") for node in nodes_of(page, "CogVideoX15TextEncode")
        }


@pytest.mark.parametrize("kind", ["PrimitiveNode", "PrimitiveString"])
def test_what_comes_over_a_link_and_stands_in_the_file_is_what_ran(migrate, pack, kind):
    """And not what the widget was left at when it was turned into an input."""
    w = text_to_video()
    w.add(kind, "name", value="THUDM/CogVideoX-5b")
    w.add(kind, "how", value="CogVideoXDDIM")
    w.change("loader", model=("name", 0))
    w.change("sampler", scheduler=("how", 0), num_frames=58)
    for old in (w.page("old"), w.page("new"), *([w.api()] if kind == "PrimitiveString" else [])):
        new, report = migrate(old)
        if "nodes" in new:
            workflows.check(new, pack, FILES)
            assert values_of(new, "CogVideoX15ModelLoader")["model"] == "CogVideoX-5b"
            assert values_of(new, "CogVideoX15Sampler")["scheduler"] == "ddim"
        assert said(report, "model came over a link", "THUDM/CogVideoX-5b was taken")
        assert said(report, "scheduler came over a link", "CogVideoXDDIM was taken")
        assert said(report, "length 57", "8N+1")


def test_a_model_that_came_over_a_link_and_is_not_known_is_to_be_chosen(migrate):
    w = text_to_video()
    w.add("ConsisIDFaceEncode", "other")
    w.change("loader", model=("other", 0))
    prompt, report = migrate(w.api())
    assert prompt[str(w.names["loader"])]["inputs"]["model"] == ""
    assert said(report, "which model came over its link", "Choose it")
    assert not said(report, "CogVideoX-2b")


def test_links_led_by_set_and_get_nodes_and_reroutes_have_their_new_types(migrate, pack):
    w = image_to_video()
    w.add("SetNode", "set", VAE=("loader", 1))
    w.add("GetNode", "get")
    w.add("Reroute", "turn", **{"": ("get", 0)})
    w.change("decode", vae=("get", 0))
    w.change("encode", vae=("turn", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "CogVideoX15VAEDecode"), "vae") == ("GetNode", "COGVIDEOX_VAE")
    assert source_of(page, node_of(page, "CogVideoX15ImageToVideo"), "vae") == ("Reroute", "")
    assert (
        node_of(page, "SetNode")["inputs"][0]["type"]
        == node_of(page, "Reroute")["outputs"][0]["type"]
        == "COGVIDEOX_VAE"
    )
    assert not said(report, "not connected")


@pytest.mark.parametrize("kind", ["Reroute (rgthree)", "mxReroute", "ReroutePrimitive|pysssss", "Any Switch (rgthree)"])
def test_nodes_of_other_packs_that_only_lead_a_link_elsewhere_do_so_still(migrate, pack, kind):
    w = text_to_video()
    name = next(iter(w.table[kind][0]))
    w.add(kind, "turn", **{name: ("loader", 0)})
    w.change("sampler", model=("turn", 0), num_frames=82)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "model")[0] == kind
    assert source_of(page, node_of(page, kind), name) == ("CogVideoX15ModelLoader", "model")
    assert {socket["type"] for socket in node_of(page, kind)["outputs"]} <= {"*", "COGVIDEOX_MODEL"}
    assert said(report, "length 81", "16N+1")
    assert not said(report, "not connected")


def test_a_link_that_easy_use_gave_a_name_is_taken_up_by_that_name(migrate, pack):
    w = text_to_video()
    w.add("SetNode", "other", VAE=("loader", 1), Constant="model")
    w.add("easy setNode", "set", **{"*": ("loader", 0)})
    w.add("easy getNode", "get")
    w.change("sampler", model=("get", 0))
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "model") == ("easy getNode", "COGVIDEOX_MODEL")


def test_what_is_broadcast_to_a_node_without_a_link_has_one_then(migrate, pack):
    """As cg-use-everywhere saves it: a node that takes the model, and a list of whom it gives it to."""
    w = text_to_video()
    w.add("EmptyLatentImage", "unused")
    w.change("sampler", num_frames=82)
    linked, _ = migrate(w)
    page = w.page("new")
    page["nodes"].append({"id": 900, "type": "Anything Everywhere", "pos": [0, 0], "inputs": [], "outputs": []})
    page["extra"]["ue_links"] = []
    by_id = {node["id"]: node for node in page["nodes"]}
    for number, (name, socket, type_) in enumerate(
        (("sampler", "model", "COGVIDEOMODEL"), ("sampler", "samples", "LATENT"), ("decode", "vae", "VAE"))
    ):
        inputs = by_id[w.names[name]]["inputs"]
        slot = next(slot for slot, entry in enumerate(inputs) if entry["name"] == socket)
        link = next(link for link in page["links"] if link[0] == inputs[slot]["link"])
        ends = {"downstream": link[3], "downstream_slot": slot, "upstream": str(link[1]), "upstream_slot": link[2]}
        page["extra"]["ue_links"].append({**ends, "controller": 900, "type": type_})
        # It leads to the node that broadcasts it.
        inputs[slot]["link"] = None
        link[3:5] = 900, number
        by_id[900]["inputs"].append({"name": f"anything{number}", "type": type_, "link": link[0]})
    page["extra"]["ue_links"] += [None, {}, {"upstream": [], "upstream_slot": 0, "downstream": 1, "downstream_slot": 0}]
    new, report = migrate(page)
    workflows.check(new, pack, FILES)
    assert said(report, "length 81", "16N+1")
    for kind, socket in (("Sampler", "model"), ("Sampler", "latent_image"), ("VAEDecode", "vae")):
        node = node_of(new, f"CogVideoX15{kind}")
        assert source_of(new, node, socket) == source_of(linked, node_of(linked, node["type"]), socket)
        # Nor does what is broadcast arrive where the old node had no input.
        assert node["properties"]["rejects_ue_links"] is True
    assert "rejects_ue_links" not in node_of(linked, "CogVideoX15Sampler")["properties"]


@pytest.mark.parametrize("kind", ["easy setNode", "mxReroute"])
def test_what_only_leads_a_link_does_so_when_it_is_bypassed(migrate, pack, kind):
    w = text_to_video()
    name = next(iter(w.table[kind][0]))
    w.add(kind, "turn", mode=4, **{name: ("loader", 0)})
    w.add("easy getNode", "get")
    w.change("sampler", model=("turn" if kind == "mxReroute" else "get", 0), num_frames=82)
    page = w.page()
    # As the page types what a link goes through.
    for socket in node_of(page, kind)["outputs"]:
        socket["type"] = "COGVIDEOMODEL"
    page, report = migrate(page)
    workflows.check(page, pack, FILES)
    assert said(report, "length 81", "16N+1")


@pytest.mark.parametrize("turn", [None, "Reroute", "mxReroute", "Any Switch (rgthree)"])
@pytest.mark.parametrize("mode", [2, 4])
def test_a_switch_leads_on_the_first_link_that_brings_something(migrate, pack, mode, turn):
    w = text_to_video()
    w.add("DownloadAndLoadCogVideoModel", "off", mode=mode, model="THUDM/CogVideoX-5b")
    if turn:
        w.add(turn, "turn", **{next(iter(w.table[turn][0])): ("off", 0)})
    w.add("Any Switch (rgthree)", "switch", any_01=("turn" if turn else "off", 0), any_03=("loader", 0))
    w.change("sampler", model=("switch", 0), num_frames=82)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert said(report, "length 81", "16N+1")
    assert not said(report, "not connected")


@pytest.mark.parametrize("mode", [2, 4])
def test_links_led_from_what_is_switched_off_are_there_when_it_is_switched_on(migrate, pack, mode):
    w = text_to_video()
    w.add("Any Switch (rgthree)", "switch", any_01=("loader", 0))
    w.add("SetNode", "set", VAE=("loader", 1))
    w.add("GetNode", "get")
    w.change("sampler", model=("switch", 0), mode=mode)
    w.change("decode", vae=("get", 0), mode=mode)
    w.change("loader", mode=mode)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert source_of(page, node_of(page, "Any Switch (rgthree)"), "any_01")[0] == "CogVideoX15ModelLoader"
    set_node = node_of(page, "SetNode")
    assert source_of(page, set_node, set_node["inputs"][0]["name"])[0] == "CogVideoX15ModelLoader"
    assert not said(report, "not connected")


def test_two_samplers_that_share_an_image_share_its_node_where_all_is_the_same(migrate, pack):
    w = image_to_video()
    again = dict(
        model=("loader", 0), positive=("positive", 0), negative=("negative", 0), image_cond_latents=("encode", 0)
    )
    w.add("CogVideoSampler", "again", **again, seed=7)
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert len(nodes_of(page, "CogVideoX15ImageToVideo")) == 1
    w.add("CogVideoSampler", "longer", **again, num_frames=81)
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert sorted(node["widgets_values_named"]["length"] for node in nodes_of(page, "CogVideoX15ImageToVideo")) == [
        49,
        81,
    ]


@pytest.mark.parametrize("turns", [False, True])
def test_an_empty_latent_that_others_use_too_stays_beside_ours(migrate, pack, turns):
    w = text_to_video()
    w.add("GetWarpedNoiseFromVideo", "other")
    w.add("mxReroute", "turn", **{"": ("size", 0)})
    page = w.page()
    # A node of another pack that takes the latent.
    other = next(node for node in page["nodes"] if node["type"] == "GetWarpedNoiseFromVideo")
    other["inputs"] = [{"name": "latent", "type": "LATENT", "link": 500}]
    size, turn = (node_of(page, kind) for kind in ("EmptyLatentImage", "mxReroute"))
    source = turn if turns else size
    source["outputs"][0]["links"] = [*(source["outputs"][0]["links"] or []), 500]
    page["links"].append([500, source["id"], 0, other["id"], 0, "LATENT"])
    new, _ = migrate(page)
    workflows.check(new, pack, FILES)
    assert source_of(new, node_of(new, "GetWarpedNoiseFromVideo"), "latent")[0] == source["type"]
    if turns:
        assert source_of(new, node_of(new, "mxReroute"), "") == ("EmptyLatentImage", "LATENT")
    assert source_of(new, node_of(new, "CogVideoX15Sampler"), "latent_image") == ("CogVideoX15EmptyLatent", "latent")


def test_the_second_sampler_starts_from_what_the_first_one_made(migrate, pack):
    w = text_to_video()
    again = dict(model=("loader", 0), positive=("positive", 0), negative=("negative", 0), samples=("sampler", 0))
    w.add("CogVideoSampler", "again", **again, denoise_strength=0.4)
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    again = next(node for node in page["nodes"] if node["id"] == w.names["again"])
    assert source_of(page, again, "latent_image") == ("CogVideoX15Sampler", "latent")


@pytest.mark.parametrize("mode", [2, 4])
def test_nodes_that_are_off_stay_off(migrate, mode):
    w = text_to_video()
    w.change("decode", mode=mode)
    page, _ = migrate(w)
    assert node_of(page, "CogVideoX15VAEDecode")["mode"] == mode


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_layout_and_everything_of_others_is_kept(tmp_path_factory, pack, data):
    """Positions, sizes, titles, colors, groups and view; of other packs' nodes all, with their links under the numbers
    they had."""
    folder = tmp_path_factory.mktemp("migrate")
    place = st.tuples(st.integers(-5000, 5000), st.floats(-5000, 5000, allow_nan=False))
    places = data.draw(st.lists(place, min_size=30, max_size=30))
    w = data.draw(st.sampled_from([*USES.values(), *fun_workflows.USES.values()]))()
    for index in range(data.draw(st.integers(0, 4))):
        w.add(
            data.draw(st.sampled_from(["SaveWEBM", "PreviewImage", "VHS_VideoCombine"])),
            f"more {index}",
            images=("decode", 0),
        )
    w.add("LoadImage", "unused")
    w.add("PreviewImage", "beside", images=("unused", 0))
    old = w.page(data.draw(st.sampled_from(AGES)), places.__getitem__)
    for node in old["nodes"]:
        look = {
            "title": st.text(max_size=9),
            "color": st.just("#232"),
            "bgcolor": st.just("#353"),
            "flags": st.just({"collapsed": True}),
        }
        node.update({name: data.draw(value) for name, value in look.items() if data.draw(st.booleans())})
    given = copy.deepcopy(old)
    (folder / "old.json").write_text(json.dumps(old), encoding="utf-8")
    migrate_workflow(folder / "old.json", folder / "new.json")
    new = json.loads((folder / "new.json").read_text(encoding="utf-8"))
    workflows.check(new, pack, FILES)
    by_id = {node["id"]: node for node in new["nodes"]}
    assert given == old
    assert {name: new[name] for name in ("groups", "config", "extra", "version")} == {
        name: old[name] for name in ("groups", "config", "extra", "version")
    }
    for node in old["nodes"]:
        kept = by_id[node["id"]]
        for name in ("pos", "size", "flags", "mode", "title", "color", "bgcolor"):
            assert kept.get(name) == node.get(name)
        if kept["type"] not in KINDS:
            without = ("inputs", "outputs")
            assert {key: value for key, value in kept.items() if key not in without} == {
                key: value for key, value in node.items() if key not in without
            }
            assert [{**socket, "links": None} for socket in kept["outputs"]] == [
                {**socket, "links": None} for socket in node["outputs"]
            ]
            assert kept["inputs"] == node["inputs"]  # the links' numbers too
    theirs = {node["id"] for node in old["nodes"] if by_id[node["id"]]["type"] not in KINDS}
    links = workflows.links_of(new)
    assert all(link in links for link in workflows.links_of(old) if {link[1], link[3]} <= theirs)
    newest = max(new["nodes"], key=lambda node: node["id"])
    assert newest["type"] == "Note"
    for node in old["nodes"]:  # the note lies over nothing
        top = node["pos"]["1"] if isinstance(node["pos"], dict) else node["pos"][1]
        assert newest["pos"][1] + newest["size"][1] < top


def test_bends_in_links_name_only_links_that_are_there(migrate):
    page = image_to_video().page()
    gone = max(link[0] for link in page["links"]) + 1
    page["extra"] |= {
        "linkExtensions": [{"id": page["links"][0][0], "parentId": 1}, {"id": gone, "parentId": 1}],
        "reroutes": [{"id": 1, "pos": [0, 0], "linkIds": [page["links"][0][0], gone]}],
    }
    new, _ = migrate(page)
    there = {link[0] for link in new["links"]}
    assert [entry["id"] for entry in new["extra"]["linkExtensions"]] == [page["links"][0][0]]
    assert set(new["extra"]["reroutes"][0]["linkIds"]) <= there


def test_the_manager_is_not_told_that_our_nodes_are_the_old_packs(migrate):
    page, _ = migrate(text_to_video().page("new"))
    assert node_of(page, "CogVideoX15Sampler")["properties"] == {"Node name for S&R": "CogVideoX15Sampler"}
    assert node_of(page, "VHS_VideoCombine")["properties"]["cnr_id"] == "some-pack"


@pytest.mark.parametrize("use", USES)
def test_a_workflow_for_the_api_becomes_one_for_the_api(migrate, pack, use):
    w = USES[use]()
    w.add("INTConstant", "frames", value=33)
    w.change("sampler", num_frames=("frames", 0))
    old = w.api()
    prompt, report = migrate(old)
    on_page, _ = migrate(w)
    expected = workflows.to_api(
        {"nodes": [node for node in on_page["nodes"] if node["type"] in KINDS], "links": on_page["links"]}
    )
    assert {id_: node["class_type"] for id_, node in expected.items()} == {
        i: n["class_type"] for i, n in prompt.items() if n["class_type"] in KINDS
    }
    for id_, node in expected.items():
        assert prompt[id_]["inputs"] == node["inputs"], id_
        assert prompt[id_]["_meta"] == old[id_]["_meta"]
    for id_, node in old.items():
        if prompt[id_]["class_type"] not in KINDS:
            assert prompt[id_] == node
    assert said(report, "num_frames" if use == "video to video" else "model")


def test_what_the_page_queues_and_pictures_hold_is_read_too(migrate):
    # The second is what the page's own script makes of a graph (app.graphToPrompt).
    for more in (
        {"prompt": text_to_video().api(), "client_id": "x"},
        {"workflow": {}, "output": text_to_video().api()},
    ):
        prompt, _ = migrate(more)
        assert "CogVideoX15Sampler" in {node["class_type"] for node in prompt.values()}


def as_png(file, text):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    # Not a letter of latin-1: Pillow then writes iTXt.
    info.add_text("prompt", "{}")
    info.add_text("workflow", text)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


def as_packed_png(file, text):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("workflow", text, "zh", "工作流", zip=True)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


def as_animated_png(file, text):
    """As SaveAnimatedPNG of ComfyUI writes it."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (("prompt", "{}"), ("workflow", json.dumps(json.loads(text)))):
        info.add(b"comf", key.encode() + b"\0" + value.encode("latin-1"), after_idat=True)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(file, pnginfo=info, save_all=True, append_images=frames[1:])


def as_exported_png(file, text):
    """As ComfyUI-Custom-Scripts exports a workflow as a picture: UTF-8 where the format has latin-1."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add(b"tEXt", b"workflow\0" + json.dumps(json.loads(text), ensure_ascii=False).encode())
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


def as_webp(file, text):
    """As SaveAnimatedWEBP of ComfyUI writes it."""
    from PIL import Image

    image = Image.new("RGB", (8, 8))
    exif = image.getexif()
    exif[0x0110], exif[0x010F] = "prompt:{}", f"workflow:{text}"
    image.save(file, exif=exif)


def as_video(file, text):
    """As SaveVideo of ComfyUI writes it."""
    write_video(file, {"prompt": "{}", "workflow": text}, movflags="use_metadata_tags")


def as_helpers_video(file, text):
    """As Video Combine of ComfyUI-VideoHelperSuite writes it."""
    write_video(file, {"comment": json.dumps({"prompt": "{}", "workflow": json.loads(text)})})


def write_video(file, metadata, **options):
    import av

    with av.open(str(file), "w", options=options) as container:
        container.metadata.update(metadata)
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for frame in (av.VideoFrame(16, 16, "yuv420p"), None):
            for packet in stream.encode(frame):
                container.mux(packet)


INSIDE = {
    "a.png": as_png,
    "packed.PNG": as_packed_png,
    "animated.png": as_animated_png,
    "exported.png": as_exported_png,
    "a.webp": as_webp,
    "a.mp4": as_video,
    "helpers.mp4": as_helpers_video,
    "a.mkv": as_video,
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("title", ["Sampler", "采样器"])
def test_a_workflow_in_a_picture_or_video_is_that_workflow(tmp_path, migrate, name, title):
    old = text_to_video().page()
    old["nodes"][0]["title"] = title
    INSIDE[name](tmp_path / name, json.dumps(old))
    expected, _ = migrate(old)
    migrate_workflow(tmp_path / name, tmp_path / "inside.json")
    assert json.loads((tmp_path / "inside.json").read_text(encoding="utf-8")) == expected
    assert main(["--check", str(tmp_path / name)]) == main(["--check", str(tmp_path / "old.json")])


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.mp4", "no.png", "no.mp4"])
def test_a_picture_or_video_without_a_workflow_says_how_to_get_one(tmp_path, capsys, name):
    from PIL import Image

    if name == "a.mp4":
        write_video(tmp_path / name, {"comment": "a cat"})
    elif name.startswith("no"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 40)
    else:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for arguments in (
        ["--migrate", str(tmp_path / name), str(tmp_path / "new.json")],
        ["--check", str(tmp_path / name)],
    ):
        assert main(arguments) == 1
        assert "is a picture or video, and no workflow is found in it here" in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()


def test_a_picture_that_was_made_to_fill_the_memory_is_passed_over(tmp_path):
    """Texts that unpack to more than is read, and pieces without end."""
    packed = zlib.compress(bytes(200 << 20), 9)
    text = b"workflow\0\0" + packed
    chunk = len(text).to_bytes(4, "big") + b"zTXt" + text + bytes(4)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + (bytes(4) + b"IDAT" + bytes(4)) * 300_000)
    begun = time.process_time()
    (found,) = texts_in(tmp_path / "a.png")
    assert len(found) == 64 << 20
    assert time.process_time() - begun < 5


# --- Models and dtypes ---


@pytest.mark.parametrize(
    ("kind", "model", "ours"),
    [
        ("DownloadAndLoadCogVideoModel", "kijai/CogVideoX-5b-1.5-T2V", "CogVideoX-5b-1.5/transformer_T2V"),
        ("DownloadAndLoadCogVideoModel", "kijai/CogVideoX-5b-1.5-I2V", "CogVideoX-5b-1.5/transformer_I2V"),
        ("DownloadAndLoadCogVideoModel", "THUDM/CogVideoX-5b", "CogVideoX-5b"),
        ("DownloadAndLoadCogVideoModel", "THUDM/CogVideoX-2b", "CogVideo2B"),
        ("DownloadAndLoadCogVideoModel", "bertjiazheng/KoolCogVideoX-5b", "KoolCogVideoX-5b"),
        ("CogVideoXModelLoader", "cog\\CogVideoX_1_5_5b_fp8.safetensors", "cog/CogVideoX_1_5_5b_fp8.safetensors"),
        # The file that the user has, and no longer another model of 11 GB: such files are read now.
        *(
            ("DownloadAndLoadCogVideoGGUFModel", name, f"GGUF/{name}")
            for name in ("CogVideoX_5b_1_5_I2V_GGUF_Q4_0.safetensors", "CogVideoX_5b_GGUF_Q4_0.safetensors")
        ),
    ],
)
def test_the_model_is_named_as_our_loader_lists_it(migrate, kind, model, ours):
    page, report = migrate(with_loader(kind, model=model))
    assert values_of(page, "CogVideoX15ModelLoader")["model"] == ours
    assert bool(said(report, ours)) == (kind != "CogVideoXModelLoader")


def with_loader(kind, **values):
    w = text_to_video()
    w.add(kind, "loader 2", **values)
    w.nodes[w.names["loader"]] = w.nodes.pop(w.names["loader 2"])
    if kind == "CogVideoXModelLoader":
        w.add("CogVideoXVAELoader", "vae")
        w.change("decode", vae=("vae", 0))
    return w


PRECISION = {
    "DownloadAndLoadCogVideoModel": "precision",
    "CogVideoXModelLoader": "base_precision",
    "DownloadAndLoadCogVideoGGUFModel": "vae_precision",
}


@pytest.mark.parametrize("kind", PRECISION)
def test_fp16_of_a_model_trained_in_bf16_becomes_auto_and_the_rest_stays(migrate, kind):
    for asked, dtype in (("fp16", "auto"), ("bf16", "bf16"), ("fp32", "fp32")):
        page, report = migrate(with_loader(kind, **{PRECISION[kind]: asked}))
        assert values_of(page, "CogVideoX15ModelLoader")["dtype"] == dtype
        assert bool(said(report, "fp16", "black")) == (asked == "fp16")


def test_fp16_of_2b_stays(migrate):
    page, report = migrate(with_loader("DownloadAndLoadCogVideoModel", model="THUDM/CogVideoX-2b", precision="fp16"))
    assert values_of(page, "CogVideoX15ModelLoader")["dtype"] == "fp16"
    assert not said(report, "black")


def test_offloading_is_carried_over(migrate):
    page, report = migrate(with_loader("DownloadAndLoadCogVideoModel", enable_sequential_cpu_offload=True))
    assert values_of(page, "CogVideoX15ModelLoader")["memory"] == "offload_layers"
    assert said(report, "Try auto")


def test_the_new_workflow_passes_the_check_that_the_old_one_failed(migrate, tmp_path):
    w = with_loader("DownloadAndLoadCogVideoModel", precision="fp16")
    migrate(w)
    assert check_config(tmp_path / "old.json").verdict == "mismatch"
    assert check_config(tmp_path / "new.json").verdict == "ok"


# --- Faster ---


def chain_of(page, sampler=None):
    """What a sampler's model has come through, the loader first: ``[(type, widgets)]``."""
    node, found = sampler or node_of(page, "CogVideoX15Sampler"), []
    while node["type"] != "CogVideoX15ModelLoader":
        number = next(socket["link"] for socket in node["inputs"] if socket["name"] == "model")
        origin = next(link[1] for link in workflows.links_of(page) if link[0] == number)
        node = next(other for other in page["nodes"] if other["id"] == origin)
        found.append((node["type"].removeprefix("CogVideoX15"), list(node["widgets_values"])))
    return found[::-1][1:]


def fast(*settings, **loader):
    """Text to video with nodes for speed: ``(type, widgets)`` each."""
    w = text_to_video()
    w.change("loader", **loader)
    for kind, values in settings:
        name, to = {
            "CogVideoXTeaCache": ("teacache_args", "sampler"),
            "CogVideoXFasterCache": ("fastercache", "sampler"),
            "CogVideoXTorchCompileSettings": ("compile_args", "loader"),
        }[kind]
        w.add(kind, kind)
        # Not through change, where mode is the node's.
        w.nodes[w.names[kind]]["values"].update(values)
        w.change(to, **{name: (kind, 0)})
    return w


def test_what_makes_it_faster_stands_behind_the_loader_in_its_order(migrate, pack):
    w = fast(
        *(
            ("CogVideoXTeaCache", {}),
            ("CogVideoXTorchCompileSettings", {"mode": "max-autotune-no-cudagraphs", "dynamic": True}),
        ),
        **{"quantization": "torchao_int8dq", "attention_mode": "fused_sageattn_qk_int8_pv_fp8_cuda"},
    )
    w.add("CogVideoLoraSelect", "lora")
    w.change("loader", lora=("lora", 0))
    for age in AGES:
        page, report = migrate(w.page(age))
        workflows.check(page, pack, FILES)
        assert chain_of(page) == [
            ("LoraLoader", ["style.safetensors", 1.0]),
            ("Quantize", ["int8_dynamic"]),
            ("Attention", ["sage"]),
            ("Cache", ["teacache", 0.56, 0.0, 1.0]),
            ("Compile", ["max-autotune-no-cudagraphs", True]),
        ]
        assert not said(report, "is not here")
        assert said(report, "TeaCache", "teacache, strength 0.56", "which threshold a strength is")
    # Those that were nodes there are in their places.
    assert node_of(page, "CogVideoX15Cache")["id"] == w.names["CogVideoXTeaCache"]
    assert node_of(page, "CogVideoX15Compile")["id"] == w.names["CogVideoXTorchCompileSettings"]
    prompt, _ = migrate(w.api())
    assert {"CogVideoX15Quantize", "CogVideoX15Attention", "CogVideoX15Cache", "CogVideoX15Compile"} <= {
        n["class_type"] for n in prompt.values()
    }


@pytest.mark.parametrize(
    ("asked", "method"),
    [
        ("fp8_e4m3fn", "fp8_weight_only"),
        ("fp8_e4m3fn_fastmode", "fp8_dynamic"),
        ("fp8_e4m3fn_fast", "fp8_dynamic"),
        ("torchao_fp8dq", "fp8_dynamic"),
        ("torchao_fp8dqrow", "fp8_dynamic"),
        ("torchao_int8dq", "int8_dynamic"),
        ("torchao_int8wo", "int8_weight_only"),
        ("torchao_fp6", "int8_weight_only"),
        ("disabled", None),
        ("of tomorrow", None),
    ],
)
def test_each_way_to_quantize_is_one_of_ours(migrate, pack, asked, method):
    page, report = migrate(fast(quantization=asked))
    workflows.check(page, pack, FILES)
    assert [node["widgets_values"] for node in nodes_of(page, "CogVideoX15Quantize")] == ([[method]] if method else [])
    assert bool(said(report, asked)) == (asked != "disabled")


def test_a_file_that_is_packed_already_stays_so(migrate):
    for kind, values in (
        ("CogVideoXModelLoader", {"model": "CogVideoX_1_5_5b_T2V_fp8.safetensors", "quantization": "fp8_e4m3fn"}),
        ("DownloadAndLoadCogVideoGGUFModel", {"fp8_fastmode": True}),
    ):
        page, report = migrate(with_loader(kind, **values))
        assert not nodes_of(page, "CogVideoX15Quantize")
        assert said(report, "packed already")


@pytest.mark.parametrize(
    ("mode", "sage"),
    [("sdpa", False), ("fused_sdpa", False), ("comfy", False), ("sageattn", True), ("fused_sageattn", True)],
)
def test_only_the_attention_in_8_bits_is_another(migrate, mode, sage):
    page, report = migrate(fast(attention_mode=mode))
    assert [node["widgets_values"] for node in nodes_of(page, "CogVideoX15Attention")] == ([["sage"]] if sage else [])
    assert bool(said(report, mode)) == sage
    assert any(mode in line for line in report.not_needed) == (mode not in ("sdpa", "sageattn", "fused_sageattn"))


def test_fastercache_begins_where_it_began(migrate, pack):
    w = fast(("CogVideoXFasterCache", {"start_step": 7}))
    w.change("sampler", steps=40)
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert chain_of(page) == [("Cache", ["faster_cache", 0.6, 0.25, 1.0])]
    w.change("sampler", steps=10)
    page, report = migrate(w)
    assert chain_of(page) == []
    assert said(report, "CogVideoXFasterCache", "nothing that is switched on ran with it")


@pytest.mark.parametrize(
    ("threshold", "strength"),
    [(0.01, 0.05), (0.1, 0.31), (0.15, 0.37), (0.2, 0.44), (0.3, 0.56), (0.4, 0.68), (5, 0.8), (0.0, None)],
)
def test_a_higher_threshold_of_teacache_skips_more(migrate, threshold, strength):
    page, _ = migrate(fast(("CogVideoXTeaCache", {"rel_l1_thresh": threshold})))
    assert [values[1] for _, values in chain_of(page)] == ([strength] if strength else [])


def test_numbers_of_caches_may_be_texts_too(migrate):
    for as_text in (int, str, float):
        w = fast(("CogVideoXFasterCache", {"start_step": as_text(7)}))
        w.change("sampler", steps=as_text(40))
        assert chain_of(migrate(w)[0]) == [("Cache", ["faster_cache", 0.6, 0.25, 1.0])]
    page, _ = migrate(fast(("CogVideoXTeaCache", {"rel_l1_thresh": "0.1"})))
    assert chain_of(page)[0][1][1] == 0.31


def test_what_does_not_go_together_is_decided_for_what_works(migrate, pack):
    everything = (
        ("CogVideoXFasterCache", {}),
        ("CogVideoXTeaCache", {}),
        ("CogVideoXTorchCompileSettings", {"mode": "reduce-overhead"}),
    )
    w = fast(*everything, enable_sequential_cpu_offload=True)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    chain = chain_of(page)
    assert chain == [("Cache", ["teacache", 0.56, 0.0, 1.0]), ("Compile", ["default", False])]
    memory = values_of(page, "CogVideoX15ModelLoader")["memory"]
    assert memory == "offload_blocks"
    check_combination([chain[0][1][0]], [], True, memory == "offload_layers")
    assert said(report, "FasterCache is left out", "one cache")
    assert said(report, "offload_blocks", "not offload_layers")
    assert said(report, "reduce-overhead uses CUDA graphs")
    page, _ = migrate(fast(everything[0], everything[2]))
    assert [values[0] for _, values in chain_of(page)] == ["first_block", "default"]


def test_each_sampler_has_its_own_cache_and_those_that_ask_the_same_share_one(migrate, pack):
    w = fast(("CogVideoXTeaCache", {}))
    again = dict(model=("loader", 0), positive=("positive", 0), negative=("negative", 0), samples=("size", 0))
    w.add("CogVideoSampler", "same", **again, teacache_args=("CogVideoXTeaCache", 0))
    w.add("CogVideoSampler", "without", **again)
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    chains = [len(chain_of(page, sampler)) for sampler in nodes_of(page, "CogVideoX15Sampler")]
    assert sorted(chains) == [0, 1, 1]
    assert len(nodes_of(page, "CogVideoX15Cache")) == 1


@pytest.mark.parametrize("mode", [2, 4])
def test_what_was_switched_off_makes_nothing_faster(migrate, mode):
    w = fast(("CogVideoXTeaCache", {}), ("CogVideoXTorchCompileSettings", {}))
    w.change("CogVideoXTeaCache", mode=mode)
    page, report = migrate(w)
    assert [kind for kind, _ in chain_of(page)] == ["Compile"]
    assert said(report, "CogVideoXTeaCache", "nothing that is switched on ran with it")


def test_nodes_of_our_own_lie_over_no_other(migrate):
    w = fast(("CogVideoXTeaCache", {}), quantization="torchao_int8dq", attention_mode="sageattn")
    page, _ = migrate(w.page("new", lambda index: (500 * (index % 4), 400 * (index // 4))))
    boxes = [(*node["pos"], *node["size"]) for node in page["nodes"]]
    for index, (x, y, wide, high) in enumerate(boxes):
        for left, top, width, height in boxes[:index]:
            assert x >= left + width or left >= x + wide or y >= top + height or top >= y + high


# --- Before 19 November 2024 ---


@pytest.mark.parametrize("day", PIPED)
@pytest.mark.parametrize("use", ["text", "image", "video"])
def test_workflows_of_the_pack_as_it_was_migrate_in_every_form(migrate, pack, use, day):
    w = piped(use, day)
    w.change("sampler", steps=31, cfg=4.5, seed=987654321987654321, num_frames=41, width=1024, height=576)
    pages = [migrate(w.page(age)) for age in AGES]
    for page, report in pages:
        workflows.check(page, pack, FILES)
        assert values_of(page, "CogVideoX15Sampler") == {
            **{
                "seed": 987654321987654321,
                "control_after_generate": "increment",
                "steps": 31,
                "cfg": 4.5,
                "scheduler": "dpm",
            },
            **{"denoise": 0.8 if use == "video" else 1.0, "dynamic_cfg": False, "on_nan": "heal"},
            **{"cfg_start": 0.0, "cfg_end": 1.0},
        }
        if use != "video":
            node = node_of(page, "CogVideoX15EmptyLatent" if use == "text" else "CogVideoX15ImageToVideo")
            # 1.0's own rule: the model is CogVideoX-5b or 2b.
            assert node["widgets_values_named"] == {"width": 1024, "height": 576, "length": 41, "batch_size": 1}
        for name in (
            "CogVideoX15VAEDecode",
            {"text": None, "image": "CogVideoX15ImageToVideo", "video": "CogVideoX15VAEEncode"}[use],
        ):
            assert name is None or source_of(page, node_of(page, name), "vae") == ("CogVideoX15ModelLoader", "vae")
        assert source_of(page, node_of(page, "CogVideoX15VAEDecode"), "samples") == ("CogVideoX15Sampler", "latent")
        # The first version loaded one model and had no widget for it.
        model = "CogVideo2B" if "08-0" in day else "CogVideoX-5b-I2V" if use == "image" else "CogVideoX-5b"
        assert values_of(page, "CogVideoX15ModelLoader")["model"] == model
        assert not said(report, "not known here")
    prompt, _ = migrate(w.api())
    on_page = workflows.to_api(
        {"nodes": [node for node in page["nodes"] if node["type"] != "Note"], "links": workflows.links_of(page)}
    )

    def essence(prompt):
        """Without the numbers, which new nodes have others of."""
        ours = [node for node in prompt.values() if node["class_type"] in KINDS]
        said = [
            {
                name: (prompt[value[0]]["class_type"], value[1]) if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            for node in ours
        ]
        return sorted(
            zip((node["class_type"] for node in ours), map(str, map(sorted, map(dict.items, said))), strict=True)
        )

    assert essence(prompt) == essence(on_page)


def test_width_and_height_of_the_five_days_when_they_were_the_other_way_round(migrate):
    for day in PIPED:
        w = piped("text", day)
        w.change("sampler", width=768, height=432)
        latent = values_of(migrate(w)[0], "CogVideoX15EmptyLatent")
        assert (latent["width"], latent["height"]) == (768, 432), day


def test_the_first_versions_one_node_for_both_prompts_becomes_two(migrate, pack):
    w = piped("text", "2024-08-06")
    w.add("CogVideoEncodePrompt", "both", pipeline=("loader", 0), prompt="a panda", negative_prompt="blurry")
    w.change("sampler", positive=("both", 0), negative=("both", 1))
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    sampler = node_of(page, "CogVideoX15Sampler")
    prompts = {}
    for name in ("positive", "negative"):
        number = next(socket["link"] for socket in sampler["inputs"] if socket["name"] == name)
        origin = next(link[1] for link in workflows.links_of(page) if link[0] == number)
        node = next(node for node in page["nodes"] if node["id"] == origin)
        prompts[name] = node["widgets_values_named"]["prompt"]
        assert source_of(page, node, "text_encoder") == ("CogVideoX15ModelLoader", "text_encoder")
    assert prompts == {"positive": "a panda", "negative": "blurry"}


def test_the_two_images_of_the_old_interpolation_are_start_and_end(migrate, pack):
    w = piped("image", "2024-10-30")
    w.add("LoadImage", "last")
    w.add(
        "CogVideoImageInterpolationEncode",
        "both",
        pipeline=("loader", 0),
        start_image=("resize", 0),
        end_image=("last", 0),
    )
    w.change("sampler", image_cond_latents=("both", 0))
    w.change("loader", model="feizhengcong/CogvideoX-Interpolation")
    w.nodes.pop(w.names["encode"])
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    node = node_of(page, "CogVideoX15ImageToVideo")
    assert source_of(page, node, "start_image") == ("ImageResizeKJ", "IMAGE")
    assert source_of(page, node, "end_image") == ("LoadImage", "IMAGE")


def test_pab_and_compiling_were_the_old_loaders(migrate, pack):
    w = piped("text", "2024-10-30")
    w.add("CogVideoPABConfig", "pab", spatial_range=4, spatial_threshold_start=900, spatial_threshold_end=200)
    w.change("loader", pab_config=("pab", 0), fp8_transformer="fastmode")
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)
    assert chain_of(page) == [("Quantize", ["fp8_dynamic"]), ("Cache", ["pab", 0.75, 0.1, 0.8])]
    w.change("loader", compile="torch", fp8_transformer="enabled")
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert chain_of(page) == [
        ("Quantize", ["fp8_weight_only"]),
        ("Cache", ["first_block", 0.75, 0.1, 0.8]),
        ("Compile", ["default", False]),
    ]
    assert said(report, "PAB", "does not go with compiling")


def test_settings_for_compiling_counted_only_where_the_old_loader_compiled(migrate):
    w = piped("text", "2024-11-16")
    w.add("CogVideoXTorchCompileSettings", "settings", dynamic=True)
    w.change("loader", compile_args=("settings", 0))
    assert chain_of(migrate(w)[0]) == []
    w.change("loader", compile="torch")
    assert chain_of(migrate(w)[0]) == [("Compile", ["default", True])]


def test_the_pack_of_minuszone_gave_its_models_to_the_same_samplers(migrate, pack):
    w = piped("text", "2024-10-30")
    w.add("MZ_CogVideoXLoader", "mz", unet_name="cog\\CogVideoX_5b.safetensors", weight_dtype="fp8_e5m2")
    w.change("sampler", pipeline=("mz", 0))
    w.nodes.pop(w.names["loader"])
    for old in (w.page(), w.page("named"), w.api()):
        new, _ = migrate(old)
        values = (
            new
            if "nodes" not in new
            else {
                node["id"]: {"class_type": node["type"], "inputs": node["widgets_values_named"]}
                for node in new["nodes"]
                if node["type"] in KINDS
            }
        )
        loader = next(node["inputs"] for node in values.values() if node["class_type"] == "CogVideoX15ModelLoader")
        assert (loader["model"], loader["vae_name"], loader["dtype"]) == (
            "cog/CogVideoX_5b.safetensors",
            "cogvideox_vae.safetensors",
            "auto",
        )
        assert [n["inputs"]["method"] for n in values.values() if n["class_type"] == "CogVideoX15Quantize"] == [
            "fp8_weight_only"
        ]


def test_temporal_tiles_are_said_where_the_clip_was_longer_than_they(migrate):
    w = piped("text", "2024-09-03")
    w.change("sampler", num_frames=97, scheduler="DDIM", t_tile_length=48)
    page, report = migrate(w)
    assert said(report, "t_tile_length 48")
    assert values_of(page, "CogVideoX15Sampler")["scheduler"] == "ddim"
    w.change("sampler", t_tile_length=97)
    assert not said(migrate(w)[1], "t_tile_length")


def test_a_mask_for_inpainting_is_refused(migrate):
    w = piped("image", "2024-10-30")
    w.change("encode", mask=("picture", 1))
    with pytest.raises(ValueError, match="an inpainting mask.*LoadImage.*nothing was written"):
        migrate(w)


# --- What is said ---


@pytest.mark.parametrize(
    ("name", "ours", "is_same"),
    [
        *(("CogVideoXDDIM", "ddim", True), ("CogVideoXDPMScheduler", "dpm", True), ("DPM", "dpm", True)),
        *(("DPM++", "dpm", False), ("Euler A", "ddim", False)),
    ],
)
def test_schedulers_that_are_not_here_are_said(migrate, name, ours, is_same):
    w = text_to_video()
    w.change("sampler", scheduler=name)
    page, report = migrate(w)
    assert values_of(page, "CogVideoX15Sampler")["scheduler"] == ours
    assert bool(said(report, name, ours)) == (not is_same)
    assert bool(said(report, "25 steps may be too few", ours)) == (not is_same)
    w.add("INTConstant", "steps", value=60)
    w.change("sampler", steps=("steps", 0))
    for old in (w.page(), w.api()):
        assert not said(migrate(old)[1], "too few")


def test_plain_ddim_is_ours_but_for_2b(migrate):
    """Their DDIM is diffusers' DDIMScheduler with CogVideoXDDIMScheduler's config: the same steps where the config
    shifts nothing."""
    for model, is_5b in (("THUDM/CogVideoX-5b", True), ("THUDM/CogVideoX-2b", False)):
        config = identify({"use_rotary_positional_embeddings": is_5b}).scheduler_config
        schedulers = [kind.from_config(config) for kind in (DDIMScheduler, CogVideoXDDIMScheduler)]
        made = []
        for scheduler in schedulers:
            scheduler.set_timesteps(10)
            latents = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
            for timestep in scheduler.timesteps:
                latents = scheduler.step(latents.tanh(), timestep, latents, return_dict=False)[0]
            made.append(latents)
        same = torch.allclose(*made, rtol=1e-4, atol=1e-5)
        w = with_loader("DownloadAndLoadCogVideoModel", model=model)
        w.change("sampler", scheduler="DDIM")
        page, report = migrate(w)
        assert values_of(page, "CogVideoX15Sampler")["scheduler"] == "ddim"
        assert same == (not said(report, "scheduler DDIM")) == is_5b


@pytest.mark.parametrize(
    ("frames", "length"),
    [
        (48, 49),
        (50, 49),
        (41, 49),
        (40, 33),
        (1, 1),
        (2, 17),
        (5, 17),
        (16, 17),
        (1000, 993),
        (161, 161),
        (10**30, 16001),
    ],
)
def test_a_length_that_the_model_cannot_make_becomes_the_nearest_and_no_video_a_still(migrate, pack, frames, length):
    for use in (text_to_video, image_to_video):
        w = use()
        w.change("sampler", num_frames=frames)
        page, report = migrate(w)
        workflows.check(page, pack, FILES)
        node = node_of(page, "CogVideoX15EmptyLatent" if use is text_to_video else "CogVideoX15ImageToVideo")
        assert node["widgets_values_named"]["length"] == length
        assert bool(said(report, f"num_frames {frames} became length {length}")) == (frames != length)


@pytest.mark.parametrize(
    ("frames", "length"), [(41, 41), (25, 25), (9, 9), (2, 9), (7, 9), (8, 9), (13, 17), (48, 49), (1, 1)]
)
@pytest.mark.parametrize("model", ["THUDM/CogVideoX-5b", "THUDM/CogVideoX-2b"])
def test_1_0_keeps_its_own_8n_plus_1(migrate, pack, model, frames, length):
    for use, name in ((text_to_video, model), (image_to_video, f"{model}-I2V")):
        w = use()
        w.change("loader", model=name)
        w.change("sampler", num_frames=frames)
        page, report = migrate(w)
        workflows.check(page, pack, FILES)
        node = node_of(page, "CogVideoX15EmptyLatent" if use is text_to_video else "CogVideoX15ImageToVideo")
        assert node["widgets_values_named"]["length"] == length
        assert bool(said(report, f"num_frames {frames} became length {length}")) == (frames != length)
        # It is not only written: the node takes it.
        made = pack.NODE_CLASS_MAPPINGS[node["type"]]
        assert made.VALIDATE_INPUTS(width=720, height=480, length=length, batch_size=1) is True
        if use is text_to_video:
            (latent,) = made().run(width=32, height=32, length=length)
            assert latent["samples"].shape[2] == (length - 1) // 4 + 1


def test_a_wrong_length_that_comes_over_a_link_is_cut_from_it(migrate):
    w = text_to_video()
    w.add("INTConstant", "frames", value=50)
    w.change("sampler", num_frames=("frames", 0))
    page, report = migrate(w)
    latent = node_of(page, "CogVideoX15EmptyLatent")
    assert source_of(page, latent, "length") is None
    assert latent["widgets_values_named"]["length"] == 49
    assert said(report, "num_frames 50 became length 49", "link")


@pytest.mark.parametrize(("width", "fits"), [(1000, 1008), (1016, 1024), (1024, 1024), (8, 16)])
def test_a_size_that_is_no_multiple_of_16_becomes_the_nearest(migrate, pack, width, fits):
    latent, picture = text_to_video(), image_to_video()
    latent.change("size", width=width)
    picture.change("resize", width=width)
    for w, kind in ((latent, "CogVideoX15EmptyLatent"), (picture, "CogVideoX15ImageToVideo")):
        page, report = migrate(w)
        workflows.check(page, pack, FILES)
        assert values_of(page, kind)["width"] == fits
        assert bool(said(report, f"width {width} became {fits}")) == (width != fits)
        if kind == "CogVideoX15ImageToVideo":
            assert (source_of(page, node_of(page, kind), "width") is None) == (width != fits)


def test_sizes_of_other_resizers_and_of_none(migrate):
    w = image_to_video()
    w.add("ImageScale", "scale", image=("picture", 0), width=768, height=1024)
    w.change("encode", start_image=("scale", 0))
    page, report = migrate(w)
    assert values_of(page, "CogVideoX15ImageToVideo") == {"width": 768, "height": 1024, "length": 49, "batch_size": 1}
    assert not said(report, "as large as its start image")
    w.change("encode", start_image=("picture", 0))
    page, report = migrate(w)
    assert values_of(page, "CogVideoX15ImageToVideo")["width"] == 1360
    assert said(report, "as large as its start image", "1360x768")


def test_a_picture_that_keeps_its_proportions_gives_its_size_over_a_link(migrate):
    w = image_to_video()
    w.change("resize", keep_proportion=True)
    page, _ = migrate(w)
    assert source_of(page, node_of(page, "CogVideoX15ImageToVideo"), "height") == ("ImageResizeKJ", "height")


def test_what_is_not_here_is_left_out_and_said(migrate, pack):
    w = text_to_video()
    w.add("CogVideoContextOptions", "context")
    w.add("CogVideoEnhanceAVideo", "feta")
    w.add("CogVideoTransformerEdit", "edit")
    w.add("CogVideoLatentPreview", "preview", samples=("sampler", 0))
    w.add("PreviewImage", "shown", images=("preview", 0))
    w.change("sampler", context_options=("context", 0), feta_args=("feta", 0))
    w.change("loader", block_edit=("edit", 0))
    w.change("positive", strength=1.3)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    for words in (
        ("Context windows",),
        ("Enhance-A-Video",),
        ("Removing blocks",),
        ("preview of latents",),
        ("PreviewImage", "images is not connected any more"),
        ("strength 1.3",),
    ):
        assert len(said(report, *words)) == 1, words
    assert any("tiling" in line for line in report.not_needed)


def test_a_link_that_nothing_here_takes_is_said(migrate, pack):
    w = text_to_video()
    w.add("StringConstant", "choice")
    w.add("INTConstant", "number")
    w.change("sampler", scheduler=("choice", 0), steps=("number", 0))
    w.change("loader", precision=("choice", 0), quantization=("choice", 0), load_device=("choice", 0))
    w.change("positive", strength=("number", 0), force_offload=("number", 0))
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert len(said(report, "came over a link")) == 4
    for name in ("scheduler", "precision", "quantization", "strength"):
        assert said(report, f"{name} came over a link")
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "steps") == ("INTConstant", "value")


def test_text_is_read_where_prompt_is_missing(migrate):
    prompt = text_to_video().api()
    encode = [node for node in prompt.values() if node["class_type"] == "CogVideoTextEncode"]
    prompt["900"] = {"class_type": "StringConstant", "inputs": {"string": "a city"}}
    encode[0]["inputs"]["text"] = encode[0]["inputs"].pop("prompt")
    encode[1]["inputs"].pop("prompt")
    encode[1]["inputs"]["text"] = ["900", 0]
    new, report = migrate(prompt)
    prompts = [node["inputs"]["prompt"] for node in new.values() if node["class_type"] == "CogVideoX15TextEncode"]
    assert prompts == ["A panda plays the guitar.", ["900", 0]]
    assert not said(report, "text")


def test_denoise_without_a_clip_did_nothing_and_does_nothing(migrate):
    for use in (text_to_video, image_to_video):
        w = use()
        w.change("sampler", denoise_strength=0.6)
        page, report = migrate(w)
        assert values_of(page, "CogVideoX15Sampler")["denoise"] == 1.0
        assert said(report, "denoise_strength became 1")


def test_weighted_words_of_a_prompt_are_said(migrate):
    w = text_to_video()
    w.change("negative", prompt="(blurry:1.3), low quality")
    assert said(migrate(w)[1], "(word:1.2)")


def test_image_settings_that_are_not_here_are_said(migrate):
    w = image_to_video()
    w.change("encode", noise_aug_strength=0.03, strength=0.9, start_percent=0.1, end_percent=0.5, enable_tiling=True)
    _, report = migrate(w)
    for name in ("noise_aug_strength 0.03", "strength 0.9", "start_percent 0.1", "end_percent 0.5"):
        assert len(said(report, name)) == 1


def test_a_node_of_others_that_took_the_vae_is_told_about(migrate, pack):
    w = text_to_video()
    w.change("save", vae=("loader", 1))
    for old in (w.page(), w.api()):
        _, report = migrate(old)
        assert said(report, "VHS_VideoCombine", "vae is not connected any more")
    page, _ = migrate(w)
    workflows.check(page, pack, FILES)


def test_the_report_is_printed_and_in_the_workflow(migrate, tmp_path):
    page, report = migrate(text_to_video())
    assert report.text.startswith(f"{tmp_path / 'new.json'}: 6 nodes were replaced, 3 others stay as they are.\n")
    note = nodes_of(page, "Note")[-1]
    assert note["widgets_values"] == [report.notes]
    assert report.notes in report.text
    assert nodes_of(page, "Note")[0]["widgets_values"] == ["Mind the seed."]


def test_a_missing_connection_is_said(migrate):
    w = text_to_video()
    w.change("sampler", negative=None, samples=None)
    page, report = migrate(w)
    assert said(report, "nothing is connected to negative")
    assert said(report, "nothing gave it a size: 1360x768")
    assert source_of(page, node_of(page, "CogVideoX15Sampler"), "latent_image") == ("CogVideoX15EmptyLatent", "latent")


def test_a_value_of_another_version_of_the_node_is_said_and_not_taken(migrate, pack):
    w = text_to_video()
    w.change("sampler", steps="many", denoise_strength=True, cfg=float("nan"), num_frames=10**400)
    w.change("positive", strength=10**400)
    page, report = migrate(w)
    workflows.check(page, pack, FILES)
    assert values_of(page, "CogVideoX15Sampler")["cfg"] == 6.0
    assert said(report, "steps is 'many'")
    assert said(report, "denoise_strength is True")


def test_numbers_that_programs_write_as_texts_or_with_a_point_are_numbers(migrate):
    def changed(as_text):
        w = text_to_video()
        w.add("INTConstant", "frames", value=as_text(33))
        w.change("sampler", seed=as_text(12345), steps=as_text(25), cfg=as_text(7), num_frames=("frames", 0))
        w.change("size", width=as_text(1360), height=as_text(768))
        return migrate(w.api())

    expected, report = changed(int)
    for as_text in (str, float):
        found, other = changed(as_text)
        assert {id_: node for id_, node in found.items() if node["class_type"] in KINDS} == {
            id_: node for id_, node in expected.items() if node["class_type"] in KINDS
        }
        assert other.differs == report.differs


@pytest.mark.parametrize("as_text", [str, float])
def test_so_are_those_of_a_node_that_scales_a_start_image(migrate, as_text):
    w = image_to_video()
    w.add("ImageScale", "scale", image=("picture", 0), width=as_text(768), height=as_text(1024))
    w.change("encode", start_image=("scale", 0))
    page, _ = migrate(w)
    assert node_of(page, "CogVideoX15ImageToVideo")["widgets_values"][:2] == [768, 1024]


@pytest.mark.parametrize("number", ["nan", "inf", "1e400"])
def test_texts_of_numbers_that_no_widget_has_are_none(migrate, number):
    w = text_to_video()
    w.add("CogVideoLoraSelect", "lora")
    w.add("INTConstant", "strength", value=number)
    w.change("lora", strength=("strength", 0))
    w.change("loader", lora=("lora", 0))
    page, report = migrate(w)
    assert node_of(page, "CogVideoX15LoraLoader")["widgets_values"][1] == 1.0
    assert not said(report, "strength")


# --- What is refused ---


def with_tora():
    w = image_to_video()
    w.add("ToraEncodeTrajectory", "special")
    w.change("sampler", tora_trajectory=("special", 0))
    return w


def with_controlnet():
    w = text_to_video()
    w.add("CogVideoControlNet", "special")
    w.change("sampler", controlnet=("special", 0))
    return w


def with_noise():
    w = text_to_video()
    w.add("GetWarpedNoiseFromVideo", "special")
    # As a script may write it.
    w.change("sampler", samples=("special", 0), denoise_strength="1.0")
    return w


def with_fun():
    w = image_to_video()
    w.change("loader", model="alibaba-pai/CogVideoX-Fun-V1.1-5b-InP")
    return w


def with_fun_encode():
    w = image_to_video()
    w.add("CogVideoImageEncodeFunInP", "special", start_image=("picture", 0))
    w.change("sampler", image_cond_latents=("special", 0))
    return w


def with_a_plain_encode_for_fun():
    w = image_to_video()
    w.change("loader", model="CogVideoX-Fun-V1.5-5b-InP")
    return w


def with_fun_images_as_a_clip():
    w = inpaint()
    w.change("sampler", image_cond_latents=None, samples=("encode", 0))
    return w


def with_a_clip_beside_fun_images():
    w = inpaint()
    w.add("VHS_LoadVideo", "clip")
    w.add("CogVideoImageEncode", "clip encode", vae=("loader", 1), start_image=("clip", 0))
    w.change("sampler", samples=("clip encode", 0), denoise_strength=0.7)
    return w


REFUSED = {
    "Tora": (with_tora, "ToraEncodeTrajectory"),
    "a ControlNet": (with_controlnet, "CogVideoControlNet"),
    "noise that another node makes": (with_noise, "GetWarpedNoiseFromVideo"),
    "a CogVideoX-Fun model other than V1.5": (with_fun, "alibaba-pai/CogVideoX-Fun-V1.1-5b-InP"),
    "image latents of another kind": (with_fun_encode, "CogVideoImageEncodeFunInP"),
    "image latents without a mask": (with_a_plain_encode_for_fun, "CogVideoImageEncode"),
    "latents of images as the clip to start from": (with_fun_images_as_a_clip, "CogVideoImageEncodeFunInP"),
    "a clip to start from beside start and end images": (with_a_clip_beside_fun_images, "CogVideoImageEncode"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_make_another_video_is_refused_and_named(migrate, tmp_path, what):
    build, named = REFUSED[what]
    for old in (build().page(), build().page("named"), build().api()):
        with pytest.raises(ValueError, match=f"{what}.*{re.escape(named)}.*nothing was written"):
            migrate(old)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


@pytest.mark.parametrize("mode", [2, 4])
def test_what_is_switched_off_does_not_stop_the_rest(migrate, pack, mode):
    for what in ("Tora", "a ControlNet", "noise that another node makes"):
        w = REFUSED[what][0]()
        w.change("special", mode=mode)
        page, report = migrate(w)
        workflows.check(page, pack, FILES)
        assert said(report, "left out") or what.startswith("noise")


def test_a_sampler_that_is_switched_off_is_migrated_and_said(migrate):
    w = with_tora()
    w.change("sampler", mode=2)
    page, report = migrate(w)
    assert node_of(page, "CogVideoX15Sampler")["mode"] == 2
    assert said(report, "Tora", "switched off")


def test_an_input_that_is_not_known_is_refused_and_named(migrate):
    w = text_to_video()
    w.add("ConsisIDFaceEncode", "face")
    unknown = {
        "consis_id_cond": ("sampler", "CogVideoSampler"),
        "my_lora": ("loader", "DownloadAndLoadCogVideoModel"),
        "style": ("positive", "CogVideoTextEncode"),
    }
    for name, (place, kind) in unknown.items():
        prompt = w.api()
        prompt[str(w.names[place])]["inputs"][name] = [str(w.names["face"]), 0]
        page = w.page()
        node = next(node for node in page["nodes"] if node["id"] == w.names[place])
        node["inputs"].append({"name": name, "type": "*", "link": 700})
        next(node for node in page["nodes"] if node["id"] == w.names["face"])["outputs"][0]["links"] = [700]
        page["links"].append([700, w.names["face"], 0, node["id"], len(node["inputs"]) - 1, "*"])
        for old in (prompt, page):
            with pytest.raises(
                ValueError, match=f"{kind}.*is given {name} by node .*ConsisIDFaceEncode.*nothing was written"
            ):
                migrate(old)
    # What does not make the picture is named, and the rest migrates.
    prompt = w.api()
    prompt[str(w.names["decode"])]["inputs"]["watermark"] = [str(w.names["face"]), 0]
    assert said(migrate(prompt)[1], "CogVideoDecode", "watermark is connected to", "ConsisIDFaceEncode")


def test_another_node_where_one_kind_is_expected_is_refused_too(migrate):
    w = text_to_video()
    w.add("ConsisIDFaceEncode", "face")
    for name in ("context_options", "feta_args", "fastercache", "teacache_args"):
        w.change("sampler", **{name: ("face", 0)})
        with pytest.raises(ValueError, match=f"given {name} by node .*ConsisIDFaceEncode"):
            migrate(w)
        w.change("sampler", **{name: None})


def test_a_model_from_a_loader_that_is_not_known_is_refused(migrate):
    w = text_to_video()
    w.add("ConsisIDFaceEncode", "other")
    w.change("sampler", model=("other", 0))
    with pytest.raises(ValueError, match="loader that is not known here, ConsisIDFaceEncode"):
        migrate(w)


def test_a_widget_that_is_not_known_is_named(migrate):
    prompt = text_to_video().api()
    sampler = next(node for node in prompt.values() if node["class_type"] == "CogVideoSampler")
    sampler["inputs"]["eta"] = 0.7
    assert said(migrate(prompt)[1], "CogVideoSampler", "eta 0.7 is not known here")


@pytest.mark.parametrize("kind", ["CogVideoXFunSampler", "CogVideoXFunVid2VidSampler", "CogVideoXFunControlSampler"])
def test_the_samplers_of_fun_are_named_as_what_they_are(migrate, kind):
    prompt = {
        "1": {"class_type": "DownloadAndLoadCogVideoModel", "inputs": {}},
        "2": {"class_type": kind, "inputs": {"pipeline": ["1", 0]}},
    }
    with pytest.raises(
        ValueError,
        match=f'node 2 "{kind}".*is a sampler of CogVideoX-Fun 1.0 and V1.1.*not carried over, so nothing was written',
    ):
        migrate(prompt)


@pytest.mark.parametrize("name", ["CogVideoX-Fun-V1.5-5b-Control", "cogvideox_fun_1_5_5b_pose.safetensors"])
def test_models_of_fun_that_read_no_mask_are_refused(migrate, name):
    w = text_to_video()
    w.change("loader", model=name)
    with pytest.raises(ValueError, match="a CogVideoX-Fun model other than V1.5-5b-InP"):
        migrate(w)


def test_a_model_of_another_kind_is_told_by_a_word_and_not_by_letters(migrate):
    w = text_to_video()
    w.change("loader", model="me/CogVideoX-5b-restoration-funny")
    assert values_of(migrate(w)[0], "CogVideoX15ModelLoader")["model"] == "CogVideoX-5b-restoration-funny"


def test_subgraphs_with_the_old_nodes_are_refused_and_others_kept(migrate):
    page = text_to_video().page("new")
    inner = {"id": "x", "name": "Inner", "nodes": [{"id": 1, "type": "CogVideoDecode"}], "links": []}
    outer = {"id": "y", "name": "Outer", "nodes": [{"id": 1, "type": "x"}], "links": []}
    page["definitions"] = {"subgraphs": [inner, outer]}
    page["nodes"].append({"id": 900, "type": "y"})
    with pytest.raises(ValueError, match="subgraph.*Unpack Subgraph"):
        migrate(page)
    inner["nodes"][0]["type"] = "VAEDecode"
    assert migrate(page)[0]["definitions"] == page["definitions"]
    page["extra"]["groupNodes"] = {"mine": {"nodes": [{"type": "CogVideoSampler"}]}}
    for sign in "/>":
        page["nodes"][-1]["type"] = f"workflow{sign}mine"
        with pytest.raises(ValueError, match="group node"):
            migrate(page)
    # What it was told to unpack, and ComfyUI keeps though nothing stands for it any more.
    page["nodes"].pop()
    inner["nodes"][0]["type"] = "CogVideoDecode"
    new, _ = migrate(page)
    assert (new["definitions"], new["extra"]) == (page["definitions"], page["extra"])


def test_a_workflow_without_a_sampler_of_that_pack_is_refused(migrate):
    w = text_to_video()
    page, _ = migrate(w)
    with pytest.raises(ValueError, match="no CogVideoSampler.*of this pack already"):
        migrate(page)
    with pytest.raises(ValueError, match="no CogVideoSampler.*Choose one"):
        migrate({"1": {"class_type": "KSampler", "inputs": {}}})


def test_odd_files_are_migrated_or_refused_in_a_sentence(migrate):
    page = text_to_video().page()
    page["nodes"] += [
        None,
        3,
        {},
        {"type": ["x"]},
        {"id": 900, "type": "Odd", "inputs": [None, {"link": "x"}], "outputs": None, "pos": "left"},
    ]
    page["links"] += [None, [1], ["a", "b", "c", "d", "e"], [801, 900, 0, 901, 0, "X"]]
    page["extra"]["linkExtensions"] = [None]
    new, _ = migrate(page)
    assert "CogVideoX15Sampler" in [node["type"] for node in new["nodes"] if isinstance(node, dict) and "type" in node]
    assert {"id": 900, "type": "Odd", "inputs": [None, {"link": "x"}], "outputs": None, "pos": "left"} in new["nodes"]


ODD = {
    "a place nobody sees": lambda page: page["nodes"][0].update(pos=[1e18, -1e18]),
    "a place of no number": lambda page: page["nodes"][0].update(pos=[float("nan"), float("inf")]),
    "a number of 400 digits": lambda page: page["nodes"][0].update(pos=[10**400, 0], size=[10**400, 3]),
    "a node of 1e18 pixels": lambda page: page["nodes"][1].update(size=[1e18, 1e18]),
    "a name that is a list": lambda page: page["nodes"][0].update(
        inputs=[{"name": ["x"], "type": [], "link": None, "widget": {"name": []}}]
    ),
    "no inputs": lambda page: page["nodes"][0].pop("inputs"),
    "links as an object": lambda page: page.update(links={str(link[0]): link for link in page["links"]}),
    "links in both forms": lambda page: page["links"].append(
        dict(
            zip(
                ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), page["links"].pop(), strict=True
            )
        )
    ),
    "links of an output as a number": lambda page: page["nodes"][0]["outputs"][0].update(links=7),
    "extra as a list": lambda page: page.update(extra=[]),
    "bends of links as numbers": lambda page: page["extra"].update(
        linkExtensions=[1, {"id": []}], reroutes=[{"linkIds": [[], {}]}]
    ),
    "groups of no bounds": lambda page: page.update(groups=[None, {"bounding": "x"}, {"bounding": [float("nan")] * 4}]),
    "a list for a name to set": lambda page: page["nodes"].append(
        {"id": 950, "type": "SetNode", "widgets_values": [["x"]], "inputs": [], "outputs": []}
    ),
    "a mode of none": lambda page: page["nodes"][0].update(mode=[]),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_values_in_a_page_are_carried_along(migrate, pack, what):
    page = text_to_video().page("new")
    ODD[what](page)
    new, _ = migrate(page)
    ours = [node for node in new["nodes"] if node["type"] in KINDS]
    assert len(ours) == 6
    values = values_of(new, "CogVideoX15Sampler")
    assert (values["steps"], values["seed"]) == (25, 123456789)
    note = nodes_of(new, "Note")[-1]
    assert all(abs(number) < 1e7 for number in note["pos"])
    for node in ours:
        for socket in node["inputs"]:
            if socket["link"] is not None:
                assert sum(link[0] == socket["link"] for link in workflows.links_of(new)) == 1


def test_numbers_of_nodes_may_be_texts(migrate, pack):
    page = text_to_video().page()
    for node in page["nodes"]:
        node["id"] = str(node["id"])
    new, _ = migrate(page)
    assert values_of(new, "CogVideoX15EmptyLatent")["width"] == 1360
    by_id = {node["id"]: node for node in new["nodes"]}
    assert all(link[1] in by_id and link[3] in by_id for link in new["links"])


def test_two_nodes_of_one_number_are_refused(migrate):
    page = text_to_video().page()
    page["nodes"][1]["id"] = page["nodes"][0]["id"]
    with pytest.raises(ValueError, match="two nodes with the number 10.*Open it in ComfyUI"):
        migrate(page)


def test_large_pages_are_migrated_or_refused_in_time(migrate):
    """Nodes stacked in one place, bends in a row and samplers without number: none takes longer than its size."""
    w = text_to_video()
    page = w.page()
    sampler = next(node for node in page["nodes"] if node["type"] == "CogVideoSampler")
    pipe = [{"name": "", "type": "*", "link": None}]
    for index in range(1000):
        turn = {
            "id": 10_000 + index,
            "type": "Reroute",
            "pos": [0, 0],
            "inputs": copy.deepcopy(pipe),
            "outputs": [{"name": "", "type": "*", "links": []}],
        }
        turn["inputs"][0]["link"] = 10_000 + index
        page["nodes"] += [turn, copy.deepcopy(sampler) | {"id": 20_000 + index, "pos": [0, 0]}]
        page["links"].append([10_000 + index, 9_999 + index, 0, 10_000 + index, 0, "*"])
    begin = time.process_time()
    new, _ = migrate(page)
    assert time.process_time() - begin < 6
    assert len(nodes_of(new, "CogVideoX15Sampler")) == 1001
    with pytest.raises(ValueError, match="20,001 nodes, and a workflow that a person laid out"):
        migrate({"nodes": [{"id": index} for index in range(20_001)], "links": []})


def test_a_text_that_was_cut_inside_a_character_is_written_as_it_came(migrate):
    w = text_to_video()
    w.change("positive", prompt="熊猫 \ud83d")
    page, _ = migrate(w)
    assert "熊猫 \ud83d" in {node["widgets_values"][0] for node in nodes_of(page, "CogVideoX15TextEncode")}


# --- Files ---


@pytest.fixture
def old(tmp_path):
    file = tmp_path / "old.json"
    file.write_text(json.dumps(text_to_video().page()), encoding="utf-8")
    return file


def test_a_file_that_is_there_is_not_overwritten(old, tmp_path):
    content = old.read_bytes()
    (tmp_path / "new.json").write_text("mine")
    for target in (old, tmp_path / "new.json"):
        with pytest.raises(ValueError, match="never writes over a file"):
            migrate_workflow(old, target)
    assert old.read_bytes() == content
    assert (tmp_path / "new.json").read_text() == "mine"


def test_a_file_that_comes_up_meanwhile_is_not_overwritten(old, tmp_path, monkeypatch):
    sync = os.fsync

    def slow(handle):
        (tmp_path / "new.json").write_text("mine")
        sync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(ValueError, match="not replaced unasked"):
        migrate_workflow(old, tmp_path / "new.json")
    assert (tmp_path / "new.json").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "old.json"]


def test_paths_that_cannot_be_are_told(old, tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        migrate_workflow(tmp_path / "none.json", tmp_path / "new.json")
    with pytest.raises(ValueError, match="does not exist"):
        migrate_workflow(old, tmp_path / "nowhere" / "new.json")
    with pytest.raises(ValueError, match=r"end in \.json"):
        migrate_workflow(old, tmp_path / "new.txt")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        migrate_workflow(tmp_path / "bad.json", tmp_path / "new.json")


def test_a_write_that_fails_leaves_nothing(old, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    content = old.read_bytes()
    for name in ("fsync", "link"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(ValueError, match=r"cannot be written \(.*No space left on device\)"):
                migrate_workflow(old, tmp_path / "new.json")
        assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert old.read_bytes() == content


@pytest.mark.parametrize(
    "arguments", [["--migrate", "old.json", "new.json"], ["--check", "old.json"], ["--check", "inference.yaml"]]
)
def test_neither_migrating_nor_checking_a_config_imports_torch(old, tmp_path, arguments):
    (tmp_path / "inference.yaml").write_text("args:\n  bf16: True\n  sampling_num_frames: 22\n")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import generate; status = generate.main({arguments}); "
    program += "print(sorted({'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys())); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_command_line_migrates_and_reports(old, tmp_path, capsys):
    assert main(["--migrate", str(old), str(tmp_path / "new.json")]) == 0
    assert "6 nodes were replaced" in capsys.readouterr().out
    assert main(["--migrate", str(old), str(tmp_path / "new.json")]) == 1
    assert "never writes over a file" in capsys.readouterr().err


def test_every_node_of_the_old_pack_that_is_made_anew_is_in_the_tests_table():
    assert WIDGETS.keys() - {"CogVideoX15ModelLoader", "CogVideoLoraSelectComfy"} <= NODES.keys()
    for kind, names in WIDGETS.items():
        if kind in NODES:
            assert tuple(NODES[kind][1])[: len(names)] == names
