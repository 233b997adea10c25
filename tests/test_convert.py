"""A converted checkpoint holds the same weights, opens in diffusers and here, needs little memory, and is there whole
or not at all."""

import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideox.checkpoint import convert, shards
from cogvideox.checkpoint.convert import convert_checkpoint
from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.dtypes import Precision
from cogvideox.handles import open_handles
from cogvideox.loading import load_module
from tests import layouts
from tests.conftest import CPU
from tests.helpers import CLASSES, run_apart
from tests.layouts import LAYOUTS
from tests.tiny_checkpoint import build_transformer

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
ALL_LAYOUTS = {"diffusers' folder": (lambda folder, source: source[0], "diffusers")} | LAYOUTS
KINDS = tuple(CLASSES)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in diffusers layout, and its modules."""
    return layouts.build_modules(tmp_path_factory.mktemp("convert") / "diffusers")


def state(modules, kind, dtype=None):
    """The tensors of a module as they are stored: each once."""
    return {
        name: value if dtype is None else value.to(dtype)
        for name, value in modules[kind].state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }


def read(place):
    """Every tensor of a file, or of the files in a folder, as safetensors reads them."""
    tensors = {}
    for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        loaded = load_file(file)
        assert not tensors.keys() & loaded.keys()
        tensors |= loaded
    return tensors


def same(ours, theirs):
    """Equal bit for bit, in the same dtypes."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert torch.equal(
            ours[name].reshape(-1).view(torch.uint8), value.contiguous().reshape(-1).view(torch.uint8)
        ), name
    return True


def pretrained(folder, kind, **options):
    library, name = CLASSES[kind]
    return getattr(importlib.import_module(library), name).from_pretrained(folder / kind, **options)


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ALL_LAYOUTS)
def test_every_layout_becomes_a_folder_that_diffusers_opens(tmp_path, source, name):
    write, layout = ALL_LAYOUTS[name]
    checkpoint = open_checkpoint(write(tmp_path / "x", source))
    report = convert_checkpoint(checkpoint, tmp_path / "converted")
    again = open_checkpoint(tmp_path / "converted")
    assert report.parts[0].layout == layout
    assert (
        [part.kind for part in report.parts] == [kind for kind in KINDS if kind in checkpoint.parts] == [*again.parts]
    )
    for kind, part in again.parts.items():
        assert same(read(tmp_path / "converted" / kind), state(source[1], kind))
        assert part.stored == checkpoint.parts[kind].stored
        assert dict(part.config) == dict(checkpoint.parts[kind].config)
        stored = next(iter(part.stored))
        assert same(
            pretrained(tmp_path / "converted", kind, torch_dtype=stored).state_dict(), source[1][kind].state_dict()
        )
        assert same(
            load_module(part, Precision(stored), torch.device("cpu")).state_dict(), source[1][kind].state_dict()
        )
    assert again.variant == checkpoint.variant
    assert dict(again.scheduler_config) == dict(checkpoint.scheduler_config)


@pytest.mark.parametrize("name", ALL_LAYOUTS)
def test_every_layout_becomes_one_file_of_the_transformer(tmp_path, source, name):
    checkpoint = open_checkpoint(ALL_LAYOUTS[name][0](tmp_path / "x", source))
    file = tmp_path / "converted.safetensors"
    report = convert_checkpoint(checkpoint, file)
    assert same(read(file), state(source[1], "transformer"))
    assert report.nbytes == file.stat().st_size
    again = open_checkpoint(file)
    assert [*again.parts] == ["transformer"]
    assert again.part("transformer").layout == "diffusers file"
    assert again.variant == checkpoint.variant
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["config"]) == dict(checkpoint.part("transformer").config)


@pytest.mark.parametrize("variant", ["1.5", "1.5-i2v", "fun-inp", "void", "5b", "2b"])
def test_diffusers_pipeline_opens_the_folder_of_every_variant(tmp_path, checkpoints, variant):
    import diffusers

    folder = tmp_path / "converted"
    convert_checkpoint(open_checkpoint(checkpoints(variant)), folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=FP32)
    wanted = diffusers.DiffusionPipeline.from_pretrained(checkpoints(variant), torch_dtype=FP32)
    assert type(pipe) is type(wanted)
    for kind in KINDS:
        assert same(getattr(pipe, kind).state_dict(), getattr(wanted, kind).state_dict())
    assert dict(pipe.scheduler.config) == dict(wanted.scheduler.config)
    assert pipe.tokenizer("a panda").input_ids == wanted.tokenizer("a panda").input_ids
    assert everything_in(folder / "tokenizer") == ["spiece.model"]


@pytest.mark.parametrize("variant", ["1.5", "1.5-i2v"])
def test_a_vae_that_several_share_is_written_as_the_transformer_needs_it(tmp_path, checkpoints, variant):
    """Its ``invert_scale_latents`` is that of only one of them; a start image's latents would be half as large, or
    twice."""
    shared, folder = tmp_path / "shared", tmp_path / "converted"
    shutil.copytree(checkpoints("1.5" if variant == "1.5-i2v" else "1.5-i2v"), shared)
    shutil.rmtree(shared / "transformer")
    shutil.copytree(checkpoints(variant) / "transformer", shared / "transformer_X")
    convert_checkpoint(open_checkpoint(shared / "transformer_X"), folder)
    given = open_checkpoint(checkpoints(variant), vae=shared / "vae")
    convert_checkpoint(given, tmp_path / "given")
    for converted in (folder, tmp_path / "given"):
        config = json.loads((converted / "vae" / "config.json").read_text())
        assert config["invert_scale_latents"] == (variant == "1.5-i2v")
        assert scales_of(converted) == scales_of(shared / "transformer_X")


def scales_of(path):
    model = open_handles(path, "fp32", CPU).model
    return model.latent_scale, model.image_latent_scale


def test_diffusers_pipeline_opens_a_folder_without_a_text_encoder(tmp_path, source):
    from diffusers import CogVideoXPipeline

    convert_checkpoint(open_checkpoint(layouts.write_sat(tmp_path / "sat", source[1])), tmp_path / "converted")
    pipe = CogVideoXPipeline.from_pretrained(
        tmp_path / "converted", text_encoder=None, tokenizer=None, torch_dtype=FP32
    )
    assert same(pipe.vae.state_dict(), source[1]["vae"].state_dict())
    assert pipe.vae.config.scaling_factor == 0.7


def test_parts_from_files_of_their_own_are_put_together(tmp_path, source):
    """The tokenizer's folder is that of the text encoders: only its files are taken."""
    (tmp_path / "parts").mkdir()
    names = {"text_encoder": "t5.safetensors", "vae": "vae.safetensors"}
    files = {
        kind: layouts.write_file(tmp_path / "parts" / name, state(source[1], kind)) for kind, name in names.items()
    }
    shutil.copy(source[0] / "tokenizer" / "spiece.model", tmp_path / "parts")
    transformer = layouts.write_file(tmp_path / "x.safetensors", layouts.comfy_names(state(source[1], "transformer")))
    convert_checkpoint(open_checkpoint(transformer, **files), tmp_path / "converted")
    assert all(same(read(tmp_path / "converted" / kind), state(source[1], kind)) for kind in KINDS)
    assert everything_in(tmp_path / "converted" / "tokenizer") == ["spiece.model"]


@pytest.mark.parametrize("names", [["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]])
def test_t5s_token_embedding_is_written_once_under_its_first_name(tmp_path, source, names):
    tensors = state(source[1], "text_encoder")
    tensors |= dict.fromkeys(names, tensors.pop("shared.weight"))
    text_encoder = layouts.write_file(tmp_path / "t5.safetensors", tensors)
    convert_checkpoint(open_checkpoint(source[0], text_encoder=text_encoder), tmp_path / "converted")
    assert same(read(tmp_path / "converted" / "text_encoder"), state(source[1], "text_encoder"))


class TestCasts:
    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
    @pytest.mark.parametrize("name", ["diffusers' folder", "SAT's folder", "one file, ComfyUI's names"])
    def test_a_cast_is_torchs_own_bit_for_bit(self, tmp_path, source, name, dtype):
        checkpoint = open_checkpoint(ALL_LAYOUTS[name][0](tmp_path / "x", source))
        convert_checkpoint(checkpoint, tmp_path / "converted", dtype)
        for kind in checkpoint.parts:
            assert same(read(tmp_path / "converted" / kind), state(source[1], kind, dtype))
        convert_checkpoint(checkpoint, tmp_path / "x.safetensors", dtype)
        assert same(read(tmp_path / "x.safetensors"), state(source[1], "transformer", dtype))

    @pytest.mark.parametrize("chunk", [64, 4096])
    def test_however_small_the_buffer_is(self, tmp_path, source, monkeypatch, chunk):
        monkeypatch.setattr(shards, "_CHUNK", chunk)
        checkpoint = open_checkpoint(layouts.write_sat(tmp_path / "sat", {"transformer": source[1]["transformer"]}))
        convert_checkpoint(checkpoint, tmp_path / "kept.safetensors")
        convert_checkpoint(checkpoint, tmp_path / "cast.safetensors", FP32)
        assert same(read(tmp_path / "kept.safetensors"), state(source[1], "transformer"))
        assert same(read(tmp_path / "cast.safetensors"), state(source[1], "transformer", FP32))

    @pytest.mark.parametrize("dtype", [None, BF16, FP32])
    def test_fp8_is_kept_or_cast_up(self, tmp_path, source, dtype):
        tensors = state(source[1], "transformer", FP8)
        checkpoint = open_checkpoint(layouts.write_file(tmp_path / "fp8.safetensors", tensors))
        convert_checkpoint(checkpoint, tmp_path / "converted.safetensors", dtype)
        assert same(
            read(tmp_path / "converted.safetensors"), {name: value.to(dtype or FP8) for name, value in tensors.items()}
        )

    @pytest.mark.parametrize(("dtype", "chunk"), [(BF16, 1000), (FP32, 1 << 24)])
    def test_scales_of_fp8_weights_are_multiplied_in(self, tmp_path, source, monkeypatch, dtype, chunk):
        """One for a tensor, and one for each row of it."""
        monkeypatch.setattr(shards, "_CHUNK", chunk)
        tensors, wanted = state(source[1], "transformer"), state(source[1], "transformer", dtype)
        for block, scale in enumerate((torch.tensor(0.3), torch.rand(128))):
            name = f"transformer_blocks.{block}.attn1.to_q"
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(FP8)
            tensors[f"{name}.scale_weight"] = scale
            wanted[f"{name}.weight"] = (tensors[f"{name}.weight"].float() * scale.reshape(-1, 1)).to(dtype)
        checkpoint = open_checkpoint(layouts.write_file(tmp_path / "x.safetensors", tensors))
        report = convert_checkpoint(checkpoint, tmp_path / "converted.safetensors", dtype)
        assert same(read(tmp_path / "converted.safetensors"), wanted)
        assert "2 packed tensors were widened" in report.text
        with pytest.raises(ValueError, match=r"2 weights .* packed .* no place for.*Choose a dtype"):
            convert_checkpoint(checkpoint, tmp_path / "kept.safetensors")
        # The scale and the weights are finite, and not what they make together.
        name = "transformer_blocks.1.attn1.to_q"
        tensors[f"{name}.weight"] = torch.full_like(wanted[f"{name}.weight"], 400.0).to(FP8)
        tensors[f"{name}.scale_weight"][-1] = 3e38
        checkpoint = open_checkpoint(layouts.write_file(tmp_path / "loud.safetensors", tensors))
        with pytest.raises(
            ValueError, match=r"transformer_blocks.1.attn1.to_q.weight .* NaN or Inf once they are widened"
        ):
            convert_checkpoint(checkpoint, tmp_path / "spoiled.safetensors", dtype)
        assert not list(tmp_path.glob("spoiled*"))

    @pytest.mark.parametrize("dtype", [BF16, FP32])
    def test_gguf_is_dequantized(self, tmp_path, source, dtype):
        file = layouts.write_gguf(tmp_path / "x.gguf", state(source[1], "transformer"), "Q4_0")
        checkpoint = open_checkpoint(file)
        report = convert_checkpoint(checkpoint, tmp_path / "converted.safetensors", dtype)
        assert report.as_dict()["parts"][0]["widened"] > 10
        assert "GGUF Q4_0" in report.text
        module = load_module(checkpoint.part("transformer"), Precision(FP32), torch.device("cpu"))
        wanted = dict(module.state_dict())
        for name, layer in module.named_modules():
            if getattr(layer, "packed", None) is not None:
                del wanted[f"{name}.packed.data"]
                wanted[f"{name}.weight"] = layer.packed.scaled(dtype)
        assert same(read(tmp_path / "converted.safetensors"), {name: value.to(dtype) for name, value in wanted.items()})
        with pytest.raises(ValueError, match="Choose a dtype"):
            convert_checkpoint(checkpoint, tmp_path / "kept.safetensors")

    def test_mixed_dtypes_are_kept_and_every_tensor_is_aligned(self, tmp_path, source):
        tensors = state(source[1], "transformer")
        tensors["norm_final.weight"] = tensors["norm_final.weight"].to(FP8)
        tensors["proj_out.bias"] = tensors["proj_out.bias"].float()
        checkpoint = open_checkpoint(layouts.write_file(tmp_path / "mixed.safetensors", tensors))
        convert_checkpoint(checkpoint, tmp_path / "kept.safetensors")
        assert same(read(tmp_path / "kept.safetensors"), tensors)
        for stored in open_checkpoint(tmp_path / "kept.safetensors").part("transformer").tensors.values():
            assert stored.offset % stored.dtype.itemsize == 0
        convert_checkpoint(checkpoint, tmp_path / "cast.safetensors", BF16)
        cast = {name: value.to(BF16) for name, value in tensors.items()}
        assert same(read(tmp_path / "cast.safetensors"), cast)

    def test_transformers_loads_the_dtype_it_was_cast_to(self, tmp_path, source):
        """It goes by config.json, which said another."""
        copy = shutil.copytree(source[0], tmp_path / "copy")
        config = copy / "text_encoder" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": "float32", "dtype": "float32"}))
        convert_checkpoint(open_checkpoint(copy), tmp_path / "converted", BF16)
        module = pretrained(tmp_path / "converted", "text_encoder", torch_dtype="auto")
        assert {value.dtype for value in module.state_dict().values()} == {BF16}

    def test_the_audit_counts_what_the_cast_loses(self, tmp_path, source):
        """Among tensors that are put together from rows of another, and others."""
        loud = state(source[1], "transformer", FP32)
        name = "transformer_blocks.0.norm2.linear.weight"
        loud[name] = loud[name].clone()
        # The first and the last of the rows, which lie apart in SAT's file.
        loud[name][0, :3] = torch.tensor([1e-9, 65510.0, 1e-6])
        loud[name][-1, :2] = torch.tensor([float("nan"), -float("inf")])
        module = SimpleNamespace(state_dict=lambda: loud)
        checkpoint = open_checkpoint(layouts.write_sat(tmp_path / "sat", {"transformer": module}))
        report = convert_checkpoint(checkpoint, tmp_path / "converted.safetensors", FP16)
        audit = report.parts[0].audit
        values = torch.cat([value.flatten() for value in loud.values()]).double()
        finite = values[values.isfinite()]
        assert audit.values == len(values)
        assert (audit.nan, audit.inf, audit.beyond_fp16, audit.overflowed) == (1, 1, 1, 0)
        assert audit.flushed == audit.vanished == int(((finite.half() == 0) & (finite != 0)).sum()) > 0
        assert audit.subnormal == int(((finite.half() != 0) & (finite.abs() < 2**-14)).sum()) > 0
        assert all(line in report.text for line in audit.text.splitlines())
        assert same(read(tmp_path / "converted.safetensors"), {key: value.half() for key, value in loud.items()})

    @pytest.mark.parametrize(
        ("dtype", "value", "remedy"), [(FP16, 65520.0, "Convert to bf16"), (BF16, 3.4e38, "Keep the dtype")]
    )
    def test_a_cast_that_would_make_inf_is_refused_before_anything_is_written(
        self, tmp_path, source, dtype, value, remedy
    ):
        tensors = state(source[1], "transformer", FP32)
        tensors["proj_out.bias"] = torch.full_like(tensors["proj_out.bias"], value)
        checkpoint = open_checkpoint(layouts.write_file(tmp_path / "x.safetensors", tensors))
        before = everything_in(tmp_path)
        with pytest.raises(ValueError) as caught:
            convert_checkpoint(checkpoint, tmp_path / "new" / "converted", dtype)
        for words in (f"{len(tensors['proj_out.bias'])} finite weights into Inf", "proj_out.bias", "is black", remedy):
            assert words in str(caught.value)
        assert everything_in(tmp_path) == before


@pytest.mark.parametrize("dtype", [None, FP32])
def test_parts_over_the_limit_are_sharded_with_an_index(tmp_path, source, monkeypatch, dtype):
    from diffusers import CogVideoXPipeline

    limit = 80_000
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    folder = tmp_path / "converted"
    report = convert_checkpoint(open_checkpoint(source[0]), folder, dtype)
    for part, stem in zip(report.parts, ("diffusion_pytorch_model", "model", "diffusion_pytorch_model"), strict=True):
        index = json.loads((folder / part.kind / f"{stem}.safetensors.index.json").read_text())
        count = len(part.files)
        assert count > 1
        assert sorted(set(index["weight_map"].values())) == [
            f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
        ]
        tensors = read(folder / part.kind)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
        for name, size in part.files:
            shard = load_file(folder / name)
            assert size == (folder / name).stat().st_size
            assert sum(value.nbytes for value in shard.values()) <= limit or len(shard) == 1
            assert all(index["weight_map"][key] == name.rpartition("/")[2] for key in shard)
        assert same(tensors, state(source[1], part.kind, dtype))
    pipe = CogVideoXPipeline.from_pretrained(folder, torch_dtype=FP32)
    ours = open_checkpoint(folder)
    for kind in KINDS:
        wanted = {name: value.float() for name, value in source[1][kind].state_dict().items()}
        assert same(getattr(pipe, kind).state_dict(), wanted)
        assert same(load_module(ours.part(kind), Precision(FP32), torch.device("cpu")).state_dict(), wanted)


def sparse_transformer(file):
    """A transformer of over 300 MB, most of it one tensor."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        shapes = build_transformer(num_attention_heads=16, num_layers=1, text_embed_dim=75_000).state_dict()
    return layouts.write_sparse(file, shapes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_tensor_of_300_megabytes_is_converted_in_constant_memory(tmp_path, source):
    """Cast and kept: neither takes 120 MB."""
    big = sparse_transformer(tmp_path / "big.safetensors")
    small = layouts.write_file(tmp_path / "small.safetensors", state(source[1], "transformer"))
    script = """
import re, sys, torch
from pathlib import Path
from cogvideox.checkpoint.convert import convert_checkpoint
from cogvideox.checkpoint.layout import open_checkpoint
big, small, folder = sys.argv[1:]
# Not ru_maxrss: that begins with the memory of the process that started this one.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
convert_checkpoint(open_checkpoint(small), f"{folder}/small", torch.float32)  # imports, first
before = peak()
convert_checkpoint(open_checkpoint(big), f"{folder}/cast.safetensors", torch.bfloat16)
convert_checkpoint(open_checkpoint(f"{folder}/cast.safetensors"), f"{folder}/kept.safetensors")
print(peak() - before)
"""
    grown = int(run_apart(script, big, small, tmp_path))
    sizes = [file.stat().st_size for file in (big, tmp_path / "cast.safetensors", tmp_path / "kept.safetensors")]
    shutil.rmtree(tmp_path)
    assert sizes[0] > 320e6
    assert sizes[1] > 160e6
    assert sizes[2] > 160e6
    assert grown < 120e6


class Cancelled(BaseException):
    """As a host cancels: not even an Exception."""


class TestWholeOrNothing:
    @pytest.mark.parametrize(
        ("target", "error", "dtype"),
        [
            ("deep/er/converted", KeyboardInterrupt, FP32),
            ("converted", Cancelled, None),
            ("deep/converted.safetensors", Cancelled, FP32),
            ("converted.safetensors", ValueError, None),
        ],
    )
    def test_an_interrupted_conversion_leaves_nothing(self, tmp_path, source, target, error, dtype):
        checkpoint, seen = open_checkpoint(source[0]), []
        convert_checkpoint(
            checkpoint, tmp_path / "first" / target, dtype, lambda done, total: seen.append((done, total))
        )
        shutil.rmtree(tmp_path / "first")
        assert seen[-1][0] == seen[-1][1]
        assert seen == sorted(set(seen))
        for stop_at in (seen[0][0], seen[len(seen) // 2][0], seen[-1][0]):

            def stop(done, total, stop_at=stop_at):
                assert not (tmp_path / target).exists()
                if done >= stop_at:
                    raise error("stop")

            with pytest.raises(error, match="stop"):
                convert_checkpoint(checkpoint, tmp_path / target, dtype, stop)
            assert everything_in(tmp_path) == []

    def test_an_interrupted_conversion_into_an_empty_folder_leaves_it_empty(self, tmp_path, source):
        (tmp_path / "empty").mkdir()

        def stop(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(open_checkpoint(source[0]), tmp_path / "empty", on_progress=stop)
        assert everything_in(tmp_path) == ["empty"]
        convert_checkpoint(open_checkpoint(source[0]), tmp_path / "empty")
        assert open_checkpoint(tmp_path / "empty").parts.keys() == set(KINDS)
        assert [path.name for path in tmp_path.iterdir()] == ["empty"]

    @pytest.mark.parametrize("target", ["new/converted", "converted.safetensors"])
    def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
        self, tmp_path, source, monkeypatch, target
    ):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000_000))
        with pytest.raises(RuntimeError, match=r"needs [\d.]+ MB and 1\.00 GB to spare.*only 1\.00 GB free.*Make room"):
            convert_checkpoint(open_checkpoint(source[0]), tmp_path / target)
        assert everything_in(tmp_path) == []

    @pytest.mark.parametrize("target", ["new/converted", "converted.safetensors"])
    def test_a_disk_that_refuses_halfway_leaves_nothing(self, tmp_path, source, target):
        resource = pytest.importorskip("resource")
        checkpoint = open_checkpoint(source[0])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # The system itself then refuses to write on.
        try:
            with pytest.raises(RuntimeError, match=r"cannot be written: File too large.*was removed.*Make room"):
                convert_checkpoint(checkpoint, tmp_path / target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert everything_in(tmp_path) == []

    def test_a_full_disk_that_shows_late_leaves_nothing(self, tmp_path, source, monkeypatch):
        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(convert.os, "fsync", full)
        with pytest.raises(RuntimeError, match="cannot be written: No space left on device"):
            convert_checkpoint(open_checkpoint(source[0]), tmp_path / "converted")
        assert everything_in(tmp_path) == []

    def test_a_source_that_shrinks_meanwhile_leaves_nothing(self, tmp_path, source):
        copy = shutil.copytree(source[0], tmp_path / "copy")
        checkpoint = open_checkpoint(copy)
        file = checkpoint.part("vae").files[-1]
        os.truncate(file, file.stat().st_size - 10)
        with pytest.raises(ValueError, match="truncated"):
            convert_checkpoint(checkpoint, tmp_path / "converted")
        file.unlink()
        with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
            convert_checkpoint(checkpoint, tmp_path / "converted")
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]


class TestRefusals:
    """Each says what is wrong, why it matters and what to do, and touches nothing."""

    def refused(self, folder, checkpoint, destination, *said, dtype=None):
        before = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
        with pytest.raises(ValueError) as caught:
            convert_checkpoint(checkpoint, destination, dtype)
        for words in said:
            assert words in str(caught.value), words
        assert before == {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

    def test_what_is_there_is_not_overwritten(self, tmp_path, source):
        checkpoint = open_checkpoint(source[0])
        (tmp_path / "file.safetensors").write_text("mine")
        (tmp_path / "plain").write_text("mine")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "notes.txt").write_text("mine")
        (tmp_path / "empty.safetensors").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        for name in ("file.safetensors", "plain", "folder", "empty.safetensors", "link"):
            self.refused(
                tmp_path,
                checkpoint,
                tmp_path / name,
                "is there already",
                "nothing is overwritten",
                "Choose another name",
            )

    def test_another_conversion_to_the_same_place(self, tmp_path, source):
        (tmp_path / "converted.partial").mkdir()
        (tmp_path / "x.safetensors.partial").write_text("half")
        for name in ("converted", "x.safetensors"):
            self.refused(
                tmp_path,
                open_checkpoint(source[0]),
                tmp_path / name,
                f"{name}.partial is there",
                "If none is running, delete it",
            )

    def test_a_place_inside_the_source(self, tmp_path, source):
        copy = shutil.copytree(source[0], tmp_path / "copy")
        (tmp_path / "link").symlink_to(copy)
        for place in (copy / "new", copy / "new.safetensors", copy / "transformer" / "new", tmp_path / "link" / "new"):
            self.refused(tmp_path, open_checkpoint(copy), place, "lies inside", "Choose a place outside it")

    def test_endings_of_other_files(self, tmp_path, source):
        for ending in (".pt", ".ckpt", ".gguf"):
            self.refused(
                tmp_path, open_checkpoint(source[0]), tmp_path / f"x{ending}", "not written here", ".safetensors"
            )

    def test_dtypes_that_nothing_runs_in(self, tmp_path, source):
        self.refused(
            tmp_path,
            open_checkpoint(source[0]),
            tmp_path / "x",
            "no part can run in",
            "fp16, bf16, fp32",
            dtype=torch.int8,
        )

    def test_weights_that_are_not_whole(self, tmp_path, source):
        """diffusers would fill what is missing with random numbers."""
        tensors = state(source[1], "transformer")
        tensors["transformer_blocks.0.surprise"] = tensors.pop("norm_final.weight")
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="1 missing .norm_final.weight."):
            open_checkpoint(tmp_path / "x.safetensors")


def test_the_report_says_what_was_written(tmp_path, source):
    comfy = layouts.write_file(tmp_path / "comfy.safetensors", layouts.comfy_names(state(source[1], "transformer")))
    checkpoint = open_checkpoint(comfy, vae=source[0] / "vae")
    folder = tmp_path / "converted"
    report = convert_checkpoint(checkpoint, folder, BF16)
    for words in (
        f"written to {folder}: a folder in diffusers layout",
        "MB) as stored, in transformer/diffusion_pytorch_model.safetensors; ",
        f"from {comfy} (layout: ComfyUI)",
        "VAE: cast from fp32 (",
        ") to bf16 (",
        *report.parts[1].audit.text.splitlines(),
        "not written: text encoder: the source has none",
        "not written: tokenizer: ",
        "beside them: model_index.json, scheduler/scheduler_config.json, ",
    ):
        assert words in report.text, words
    data = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert data["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    written = {name for part in data["parts"] for name in part["files"]} | set(data["others"])
    assert written == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    transformer, vae = data["parts"]
    assert (transformer["audit"], transformer["before"], transformer["layout"]) == (
        None,
        transformer["after"],
        "ComfyUI",
    )
    assert vae["before"]["fp32"] == 2 * vae["after"]["bf16"]
    assert vae["audit"]["target"] == "bf16"
    one = convert_checkpoint(checkpoint, tmp_path / "one.safetensors")
    assert "one file of the transformer, with diffusers' names" in one.text
    assert "not written: VAE: a single file holds the transformer only" in one.text
