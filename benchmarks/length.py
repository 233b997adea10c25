"""How the cost of a step grows with the length of a clip: seconds and peak bytes of a guided step of diffusers, ours
and ComfyUI's own model, from 0.4k to 12k tokens, as a table and as a picture (``--plot FILE.svg``).

On a CPU in fp32, 3 layers x 8 heads of random weights, each step a run's second one; there it takes one thread, and
what is counted is the processor's time, which other programs disturb less. Sides take turns, and all figures are
medians: of the rounds' seconds, and of their ratios, as a processor's pace changes from minute to minute, and one lucky
round would decide what is least. *own* is what the sampler does beside the transformer's forward. ComfyUI's model runs
in a process of its own where ``COMFYUI_PATH`` (and ``COMFYUI_PYTHON``) is given.

Run as ``python -m benchmarks.length``.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.step import build, comfyui, forwards_timed, machine, ours, theirs
from cogvideox.geometry import latent_frames, video_tokens
from cogvideox.handles import open_handles
from cogvideox.memory import LiveBytes
from cogvideox.precision.hardware import Hardware
from cogvideox.variants import full_config

SIZE = dict(num_attention_heads=8, num_layers=3, time_embed_dim=512, text_embed_dim=512)
#: Width, height and frames of clips of about 0.4k to 12k tokens, the prompt's included.
CLIPS = {
    "short": ((96, 64, 33), (160, 96, 49), (192, 128, 65), (256, 160, 81), (320, 192, 81)),
    "all": (
        *((96, 64, 33), (160, 96, 49), (192, 128, 65), (256, 160, 81), (320, 192, 81)),
        *((384, 224, 97), (480, 272, 97), (608, 336, 113)),
    ),
}
#: Sides of the picture, in its own units.
WIDTH, HEIGHT, MARGIN = 720, 420, 60
COLOURS = {"diffusers": "#888888", "ours": "#1f77b4", "ComfyUI core": "#d62728"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="up to 3k tokens only")
    parser.add_argument("--rounds", type=int, default=16, help="at most, of each length; 1 or more")
    parser.add_argument("--minutes", type=float, default=4, help="for a length, after three rounds")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw the seconds into")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds is 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build(Path(folder) / "random", SIZE, device)
        model = open_handles(checkpoint, "fp32", Hardware.detect(device)).model
        print(f"{machine(device)}; {SIZE['num_layers']} layers x {SIZE['num_attention_heads']} heads, fp32, guided\n")
        print("| tokens | rounds | diffusers | ours | ratio | own | peak, diffusers | peak, ours | ComfyUI core |")
        print("|---|---|---|---|---|---|---|---|---|")
        for width, height, frames in CLIPS["short" if options.short else "all"]:
            shape = (1, 16, latent_frames(frames), height // 8, width // 8)
            found.append(_measure(checkpoint, model, device, shape, options.rounds, options.minutes))
            print(_line(found[-1]), flush=True)
            # With each length, so that a cut leaves what was measured.
            for file, text in ((options.plot, draw(found)), (options.json, json.dumps(found, indent=1))):
                if file:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(text, encoding="utf-8")


def _measure(
    checkpoint: Path, model, device: torch.device, shape: tuple[int, ...], rounds: int, minutes: float
) -> dict:
    """Time one length: seconds of each side, their ratio, the share of our own work, and peak bytes."""
    config = full_config(model.weights.config)
    size = 2, 1, config["max_text_seq_length"], config["text_embed_dim"]
    prompts = torch.randn(size, generator=torch.Generator().manual_seed(2))
    inputs = dict(prompts=prompts, shape=shape, steps=2)
    sides = {
        "diffusers": theirs(checkpoint, model, device, **inputs),
        "ours": lambda on_step: ours(model, on_step, **inputs),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    own: list[float] = []
    begun = time.monotonic()
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() - begun > 60 * minutes:
            break
        for name in sides if turn % 2 else reversed(sides):
            ends: list[tuple[float, float]] = []
            inside: list[tuple[float, float]] = []
            with forwards_timed(inside, device):
                sides[name](on_step=lambda ends=ends: ends.append((time.perf_counter(), time.process_time())))
            clock, processor = (after - before for before, after in zip(*ends, strict=True))
            taken[name].append(processor if device.type == "cpu" else clock)
            if name == "ours":
                own.append(1 - sum(end - start for start, end in inside if start >= ends[0][0]) / clock)
    peaks = {}
    for name, side in sides.items():
        with LiveBytes() as live:
            side(on_step=lambda: None)
        peaks[name] = live.peak
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    ratios = [ours / theirs for theirs, ours in zip(taken["diffusers"], taken["ours"], strict=True)]
    core = comfyui(checkpoint, device, shape, prompts, 2, 1, of_processor=device.type == "cpu")[1]
    if core is not None:
        seconds["ComfyUI core"] = core
    return {
        "tokens": size[2] + video_tokens(config, shape),
        "rounds": len(ratios),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "peaks": peaks,
        "own": statistics.median(own),
    }


def _line(found: dict) -> str:
    seconds, peaks = found["seconds"], found["peaks"]
    core = seconds.get("ComfyUI core")
    parts = [
        f"{found['tokens']:,}",
        f"{found['rounds']}",
        f"{seconds['diffusers']:.3f} s",
        f"{seconds['ours']:.3f} s",
        f"{found['ratio']:.2f}",
        f"{found['own']:.2%}",
        *(f"{peaks[name] / 1e6:.0f} MB" for name in ("diffusers", "ours")),
        "-" if core is None else f"{core:.3f} s",
    ]
    return f"| {' | '.join(parts)} |"


def draw(found: list[dict]) -> str:
    """Draw the seconds of a step against the tokens, both on a logarithmic scale, as an SVG."""
    tokens = [entry["tokens"] for entry in found]
    values = [seconds for entry in found for seconds in entry["seconds"].values()]
    spans = [torch.tensor(numbers).double().log10() for numbers in (tokens, values)]
    (left, right), (low, high) = ((span.min().item(), span.max().item()) for span in spans)

    def place(count: float, seconds: float) -> tuple[float, float]:
        x, y = (torch.tensor(float(value)).double().log10().item() for value in (count, seconds))
        across = (x - left) / max(right - left, 1e-9)
        up = (y - low) / max(high - low, 1e-9)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">tokens</text>',
        f'<text x="{MARGIN}" y="24">seconds a guided step (both axes logarithmic)</text>',
    ]
    for entry in found:
        x, _ = place(entry["tokens"], 10**low)
        parts.append(
            f'<line x1="{x:.1f}" y1="{MARGIN}" x2="{x:.1f}" y2="{HEIGHT - MARGIN}" stroke="#e0e0e0"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{entry["tokens"]:,}</text>'
        )
    for row, (name, colour) in enumerate(COLOURS.items()):
        points = [place(entry["tokens"], entry["seconds"][name]) for entry in found if name in entry["seconds"]]
        if not points:
            continue
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        last = next(entry["seconds"][name] for entry in reversed(found) if name in entry["seconds"])
        parts.append(
            f'<text x="{MARGIN + 12}" y="{MARGIN + 20 + 20 * row}" fill="{colour}">{name}: {last:.2f} s at the '
            "longest</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
