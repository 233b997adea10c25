"""The lists to choose from hold each CogVideoX checkpoint and part once, with what it is, and nothing else."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox.checkpoint import catalogue
from cogvideox.checkpoint.catalogue import find_entry, list_checkpoints, list_parts
from cogvideox.checkpoint.layout import open_checkpoint, open_part
from cogvideox.handles import open_handles
from tests import layouts
from tests.conftest import CPU
from tests.helpers import lock

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
    shutil.copytree(
        tmp_path / "CogVideo" / "both" / "transformer_I2V", tmp_path / "CogVideo" / "both" / "transformer_T2V"
    )
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
    return list_checkpoints(
        [models / "CogVideo", models / "diffusers"], [models / "CogVideo", models / "diffusion_models"]
    )


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
    assert [entry.label for entry in list_parts("vae", [models / "vae"])] == [
        "cog_vae.safetensors · CogVideoX VAE · fp32 · diffusers"
    ]


def test_a_released_model_is_not_named_twice():
    assert catalogue._without("CogVideoX1.5-5B-I2V · bf16 · diffusers", "CogVideoX1.5-5B-I2V") == "bf16 · diffusers"
    assert (
        catalogue._without("CogVideoX1.5-5B · bf16 · ComfyUI", "cog.safetensors") == "CogVideoX1.5-5B · bf16 · ComfyUI"
    )


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


def change_transformer(folder, edit):
    """The transformer of a checkpoint's folder, edited, in one file."""
    state = {}
    for file in sorted((folder / "transformer").glob("*.safetensors*")):
        state |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    edit(state)
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_what_cannot_run_is_not_offered(models, source):
    """Wan's UMT5, other latents, other inputs, other programs' packing, one piece of several: none of them in the
    lists."""
    from tests.tiny_checkpoint import build_text_encoder, build_transformer

    umt5 = build_text_encoder().state_dict()
    umt5["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.ones(32, 2)
    layouts.write_file(models / "text_encoders" / "umt5_xxl.safetensors", umt5)
    layouts.write_file(models / "text_encoders" / "mt5.safetensors", build_text_encoder(vocabulary=70_000).state_dict())
    layouts.write_file(models / "text_encoders" / "model-00001-of-00002.safetensors", build_text_encoder().state_dict())
    vae = type(source[1]["vae"]).from_config(dict(source[1]["vae"].config) | {"latent_channels": 4})
    layouts.write_file(models / "vae" / "other_latents.safetensors", vae.state_dict())
    fun = build_transformer(in_channels=64)
    layouts.write_file(models / "diffusion_models" / "fun.safetensors", fun.state_dict())
    packed = dict(source[1]["transformer"].state_dict())
    packed["transformer_blocks.0.attn1.to_q.weight.absmax"] = torch.ones(3)
    layouts.write_file(models / "diffusion_models" / "nf4.safetensors", packed)
    short = {name: value for name, value in source[1]["transformer"].state_dict().items() if name != "proj_out.bias"}
    layouts.write_file(models / "diffusion_models" / "short.safetensors", short)
    shutil.copytree(source[0], models / "CogVideo" / "fun")
    shutil.rmtree(models / "CogVideo" / "fun" / "transformer")
    fun.save_pretrained(models / "CogVideo" / "fun" / "transformer")
    assert [entry.name for entry in list_parts("text_encoder", [models / "text_encoders"])] == ["t5xxl.safetensors"]
    assert [entry.name for entry in list_parts("vae", [models / "vae"])] == ["cog_vae.safetensors"]
    assert {"fun", "fun.safetensors", "nf4.safetensors", "short.safetensors"}.isdisjoint(
        entry.name for entry in listed(models)
    )


@pytest.mark.parametrize(
    "edit",
    [lambda state: state.pop("proj_out.bias"), lambda state: state.update({"projectors.0.weight": torch.ones(2)})],
    ids=["a tensor missing", "a head of training"],
)
def test_a_folder_that_is_not_whole_is_offered_as_such_until_it_is(models, source, edit):
    folder = models / "CogVideo" / "mine"
    shutil.copytree(source[0], folder)
    change_transformer(folder, edit)
    (entry,) = [entry for entry in listed(models) if entry.name == "mine"]
    assert entry.what == f"CogVideoX1.5-I2V {SIZE} · incomplete · diffusers"
    shutil.rmtree(folder / "transformer")
    shutil.copytree(source[0] / "transformer", folder / "transformer")
    (entry,) = [entry for entry in listed(models) if entry.name == "mine"]
    assert entry.what == f"CogVideoX1.5-I2V {SIZE} · bf16 · diffusers"


def test_entries_know_how_far_their_dtypes_round(tmp_path):
    """Measured on their own weights, the order is the same: fp32, fp16, bf16, Q8_0, fp8 with and without scales, Q5_0,
    e5m2, Q4_0."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    from tests.tiny_checkpoint import build_text_encoder

    torch.manual_seed(0)
    state = {
        name: torch.randn_like(value) / 50
        for name, value in build_text_encoder(width=64).state_dict().items()
        if "embed_tok" not in name
    }
    matrices = {name: value for name, value in state.items() if value.ndim == 2 and value.shape[1] % 32 == 0}
    wide = torch.cat([value.flatten() for value in matrices.values()])
    files, measured = {}, {}

    def note(name, write, rounded):
        files[name] = write(tmp_path / name)
        measured[name] = float((rounded.flatten() - wide).norm() / wide.norm())

    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
        cast = {name: value.to(dtype) if name in matrices else value for name, value in state.items()}
        note(f"{dtype}.safetensors", lambda path, cast=cast: layouts.write_file(path, cast), wide.to(dtype).float())
    scales = {name: value.abs().max() / 448 for name, value in matrices.items()}
    scaled = {
        name: (value / scales[name]).to(torch.float8_e4m3fn) if name in scales else value
        for name, value in state.items()
    }
    scaled |= {f"{name.removesuffix('.weight')}.scale_weight": scale for name, scale in scales.items()}
    rounded = torch.cat([scaled[name].float().flatten() * scales[name] for name in matrices])
    note("scaled.safetensors", lambda path: layouts.write_file(path, scaled), rounded)
    for kind in ("Q8_0", "Q5_0", "Q4_0"):
        number = GGMLQuantizationType[kind]
        rounded = torch.from_numpy(dequantize(quantize(wide.view(-1, 32).numpy(), number), number))
        note(
            f"{kind}.gguf", lambda path, kind=kind: layouts.write_gguf(path, layouts.llama_names(state), kind), rounded
        )
    entries = sorted(list_parts("text_encoder", [tmp_path]), key=lambda entry: entry.rounding)
    assert [entry.name for entry in entries] == sorted(files, key=measured.get)
    assert [entry.what for entry in entries if entry.name == "Q8_0.gguf"] == ["T5 encoder · GGUF Q8_0 · llama.cpp"]


def names(*roots):
    return [entry.name for entry in list_checkpoints(roots, [])]


def test_folders_two_levels_down_are_listed_by_their_path_and_those_one_level_down_as_before(tmp_path, source):
    for place in ("CogVideoX1.5-5B-I2V", "zai-org/CogVideoX1.5-5B-I2V", "THUDM/2024/CogVideoX-5b-I2V"):
        shutil.copytree(source[0], tmp_path / place)
    shutil.copytree(source[0] / "vae", tmp_path / "vae-alone")
    assert names(tmp_path) == ["CogVideoX1.5-5B-I2V", "THUDM/2024/CogVideoX-5b-I2V", "zai-org/CogVideoX1.5-5B-I2V"]


def test_single_files_in_models_checkpoints_are_listed_and_other_models_there_are_not(tmp_path, source):
    state = layouts.comfy_names(source[1]["transformer"].state_dict())
    (tmp_path / "checkpoints" / "video").mkdir(parents=True)
    layouts.write_file(tmp_path / "checkpoints" / "video" / "cog.safetensors", state, "model.diffusion_model.")
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(3)}, tmp_path / "checkpoints" / "sdxl.safetensors"
    )
    # A config of another model beside the files takes none of them away.
    (tmp_path / "checkpoints" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert [entry.name for entry in list_checkpoints([], [tmp_path / "checkpoints"])] == ["video/cog.safetensors"]


@pytest.mark.parametrize(("kind", "name"), [("text_encoder", "model"), ("vae", "diffusion_pytorch_model")])
def test_a_part_in_a_folder_of_its_own_is_listed_and_opens_with_its_config(tmp_path, source, kind, name):
    """As ``hf download`` leaves it: a config.json beside the weights."""
    folder = tmp_path / "mine" / "X"
    folder.mkdir(parents=True)
    shutil.copy(source[0] / kind / "config.json", folder)
    layouts.write_file(folder / f"{name}.safetensors", source[1][kind].state_dict())
    (entry,) = list_parts(kind, [tmp_path])
    assert (entry.name, entry.path) == (f"mine/X/{name}.safetensors", folder / f"{name}.safetensors")
    assert open_part(entry.path, kind).layout == "diffusers"


def test_a_text_encoder_in_shards_is_one_entry_until_one_is_missing(tmp_path, source):
    source[1]["text_encoder"].save_pretrained(tmp_path / "t5" / "text_encoder", max_shard_size="50KB")
    shards = sorted((tmp_path / "t5" / "text_encoder").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    (entry,) = list_parts("text_encoder", [tmp_path])
    assert (entry.label, entry.path) == ("t5/text_encoder · T5 encoder · fp32 · diffusers", shards[0].parent)
    assert list_parts("vae", [tmp_path]) == list_parts("lora", [tmp_path]) == []
    shards[0].unlink()
    assert list_parts("text_encoder", [tmp_path]) == []


def test_a_config_beside_transformers_hides_them_only_where_it_opens_with_one(tmp_path, source):
    state = source[1]["transformer"].state_dict()
    for name in ("repo/cog_fp8", "two/a", "two/b", "whole/diffusion_pytorch_model", "whole/checkpoint-500/cog"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        layouts.write_file(tmp_path / f"{name}.safetensors", state)
    (tmp_path / "repo" / "config.json").write_text("{}")
    for name in ("two", "whole"):
        shutil.copy(source[0] / "transformer" / "config.json", tmp_path / name)
    shutil.copytree(tmp_path / "whole", tmp_path / "checkpoint" / "transformer")
    assert {entry.name: entry.is_whole for entry in list_checkpoints([], [tmp_path])} == {
        "repo/cog_fp8.safetensors": True,
        "two": False,
        "two/a.safetensors": True,
        "two/b.safetensors": True,
        "whole": True,
        "whole/checkpoint-500/cog.safetensors": True,
        "checkpoint": True,
        "checkpoint/transformer/checkpoint-500/cog.safetensors": True,
    }


def test_a_checkpoint_that_is_listed_already_is_not_listed_as_its_file_too(tmp_path, source):
    """Two roots with a folder of one name."""
    folder = source[0]
    for root in ("a", "b"):
        (tmp_path / root / "X" / "transformer").mkdir(parents=True)
        shutil.copy(folder / "transformer" / "config.json", tmp_path / root / "X" / "transformer")
        layouts.write_file(
            tmp_path / root / "X" / "transformer" / "diffusion_pytorch_model.safetensors",
            source[1]["transformer"].state_dict(),
        )
    roots = [tmp_path / "a", tmp_path / "b"]
    assert [entry.name for entry in list_checkpoints(roots, roots)] == ["X"]


def test_parts_in_torchs_own_files_are_listed_too(tmp_path, source):
    modules = source[1]
    states = {name: module.state_dict() for name, module in modules.items()}
    torch.save({"state_dict": layouts.sat_vae_names(states["vae"])}, tmp_path / "3d-vae.pt")
    torch.save(states["text_encoder"], tmp_path / "t5xxl.bin")
    torch.save(states["transformer"], tmp_path / "cog.pth")
    torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(3)}}, tmp_path / "sd.ckpt")
    layouts.write_sat(tmp_path / "sat", modules)
    for kind, name in (("vae", "3d-vae.pt"), ("text_encoder", "t5xxl.bin")):
        assert name in [entry.name for entry in list_parts(kind, [tmp_path])]
    # SAT's weights are those of their folder.
    assert [entry.name for entry in list_checkpoints([], [tmp_path])] == ["sat", "cog.pth"]
    # In several pieces they are no model, and none of them is one.
    weights = tmp_path / "sat" / "transformer" / "1000" / "mp_rank_00_model_states.pt"
    shutil.copy(weights, weights.with_name("mp_rank_01_model_states.pt"))
    assert [entry.name for entry in list_checkpoints([], [tmp_path])] == ["cog.pth"]


def test_a_download_that_is_not_finished_is_not_listed_until_it_is(tmp_path, source):
    """aria2 gives a file its full length at once, and its time does not change with the last step."""
    file = layouts.write_file(tmp_path / "cog.safetensors", source[1]["transformer"].state_dict())
    control = tmp_path / "cog.safetensors.aria2"
    control.write_bytes(b"\0\1")
    assert list_checkpoints([], [tmp_path]) == []
    with pytest.raises(ValueError, match=r"its download is not finished, says cog\.safetensors\.aria2 beside it"):
        open_checkpoint(file)
    control.unlink()
    assert [entry.name for entry in list_checkpoints([], [tmp_path])] == ["cog.safetensors"]
    assert open_checkpoint(file)


BAD = {
    "a config that is nested deeply": lambda folder: (folder / "transformer" / "config.json").write_text("[" * 50_000),
    "a config that is no object": lambda folder: (folder / "transformer" / "config.json").write_text("3"),
    "a config whose class is a list": lambda folder: change(
        folder / "transformer" / "config.json", _class_name=["CogVideoXTransformer3DModel"]
    ),
    "an index of nothing": lambda folder: change(
        next((folder / "transformer").glob("*.index.json")), weight_map={"a": None}
    ),
    "an index that is a folder": lambda folder: as_folder(next((folder / "transformer").glob("*.index.json"))),
    "a pipe in the place of a config": lambda folder: as_pipe(folder / "transformer" / "config.json"),
    "a model_index that is no text": lambda folder: (folder / "model_index.json").write_bytes(b"\xff\xfe\x00"),
    "a latest of many letters": lambda folder: (folder / "latest").write_text("a" * 5000),
    "a link that leads back": lambda folder: (folder / "again").symlink_to(folder),
    "a link to itself": lambda folder: (folder / "self").symlink_to(folder / "self"),
    "a link to itself beside it, and one that leads there": lambda folder: [
        (folder.parent / "self").symlink_to(folder.parent / "self"),
        (folder / "again").symlink_to(folder.parent),
    ],
    "many links that lead back": lambda folder: [
        (folder / f"again{number}").symlink_to(folder.parent) for number in range(30)
    ],
    "folders without end": lambda folder: folder.joinpath(*["deeper"] * 60).mkdir(parents=True),
}


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def as_folder(file):
    file.unlink()
    file.mkdir()


def as_pipe(file):
    file.unlink()
    os.mkfifo(file)


def test_a_folder_in_a_checkpoint_that_may_not_be_read_does_not_hide_it(tmp_path, source, monkeypatch):
    shutil.copytree(source[0], tmp_path / "mine")
    lock(tmp_path / "mine" / "locked", monkeypatch)
    assert [entry.name for entry in list_checkpoints([tmp_path], [])] == ["mine"]


def test_what_modelscope_is_downloading_is_not_listed(tmp_path, source):
    shutil.copytree(source[0], tmp_path / "ZhipuAI" / "CogVideoX1___5-5B")
    shutil.copytree(source[0], tmp_path / "._____temp" / "ZhipuAI" / "CogVideoX1.5-5B-I2V")
    assert [entry.name for entry in list_checkpoints([tmp_path], [tmp_path])] == ["ZhipuAI/CogVideoX1___5-5B"]


@pytest.mark.parametrize("how", BAD)
def test_a_bad_folder_costs_itself_alone(tmp_path, source, how):
    for name in ("a", "b", "c"):
        shutil.copytree(source[0], tmp_path / name)
    BAD[how](tmp_path / "b")
    begun = time.perf_counter()
    listed = list_checkpoints([tmp_path], [tmp_path])
    assert time.perf_counter() - begun < 5
    opens = {"b"} if "link" in how else set()
    assert {"a", "c"} | opens <= {entry.name for entry in listed} <= {"a", "b", "c"}
    assert all(" · bf16 · diffusers" in entry.label for entry in listed if entry.name != "b")


def test_an_entry_is_found_by_the_name_it_had_elsewhere(models):
    (models / "CogVideo" / "sat").rename(models / "CogVideo" / "moved")
    (models / "CogVideo" / "org").mkdir()
    (models / "CogVideo" / "moved").rename(models / "CogVideo" / "org" / "sat")
    entries = listed(models)
    found = find_entry(entries, "org/sat")
    assert found.path == models / "CogVideo" / "org" / "sat"
    # Saved before it was moved; saved on Windows; from a folder whose name has what stands between a name and what it
    # is.
    assert find_entry(entries, "sat · CogVideoX1.5-I2V · bf16 · SAT") == found
    assert find_entry(entries, "org\\sat") == found
    assert find_entry(entries, "wan\\CogVideoX1.5_fp8.safetensors").name == "wan/CogVideoX1.5_fp8.safetensors"
    assert find_entry(entries, "") is None
    shutil.copytree(found.path, models / "CogVideo" / "a · b")
    assert (
        find_entry(listed(models), next(entry.label for entry in listed(models) if entry.name == "a · b")).name
        == "a · b"
    )
    # Two of a name are not told apart.
    shutil.copytree(found.path, models / "CogVideo" / "other" / "sat")
    assert find_entry(listed(models), "sat") is None


def test_many_unrelated_files_are_looked_at_quickly(tmp_path, source):
    save_file({f"layer.{number}.weight": torch.ones(1) for number in range(1000)}, tmp_path / "0.safetensors")
    for number in range(1, 500):
        os.link(tmp_path / "0.safetensors", tmp_path / f"{number}.safetensors")
    (tmp_path / "below").mkdir()
    layouts.write_file(tmp_path / "below" / "cog.safetensors", source[1]["transformer"].state_dict())
    times = []
    for _ in range(4):
        begun = time.process_time()
        assert [entry.name for entry in list_checkpoints([], [tmp_path])] == ["below/cog.safetensors"]
        times.append(time.process_time() - begun)
    assert times[0] < 0.5
    assert min(times[1:]) < 0.05
