"""The processes of one run, as torchrun, ``accelerate launch`` and SLURM start them: who is who, who does what, and how
one that fails ends all.

Each is told its number (its rank) by environment variables. Rank 0 encodes prompts and images, decodes, writes files
and shows progress; all of them sample together, or each makes videos of its own.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cogvideox.words import reason, short

if TYPE_CHECKING:
    import torch

    from cogvideox.modules.sharded import Split, Team

Value = TypeVar("Value")
#: How the work is shared. ``both`` is guidance and sequence.
AUTO, GUIDANCE, SEQUENCE, BOTH, PROMPTS = "auto", "guidance", "sequence", "both", "prompts"
SPLITS = (AUTO, GUIDANCE, SEQUENCE, BOTH, PROMPTS)
#: For all processes to have checked what they are to do, and to have begun.
_MEETING = timedelta(minutes=10)
#: Longer than any video takes; one that is gone is noticed otherwise.
_WAIT = timedelta(days=7)
#: Seconds between two looks at the others, and for which one may be silent.
_BEAT, _SILENCE = 1.0, 120.0
#: Longer than a look takes, unless process 0 is gone.
_CALL = timedelta(seconds=10)
_ENDED, _LEFT = "ended", "left"


@dataclass(frozen=True)
class Place:
    """A process among those of a run.

    Attributes:
        rank: its number, from 0.
        count: of all processes.
        local: its number on its machine.
        address, port: where they meet.
        served: whether another program (torchrun's agent) is there to meet at.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    address: str = "127.0.0.1"
    port: int = 29500
    served: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def place_of(env: Mapping[str, str] = os.environ) -> Place:
    """Read from the environment who this process is: ``RANK`` and ``WORLD_SIZE``, as torchrun and accelerate set them,
    or a step of SLURM's ``srun``.

    Raises:
        ValueError: for numbers that are none, or do not go together.
    """
    if _number(env, "WORLD_SIZE", 1) > 1:
        count, rank = _number(env, "WORLD_SIZE", 1), _number(env, "RANK", 0)
        local = _number(env, "LOCAL_RANK", rank)
    elif _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        # Of a step: what sbatch itself runs has the job's variables, too, and is one process.
        count, rank = _number(env, "SLURM_STEP_NUM_TASKS", 1), _number(env, "SLURM_PROCID", 0)
        local = _number(env, "SLURM_LOCALID", 0)
    else:
        return Place()
    if not 0 <= rank < count or local < 0:
        raise ValueError(
            f"The environment says that this is process {rank} of {count} (RANK and WORLD_SIZE, or SLURM's), and they "
            "count from 0. Start the program with torchrun, accelerate launch or srun, which set them."
        )
    address = env.get("MASTER_ADDR") or _first_host(env) or "127.0.0.1"
    port = _number(env, "MASTER_PORT", 29500 + _number(env, "SLURM_JOB_ID", 0) % 1000)
    return Place(rank, count, local, address, port, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "").strip()
    if value and not value.isdecimal():
        raise ValueError(
            f"{name} is {short(repr(value))} in the environment, and it is a number that torchrun, accelerate launch "
            "or SLURM sets for each process. Unset it, or start the program with one of them."
        )
    return int(value) if value else default


def _first_host(env: Mapping[str, str]) -> str:
    """Return the first machine of SLURM's list, such as ``node[03-05,9],other``."""
    name, bracket, rest = env.get("SLURM_STEP_NODELIST", "").partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    return name + rest.partition("]")[0].partition(",")[0].partition("-")[0]


def check_alone(split: str, place: Place) -> None:
    """Refuse to share what one process does.

    Raises:
        ValueError: for any ``split`` but ``auto`` where there is one process.
    """
    if place.count == 1 and split != AUTO:
        raise ValueError(
            f"--split {split} shares the work among processes, and this is the only one. Start as many as there are "
            "cards: torchrun --nproc-per-node 2 generate.py …"
        )


def choose_split(asked: str, count: int, guided: bool, heads: int) -> "Split":
    """Choose how processes share one video; for ``auto`` both halves of guidance where there are two, and tokens among
    the processes of each.

    Args:
        count: of processes.
        guided: whether ``cfg`` is above 1.
        heads: of the transformer.

    Raises:
        ValueError: for what cannot be shared so.
    """
    from cogvideox.modules.sharded import Split

    if asked in (GUIDANCE, BOTH) and not guided:
        raise ValueError(
            f"--split {asked} shares the halves of guidance, and at --cfg 1 there is one. Take --split sequence."
        )
    if asked == GUIDANCE and count != 2:
        raise ValueError(
            f"--split guidance has two halves to share, and there are {count} processes. Start 2, or take --split both."
        )
    halves = 2 if asked in (GUIDANCE, BOTH) or (asked == AUTO and guided and count % 2 == 0) else 1
    sequence, rest = divmod(count, halves)
    if rest or heads % sequence:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"{count} processes cannot share this video: each takes as many of the {heads} heads of the attention as "
            f"the others. Start {', '.join(str(halves * n) for n in fitting if halves * n > 1)} of them."
        )
    return Split(halves, sequence)


class FailedAlike(RuntimeError):
    """Something failed in all processes alike: they can go on together with something else."""


class FailedAlone(RuntimeError):
    """Something failed in this process, and others wait for it: nothing can go on."""


class Ranks:
    """This process and the others, from ``joined``."""

    def __init__(self, place: Place, device: "torch.device"):
        import torch.distributed as dist

        self.place, self._device = place, device
        self._teams: dict[Split, Team] = {}
        self._control = dist.new_group(backend="gloo", timeout=_WAIT)

    def meet(self) -> None:
        """Wait until all processes are here, having checked what they are to do.

        Raises:
            RuntimeError: with the numbers of those that did not come in ten minutes.
        """
        import torch.distributed as dist

        try:
            dist.monitored_barrier(self._control, timeout=_MEETING, wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"Not all processes came together in ten minutes ({reason(error)}). See what the others say, and "
                "whether they can reach this machine."
            ) from error

    def same(self, work: Callable[[], Value]) -> Value:
        """Have rank 0 do something, and all have the result.

        Raises:
            FailedAlike: with the sentence of what it raises.
        """
        import torch.distributed as dist

        found: list[Any] = [None]
        failed: Exception | None = None
        if self.place.is_first:
            try:
                found = [(work(), "")]
            except Exception as error:
                failed, found = error, [(None, str(error) or type(error).__name__)]
        dist.broadcast_object_list(found, 0, self._control)
        result, said = found[0]
        if said:
            raise FailedAlike(said) from failed
        return result

    def gathered(self, value: Value) -> list[Value]:
        """Return what each process has, by its number."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.place.count
        dist.all_gather_object(found, value, self._control)
        return found

    def team(self, split: "Split") -> "Team":
        """Return the processes as they share one video so."""
        from cogvideox.modules.sharded import Team

        if split not in self._teams:
            self._teams[split] = Team(split, self._device)
        return self._teams[split]


def device_of(asked: str | None, place: Place) -> str | None:
    """Return the device of a process among several: each has a card of its own.

    Raises:
        ValueError: for a card by its number, or where there are fewer cards than processes on this machine.
    """
    import torch

    if place.count == 1 or asked == "cpu" or (asked is None and not torch.cuda.is_available()):
        return asked
    if asked not in (None, "cuda"):
        raise ValueError(
            f"--device is {short(asked)}, and with several processes each takes a card of its own. Leave it away, or "
            "give cpu; CUDA_VISIBLE_DEVICES says which cards there are."
        )
    cards = torch.cuda.device_count()
    # SLURM can show each process its own card alone.
    number = place.local if cards > 1 else 0
    if number >= cards or (cards == 1 and place.local > 0 and "SLURM_STEP_NUM_TASKS" not in os.environ):
        raise ValueError(
            f"This is process {place.local + 1} on its machine, which shows {cards} cards, and each takes one of its "
            f"own. Start {cards} a machine."
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


@contextmanager
def joined(place: Place, device: "torch.device") -> Iterator[Ranks]:
    """Join the other processes for a ``with`` block. What ends it in one of them ends all of them, with its sentence.

    Raises:
        RuntimeError: if they cannot be reached, or with what ended another.
    """
    import torch.distributed as dist

    host = place.is_first and not place.served
    try:
        store = dist.TCPStore(place.address, place.port, place.count, host, _MEETING, wait_for_workers=False)
        watched = dist.TCPStore(place.address, place.port, place.count, False, _MEETING, wait_for_workers=False)
    except RuntimeError as error:
        raise RuntimeError(
            f"The processes cannot meet at {short(place.address)}:{place.port} ({reason(error)}). See whether "
            "process 0 runs, and whether MASTER_ADDR and MASTER_PORT are a machine and a free port that all reach."
        ) from error
    watched.set_timeout(_CALL)
    watch = _Watch(place, watched)
    # By its name diffusers tells where sizes are gathered: of a bare "gloo" it takes the card that torch is built for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo"
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore("run", store), rank=place.rank, world_size=place.count, timeout=_WAIT
        )
        yield Ranks(place, device)
    except BaseException as error:
        said = watch.ended_by(error)
        watch.stop()
        if said is None:
            raise
        raise RuntimeError(said) from error
    watch.leave()
    # Not where one has failed: others wait there.
    dist.destroy_process_group()


class _Watch:
    """Looks once a second whether another process has failed, or is gone, and ends this one if so: it may be waiting
    for that one in a call that nothing interrupts."""

    def __init__(self, place: Place, store: Any):
        self._place, self._store, self._stopped = place, store, threading.Event()
        self._lock = threading.Lock()
        self._seen = {other: (0, time.monotonic()) for other in range(place.count) if other != place.rank}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def ended_by(self, error: BaseException) -> str | None:
        """Tell the others what ended this process; return the sentence of another that ended before, if there is
        one."""
        # A broken connection is noticed before its cause is told.
        broken = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("Connection", "gloo", "NCCL", "ProcessGroup")
        )
        for _ in range(20 if broken else 1):
            said = self._said()
            if said:
                return said
            if broken:
                time.sleep(0.1)
        said = (
            "Another process of this run is gone without a word: it was killed, or its machine ran out of memory."
            if broken
            else "stopped."
            if isinstance(error, KeyboardInterrupt)
            else str(error) or type(error).__name__
        )
        with suppress(Exception), self._lock:
            self._store.set(_ENDED, said if broken else f"Process {self._place.rank} ended all of them: {said}")
        return said if broken else None

    def leave(self) -> None:
        """Tell the others that this process is done; the first, where they meet, waits until all are."""
        self.stop()
        self._thread.join(3 * _BEAT)
        with suppress(Exception):
            if self._lock.acquire(timeout=3 * _BEAT):
                self._store.set(f"{_LEFT}{self._place.rank}", "1")
                until = time.monotonic() + _CALL.total_seconds()
                others = [f"{_LEFT}{other}" for other in self._seen]
                while self._place.is_first and time.monotonic() < until and not self._store.check(others):
                    time.sleep(0.05)

    def stop(self) -> None:
        self._stopped.set()

    def _said(self) -> str:
        with suppress(Exception), self._lock:
            if self._store.check([_ENDED]):
                return self._store.get(_ENDED).decode()
        return ""

    def _look(self) -> None:
        while not self._stopped.wait(_BEAT):
            try:
                said = self._said() or self._silent()
            except Exception:
                said = "Process 0, where all meet, is gone."
            if said and not self._stopped.wait(3 * _BEAT):
                # The main thread had time to end by itself, and has not.
                from cogvideox.modules.internals import end_process

                print(f"error: {said}", file=sys.stderr, flush=True)
                end_process(1)

    def _silent(self) -> str:
        """Say which process is not heard of any more; "" if none."""
        with self._lock:
            self._store.add(f"beat{self._place.rank}", 1)
            for other, (count, since) in self._seen.items():
                now = self._store.add(f"beat{other}", 0)
                # One that has not begun is waited for where all meet.
                if now != count or now == 0 or self._store.check([f"{_LEFT}{other}"]):
                    self._seen[other] = now, time.monotonic()
                elif time.monotonic() - since > _SILENCE:
                    return f"Process {other} has not been heard of for {_SILENCE:.0f} seconds."
        return ""


def shares(numbers: Sequence[int], place: Place) -> list[int]:
    """Return this process's share of a list, the same length as the others' but for one."""
    return list(numbers)[place.rank :: place.count]
