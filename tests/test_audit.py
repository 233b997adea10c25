"""The weight audit counts, streaming, what float64 arithmetic on every weight would count."""

import json
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cogvideox.checkpoint.headers import DTYPES, read_header
from cogvideox.precision import audit
from cogvideox.precision.audit import scan_weights
from tests.conftest import ROOT

STORED = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
TARGETS = [torch.bfloat16, torch.float16, torch.float32]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
EDGES = [0.0, -0.0, 65504.0, 65519.99, 65520.0, 1e5, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01, 2.0**-25 * 1.5, 2.0**-14, 2.0**-14 - 2.0**-25]
EDGES += [2.0**-14 - 2.0**-24, 2.0**-17, 3e-8, 1e-38, 1e-40, 3e38, 1.0 + 2**-9, float("inf"), float("nan")]


def brute_force(weights, target):
    """The same counts from float64 and from the casts themselves."""
    values = weights.double().flatten()
    half, cast = values.to(torch.float16), values.to(target).double()
    finite, some = values.isfinite(), values != 0
    magnitude = values.abs()
    kept = finite & some & cast.isfinite() & (cast != 0)
    error = ((cast - values) / values).abs()[kept]
    return dict(
        values=len(values),
        nan=values.isnan().sum().item(),
        inf=values.isinf().sum().item(),
        beyond=(finite & (magnitude > 65504)).sum().item(),
        flushed=(some & (half == 0)).sum().item(),
        subnormal=((half != 0) & (half.abs().double() < 2.0**-14)).sum().item(),
        rounding=error.max().item() if len(error) else 0.0,
    )


def scan(folder, tensors, target, **options):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "x.safetensors")
    return scan_weights(read_header(folder / "x.safetensors"), target, **options)


def check(found, weights, target):
    wanted = brute_force(weights, target)
    rounding = wanted.pop("rounding")
    assert {name: getattr(found, name) for name in wanted} == wanted
    # To within 0.2 % of itself, and never more than there is.
    assert rounding * 0.998 <= found.rounding <= rounding


def bit_patterns(dtype, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stored", STORED)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**31), edges=st.lists(st.sampled_from(EDGES), max_size=30), sign=st.sampled_from([1, -1]))
@settings(max_examples=25, deadline=None)
def test_any_bits_and_the_edges_of_fp16_are_counted_as_float64_counts_them(tmp_path_factory, stored, target, count, seed, edges, sign):
    weights = torch.cat([bit_patterns(stored, count, seed), (sign * torch.tensor(edges, dtype=torch.float64)).to(stored)])
    check(scan(tmp_path_factory.getbasetemp(), {"w": weights}, target), weights, target)


@pytest.mark.parametrize("scale", [0.02, 1e-5, 1e-7, 3e4])
@pytest.mark.parametrize(("stored", "target"), [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)])
def test_weights_of_every_size_in_many_pieces(tmp_path, stored, target, scale, monkeypatch):
    monkeypatch.setattr(audit, "_PIECE", 1 << 15)
    weights = {f"w{index}": (torch.randn(40_000 + index, dtype=torch.float64) * scale).to(stored) for index in range(5)}
    check(scan(tmp_path, weights, target), torch.cat(list(weights.values())), target)


def test_rounding_is_that_of_weights_the_cast_keeps(tmp_path):
    assert scan(tmp_path, {"w": torch.randn(999).bfloat16()}, torch.float32).rounding == 0
    assert scan(tmp_path, {"w": torch.ones(9).bfloat16()}, torch.float16).rounding == 0
    assert scan(tmp_path, {"w": torch.tensor([1.0 + 2.0**-9])}, torch.bfloat16).rounding == pytest.approx(2.0**-9, rel=0.01)
    assert scan(tmp_path, {"w": torch.tensor([1e-9])}, torch.float16).rounding == 0


def test_tensors_with_nan_or_inf_are_named(tmp_path):
    weights = {f"w{index}": torch.randn(10) for index in range(9)}
    for index in (1, 3, 4, 6, 7):
        weights[f"w{index}"][2] = float("nan") if index % 2 else float("inf")
    found = scan(tmp_path, weights, torch.bfloat16, name="transformer")
    assert found.damaged
    assert (found.nan, found.inf) == (3, 2)
    assert found.damaged_in == ("w1", "w3", "w4", "and 2 more tensors")
    assert "3 NaN and 2 Inf (in w1, w3, w4, and 2 more tensors)" in found.text
    assert "download the original" in found.text


def test_the_text_says_what_an_fp16_copy_would_lose(tmp_path):
    found = scan(tmp_path, {"w": torch.tensor([1.0, 1e-5, 1e-9, 1e5])}, torch.bfloat16, name="transformer")
    assert "transformer, 4 weights read: no NaN, no Inf" in found.text
    assert "turn 1 (0.25 of all) into Inf, flush 1 (0.25 of all) to zero, and keep 1 (0.25 of all) only as subnormals" in found.text
    assert "the cast to bf16 rounds by at most 0." in found.text
    assert json.loads(json.dumps(found.as_dict()))["flushed"] == 1


def test_integers_are_passed_over_and_empty_parts_are_nothing(tmp_path):
    found = scan(tmp_path, {"ids": torch.arange(100), "w": torch.ones(3), "none": torch.ones(0)}, torch.float16)
    assert found.values == 3
    assert scan_weights({}, torch.float16).values == 0


def test_every_dtype_of_the_format_is_read(tmp_path):
    for dtype in DTYPES.values():
        assert scan(tmp_path, {"w": torch.ones(5).to(dtype)}, torch.bfloat16).nan == 0


def test_progress_ends_at_all_bytes_and_can_stop_the_scan(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_PIECE", 1 << 12)
    weights, seen = {"w": torch.randn(50_000), "ids": torch.arange(1000)}, []
    scan(tmp_path, weights, torch.bfloat16, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (208_000, 208_000)

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, weights, torch.bfloat16, on_progress=cancel)
    assert not [thread for thread in threading.enumerate() if thread.name == "weight scan"]


def test_a_file_that_shrinks_meanwhile_is_a_sentence(tmp_path):
    save_file({"w": torch.randn(50_000)}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(ValueError, match="ended while a tensor was read"):
        scan_weights(tensors, torch.bfloat16)


def test_only_floating_dtypes_can_be_cast_to():
    with pytest.raises(ValueError, match="int8"):
        scan_weights({}, torch.int8)


def test_memory_is_constant(tmp_path):
    """A gigabyte of zeros, sparse on disk: the process grows by a few megabytes."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1 << 29], "data_offsets": [0, 1 << 30]}}).encode()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 30))
    script = """
import resource, sys, torch
from pathlib import Path
from cogvideox.checkpoint.headers import read_header
from cogvideox.precision.audit import scan_weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert scan_weights(read_header(Path(sys.argv[1])), torch.float16).values == 1 << 29
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "x.safetensors"], capture_output=True, text=True, check=True, cwd=Path(ROOT))
    assert int(done.stdout) < 50
