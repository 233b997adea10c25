"""Processes that share a video give the video of one: the halves of guidance bit for bit, the tokens within rounding.

Each test forks processes that talk by gloo, and compares many runs in one go.
"""

import multiprocessing
import os
import queue
import socket
import sys
import traceback

import pytest
import torch

from cogvideox.events import Events
from cogvideox.handles import open_handles, quantized, with_cache
from cogvideox.modules.cache import Cache
from cogvideox.modules.sharded import Split, Team
from cogvideox.sampling import sample
from tests.conftest import CPU
from tests.reference import draw_prompts, error
from tests.tiny_checkpoint import build_checkpoint, build_transformer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
#: A process that says nothing for so long has hung.
LIMIT = 120


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory):
    """The folder of a tiny checkpoint whose heads four processes can share."""

    def widen(parts):
        parts["transformer"] = build_transformer(num_attention_heads=4, num_layers=3)

    folder = tmp_path_factory.mktemp("heads") / "heads"
    return build_checkpoint(folder, change=widen, stored={"transformer": torch.float32})


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _child(work, rank, count, port, answers, given):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    try:
        dist.init_process_group("gloo")
        answers.put((rank, work(rank, *given), None))
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def together(count, work, *given):
    """What ``work(rank, *given)`` returns in each of ``count`` processes that can talk."""
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_child, args=(work, rank, count, port, answers, given)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < count:
            rank, result, failed = answers.get(timeout=LIMIT)
            assert failed is None, failed
            found[rank] = result
    except queue.Empty:
        pytest.fail(f"only {sorted(found)} of {count} processes answered")
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [found[rank] for rank in range(count)]


class Told(Events):
    def __init__(self):
        self.notes = []

    def note(self, text, level=30):
        self.notes.append(text)


def run(model, team=None, **more):
    """A short run of 32 tokens of video, and of 226 of text, which two processes can share equally and four cannot."""
    latents = torch.zeros(1, 16, 3, 8, 8)
    how = dict(seed=1, steps=4, events=Told()) | more
    return sample(model, *draw_prompts(), latents, team=team, **how)


def one_by_one(model, **more):
    """The run of one process that evaluates the halves one after the other."""
    import cogvideox.sampling as module

    chosen = module.choose_placements
    try:
        module.choose_placements = lambda *given: chosen(*given[:3], False, *given[4:])
        return run(model, **more)
    finally:
        module.choose_placements = chosen


CACHES = [None, Cache("teacache", 0.5, 0.0, 1.0), Cache("taylorseer", 0.5, 0.0, 1.0)]


def models(folder):
    plain = open_handles(folder, "fp32", CPU).model
    safe = open_handles(folder, "fp16", CPU).model
    assert safe.weights.precision.range_safe
    return {
        "fp32": plain,
        "range-safe": safe,
        "quantized": quantized(plain, "int8_weight_only"),
        **{cache.method: with_cache(plain, cache) for cache in CACHES if cache is not None},
    }


def _guidance(rank, folder):
    team = Team(Split(guidance=2), torch.device("cpu"))
    found = {}
    for name, model in models(folder).items():
        for more in ({}, {"cfg_start": 0.4, "scheduler": "dpm"}):
            found[name, bool(more)] = torch.equal(run(model, team, **more), one_by_one(model, **more))
    found["sent"] = team.sent
    return found


def test_halves_of_guidance_in_two_processes_are_bit_equal_to_halves_one_by_one(four_heads):
    for found in together(2, _guidance, four_heads):
        sent = found.pop("sent")
        assert all(found.values()), found
        assert len(found) == 10
        # 4 steps of each run, a float32 prediction of 4 x 16 x 8 x 8 numbers each (one latent frame is padding).
        assert sent == 10 * 4 * 4 * 16 * 8 * 8 * 4


def _sequence(rank, folder, split):
    team = Team(split, torch.device("cpu"))
    found = {}
    for name, model in models(folder).items():
        once = dict(steps=1, cfg=1.0)
        ours = run(model, team)
        found[name] = (
            error(run(model, team, **once), run(model, **once)),
            error(ours, run(model)),
            ours.numpy().tobytes(),
        )
    return found


@pytest.mark.parametrize("split", [Split(sequence=2), Split(sequence=4), Split(2, 2)], ids=lambda split: split.text)
def test_tokens_shared_among_processes_give_the_same_within_rounding(four_heads, split):
    results = together(split.guidance * split.sequence, _sequence, four_heads, split)
    for name, (once, run_through, ours) in results[0].items():
        # fp16's products are rounded otherwise, as they are added up otherwise: by 1e-3 from fp32's.
        assert once < (1e-3 if name == "range-safe" else 1e-6), (name, once)
        # Guidance multiplies what differs at each step.
        assert run_through < (3e-3 if name == "range-safe" else 1e-5), (name, run_through)
        for other in results[1:]:
            assert other[name][2] == ours, name
