"""Checkpoints are known by their headers, refused with a sentence, and loaded once, lazily, straight into their
dtype."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cogvideox.checkpoint.convert import convert_checkpoint
from cogvideox.checkpoint.headers import read_header
from cogvideox.checkpoint.layout import is_checkpoint, open_checkpoint
from cogvideox.dtypes import RANGE_SAFE_FP16, Precision
from cogvideox.handles import open_handles
from cogvideox.loading import load_module
from cogvideox.modules.range_safe import make_range_safe
from cogvideox.precision.policy import plan_dtypes, scan_parts
from cogvideox.text import encode_prompt
from cogvideox.vae import decode
from cogvideox.variants import identify
from tests import layouts
from tests.conftest import CPU
from tests.helpers import CLASSES, run_apart
from tests.tiny_checkpoint import build_checkpoint, build_text_encoder
from tests.told import Told


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny checkpoint to break."""
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def change_config(file, **changes):
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("kind", CLASSES)
def test_headers_say_what_the_library_says(tiny, kind):
    from safetensors import safe_open

    files = list((tiny / kind).glob("*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, "pt") as theirs:
            ours = read_header(file)
            assert set(ours) == set(theirs.keys())
            for name, tensor in ours.items():
                assert tensor.shape == tuple(theirs.get_slice(name).get_shape())
                assert tensor.dtype == theirs.get_tensor(name).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CLASSES)
def test_weights_equal_from_pretrained_in_every_dtype(tiny, kind, dtype):
    import importlib

    library, name = CLASSES[kind]
    theirs = (
        getattr(importlib.import_module(library), name).from_pretrained(tiny / kind, torch_dtype=dtype).state_dict()
    )
    ours = load_module(open_checkpoint(tiny).part(kind), Precision(dtype), torch.device("cpu")).state_dict()
    assert set(ours) == set(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key


def test_one_file_without_index_loads_like_shards(tiny, tmp_path):
    """The same weights in one safetensors file."""
    from diffusers import CogVideoXTransformer3DModel

    single = shutil.copytree(tiny, tmp_path / "single", ignore=shutil.ignore_patterns("transformer"))
    CogVideoXTransformer3DModel.from_pretrained(tiny / "transformer", torch_dtype=torch.bfloat16).save_pretrained(
        single / "transformer"
    )
    assert [file.name for file in (single / "transformer").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    one, many = (
        load_module(open_checkpoint(path).part("transformer"), Precision(torch.bfloat16), torch.device("cpu"))
        for path in (single, tiny)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["transformer", "text_encoder"])
def test_range_safe_weights_read_from_disk_are_those_made_in_memory(tiny, kind):
    part, cpu = open_checkpoint(tiny).part(kind), torch.device("cpu")
    read = load_module(part, RANGE_SAFE_FP16, cpu)
    made = make_range_safe(load_module(part, Precision(torch.float32), cpu))
    ours, theirs = (dict((*module.named_parameters(), *module.named_buffers())) for module in (read, made))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    half = sum(tensor.nbytes // tensor.dtype.itemsize * 2 for tensor in part.tensors.values())
    assert sum({tensor.data_ptr(): tensor.nbytes for tensor in ours.values()}.values()) < 1.05 * half


def test_loading_needs_little_more_than_the_loaded_weights(tmp_path):
    """An fp32 T5 loaded as bf16: peak memory under 1.15 x the bf16 weights."""
    script = """
import sys, json
from pathlib import Path
import torch
from cogvideox.checkpoint.layout import open_part
from cogvideox.loading import load_module
from cogvideox.precision.policy import Precision
folder = Path(sys.argv[1])
part = open_part(folder / "text_encoder", "text_encoder")
# Imports, first.
other = open_part(Path(sys.argv[2]) / "text_encoder", "text_encoder")
load_module(other, Precision(torch.bfloat16), torch.device("cpu"))
from tests.memory import peak_kilobytes
before = peak_kilobytes()
module = load_module(part, Precision(torch.bfloat16), torch.device("cpu"))
peak = (peak_kilobytes() - before) * 1024
weights = {p.data_ptr(): p.nbytes for p in module.parameters()}
print(json.dumps([peak, sum(weights.values())]))
"""
    big, small = tmp_path / "big" / "text_encoder", tmp_path / "small" / "text_encoder"
    build_text_encoder().save_pretrained(small)
    with torch.device("meta"):
        encoder = build_text_encoder(vocabulary=32128, width=2048, layers=6)
    encoder.config.save_pretrained(big)
    # In shards, as the encoder is released.
    state = {name: value for name, value in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    third = len(state) // 3 + 1
    shards = {f"model-{index + 1:05}-of-00003.safetensors": list(state)[index * third :][:third] for index in range(3)}
    for file, names in shards.items():
        layouts.write_sparse(big / file, {name: state[name] for name in names})
    where = {name: file for file, names in shards.items() for name in names}
    (big / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    peak, weights = json.loads(run_apart(script, tmp_path / "big", tmp_path / "small"))
    assert weights > 250e6
    assert peak < 1.15 * weights


def test_parts_load_when_first_used_and_only_then(tiny):
    handles = open_handles(tiny, "fp32", CPU)
    parts = (handles.model.weights, handles.text_encoder.weights, handles.vae.weights)
    assert [part.is_loaded for part in parts] == [False, False, False]
    decode(handles.vae, torch.zeros(1, 16, 1, 2, 2))
    assert [part.is_loaded for part in parts] == [False, False, True]


def test_a_loaded_part_is_not_loaded_again_and_is_freed_with_its_last_handle(tiny):
    import gc
    import weakref

    handles = open_handles(tiny, "fp32", CPU)
    reads = []
    for _ in range(2):
        encode_prompt(
            handles.text_encoder,
            "a cat",
            events=Told(progress=lambda done, total: reads.append((done, total)), of="loading"),
        )
    assert reads[-1][0] == reads[-1][1]
    assert len({done for done, _ in reads}) == len(reads)
    with handles.text_encoder.weights.running() as module:
        alive = weakref.ref(module)
    del handles, module
    gc.collect()
    assert alive() is None


def test_an_interrupted_load_leaves_nothing_behind(tiny):
    handles = open_handles(tiny, "fp32", CPU)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_prompt(handles.text_encoder, "a cat", events=Told(progress=stop))
    assert not handles.text_encoder.weights.is_loaded
    assert encode_prompt(handles.text_encoder, "a cat").embeddings.isfinite().all()


OFFICIAL = {
    "CogVideoX1.5-5B": (
        dict(num_layers=42, num_attention_heads=48, patch_size_t=2, use_rotary_positional_embeddings=True),
        torch.bfloat16,
    ),
    "CogVideoX1.5-5B-I2V": (
        dict(
            num_layers=42, num_attention_heads=48, patch_size_t=2, in_channels=32, use_rotary_positional_embeddings=True
        ),
        torch.bfloat16,
    ),
    "CogVideoX-Fun-V1.5-5b-InP": (
        dict(num_layers=42, num_attention_heads=48, in_channels=33, patch_size_t=2),
        torch.bfloat16,
    ),
    "VOID": (dict(num_layers=42, num_attention_heads=48, in_channels=48, patch_size_t=2), torch.bfloat16),
    "CogVideoX-5b": (
        dict(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True),
        torch.bfloat16,
    ),
    "CogVideoX-5b-I2V": (
        dict(num_layers=42, num_attention_heads=48, in_channels=32, use_rotary_positional_embeddings=True),
        torch.bfloat16,
    ),
    "CogVideoX-2b": (dict(num_layers=30, num_attention_heads=30), torch.float16),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_released_models_are_named_by_their_architecture(name):
    config, trained = OFFICIAL[name]
    variant = identify({"in_channels": 16} | config)
    assert (variant.name, variant.trained_dtype, variant.image_to_video) == (name, trained, "I2V" in name)


@given(width=st.integers(48, 90).map(lambda n: n * 16), frames=st.integers(0, 10).map(lambda n: 16 * n + 1))
def test_what_the_model_card_allows_is_not_warned_of(width, frames):
    image = identify(OFFICIAL["CogVideoX1.5-5B-I2V"][0])
    assert (image.outside_model_card(width, 768, frames) is None) == (width <= 1360)
    assert (image.outside_model_card(768, width, frames) is None) == (width <= 1360)
    text = identify({"in_channels": 16} | OFFICIAL["CogVideoX1.5-5B"][0])
    assert (text.outside_model_card(width, 768, frames) is None) == (width == 1360)
    assert "177 frames" in text.outside_model_card(1360, 768, 177)


@given(frames=st.integers(1, 161))
def test_a_length_that_the_model_card_does_not_give_is_said(frames):
    newer, older = (identify({"in_channels": 16} | OFFICIAL[name][0]) for name in ("CogVideoX1.5-5B", "CogVideoX-5b"))
    said = newer.outside_model_card(1360, 768, frames)
    assert (said is None) == (frames % 16 == 1)
    assert said is None or (f"{frames} frames" in said and "16N+1" in said)
    said = older.outside_model_card(*older.default_size, frames)
    assert (said is None) == (frames % 8 == 1 and frames <= older.max_frames)


def test_is_checkpoint_looks_at_the_config_alone(tiny, tmp_path):
    assert is_checkpoint(tiny)
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "nowhere")


class TestRefusals:
    """Each error says what is wrong, why it matters and what to do."""

    def refused(self, folder, *said):
        """When it is opened, or, for a part that not every step needs, when that is asked for."""
        with pytest.raises(ValueError) as caught:
            [open_checkpoint(folder).part(kind) for kind in CLASSES]
        for words in said:
            assert words in str(caught.value)

    def test_no_such_folder(self, tmp_path):
        self.refused(tmp_path / "nowhere", "There is no", "Check the path")

    def test_a_file(self, tiny):
        self.refused(tiny / "tokenizer" / "spiece.model", "is not a readable safetensors file")

    def test_an_empty_folder(self, tmp_path):
        self.refused(tmp_path, "is empty", "CogVideoX1.5-5B")

    def test_another_pipeline(self, copy):
        shutil.rmtree(copy / "transformer")
        change_config(copy / "model_index.json", _class_name="StableDiffusionPipeline")
        self.refused(copy, "not a CogVideoX checkpoint", "StableDiffusionPipeline")

    def test_a_config_of_another_model(self, copy):
        change_config(copy / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
        self.refused(copy, "FluxTransformer2DModel", "another model's transformer", "Choose a CogVideoX checkpoint")

    def test_a_config_that_does_not_fit_the_weights(self, copy):
        change_config(copy / "transformer" / "config.json", in_channels=32)
        self.refused(copy, "do not fit its config.json", "patch_embed.proj.weight", "(128, 256)")

    def test_a_text_encoder_of_another_kind(self, copy):
        change_config(copy / "text_encoder" / "config.json", architectures=["CLIPTextModel"])
        self.refused(copy, "CLIPTextModel", "text encoder")

    def test_no_config(self, copy):
        (copy / "vae" / "config.json").unlink()
        self.refused(copy, "has no config.json", "VAE")

    def test_a_config_that_is_not_json(self, copy):
        (copy / "vae" / "config.json").write_text("<html>")
        self.refused(copy, "not valid JSON", "Download this file again")

    def test_shards_without_an_index(self, copy):
        """Their numbers say how many there are, and their shapes that nothing is missing."""
        part, index = open_checkpoint(copy).part("transformer"), next((copy / "transformer").glob("*.index.json"))
        index.unlink()
        assert open_checkpoint(copy).part("transformer").tensors == part.tensors
        (copy / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
        self.refused(copy, "lacks 1 of 3 shards", ": diffusion_pytorch_model-00002-of-00003.safetensors. ")

    def test_a_missing_shard(self, copy):
        (copy / "text_encoder" / "model-00002-of-00003.safetensors").unlink()
        self.refused(copy, "lacks 1 of 3 shards", "model-00002-of-00003.safetensors")

    def test_a_truncated_shard(self, copy):
        shard = copy / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])
        self.refused(copy, "truncated", "-00002-of-00003", "download it again")

    @pytest.mark.parametrize("change", ["gone", "truncated", "other dtype"])
    def test_a_file_that_is_not_the_one_that_was_opened(self, copy, change):
        """Weights are read when a node first needs them, maybe minutes after the loader has run."""
        part, file = open_checkpoint(copy).part("vae"), copy / "vae" / "diffusion_pytorch_model.safetensors"
        whole, size = load_file(file), file.stat().st_size
        file.unlink()
        if change == "truncated":
            file.write_bytes(bytes(100))
        elif change == "other dtype":
            save_file({name: tensor.double() for name, tensor in whole.items()}, file)
        with pytest.raises(ValueError) as caught:
            load_module(part, Precision(torch.float32), CPU.device)
        assert str(file) in str(caught.value)
        assert ("cannot be read" if change == "gone" else f"had {size:,} bytes when it was opened") in str(caught.value)

    @pytest.mark.parametrize("kind", CLASSES)
    def test_weights_that_were_not_written(self, copy, kind):
        """A file has its full size where a disk was filled, the power failed, or a program sets the room aside."""
        file = max((copy / kind).glob("*.safetensors"))
        stored, size = read_header(file), file.stat().st_size
        half = max(size // 2, min(tensor.offset for tensor in stored.values()))
        last = max((tensor.offset, name, tensor) for name, tensor in stored.items() if len(tensor.shape) > 1)
        with file.open("r+b") as opened:
            opened.truncate(min(half, last[0]))
            opened.truncate(size)
        checkpoint = open_checkpoint(copy)
        said = "is not whole: .* are zeros throughout"
        with pytest.raises(ValueError, match=said) as caught:
            load_module(checkpoint.part(kind), Precision(torch.float32), CPU.device)
        assert str(file) in str(caught.value)
        with pytest.raises(ValueError, match=said):
            scan_parts(checkpoint, plan_dtypes(checkpoint, "auto", CPU))
        with pytest.raises(ValueError, match=said):
            convert_checkpoint(checkpoint, copy.parent / "converted", None)

    def test_zeros_among_weights_are_weights(self, copy):
        """Biases that were never trained, and a table that begins with a page of zeros, as positions do."""
        file = copy / "text_encoder" / "model-00001-of-00003.safetensors"
        tensors = load_file(file)
        tensors["shared.weight"][:200] = 0
        save_file(tensors, file)
        vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
        save_file({name: value * (value.ndim > 1) for name, value in load_file(vae).items()}, vae)
        for kind in ("text_encoder", "vae"):
            load_module(open_checkpoint(copy).part(kind), Precision(torch.float32), CPU.device)

    @pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
    def test_a_scale_of_fp8_weights_that_is_none(self, copy, tmp_path, scale):
        state = {}
        for file in (copy / "text_encoder").glob("*.safetensors"):
            state |= load_file(file)
        name = "encoder.block.0.layer.1.DenseReluDense.wo"
        state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.float8_e4m3fn)
        state[f"{name}.scale_weight"] = torch.tensor(scale)
        save_file(state, tmp_path / "t5.safetensors")
        handles = open_handles(copy, "bf16", CPU, text_encoder=tmp_path / "t5.safetensors")
        with pytest.raises(ValueError, match=r"the scale of encoder\.block\.0.*wo\.weight is zero, NaN or Inf"):
            encode_prompt(handles.text_encoder, "a cat")

    def test_a_git_lfs_pointer(self, copy):
        (copy / "vae" / "diffusion_pytorch_model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
        )
        self.refused(copy, "not a readable safetensors file", "Git LFS")

    @given(data=st.binary(max_size=200))
    def test_any_bytes_that_are_not_safetensors(self, tmp_path_factory, data):
        file = tmp_path_factory.mktemp("bytes") / "x.safetensors"
        file.write_bytes(data)
        with pytest.raises(ValueError, match="not a readable safetensors file|truncated"):
            read_header(file)

    def test_a_header_that_lies_about_sizes(self, tmp_path):
        header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 8]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(ValueError, match="cannot take 8 bytes"):
            read_header(tmp_path / "x.safetensors")

    def test_a_pickle_with_code_in_it_is_not_run(self, copy, tmp_path):
        trap = tmp_path / "it-ran"

        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(trap),)

        (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save({"weight": Trap()}, copy / "vae" / "diffusion_pytorch_model.bin")
        self.refused(copy, "could run code on your computer", "diffusion_pytorch_model.bin")
        assert not trap.exists()

    def test_no_noise_schedule(self, copy):
        shutil.rmtree(copy / "scheduler")
        self.refused(copy, "scheduler_config.json", "noise schedule")

    def test_a_missing_part_is_told_when_it_is_needed(self, copy):
        shutil.rmtree(copy / "text_encoder")
        handles = open_handles(copy, "fp32", CPU)
        assert "[absent] text encoder" in handles.plan.text
        decode(handles.vae, torch.zeros(1, 16, 1, 2, 2))
        with pytest.raises(ValueError, match="no text encoder"):
            encode_prompt(handles.text_encoder, "a cat")

    def test_missing_and_unknown_tensors_are_named(self, tiny, tmp_path):
        from safetensors.torch import load, save_file

        folder = shutil.copytree(tiny, tmp_path / "renamed")
        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load(file.read_bytes())
        tensors["decoder.surprise"] = tensors.pop("decoder.conv_in.conv.weight")
        save_file(tensors, file)
        with pytest.raises(
            ValueError, match=r"1 missing \(decoder\.conv_in\.conv\.weight\); 1 unknown \(decoder\.surprise\)"
        ):
            decode(open_handles(folder, "fp32", CPU).vae, torch.zeros(1, 16, 1, 2, 2))


def test_the_builder_makes_what_the_official_folders_hold(tiny, tmp_path):
    files = {file.relative_to(tiny).as_posix() for file in tiny.rglob("*") if file.is_file()}
    assert "transformer/diffusion_pytorch_model-00001-of-00003.safetensors" in files
    assert "text_encoder/model.safetensors.index.json" in files
    assert "vae/diffusion_pytorch_model.safetensors" in files
    again = build_checkpoint(tmp_path / "again")
    for file in files:
        if file.endswith(".safetensors"):
            assert (again / file).read_bytes() == (tiny / file).read_bytes()
