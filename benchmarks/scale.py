"""What several processes make of one video: whether it is the same, what they send each other, and how long a step is.

Here processes talk by gloo on one machine, which shows that the video is the same and how many bytes move; they share
its cores, so it says nothing of speed. With ``--nccl`` each has a card of its own, and steps are timed. ``--plan``
counts the output that all receive, too. A model of random weights is built for it; ``--model`` takes a real one.

Run as ``python -m benchmarks.scale``.
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.step import build, machine
from cogvideox.events import Events
from cogvideox.geometry import latent_frames
from cogvideox.handles import open_handles
from cogvideox.modules.sharded import Split, Team
from cogvideox.precision.hardware import Hardware
from cogvideox.sampling import sample
from cogvideox.sharing import expected_gain
from cogvideox.variants import full_config

SIZE = dict(num_attention_heads=8, num_layers=3, time_embed_dim=512, text_embed_dim=512)
SPLITS = (Split(2), Split(1, 2), Split(2, 2), Split(1, 4), Split(2, 4))


class Clock(Events):
    """The seconds at which steps were done."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def note(self, text, level=0):
        """The table says it."""

    def step(self, done, total, clean):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())


def run(folder, device, shape, steps, team=None):
    """The latents of a short run, and the seconds of its fastest step but for the first."""
    model = open_handles(folder, "auto" if device.type == "cuda" else "fp32", Hardware.detect(device)).model
    generator = torch.Generator().manual_seed(1)
    width = full_config(model.weights.config)["text_embed_dim"]
    prompts = (torch.randn(1, 226, width, generator=generator) for _ in range(2))
    clock = Clock(device)
    latents = sample(model, *prompts, torch.zeros(shape), seed=1, steps=steps, events=clock, team=team)
    gain = None if team is None else expected_gain(model, shape, team.split, True, model.weights.hardware.name)
    return latents.numpy(), min(b - a for a, b in zip(clock.times, clock.times[1:], strict=False)), gain


def child(rank, split, port, nccl, arguments, answers):
    """One of the processes that share a video."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    count = split.guidance * split.sequence
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    device = torch.device("cuda", rank) if nccl else torch.device("cpu")
    if nccl:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    received, all_to_all = [0], dist.all_to_all_single

    def counted(output, tensor, output_sizes, input_sizes, group):
        """Count what comes from others: of each, as much as goes to it of what this one has."""
        all_to_all(output, tensor, output_sizes, input_sizes, group=group)
        received[0] += (sum(output_sizes) - output_sizes[dist.get_rank(group)]) * output[0].nbytes

    dist.all_to_all_single = counted
    team = Team(split, device)
    latents, seconds, gain = run(*arguments[:1], device, *arguments[1:], team)
    answers.put((rank, latents, seconds, (received[0] + team.sent) / arguments[2], gain))
    dist.barrier()
    dist.destroy_process_group()


def share(split, nccl, arguments):
    """What the first of the processes has, and whether all have the same."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    ranks = range(split.guidance * split.sequence)
    processes = [context.Process(target=child, args=(rank, split, port, nccl, arguments, answers)) for rank in ranks]
    for process in processes:
        process.start()
    found = sorted((answers.get(timeout=3000) for _ in ranks), key=lambda answer: answer[0])
    for process in processes:
        process.join()
    return found[0][1:], all((found[0][1] == other[1]).all() for other in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nccl", action="store_true", help="a card for each process")
    parser.add_argument("--model", type=Path, help="a checkpoint; by default a small one of random weights")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    most = torch.cuda.device_count() if options.nccl else 4
    device = torch.device("cuda", 0) if options.nccl else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.model or build(Path(folder) / "random", SIZE, device)
        shape = (1, 16, latent_frames(options.frames), options.height // 8, options.width // 8)
        arguments = (checkpoint, shape, options.steps)
        alone, seconds, _ = run(checkpoint, device, shape, options.steps)
        print(f"{machine(device)}; {options.width}x{options.height}, {options.frames} frames, {options.steps} steps\n")
        print("| shared | relative L2 to one process | same in all | MB received a step | counted by --plan | a step |")
        print("|---|---|---|---|---|---|")
        print(f"| by nobody | 0 | | 0 | 0 | {seconds:.2f} s |")
        for split in SPLITS:
            if split.guidance * split.sequence > most:
                continue
            (latents, taken, moved, gain), same = share(split, options.nccl, arguments)
            relative = ((latents - alone) ** 2).sum() ** 0.5 / (alone**2).sum() ** 0.5
            speed = f"{taken:.2f} s" + (f", {seconds / taken:.2f} x" if options.nccl else "")
            counted = f"{gain.received / 1e6:.2f}"
            row = (split.text, f"{relative:.1e}", "yes" if same else "NO", f"{moved / 1e6:.2f}", counted, speed)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
