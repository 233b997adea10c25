"""Draws what the examples bring along: the clip that ``video_to_video`` opens with, and the templates' thumbnails.

``python -m tests.drawings`` writes both into example_workflows. No model has drawn any of it: the thumbnails show what
goes in and what comes out, and promise no quality.
"""

import math

import torch
from PIL import Image, ImageDraw, ImageFont

from cogvideox.video import write_mp4
from tests import workflows
from tests.conftest import ROOT

CLIP = ROOT / "example_workflows" / "input" / "cogvideox15_example.mp4"
#: Of the clip: half of what the model was trained for, five seconds at 16 frames a second.
SIZE, FRAMES, FPS = (680, 384), 81, 16
#: Drawn so many times larger, then shrunk: pillow draws no smooth edges.
_FINE = 2
_SUMMER = {"sky": ((86, 156, 214), (250, 214, 165)), "hills": ((96, 125, 139), (69, 110, 92), (46, 90, 62))}
_WINTER = {"sky": ((150, 165, 182), (226, 230, 236)), "hills": ((176, 188, 198), (205, 214, 222), (236, 240, 244))}
_CARD, _INK, _PALE, _ACCENT = (30, 33, 40), (240, 240, 240), (160, 166, 176), (143, 111, 232)


def scene(time: float, size: tuple[int, int] = SIZE, winter: bool = False) -> Image.Image:
    """Draw a boat that crosses a lake, at a share of its way: ``time`` in 0..1."""
    width, height = (_FINE * side for side in size)
    look = _WINTER if winter else _SUMMER
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    shore = round(0.62 * height)
    _shade(draw, width, 0, shore, *look["sky"])
    sun, radius = (width * (0.72 - 0.12 * time), height * (0.2 + 0.1 * time)), height * 0.07
    draw.ellipse([*(side - radius for side in sun), *(side + radius for side in sun)], (255, 244, 214))
    for depth, colour in enumerate(look["hills"]):
        # The nearer, the faster: the camera moves slowly to the right.
        top = [
            (x, shore - height * (0.26 - 0.08 * depth) * (0.6 + 0.4 * math.sin(0.006 * x / _FINE * (2 + depth) + phase)))
            for phase in (1.7 * depth + time * (0.3 + 0.5 * depth),)
            for x in range(0, width + 8, 8)
        ]
        draw.polygon([(0, shore), *top, (width, shore)], colour)
    near = (210, 220, 228) if winter else (120, 170, 190)
    _shade(draw, width, shore, height, near, tuple(shade // 2 for shade in near))
    for line in range(14):
        y = shore + (height - shore) * (line + 1) / 15
        start = width * ((0.37 * line + time * (0.1 + 0.03 * line)) % 1.2 - 0.2)
        draw.line([start, y, start + width * (0.05 + 0.01 * line), y], tuple(min(255, s + 30) for s in near), _FINE)
    _boat(draw, width * (0.2 + 0.5 * time), height * (0.76 + 0.006 * math.sin(20 * time)), height)
    if winter:
        for flake in range(90):
            x, y = (flake * 0.618 + 0.05 * time) % 1 * width, (flake * 0.383 + 0.5 * time) % 1 * height
            draw.ellipse([x, y, x + 3 * _FINE, y + 3 * _FINE], (255, 255, 255))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _boat(draw: ImageDraw.ImageDraw, x: float, y: float, height: int) -> None:
    one = height / 100
    draw.polygon([(x - 11 * one, y), (x + 11 * one, y), (x + 7 * one, y + 6 * one), (x - 7 * one, y + 6 * one)], (120, 62, 38))
    draw.line([x, y, x, y - 24 * one], (84, 48, 32), round(one))
    draw.polygon([(x + one, y - 24 * one), (x + one, y - 2 * one), (x + 13 * one, y - 2 * one)], (250, 246, 236))
    draw.polygon([(x - one, y - 20 * one), (x - one, y - 2 * one), (x - 9 * one, y - 2 * one)], (214, 83, 74))


def _shade(draw: ImageDraw.ImageDraw, width: int, top: int, bottom: int, first: tuple, last: tuple) -> None:
    for y in range(top, bottom):
        share = (y - top) / (bottom - top)
        draw.line([0, y, width, y], tuple(round(a + (b - a) * share) for a, b in zip(first, last, strict=True)))


def clip() -> torch.Tensor:
    """Draw the example clip: ``[frames, H, W, 3]`` in 0..1."""
    frames = (scene(frame / (FRAMES - 1)) for frame in range(FRAMES))
    return torch.stack(
        [torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(SIZE[1], SIZE[0], 3) for frame in frames]
    ).float() / 255


if __name__ == "__main__":
    CLIP.parent.mkdir(exist_ok=True)
    write_mp4(clip(), CLIP, FPS, overwrite=True)
