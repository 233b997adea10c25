"""Processes that share a video give the video of one: the halves of guidance bit for bit, and the tokens where products
do not depend on how many rows they have; elsewhere within rounding.

Each test forks processes that talk by gloo, and compares many runs in one go.
"""

import multiprocessing
import os
import queue
import signal
import socket
import sys
import traceback
from contextlib import contextmanager, nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from cogvideox.dtypes import Precision
from cogvideox.events import Events
from cogvideox.handles import open_handles, quantized, with_cache, with_windows
from cogvideox.memory import step_bytes
from cogvideox.modules.cache import Cache
from cogvideox.modules.internals import splits_anything
from cogvideox.modules.sharded import Split, Team
from cogvideox.requests import check_split
from cogvideox.sampling import sample
from cogvideox.sharing import expected_gain
from cogvideox.variants import full_config
from cogvideox.windows import Windows
from commands.ranks import Place, choose_split, device_of, place_of
from tests.conftest import CPU
from tests.helpers import is_same_video, run_generate
from tests.reference import draw_prompts, error
from tests.test_generate import no_weights
from tests.tiny_checkpoint import build_checkpoint, build_transformer

__all__ = ["no_weights"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
#: Older versions share tokens that divide alone.
SHARES_TOKENS = pytest.mark.skipif(not splits_anything(), reason="diffusers cannot share 226 tokens")
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


def _child(work, rank, count, port, answers, given, meets):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    try:
        if meets:
            dist.init_process_group("cpu:gloo")
        answers.put((rank, work(rank, *given), None))
        if meets:
            dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def together(count, work, *given, dies=None, meets=True):
    """What ``work(rank, *given)`` returns in each of ``count`` processes that can talk, or are told where to meet
    (``meets``); nothing of one that is to die (``dies``)."""
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_child, args=(work, rank, count, port, answers, given, meets)) for rank in range(count)
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
    """A short run of 32 tokens of video, and of 10 of text, which two processes can share equally and four cannot; in
    context windows, of 48 and 32 tokens of video."""
    latents = torch.zeros(1, 16, 3 if model.windows is None else 8, 8, 8)
    how = dict(seed=1, steps=4, events=Told()) | more
    return sample(model, *draw_prompts(10), latents, team=team, **how)


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
OTHERWISE = {
    "unguided": {"steps": 1, "cfg": 1.0},
    "dpm": {"cfg_start": 0.4, "scheduler": "dpm"},
    "guided later": {"cfg_start": 0.5},
}
#: What is run with them.
RUN_OTHERWISE = {"guided later": [cache.method for cache in CACHES]}
#: A setting in which both halves of guidance are one batch.
BATCHED = "batched"


def models(folder):
    plain = open_handles(folder, "fp32", CPU).model
    safe = open_handles(folder, "fp16", CPU).model
    assert safe.weights.precision.range_safe
    return {
        "fp32": plain,
        "range-safe": safe,
        "quantized": quantized(plain, "int8_weight_only"),
        **{cache.method: with_cache(plain, cache) for cache in CACHES},
        "windows": with_windows(plain, Windows(21, 2)),
        "windows, cached": with_windows(with_cache(plain, CACHES[1]), Windows(21, 2)),
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
            for name in RUN_OTHERWISE.get(setting, ("fp32", "range-safe"))
        }
    finally:
        torch.set_num_threads(before)


def _shared(rank, folder, split, names):
    """What processes make together by model and setting, and the bytes that one received."""
    team = Team(split, torch.device("cpu"))
    found = models(folder)
    made = {}
    for name, setting in names:
        with nullcontext() if setting == BATCHED else halves_apart():
            made[name, setting] = run(found[name], team, **OTHERWISE.get(setting, {})).numpy()
    return made, team.sent


@SHARES_TOKENS
def test_every_context_window_has_to_be_shared_in_equal_parts(four_heads):
    """A clip of 36 tokens could be, by four; its windows have 18 and 12."""
    model, split, shape = open_handles(four_heads, "fp32", CPU).model, Split(sequence=4), (1, 16, 12, 4, 6)
    check_split(model, split, shape)
    with pytest.raises(ValueError, match="18 tokens, which 4 processes on cpu cannot share"):
        check_split(with_windows(model, Windows(21, 2)), split, shape)


def test_halves_of_guidance_in_two_processes_are_bit_equal_to_halves_one_by_one(four_heads, alone):
    for made, sent in together(2, _shared, four_heads, Split(guidance=2), list(alone)):
        for name, latents in alone.items():
            assert torch.equal(torch.from_numpy(made[name]), latents), name
        # A float32 prediction of 16 x 8 x 8 numbers each step and latent frame: three and one of padding, or those of
        # two windows.
        frames = sum(
            OTHERWISE.get(setting, {}).get("steps", 4) * (6 + 4 if "windows" in name else 4) for name, setting in alone
        )
        assert sent == frames * 16 * 8 * 8 * 4


def batched(folder):
    """What one process makes of the plain model with both halves of guidance in a batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(models(folder)["fp32"])
    finally:
        torch.set_num_threads(before)


def rows_are_alike():
    """Say whether a product on this machine has the same rows however many it has of them, in fp32 and fp16."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype, (wide, narrow) in product((torch.float32, torch.float16), ((256, 1024), (1024, 256), (256, 256))):
            tokens, weights = torch.randn(1, 58, wide).to(dtype), torch.randn(narrow, wide).to(dtype)
            whole = functional.linear(tokens, weights)
            for rows in (42, 29, 21, 16, 11, 10, 8, 5, 3):
                if not torch.equal(functional.linear(tokens[:, :rows].contiguous(), weights), whole[:, :rows]):
                    return False
        return True
    finally:
        torch.set_num_threads(before)


def _attended(rank, tensors, text):
    """What processes with their parts of the tokens attend to together."""
    team = Team(Split(sequence=2), torch.device("cpu"))
    parts = [
        torch.cat([x[:, :text].tensor_split(2, 1)[rank], x[:, text:].tensor_split(2, 1)[rank]], 1) for x in tensors
    ]
    team.tokens = text, tensors.shape[2] - text
    return team.attend(attend, *parts).numpy()


def attend(*tensors):
    return functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)


@SHARES_TOKENS
def test_an_attention_adds_up_in_the_order_of_one_process():
    """Of 7 tokens of text, which two processes cannot share equally, and 12 of video."""
    tensors = torch.randn(3, 2, 19, 4, 64, generator=torch.Generator().manual_seed(3))
    found = together(2, _attended, tensors, 7)
    text, video = zip(
        *((part[:, :count], part[:, count:]) for part, count in zip(found, (4, 3), strict=True)), strict=True
    )
    assert torch.equal(torch.cat([torch.from_numpy(part) for part in (*text, *video)], 1), attend(*tensors))


@SHARES_TOKENS
@pytest.mark.parametrize("split", [Split(sequence=2), Split(sequence=4), Split(2, 2)], ids=lambda split: split.text)
def test_tokens_shared_among_processes_give_the_video_of_one(four_heads, alone, split):
    pair = split == Split(sequence=2)
    names = list(alone) if pair else [("fp32", ""), ("range-safe", "dpm")]
    expected = alone | ({("fp32", BATCHED): batched(four_heads)} if pair else {})
    names += [("fp32", BATCHED)] if pair else []
    first, *others = together(split.guidance * split.sequence, _shared, four_heads, split, names)
    alike = rows_are_alike()
    for (name, setting), latents in first[0].items():
        # Where products of fewer rows round otherwise: fp16's by 1e-3.
        limit = 0.0 if alike else 1e-3 if name == "range-safe" else 1e-6
        relative = error(torch.from_numpy(latents), expected[name, setting])
        assert relative <= limit, (name, setting, relative)
        for other in others:
            assert (other[0][name, setting] == latents).all(), (name, setting)


def _speaking(rank, arguments, change):
    """What ``generate.py`` returns in a process, what it says, and how long it took."""
    import contextlib
    import io
    import time

    import generate

    if change is not None:
        change(rank)
    said, error, begun = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        code = generate.main([str(argument) for argument in arguments])
    return code, said.getvalue(), error.getvalue(), time.monotonic() - begun


def speak(*arguments, count=2, change=None, dies=None):
    """What ``generate.py`` returns and says in processes, which meet by themselves."""
    return together(count, _speaking, arguments, change, dies=dies, meets=False)


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
    assert is_same_video(tmp_path / "one.mp4", tmp_path / "two.mp4")
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


class TestAnswersOfOneAlone:
    """Of several processes that make the lines of a file."""

    @pytest.fixture
    def lines(self, tiny, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "x.txt").write_text("a\nb\nc")
        return "--prompts", "x.txt", *short_video(tiny, "videos")[2:]

    @pytest.mark.parametrize(("split", "tried"), [("guidance", []), ("prompts", ["00002.mp4"])])
    def test_a_name_is_tried_by_the_one_that_writes_it(self, lines, tmp_path, split, tried):
        """What one has there to try it, another would take for a video."""

        def change(rank):
            import cogvideox.video as module

            check = module.check_output

            def own(path, *given, **how):
                if rank == 1 and path.name not in tried:
                    raise ValueError(f"{path} exists already.")
                return check(path, *given, **how)

            module.check_output = own

        for code, said, wrong, _ in speak(*lines, "--split", split, change=change):
            assert code == 0, said + wrong
        assert len(list((tmp_path / "videos").iterdir())) == 3

    def test_nothing_is_begun_before_all_have_checked(self, lines, tmp_path):
        def change(rank):
            import time

            import commands.video as module

            prepared = module.prepared

            def slow(options, *given):
                if rank == 1 and options.prompt == "c":
                    time.sleep(1.5)
                    raise ValueError("Not this one.")
                return prepared(options, *given)

            module.prepared = slow

        for code, said, wrong, _ in speak(*lines, change=change):
            assert code == 1
            assert "line 1 (" not in said
            assert "nothing was begun" in wrong
        assert list((tmp_path / "videos").iterdir()) == []

    def test_what_one_refuses_is_left_by_all(self, lines, tmp_path):
        """What is there is checked again before each video, and can be gone for one of them."""

        def change(rank):
            import commands.video as module

            prepared, calls = module.prepared, []

            def gone(options, *given):
                calls.append(options.prompt)
                # Of each line the first time all are checked, the second prompts are encoded.
                if rank == 1 and calls.count(options.prompt) == {"a": 2, "b": 3}.get(options.prompt):
                    raise ValueError(f"The picture of {options.prompt} is gone.")
                return prepared(options, *given)

            module.prepared = gone

        (code, said, error, took), other = speak(*lines, "--split", "guidance", change=change)
        assert (code, other[0]) == (1, 1), error + other[2]
        assert took < 60
        assert "1 videos made, 0 there already, 2 failed." in said
        for number, name in ((1, "a"), (2, "b")):
            assert f"line {number}: error: The picture of {name} is gone.\n" in said
        assert [path.name for path in (tmp_path / "videos").iterdir()] == ["00003.mp4"]


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

        (code, _, error, took) = speak(*short_video(tiny, tmp_path / "x.mp4"), change=change, dies=1)[0]
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
        # Beside them what the process has copied of the one that it was forked from.
        assert found < nbytes / 2, (found, nbytes)


def full_size():
    """A stand-in for CogVideoX1.5-5B's handle: its config, no weights."""
    config = dict(num_attention_heads=48, attention_head_dim=64, num_layers=42, patch_size=2, patch_size_t=2)
    config |= dict(text_embed_dim=4096, time_embed_dim=512, use_rotary_positional_embeddings=True)
    precision = Precision(torch.bfloat16)
    return SimpleNamespace(weights=SimpleNamespace(config=full_config(config), precision=precision))


class TestThePlan:
    def test_says_more_than_was_measured_of_whole_runs_and_not_much(self):
        """xDiT has 6.12 x on 8 L40 over PCIe at 161 frames, decoding included, which one card does."""
        gain = expected_gain(full_size(), (1, 16, 41, 96, 170), Split(2, 4), True, "NVIDIA L40")
        assert 6.12 < gain.faster["pcie"] < 1.25 * 6.12
        assert gain.faster["pcie"] < gain.faster["nvlink"] < 8

    def test_counts_what_is_exchanged(self, four_heads):
        """The bytes of a guidance split are those that a team received, and those of Ulysses its four exchanges."""
        model = open_handles(four_heads, "fp32", CPU).model
        shape = (1, 16, 3, 8, 8)
        assert expected_gain(model, shape, Split(2), True).received == 4 * 16 * 4 * 8 * 8
        part, output = (226 + 32) / 2 * 256 * 4, 4 * 16 * 4 * 8 * 8
        assert expected_gain(model, shape, Split(1, 2), True).received == 2 * (4 * 3 * part + output) / 2
        assert expected_gain(model, shape, Split(1, 2), False).operations == 3 * 258 * (24 * 256**2 + 4 * 258 * 256) / 2

    def test_a_part_of_the_tokens_takes_a_part_of_the_memory(self):
        config, shape, whole = full_size().weights.config, (1, 16, 21, 96, 170), []
        for parts in (1, 2, 4):
            whole.append(step_bytes(config, Precision(torch.bfloat16), shape, False, 226, parts=parts))
        assert whole[0] > whole[1] > whole[2] > whole[0] / 4

    @SHARES_TOKENS
    def test_is_said_where_processes_are_to_be_started(self, tiny, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        code, said, error = run_generate(capsys, "--plan", *short_video(tiny, tmp_path / "x.mp4"))
        assert code == 0, error
        assert "each card: memory to sample 64x64, 17 frames: gpu " in said
        assert "4 cards share the halves of guidance and the tokens among 2: a step is" in said
        monkeypatch.setenv("RANK", "1")
        assert run_generate(capsys, "--plan", *short_video(tiny, tmp_path / "x.mp4"))[1:] == ("", "")


class TestPlaces:
    @pytest.mark.parametrize(
        ("env", "place"),
        [
            ({}, Place()),
            ({"WORLD_SIZE": "1", "RANK": "0"}, Place()),
            (
                {
                    "WORLD_SIZE": "8",
                    "RANK": "5",
                    "LOCAL_RANK": "1",
                    "MASTER_ADDR": "a",
                    "MASTER_PORT": "1",
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                },
                Place(5, 8, 1, "a", 1, True),
            ),
            # Of a job that sbatch began, and not yet a step of srun.
            ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Place()),
            (
                {
                    "SLURM_STEP_NUM_TASKS": "4",
                    "SLURM_PROCID": "3",
                    "SLURM_LOCALID": "1",
                    "SLURM_STEP_NODELIST": "gpu[07-09,12],x1",
                    "SLURM_JOB_ID": "12345",
                },
                Place(3, 4, 1, "gpu07", 29845),
            ),
            (
                {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "a1,b[2-3]"},
                Place(1, 2, 0, "a1", 29500),
            ),
        ],
    )
    def test_are_read_from_the_environment(self, env, place):
        assert place_of(env) == place

    @pytest.mark.parametrize(
        ("env", "said"),
        [
            ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
            ({"WORLD_SIZE": "2", "RANK": "2"}, "process 2 of 2"),
            ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ],
    )
    def test_that_cannot_be_are_refused(self, env, said):
        with pytest.raises(ValueError, match=said):
            place_of(env)

    @pytest.mark.parametrize(
        ("asked", "count", "guided", "split"),
        [
            ("auto", 2, True, Split(2)),
            ("auto", 8, True, Split(2, 4)),
            ("auto", 3, True, Split(1, 3)),
            ("auto", 2, False, Split(1, 2)),
            ("sequence", 4, True, Split(1, 4)),
            ("both", 4, True, Split(2, 2)),
            ("guidance", 4, True, "Start 2, or take --split both"),
            ("guidance", 2, False, "at --cfg 1 there is one"),
            ("both", 5, True, "Start 2, 4, 6, 8, 12, 16"),
            ("sequence", 5, True, "Start 2, 3, 4, 6, 8, 12"),
        ],
    )
    def test_share_a_video(self, asked, count, guided, split):
        if isinstance(split, str):
            with pytest.raises(ValueError, match=split):
                choose_split(asked, count, guided, 48)
        else:
            assert choose_split(asked, count, guided, 48) == split

    def test_have_a_card_each(self, monkeypatch):
        taken = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        assert [device_of(None, Place(2 + local, 4, local)) for local in (0, 1)] == ["cuda:0", "cuda:1"]
        assert taken == [0, 1]
        assert (device_of("cuda:1", Place()), device_of("cpu", Place(1, 2, 1))) == ("cuda:1", "cpu")
        with pytest.raises(ValueError, match="shows 2 cards"):
            device_of("cuda", Place(2, 4, 2))
        with pytest.raises(ValueError, match="each takes a card of its own"):
            device_of("cuda:1", Place(0, 2))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--split", "guidance"), "this is the only one"),
        (("--split", "prompts", 2), "this is one video"),
        (("--cache", "first_block", 2), "decides at each step by what it measures"),
        (("--split", "sequence", "--cache", "pab", 2), "acts inside the attention"),
        (("--split", "sequence", "--cache", "faster_cache", 2), "predicts one half of guidance from the other"),
        (("--split", "guidance", "--cache", "faster_cache", 2), "predicts one half of guidance from the other"),
        (("--split", "sequence", "--compile", 2), "Compiled blocks and shared tokens"),
        (("--split", "sequence", "--width", 48, "--height", 48, "--frames", 1, 2), "2 processes on cpu cannot share"),
        (("--split", "sequence", 3), "Start 2 of them"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_weights_are_read(
    tiny, tmp_path, capsys, monkeypatch, no_weights, more, said
):
    *more, count = more if isinstance(more[-1], int) else (*more, 1)
    monkeypatch.setenv("WORLD_SIZE", str(count))
    code, _, error = run_generate(capsys, *short_video(tiny, tmp_path / "x.mp4"), *more, "--plan")
    assert code == 1
    assert said in error


def test_diffusers_that_cannot_share_the_tokens_is_said(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cogvideox.requests.splits_anything", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    video = short_video(tiny, tmp_path / "x.mp4")
    assert "cannot share the 226 tokens" in run_generate(capsys, *video, "--split", "sequence", "--plan")[2]
    assert run_generate(capsys, *video, "--split", "guidance", "--plan")[0] == 0


def test_offloading_is_refused_with_shared_tokens():
    from cogvideox.combinations import check_sharing

    check_sharing(True, False, "pab", True, True)
    check_sharing(False, False, "faster_cache", True, True)
    check_sharing(True, True, "teacache", False, False)
    with pytest.raises(ValueError, match="Offloading"):
        check_sharing(False, True, None, False, True)


def test_shared_tokens_are_not_offloaded(four_heads, monkeypatch):
    """Both put hooks on the blocks: where the whole model does not fit, that is said."""
    from cogvideox.memory import choose_placements, plan_memory
    from cogvideox.weights import Weights

    model, latents = open_handles(four_heads, "fp32", CPU).model, torch.zeros(1, 16, 5, 32, 32)
    plan = plan_memory(model, latents.shape, True, 226, 2)
    monkeypatch.setattr(Weights, "free", plan.needed["gpu"])
    assert [chosen.mode for chosen in choose_placements(model, latents, True, True, 226, Told(), 2)] == ["gpu", "gpu"]
    # What all tokens take would not fit.
    assert choose_placements(model, latents, True, True, 226, Told())[0].batched is False
    monkeypatch.setattr(Weights, "free", plan.weights)
    with pytest.raises(ValueError, match="This video needs"):
        choose_placements(model, latents, True, True, 226, Told(), 2)
