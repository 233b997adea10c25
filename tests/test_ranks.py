"""Processes that share a video give the video of one: the halves of guidance bit for bit, the tokens within rounding.

Each test forks processes that talk by gloo, and compares many runs in one go.
"""

import multiprocessing
import os
import queue
import signal
import socket
import sys
import traceback
from contextlib import contextmanager

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


def together(count, work, *given, dies=None):
    """What ``work(rank, *given)`` returns in each of ``count`` processes that can talk; nothing of one that is to die
    (``dies``)."""
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_child, args=(work, rank, count, port, answers, given)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < count - (dies is not None):
            rank, result, failed = answers.get(timeout=LIMIT)
            assert failed is None, failed
            found[rank] = result
    except queue.Empty:
        pytest.fail(f"only {sorted(found)} of {count} processes answered")
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [found[rank] for rank in range(count) if rank != dies]


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


@contextmanager
def halves_apart():
    """One process evaluates the halves of guidance one after the other, and not as a batch."""
    import cogvideox.sampling as module

    chosen = module.choose_placements
    try:
        module.choose_placements = lambda *given: chosen(*given[:3], False, *given[4:])
        yield
    finally:
        module.choose_placements = chosen


def one_by_one(model, **more):
    with halves_apart():
        return run(model, **more)


CACHES = [Cache("teacache", 0.5, 0.0, 1.0), Cache("taylorseer", 0.5, 0.0, 1.0)]
#: Settings of the runs that are compared with those of one process.
OTHERWISE = {"unguided": {"steps": 1, "cfg": 1.0}, "dpm": {"cfg_start": 0.4, "scheduler": "dpm"}}


def models(folder):
    plain = open_handles(folder, "fp32", CPU).model
    safe = open_handles(folder, "fp16", CPU).model
    assert safe.weights.precision.range_safe
    return {
        "fp32": plain,
        "range-safe": safe,
        "quantized": quantized(plain, "int8_weight_only"),
        **{cache.method: with_cache(plain, cache) for cache in CACHES},
    }


@pytest.fixture(scope="module")
def alone(four_heads):
    """What one process makes by the name of a model, and of a setting: the halves one after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = models(four_heads)
        return {(name, ""): one_by_one(model) for name, model in found.items()} | {
            (name, setting): one_by_one(found[name], **more)
            for setting, more in OTHERWISE.items()
            for name in ("fp32", "range-safe")
        }
    finally:
        torch.set_num_threads(before)


def _shared(rank, folder, split, names):
    """What processes make together by model and setting, and the bytes that one received."""
    team = Team(split, torch.device("cpu"))
    found = models(folder)
    made = {(name, setting): run(found[name], team, **OTHERWISE.get(setting, {})).numpy() for name, setting in names}
    return made, team.sent


def test_halves_of_guidance_in_two_processes_are_bit_equal_to_halves_one_by_one(four_heads, alone):
    for made, sent in together(2, _shared, four_heads, Split(guidance=2), list(alone)):
        for name, latents in alone.items():
            assert torch.equal(torch.from_numpy(made[name]), latents), name
        # A float32 prediction of 4 x 16 x 8 x 8 numbers each step (one latent frame is padding).
        steps = sum(OTHERWISE.get(setting, {}).get("steps", 4) for _, setting in alone)
        assert sent == steps * 4 * 16 * 8 * 8 * 4


@pytest.mark.parametrize("split", [Split(sequence=2), Split(sequence=4), Split(2, 2)], ids=lambda split: split.text)
def test_tokens_shared_among_processes_give_the_same_within_rounding(four_heads, alone, split):
    names = [name for name in alone if (split.sequence == 2 and split.guidance == 1) or name[0] in ("fp32", "range-safe")]
    first, *others = together(split.guidance * split.sequence, _shared, four_heads, split, names)
    for (name, setting), latents in first[0].items():
        # A single evaluation first. fp16's products are rounded otherwise, as they are added up otherwise: by 1e-3 from
        # fp32's. Guidance multiplies what differs at each step.
        limits = (1e-3, 3e-3) if name == "range-safe" else (1e-6, 1e-5)
        relative = error(torch.from_numpy(latents), alone[name, setting])
        assert relative < limits[setting != "unguided"], (name, setting, relative)
        for other in others:
            assert (other[0][name, setting] == latents).all(), (name, setting)


def _speaking(rank, arguments, change):
    """What ``generate.py`` returns in a process, what it says, and how long it took."""
    import contextlib
    import io
    import time

    import torch.distributed as dist

    import generate

    # The command line meets by itself.
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    if change is not None:
        change(rank)
    said, error, begun = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        code = generate.main([str(argument) for argument in arguments])
    dist.is_initialized() or dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return code, said.getvalue(), error.getvalue(), time.monotonic() - begun


def speak(*arguments, count=2, change=None):
    return together(count, _speaking, arguments, change)


def short_video(model, output, *more):
    how = ("--width", 64, "--height", 64, "--frames", 17, "--steps", 2, "--device", "cpu")
    return ("--prompt", "a panda", "--model", model, *how, "--output", output, *more)


def test_processes_write_one_video_that_is_that_of_one(tiny, tmp_path, capsys):
    import generate

    with halves_apart():
        assert generate.main([str(word) for word in short_video(tiny, tmp_path / "one.mp4")]) == 0
    (code, said, error, _), other = speak(*short_video(tiny, tmp_path / "two.mp4"))
    assert (code, other[0]) == (0, 0), error + other[2]
    assert "2 processes share the halves of guidance." in said
    assert other[1:3] == ("", "")
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "two.mp4"]


def test_processes_share_the_lines_of_a_file(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(
        "\n".join(['{"prompt": "a"}', '{"prompt": "b"}', '{"prompt": "c", "on_black": "stop"}'])
    )
    how = ("--prompts", "x.jsonl", *short_video(tiny, "videos")[2:])
    (code, said, error, _), other = speak(*how)
    assert (code, other[0]) == (0, 0), error + other[2]
    assert "2 processes share 3 videos." in said
    assert said.splitlines()[-1] == "3 videos made, 0 there already, 0 failed."
    made = {path.name: path.read_bytes() for path in (tmp_path / "videos").iterdir()}
    assert sorted(made) == ["00001.mp4", "00002.mp4", "00003.mp4"]
    # Together, each line after the other, and one of them fails where files are written.
    (tmp_path / "videos" / "00001.mp4").unlink()
    (tmp_path / "videos" / "00002.mp4").unlink()

    def change(rank):
        import cogvideox.vae as module

        decode, black = module.decode, [True]
        module.decode = lambda *given, **how: decode(*given, **how) * (torch.nan if black and black.pop() else 1)

    (code, said, _, _), other = speak(*how, "--split", "guidance", change=change)
    assert (code, other[0]) == (1, 1)
    assert "1 videos made, 1 there already, 1 failed." in said
    assert "line 1: error:" in said
    assert (tmp_path / "videos" / "00002.mp4").exists()
    assert not (tmp_path / "videos" / "00001.mp4").exists()


class TestOneThatFails:
    def test_ends_all_with_its_sentence(self, tiny, tmp_path):
        def change(rank):
            import cogvideox.sampling as module

            def fail(*_, **__):
                raise ValueError("The card of this one is on fire. Put it out.")

            if rank == 1:
                module.advance = fail

        found = speak(*short_video(tiny, tmp_path / "x.mp4"), change=change)
        assert [code for code, *_ in found] == [1, 1]
        assert found[1][2] == "error: The card of this one is on fire. Put it out.\n"
        assert found[0][2].splitlines()[-1] == "error: Process 1 ended all of them: " + found[1][2][7:-1]
        assert max(took for *_, took in found) < 60
        assert list(tmp_path.iterdir()) == []

    def test_is_noticed_without_a_word(self, tiny, tmp_path):
        def change(rank):
            import cogvideox.sampling as module

            if rank == 1:
                module.advance = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

        (code, _, error, took) = together(2, _speaking, short_video(tiny, tmp_path / "x.mp4"), change, dies=1)[0]
        assert code == 1
        assert error.splitlines()[-1].startswith("error: Another process of this run is gone without a word")
        assert took < 60

    def test_ends_one_that_waits_in_a_call_that_nothing_interrupts(self):
        from datetime import timedelta

        from torch.distributed import TCPStore

        from commands import ranks

        port = free_port()
        ended = []
        store = TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=20), wait_for_workers=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cogvideox.modules.internals.end_process", ended.append)
            patch.setattr(ranks, "_BEAT", 0.05)
            watch = ranks._Watch(ranks.Place(0, 2), store)
            store.set("ended", "Process 1 ended all of them: no.")
            watch._thread.join(1)
            assert ended[:1] == [1]
            watch.stop()
            # And one that was heard of, and is not any more.
            patch.setattr(ranks, "_SILENCE", 0.3)
            store.delete_key("ended")
            store.add("beat1", 5)
            watch = ranks._Watch(ranks.Place(0, 2), store)
            watch._thread.join(2)
            assert len(ended) > 1
            watch.stop()


def _healed(rank, folder):
    team = Team(Split(guidance=2), torch.device("cpu"))
    model = open_handles(folder, "fp32", CPU).model
    events, calls = Told(), []

    def spoil(module, given, output):
        calls.append(1)
        return (output[0] * torch.nan,) if rank == 0 and len(calls) == 2 else None

    import cogvideox.weights as module

    load = module.load_module

    def loaded(*given):
        found = load(*given)
        found.register_forward_hook(spoil)
        return found

    module.load_module = loaded
    try:
        ours = run(model, team, events=events)
    finally:
        module.load_module = load
    return ours.numpy(), events.notes, len(calls)


def test_what_is_not_finite_in_one_is_healed_by_all(four_heads, alone):
    for ours, notes, calls in together(2, _healed, four_heads):
        assert torch.equal(torch.from_numpy(ours), alone["fp32", ""])
        assert sum("step 2 of 4" in note and "passing fault" in note for note in notes) == 1, notes
        assert calls == 5


def _private_bytes(rank, folder):
    """What a process of its own has of the memory of a loaded model, and its size."""
    weights = open_handles(folder, "bf16", CPU, on_mismatch="warn").model.weights

    def private():
        with open("/proc/self/smaps_rollup") as table:
            return (
                sum(int(line.split()[1]) for line in table if line.startswith(("Private_Dirty", "Private_Clean"))) << 10
            )

    before = private()
    with weights.running() as module:
        for parameter in module.parameters():
            parameter.float().sum()
        import torch.distributed as dist

        dist.barrier()
        found = private() - before
        dist.barrier()
    return found, weights.nbytes


def test_processes_have_one_copy_of_the_weights_in_the_hosts_memory(tmp_path):
    """Their files are mapped: what all read is there once."""

    def widen(parts):
        parts["transformer"] = build_transformer(num_attention_heads=8, num_layers=5)

    folder = build_checkpoint(tmp_path / "wide", change=widen)
    for found, nbytes in together(2, _private_bytes, folder):
        assert nbytes > 25 << 20
        assert found < nbytes / 3, (found, nbytes)
