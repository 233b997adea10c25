"""The weight audit counts what a float64 computation of every single weight counts, whatever is stored and however it
lies on disk."""

import gc
import json
import math
import os
import threading
import time
from bisect import bisect_left
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cogvideox.checkpoint import audit
from cogvideox.checkpoint.audit import WeightAudit, scan_weights
from cogvideox.checkpoint.headers import StoredTensor, read_header
from tests.helpers import run_apart

STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
TARGETS = (torch.float16, torch.bfloat16, torch.float32)
#: (mantissa bits, exponent of the smallest normal number, largest number), as IEEE 754 and the bfloat16 format define
#: them
FORMATS = {
    torch.float16: (10, -14, 65504.0),
    torch.bfloat16: (7, -126, (2 - 2.0**-7) * 2.0**127),
    torch.float32: (23, -126, (2 - 2.0**-23) * 2.0**127),
}
#: Magnitudes at which an answer changes, or might if a bound were off by one.
EDGES = [
    0.0,
    1.0,
    2.0,
    448.0,
    57344.0,
    65504.0,
    65519.99,
    65520.0,
    65536.0,
    2.0**-24,
    2.0**-25,
    3 * 2.0**-25,
    2.0**-14,
    2.0**-14 - 2.0**-25,
]
EDGES += [
    2.0**-16,
    2.0**-17,
    2.0**-9,
    2.0**-126,
    2.0**-133,
    2.0**-134,
    2.0**-149,
    2.0**-150,
    1 + 2.0**-8,
    1 + 2.0**-11,
    1 + 2.0**-24,
]
EDGES += [FORMATS[torch.bfloat16][2], (2 - 2.0**-8) * 2.0**127, FORMATS[torch.float32][2], 1e39, 1e300, 5e-324]


def cast(weights: np.ndarray, target: torch.dtype) -> np.ndarray:
    """float64 -> the nearest numbers of ``target``, ties to even, in float64."""
    bits, smallest, largest = FORMATS[target]
    exponent = np.maximum(np.frexp(weights)[1] - 1, smallest)
    step = np.ldexp(1.0, exponent - bits)
    rounded = np.rint(weights / step) * step
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, weights), rounded)


def brute_force(tensors: list[torch.Tensor], target: torch.dtype) -> dict:
    """Every count, and the largest rounding error that is possible, from the weights as float64."""
    found = dict.fromkeys(
        ("values", "nan", "inf", "beyond_fp16", "flushed", "subnormal", "overflowed", "vanished"), 0
    ) | {"rounding": 0.0}
    for tensor in tensors:
        weights = tensor.flatten().double().numpy()
        finite = weights[np.isfinite(weights)]
        # torch casts float64 by way of float32.
        with np.errstate(over="ignore"):
            narrow = finite.astype(np.float32).astype(np.float64) if tensor.dtype == torch.float64 else finite
        finite, narrow = finite[np.isfinite(narrow)], narrow[np.isfinite(narrow)]
        lost = np.isfinite(weights).sum() - finite.size
        half, kept = np.abs(cast(narrow, torch.float16)), cast(narrow, target)
        found["values"] += weights.size
        found["nan"] += np.isnan(weights).sum()
        found["inf"] += np.isinf(weights).sum()
        found["beyond_fp16"] += (np.abs(finite) > 65504).sum() + lost
        found["flushed"] += ((finite != 0) & (half == 0)).sum()
        found["subnormal"] += ((half > 0) & (half < 2.0**-14)).sum()
        found["overflowed"] += np.isinf(kept).sum() + lost
        found["vanished"] += ((finite != 0) & (kept == 0)).sum()
        stays = np.isfinite(kept) & (kept != 0)
        errors = np.abs((kept[stays] - finite[stays]) / finite[stays])
        normal = np.abs(finite[stays]) >= 2.0 ** FORMATS[target][1]
        found["rounding"] = max(found["rounding"], largest_error(tensor.dtype, target) if errors[normal].any() else 0.0)
        if not normal.all():
            found["rounding"] = max(found["rounding"], largest_subnormal_error(tensor.dtype, target))
        assert errors.max(initial=0.0) <= found["rounding"]
    return found


def largest_error(stored: torch.dtype, target: torch.dtype) -> float:
    """Of a number in the target's normal range: half a unit in the last place, relatively largest just above a power of
    two."""
    unit = 2.0 ** -(FORMATS[target][0] + 1)
    return unit / (1 + unit) + (2.0**-24 if stored == torch.float64 and target != torch.float32 else 0.0)


@cache
def largest_subnormal_error(stored: torch.dtype, target: torch.dtype) -> float:
    """Of a number that becomes subnormal: of the smallest one that is not turned to zero."""

    def weight_of(pattern: int) -> np.ndarray:
        return torch.tensor([pattern], dtype=bits_of(stored)).view(stored).double().numpy()

    one = torch.ones(1, dtype=stored).view(bits_of(stored)).item()
    first = bisect_left(range(one), True, key=lambda pattern: bool(cast(narrowed(weight_of(pattern)), target)[0]))
    weight = weight_of(first)
    return float(abs(cast(narrowed(weight), target) - weight)[0] / weight[0])


def narrowed(weights: np.ndarray) -> np.ndarray:
    """torch casts float64 by way of float32."""
    return weights.astype(np.float32).astype(np.float64)


def assert_right(audited: WeightAudit, tensors: list[torch.Tensor]) -> None:
    wanted = brute_force(tensors, audited.target)
    if any(
        ((tensor != 0) & (tensor.double().abs() < torch.finfo(tensor.dtype).smallest_normal)).any()
        for tensor in tensors
    ):
        # What is stored as a subnormal has fewer significant bits than its dtype: its cast may be exact though bits are
        # dropped.
        possible = max((largest_error(tensor.dtype, audited.target) for tensor in tensors), default=0.0)
        assert wanted["rounding"] <= audited.rounding <= max(possible, wanted["rounding"])
        wanted["rounding"] = audited.rounding
    assert {name: getattr(audited, name) for name in wanted} == wanted


def write(file: Path, tensors: dict[str, torch.Tensor], gap: int = 0) -> dict[str, StoredTensor]:
    """The tensors in one file, ``gap`` bytes before each."""
    stored, offset = {}, 0
    with file.open("wb") as out:
        for name, tensor in tensors.items():
            data = tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            out.write(b"\xff" * gap + data)
            stored[name] = StoredTensor(file, tensor.dtype, tuple(tensor.shape), offset + gap, len(data))
            offset += gap + len(data)
    return stored


@contextmanager
def small_blocks(block: int = 4096, tile: int = 256):
    """So that a few thousand weights are many blocks of many tiles."""
    before = audit._BLOCK, audit._TILE, audit._STARTS
    audit._BLOCK, audit._TILE, audit._STARTS = block, tile, np.arange(0, block, tile)
    try:
        yield
    finally:
        audit._BLOCK, audit._TILE, audit._STARTS = before


def bits_of(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def at_the_edges(dtype: torch.dtype) -> torch.Tensor:
    """Each edge and its neighbours, of both signs, beside NaN of several payloads and Inf."""
    magnitudes = torch.tensor([*EDGES, math.inf, math.nan], dtype=torch.float64).to(dtype).view(bits_of(dtype))
    top = torch.iinfo(bits_of(dtype)).max
    near = torch.cat(
        [(magnitudes + step).clamp(0, top) for step in (-2, -1, 0, 1, 2)]
        + [torch.tensor([top, top - 1], dtype=bits_of(dtype))]
    )
    return torch.cat([near, near | torch.iinfo(bits_of(dtype)).min]).view(dtype)


def make(kind: str, dtype: torch.dtype, count: int, random: np.random.Generator) -> torch.Tensor:
    """``count`` weights of one kind."""
    if kind == "any bits":
        return torch.frombuffer(bytearray(random.bytes((count + 1) * dtype.itemsize)), dtype=dtype)[:count]
    if kind == "edges":
        return at_the_edges(dtype)[torch.from_numpy(random.integers(0, len(at_the_edges(dtype)), count))]
    if kind == "one value":
        return torch.full((count,), random.choice(EDGES), dtype=torch.float64).to(dtype)
    values = random.standard_normal(count) * float(kind)
    return torch.from_numpy(np.where(random.random(count) < 0.1, 0.0, values)).to(dtype)


KINDS = ("any bits", "edges", "one value", "0.02", "1e-5", "1e-7", "3e-38", "3e4")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", STORED)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    gap=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=12, deadline=None)
def test_every_count_equals_a_float64_computation(tmp_path_factory, dtype, target, seed, kinds, gap):
    random = np.random.default_rng(seed)
    tensors = {
        f"{i}": make(kind, dtype, int(random.choice([0, 1, 7, 255, 3000, 9000])), random)
        for i, kind in enumerate(kinds)
    }
    stored = write(tmp_path_factory.getbasetemp() / "weights", tensors, gap)
    with small_blocks():
        assert_right(scan_weights(stored, target), list(tensors.values()))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", STORED)
def test_each_edge_falls_to_the_right_side(tmp_path, dtype, target):
    edges = at_the_edges(dtype)
    assert_right(scan_weights(write(tmp_path / "weights", {"edges": edges}), target), [edges])
    stored = write(tmp_path / "weights", {str(number): edge[None] for number, edge in enumerate(edges)})
    with small_blocks():
        for number, edge in enumerate(edges):
            assert_right(scan_weights({"edge": stored[str(number)]}, target), [edge[None]])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", STORED[2:])
def test_every_pattern_of_8_and_16_bits(tmp_path, dtype, target):
    every = torch.arange(2 ** (8 * dtype.itemsize)).to(bits_of(dtype)).view(dtype)
    audited = scan_weights(write(tmp_path / "weights", {"every": every}), target)
    assert_right(audited, [every])
    assert audited.values == 2 ** (8 * dtype.itemsize)


@pytest.mark.parametrize("target", TARGETS)
def test_a_part_of_several_dtypes_and_shards(tmp_path, target):
    random = np.random.default_rng(0)
    stored, tensors = {}, []
    for shard in range(3):
        sizes = random.integers(0, 700_000, 8)
        names = [f"{shard}.{'abcdefgh'[i]}" for i in range(8)]
        dtypes = [(torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)[i // 2] for i in range(8)]
        made = {name: make("0.02", dtype, size, random) for name, dtype, size in zip(names, dtypes, sizes, strict=True)}
        stored |= write(tmp_path / f"shard{shard}", made, gap=shard)
        tensors += made.values()
    assert_right(scan_weights(dict(reversed(stored.items())), target), tensors)


@pytest.mark.parametrize("scale", ["0.02", "1e-5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_the_real_size(tmp_path, dtype, scale):
    weights = make(scale, dtype, audit._BLOCK // dtype.itemsize + 12_345, np.random.default_rng(1))
    stored = write(tmp_path / "weights", {"w": weights.view(-1, 1)}, gap=5)
    for target in TARGETS:
        assert_right(scan_weights(stored, target), [weights])


def test_a_safetensors_file(tmp_path):
    tensors = {
        "a.weight": torch.randn(40, 30).bfloat16(),
        "b.bias": torch.zeros(7),
        "ids": torch.arange(9),
        "scalar": torch.tensor(1e6),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    audited = scan_weights(read_header(tmp_path / "model.safetensors"), torch.bfloat16, "transformer")
    assert_right(audited, [tensor for name, tensor in tensors.items() if name != "ids"])
    assert audited.worst == (("scalar", "1 beyond 65504"),)


@pytest.mark.parametrize(
    "tensors", [{}, {"empty": torch.zeros(0, 4)}, {"ids": torch.arange(5), "mask": torch.ones(3, dtype=torch.bool)}]
)
def test_what_holds_no_weights_is_sound(tmp_path, tensors):
    told = []
    audited = scan_weights(
        write(tmp_path / "weights", tensors), torch.float16, on_progress=lambda *now: told.append(now)
    )
    assert audited == WeightAudit("", torch.float16)
    assert told == []
    assert "0 weights read: no NaN, no Inf" in audited.text


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float8_e5m2, torch.float16)],
)
def test_a_cast_that_holds_everything_is_exact(tmp_path, dtype, target):
    audited = scan_weights(
        write(tmp_path / "weights", {"w": make("any bits", dtype, 5000, np.random.default_rng(2))}), target
    )
    assert (audited.rounding, audited.overflowed, audited.vanished) == (0.0, 0, 0)
    assert "is exact" in audited.text


def test_float32_made_from_bfloat16_goes_back_exactly(tmp_path):
    weights = torch.randn(50_000).bfloat16().float()
    assert scan_weights(write(tmp_path / "weights", {"w": weights}), torch.bfloat16).rounding == 0.0


def test_the_tensors_with_bad_weights_are_named_damage_first(tmp_path):
    tensors = {f"layer{i}": torch.randn(3000) for i in range(12)}
    tensors["layer2"][5] = -70000.0
    tensors["layer7"][[0, 2999]] = torch.tensor([math.nan, -math.inf])
    tensors["layer8"][:] = math.nan
    tensors["layer9"][0] = 65504.0
    with small_blocks():
        audited = scan_weights(write(tmp_path / "weights", tensors), torch.float32)
    assert audited.worst == (("layer7", "1 NaN, 1 Inf"), ("layer8", "3,000 NaN"), ("layer2", "1 beyond 65504"))
    assert audited.damaged
    assert "layer7 (1 NaN, 1 Inf)" in audited.text


def test_only_the_first_bad_tensors_are_named(tmp_path):
    audited = scan_weights(
        write(tmp_path / "weights", {f"{i:03}": torch.full((2,), math.inf) for i in range(100)}), torch.float32
    )
    assert [name for name, _ in audited.worst] == ["000", "001", "002", "003", "004"]
    assert audited.inf == 200


def test_the_text_tells_soundness_the_cost_of_fp16_and_the_cast(tmp_path):
    torch.manual_seed(0)
    weights = torch.randn(10_000)
    weights[:3], weights[3:5], weights[5] = 1e-9, 1e-5, 1e5
    audited = scan_weights(write(tmp_path / "weights", {"w": weights}), torch.bfloat16, "transformer")
    sound, half, runs = audited.text.split("\n")
    assert sound == "[ok] transformer: 10,000 weights read: no NaN, no Inf."
    assert "overflow at 1 (0.01 %), flush to zero 3 (0.03 %) and keep only as subnormals " in half
    assert "w (1 beyond 65504)" in half
    assert runs.strip() == "The cast to bf16 rounds by at most 0.39 %."
    assert not audited.damaged


def test_large_counts_are_told_short():
    text = WeightAudit("transformer", torch.float16, values=5_570_000_000, flushed=12_345, subnormal=1_234_567).text
    assert "5.57 G weights" in text
    assert "flush to zero 12,345 (0.00022 %) and keep only as subnormals 1.23 M (0.022 %)" in text


def test_an_audit_is_json(tmp_path):
    audited = scan_weights(write(tmp_path / "weights", {"w": at_the_edges(torch.float32)}), torch.float16, "vae")
    back = json.loads(json.dumps(audited.as_dict(), allow_nan=False))
    assert back["name"] == "vae"
    assert back["target"] == "fp16"
    assert back["nan"] == audited.nan > 0
    assert back["worst"] == [["w", audited.worst[0][1]]]
    assert back["damaged"] is True


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_progress_is_told_in_the_calling_thread_and_ends_at_the_total(tmp_path, threads, thread_count):
    thread_count(threads)
    stored = write(
        tmp_path / "weights", {"a": torch.randn(50_000), "ids": torch.arange(9), "b": torch.randn(77).half()}, gap=1
    )
    told, where = [], set()
    with small_blocks():
        scan_weights(
            stored, torch.float16, on_progress=lambda *now: (told.append(now), where.add(threading.current_thread()))
        )
    total = 200_000 + 154
    assert {of for _, of in told} == {total}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (total, total)
    assert where == {threading.current_thread()}


def test_the_number_of_threads_does_not_change_the_answer(tmp_path, thread_count):
    stored = write(
        tmp_path / "weights",
        {"w": make("1e-5", torch.float32, 100_000, np.random.default_rng(3)), "v": torch.randn(50_000)},
    )
    answers = set()
    with small_blocks():
        for threads in (1, 2, 4, 4, 4):
            thread_count(threads)
            answers |= {scan_weights(stored, target) for target in TARGETS}
    assert len(answers) == len(TARGETS)


@pytest.fixture
def thread_count():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def open_files() -> list[str]:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("which files are open cannot be told on this system")
    return [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


@pytest.mark.parametrize("threads", [1, 4])
def test_what_progress_raises_stops_the_scan_and_leaves_nothing_behind(tmp_path, monkeypatch, threads, thread_count):
    thread_count(threads)
    blocks = []
    look = audit._look

    def look_slowly(*arguments):
        """The other threads must not be through before this one, starved on a busy machine, has its first turn."""
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.01)
        blocks.append(1)
        return look(*arguments)

    monkeypatch.setattr(audit, "_look", look_slowly)
    stored = write(tmp_path / "weights", {"w": torch.randn(1_000_000)})

    class Interrupted(BaseException):
        pass

    def interrupt(done, total):
        raise Interrupted

    with small_blocks(), pytest.raises(Interrupted):
        scan_weights(stored, torch.float16, on_progress=interrupt)
    gc.collect()
    assert len(blocks) < 4_000_000 // 4096 // 2
    assert not [thread for thread in threading.enumerate() if "weight-audit" in thread.name]
    assert str(tmp_path / "weights") not in open_files()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_ends_early_is_refused_by_whichever_thread_reads_it(tmp_path, threads, thread_count):
    thread_count(threads)
    stored = write(tmp_path / "first", {"a": torch.randn(9_000)}) | write(
        tmp_path / "second", {"b": torch.randn(90_000)}
    )
    os.truncate(tmp_path / "second", 200_002)
    with (
        small_blocks(),
        pytest.raises(ValueError, match=r"second ended while its weights were read.*truncated.*[Dd]ownload it again"),
    ):
        scan_weights(stored, torch.float16)
    assert not [thread for thread in threading.enumerate() if "weight-audit" in thread.name]
    assert str(tmp_path / "second") not in open_files()


def test_a_file_that_is_gone_is_told(tmp_path):
    stored = write(tmp_path / "weights", {"a": torch.randn(9)})
    (tmp_path / "weights").unlink()
    with pytest.raises(FileNotFoundError):
        scan_weights(stored, torch.float16)


def test_memory_does_not_grow_with_the_file(tmp_path):
    size = 1 << 29
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(size)
    script = """
import sys, torch
from pathlib import Path
from cogvideox.checkpoint.headers import StoredTensor
from cogvideox.checkpoint.audit import scan_weights
file, size = Path(sys.argv[1]), int(sys.argv[2])
torch.randn(1000).bfloat16().double().max()
from tests.memory import peak_kilobytes
before = peak_kilobytes()
audited = scan_weights({"w": StoredTensor(file, torch.float32, (size // 4,), 0, size)}, torch.bfloat16)
print(audited.values, peak_kilobytes() - before)
"""
    values, grown = map(int, run_apart(script, tmp_path / "weights", size).split())
    assert values == size // 4
    assert grown * 1024 < 60e6


@pytest.mark.parametrize("target", [torch.float64, torch.float8_e4m3fn, torch.int8, None])
def test_a_dtype_that_no_part_runs_in_is_refused(target):
    with pytest.raises(
        ValueError, match=rf"audited for {target}, .*Choose torch.float16, torch.bfloat16, torch.float32"
    ):
        scan_weights({}, target)


def test_a_tensor_put_together_from_rows_of_another_is_read_where_its_rows_lie(tmp_path):
    """As SAT's fused modulations are."""
    whole = torch.arange(24.0).reshape(12, 2)
    whole[3] = float("nan")
    stored = write(tmp_path / "weights", {"w": whole})["w"]
    audited = scan_weights(
        {"sound": stored.rows(0, 1, 2, 6, 7, 8, of=12), "bad": stored.rows(3, 4, 5, 9, 10, 11, of=12)}, torch.bfloat16
    )
    assert (audited.values, audited.nan) == (24, 2)
    assert audited.worst == (("bad", "2 NaN"),)
