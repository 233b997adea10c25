"""GGUF headers are read as the gguf package reads them, within bounds; blocks are the same weights in GGUF and in
safetensors files."""

import re
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import save_file

from cogvideox.checkpoint.audit import scan_weights
from cogvideox.checkpoint.catalogue import list_checkpoints
from cogvideox.checkpoint.gguf import read_gguf_header
from cogvideox.checkpoint.layout import open_checkpoint, open_part
from cogvideox.dtypes import Precision
from cogvideox.handles import open_handles
from cogvideox.loading import load_module
from cogvideox.modules.packed import _WIDENED
from cogvideox.sentinel import NonFiniteError
from tests import layouts
from tests.conftest import CPU
from tests.layouts import latents
from tests.tiny_checkpoint import build_transformer

TYPES = (
    "F32",
    "F16",
    "BF16",
    "F64",
    "I8",
    "I32",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
)
PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I32": torch.int32,
}


def save(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def state():
    return {name: value.float() for name, value in build_transformer().state_dict().items()}


@pytest.fixture
def file(tmp_path):
    """A small file with notes of every kind."""
    writer = GGUFWriter(str(tmp_path / "x.gguf"), arch="cogvideox")
    writer.add_array("general.tags", ["a", "bc", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float64("one", 1.0)
    writer.add_tensor("a", np.ones((4, 32), "float32"))
    writer.add_tensor(
        "b",
        gguf.quants.quantize(np.ones((4, 64), "float32"), GGMLQuantizationType.Q4_0),
        raw_dtype=GGMLQuantizationType.Q4_0,
    )
    save(writer)
    return tmp_path / "x.gguf"


def patched(file, at, content, instead=0):
    """``content`` in the place of ``instead`` bytes of a file."""
    raw = bytearray(file.read_bytes())
    raw[at : at + instead] = content
    file.write_bytes(raw)
    return file


def refused(file):
    with pytest.raises(ValueError, match="is not a readable GGUF file") as caught:
        read_gguf_header(file)
    return str(caught.value)


@pytest.mark.parametrize("seed", range(12))
def test_headers_say_what_the_gguf_package_says(tmp_path, seed):
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(tmp_path / "x.gguf"), arch="cogvideox")
    for number in range(seed % 5):
        writer.add_array(
            f"array.{number}",
            [str(value) for value in range(rng.integers(1, 9))] if number % 2 else [[1, 2], [3]][number // 2 % 2],
        )
    if seed % 3 == 1:
        writer.add_custom_alignment(int(rng.choice((16, 64, 4096))))
    for number in range(rng.integers(0, 20)):
        kind = GGMLQuantizationType[rng.choice(TYPES)]
        _, size = GGML_QUANT_SIZES[kind]
        rows = [int(rng.integers(1, 5)) for _ in range(rng.integers(0, 3))]
        raw = rng.integers(0, 255, (*rows, int(rng.integers(1, 4)) * size), dtype="uint8")
        writer.add_tensor(f"layer.{number}.weight", raw, raw_dtype=kind)
    save(writer)
    mine, reader = read_gguf_header(tmp_path / "x.gguf"), GGUFReader(tmp_path / "x.gguf")
    assert list(mine) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        stored, kind = mine[tensor.name], GGMLQuantizationType(tensor.tensor_type)
        assert (stored.offset, stored.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert stored.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (stored.dtype, stored.quantization) == (
            (PLAIN[kind.name], None) if kind.name in PLAIN else (torch.uint8, int(kind))
        )


def test_every_quantization_that_is_let_in_can_be_widened_and_another_is_named(tmp_path):
    from diffusers.quantizers.gguf.utils import dequantize_functions

    assert {GGMLQuantizationType[name] for name in _WIDENED} <= set(dequantize_functions)
    for kind in set(GGML_QUANT_SIZES) - set(dequantize_functions) - {GGMLQuantizationType[name] for name in PLAIN}:
        writer = GGUFWriter(str(tmp_path / "x.gguf"), arch="cogvideox")
        if kind.name in ("I16", "I64"):
            continue
        writer.add_tensor("a", np.zeros((2, GGML_QUANT_SIZES[kind][1]), "uint8"), raw_dtype=kind)
        save(writer)
        with pytest.raises(ValueError, match=f"is quantized as {kind.name}, which diffusers cannot read.*Q4_K"):
            read_gguf_header(tmp_path / "x.gguf")


class TestDamage:
    """What a header claims is held against the file before it is believed."""

    @pytest.mark.parametrize(("at", "what"), [(8, "tensors"), (16, "notes")])
    def test_counts_that_no_model_has(self, file, at, what):
        assert f"{2**62:,} {what}" in refused(patched(file, at, struct.pack("<Q", 2**62), 8))

    @pytest.mark.parametrize(
        "value", [struct.pack("<IIQ", 9, 5, 2**62), struct.pack("<IIQ", 9, 8, 2**61), struct.pack("<IQ", 8, 2**63)]
    )
    def test_lengths_beyond_the_file(self, file, value):
        assert "truncated" in refused(self.noted(file, b"a", value))

    def test_arrays_in_arrays(self, file):
        value = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQ", 4, 0)
        assert "arrays in arrays" in refused(self.noted(file, b"a", value))

    def test_types_of_notes_and_tensors_that_are_unknown(self, file):
        raw = file.read_bytes()
        assert "unknown type 99" in refused(self.noted(file, b"a", struct.pack("<II", 99, 0)))
        file.write_bytes(raw)
        at = raw.index(struct.pack("<Q", 1) + b"b") + 9
        assert "of type 4" in refused(patched(file, at + 4 + 16, struct.pack("<I", 4), 4))

    def test_a_note_that_is_there_twice(self, file):
        assert "numbers twice" in refused(self.noted(file, b"numbers", struct.pack("<II", 4, 0)))

    def test_an_alignment_that_is_none(self, file):
        for value in (struct.pack("<II", 4, 0), struct.pack("<II", 4, 48), struct.pack("<IQ", 10, 32)):
            assert "no power of two" in refused(
                self.noted(file.with_name("y.gguf"), b"general.alignment", value, file.read_bytes())
            )

    def test_other_versions_and_byte_orders(self, file):
        assert "big-endian" in refused(patched(file, 4, struct.pack(">I", 3), 4))
        assert "version 1 " in refused(patched(file, 4, struct.pack("<I", 1), 4))

    def test_version_2_is_read(self, file):
        assert list(read_gguf_header(patched(file, 4, struct.pack("<I", 2), 4))) == ["a", "b"]

    @pytest.mark.parametrize(
        ("offset", "what"), [(0, "overlap"), (480, "overlap"), (544, "a gap"), (2**62, "a gap"), (513, "a gap")]
    )
    def test_tensors_lie_one_behind_the_other(self, file, offset, what):
        raw = file.read_bytes()
        at = raw.index(struct.pack("<Q", 1) + b"b") + 9 + 4 + 16 + 4
        assert struct.unpack_from("<Q", raw, at) == (512,)
        assert what in refused(patched(file, at, struct.pack("<Q", offset), 8))

    def test_shapes_that_cannot_be(self, file):
        raw = file.read_bytes()
        at = raw.index(struct.pack("<Q", 1) + b"b") + 9
        for sizes in ((2**40, 2**40), (2**63, 0), (31, 8)):
            copy = file.with_name("y.gguf")
            copy.write_bytes(raw)
            assert "b cannot be of shape" in refused(patched(copy, at + 4, struct.pack("<QQ", *sizes), 16))
        assert "has 4,294,967,295 dimensions" in refused(patched(file, at, struct.pack("<I", 2**32 - 1), 4))

    def test_one_name_for_two(self, file):
        raw = file.read_bytes()
        assert "two of its tensors have one name" in refused(
            patched(file, raw.index(struct.pack("<Q", 1) + b"b") + 8, b"a", 1)
        )

    def test_a_file_that_ends_anywhere(self, file):
        raw = file.read_bytes()
        for size in range(5, len(raw) - 64, 13):
            file.write_bytes(raw[:size])
            assert "truncated" in refused(file)

    @staticmethod
    def noted(file, key, value, raw=None):
        """A file with one more note, before the others."""
        raw = bytearray(raw or file.read_bytes())
        raw[24:24] = struct.pack("<Q", len(key)) + key + value
        struct.pack_into("<Q", raw, 16, struct.unpack_from("<Q", raw, 16)[0] + 1)
        file.write_bytes(raw)
        return file


def as_gguf(raw, kind):
    """What the gguf package makes of blocks, rounded to fp16 as diffusers' kernels (and the reader that these files
    were made for) round it."""
    return torch.from_numpy(gguf.quants.dequantize(raw, kind)).half().float()


def quantized(state, kind, suffix="weight", left=()):
    """The matrices of the blocks in GGUF's blocks, the others in fp16, as ComfyUI-CogVideoX-MZ writes them to
    safetensors files."""
    made = {}
    for name, value in state.items():
        if value.ndim == 2 and "transformer_blocks" in name and not any(word in name for word in left):
            made[name.removesuffix("weight") + suffix] = torch.from_numpy(
                gguf.quants.quantize(value.numpy(), GGMLQuantizationType[kind]).copy()
            )
        else:
            made[name] = value.half()
    return made


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_in_safetensors_files_are_the_weights_that_gguf_dequantizes(tmp_path, state, kind):
    packed = quantized(state, kind, f"{kind}_qweight", left=("to_q",))
    save_file(packed, tmp_path / "x.safetensors")
    (entry,) = list_checkpoints([], [tmp_path])
    assert f" · GGUF {kind} · " in entry.label
    module = load_module(open_part(entry.path, "transformer"), Precision(torch.float32), torch.device("cpu"))
    wide = {
        re.sub(r"\.Q\w+_qweight$", ".weight", name): as_gguf(value.numpy(), GGMLQuantizationType[kind])
        if value.dtype == torch.uint8
        else value.float()
        for name, value in packed.items()
    }
    linears = {name: child for name, child in module.named_modules() if type(child).__name__ == "PackedLinear"}
    assert len(linears) == 2 * 7
    for name, linear in linears.items():
        assert linear.packed.data.dtype == torch.uint8
        # Those with an offset are rounded once more.
        torch.testing.assert_close(
            linear.packed(torch.float32),
            wide[f"{name}.weight"],
            rtol=2e-3 if kind.endswith("1") else 0,
            atol=1e-4 * kind.endswith("1"),
        )
    truth = latents(open_handles(layouts.write_file(tmp_path / "wide.safetensors", wide), "fp32", CPU))
    made = latents(open_handles(entry.path, "fp32", CPU))
    assert (made - truth).norm() <= (1e-3 if kind.endswith("1") else 0) * truth.norm()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_blocks_that_hold_nan_are_named_as_damaged(tmp_path, state, dtype):
    packed = quantized(state, "Q8_0", "Q8_0_qweight")
    # The scale of the first block.
    packed["transformer_blocks.1.ff.net.2.Q8_0_qweight"][0, :2] = torch.tensor([255, 127], dtype=torch.uint8)
    save_file(packed, tmp_path / "x.safetensors")
    with pytest.raises(NonFiniteError, match=r"the weights of transformer_blocks\.1\.ff\.net\.2.* themselves hold NaN"):
        latents(open_handles(tmp_path / "x.safetensors", dtype, CPU))


def test_a_scan_says_that_it_does_not_look_into_blocks(tmp_path, state):
    save_file(quantized(state, "Q8_0", "Q8_0_qweight"), tmp_path / "x.safetensors")
    tensors = open_part(tmp_path / "x.safetensors", "transformer").tensors
    audited = scan_weights(tensors, torch.bfloat16, "transformer")
    assert 0 < audited.unread == sum(value.numel() for value in state.values()) - audited.values
    assert "are in GGUF's blocks, which were not looked at" in audited.text
    save_file(state, tmp_path / "wide.safetensors")
    wide = scan_weights(open_part(tmp_path / "wide.safetensors", "transformer").tensors, torch.bfloat16)
    assert wide.unread == 0
    assert "GGUF" not in wide.text


def test_blocks_are_read_under_comfyuis_names_and_prefixes_too(tmp_path, state):
    packed = {
        f"model.diffusion_model.{name}": value
        for name, value in layouts.comfy_names(quantized(state, "Q8_0", "Q8_0_qweight")).items()
    }
    save_file(packed, tmp_path / "x.safetensors")
    part = open_checkpoint(tmp_path / "x.safetensors").part("transformer")
    assert part.layout == "ComfyUI"
    assert (
        part.tensors["transformer_blocks.1.ff.net.2.weight"].shape
        == state["transformer_blocks.1.ff.net.2.weight"].shape
    )
    assert part.tensors["transformer_blocks.1.ff.net.2.weight"].kind == "GGUF Q8_0"


def test_blocks_that_are_none_are_refused_by_name(tmp_path):
    odd = {
        r"blocks of 18 bytes, and is torch.uint8 of shape \[4, 19\]": torch.zeros(4, 19, dtype=torch.uint8),
        "float32": torch.zeros(4, 18),
    }
    for what, tensor in odd.items():
        save_file({"a.Q4_0_qweight": tensor}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=what):
            open_checkpoint(tmp_path / "x.safetensors")
    blocks = torch.zeros(4, 18, dtype=torch.uint8)
    for other in ("a.weight", "a.IQ4_NL_qweight"):
        save_file({"a.Q4_0_qweight": blocks, other: blocks.clone()}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"holds a\.weight (twice|in two quantizations)"):
            open_checkpoint(tmp_path / "x.safetensors")
    save_file({"a.IQ2_S_qweight": torch.zeros(4, 82, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is quantized as IQ2_S, which diffusers cannot read"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_rows_that_are_no_whole_blocks_are_read_where_the_shape_is_noted(tmp_path, state):
    """ComfyUI-GGUF's converter writes them so: CogVideoX-2b's rows of 1920 numbers are seven and a half blocks of the K
    quantizations."""
    kind, name = GGMLQuantizationType.Q4_K, "transformer_blocks.0.attn1.to_q.weight"
    writer = GGUFWriter(str(tmp_path / "x.gguf"), arch="cogvideox")
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (state[name].numel() // block, size), dtype="uint8")
    for key, value in state.items():
        if key == name:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(value.shape))
            writer.add_tensor(key, raw, raw_dtype=kind)
        else:
            writer.add_tensor(key, value.numpy())
    save(writer)
    part = open_checkpoint(tmp_path / "x.gguf").part("transformer")
    assert part.tensors[name].shape == state[name].shape
    module = load_module(part, Precision(torch.float32), torch.device("cpu"))
    made = module.get_submodule(name.removesuffix(".weight")).packed(torch.float32)
    torch.testing.assert_close(made, as_gguf(raw, kind).reshape(state[name].shape), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("number", [1, 2])
def test_each_piece_of_a_split_file_says_how_they_are_joined(tmp_path, number):
    state = build_transformer().state_dict()
    names = list(state)[:40] if number == 1 else list(state)[40:]
    file = tmp_path / f"cog-Q8_0-0000{number}-of-00002.gguf"
    layouts.write_gguf(file, {name: state[name] for name in names}, "Q8_0")
    with pytest.raises(ValueError, match=f"is piece {number} of 2 of a GGUF file.* llama-gguf-split --merge"):
        open_checkpoint(file)
