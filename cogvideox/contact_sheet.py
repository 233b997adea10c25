"""Draw the frames that the black-frame check objects to: people look rather than read."""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import adaptive_avg_pool1d, adaptive_max_pool1d, max_pool2d

from .black_frames import BlackFrameReport

#: Frames on a sheet at most, and beside one another; the width of each in pixels, and the height of a tall one. A node
#: shows a sheet at about 0.4 of its size, and writes its own texts 12 high: so labels can be read there too.
_FRAMES, _COLUMNS, _WIDTH, _HEIGHT = 6, 2, 300, 190
_MARGIN, _TEXT = 8, 34
_GROUND, _INK, _BAD, _NOT_FINITE = (32, 32, 32), (235, 235, 235), (229, 83, 75), (255, 0, 255)
#: Fonts with Chinese letters as Windows, macOS and Linux have them; Pillow's own has none. Not Droid Sans Fallback,
#: which has neither Latin letters nor digits.
_CHINESE = (
    *("msyh.ttc", "simhei.ttf", "PingFang.ttc", "Songti.ttc"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc"),
)


def contact_sheet(
    images: torch.Tensor, report: BlackFrameReport, say: Callable[[str], str] = str
) -> Image.Image | None:
    """Draw the frames that are black or hold NaN or Inf, each with its number and what is wrong with it.

    Pixels that are NaN or Inf are magenta, so that they are seen: saved, they would be black. Of more than 6 frames,
    6 are drawn, evenly chosen, the first and the last among them. A frame is looked at a few rows at a time: of any
    number and size of frames, the sheet and the memory that it takes are small.

    Args:
        images: ``[frames, H, W, 3]`` (or 4, whose alpha is ignored), floating point, 0..1: those that were checked.
        say: says an English text in the language of the labels. They stay English where no font here has its letters.

    Returns:
        An RGB picture, or None where there is nothing to object to.
    """
    bad = sorted({*report.black_frames, *report.nonfinite})
    if not bad:
        return None
    shown = (
        bad if len(bad) <= _FRAMES else [bad[round(place * (len(bad) - 1) / (_FRAMES - 1))] for place in range(_FRAMES)]
    )
    shrink = min(_WIDTH / images.shape[2], _HEIGHT / images.shape[1])
    width, height = (max(1, round(side * shrink)) for side in (images.shape[2], images.shape[1]))
    cell_width, cell_height = _WIDTH + _MARGIN, height + _TEXT + 2 * _MARGIN
    head = _TEXT + 3 * _MARGIN
    size = (_COLUMNS * cell_width + _MARGIN, head + math.ceil(len(shown) / _COLUMNS) * cell_height)
    sheet = Image.new("RGB", size, _GROUND)
    letters = None if say("black").isascii() else _chinese_letters()
    say, letters = (str, ImageFont.load_default) if letters is None else (say, letters)
    draw, font = ImageDraw.Draw(sheet), letters(_TEXT)
    what = f"{len(bad)} of {len(images)} frames" + (f", {len(shown)} shown" if len(shown) < len(bad) else "")
    title = f"{say(report.verdict)}: {say(what)}"
    # Of many frames, the one line is written smaller.
    fits = min(1.0, (size[0] - 2 * _MARGIN) / font.getlength(title))
    draw.text((_MARGIN, _MARGIN), title, _BAD, letters(int(_TEXT * fits)))
    for place, index in enumerate(shown):
        left, top = _MARGIN + place % _COLUMNS * cell_width, head + place // _COLUMNS * cell_height
        draw.rectangle((left - 2, top - 2, left + width + 1, top + height + 1), outline=_BAD, width=2)
        sheet.paste(_thumbnail(images[index], width, height), (left, top))
        said = "NaN or Inf" if index in report.nonfinite else f"{report.ratios[index]:.0%} black"
        draw.text((left, top + height + _MARGIN // 2), f"{index} · {say(said)}", _INK, font)
    return sheet


def _chinese_letters() -> "Callable[[float], ImageFont.FreeTypeFont | ImageFont.ImageFont] | None":
    """Find a font with Chinese letters where the system keeps its fonts: what gives it in a size."""
    for name in _CHINESE:
        with suppress(OSError):
            ImageFont.truetype(name, _TEXT)
            return partial(ImageFont.truetype, name)
    return None


def _thumbnail(frame: torch.Tensor, width: int, height: int) -> Image.Image:
    """Shrink a frame ``[H, W, 3]`` to a picture; every broken pixel becomes a magenta spot, so that none is
    overlooked."""
    colours, spots = torch.empty(3, height, width), torch.empty(1, height, width)
    for row in range(height):
        # The rows that adaptive pooling would put together for this one.
        first, last = row * len(frame) // height, -(-(row + 1) * len(frame) // height)
        pixels = frame[first:last, :, :3].to("cpu", torch.float32)
        finite = pixels.isfinite()
        line = pixels.where(finite, 0).clamp_(0, 1).mean(0) * 255
        colours[:, row] = adaptive_avg_pool1d(rearrange(line, "w c -> c w"), width)
        spots[:, row] = adaptive_max_pool1d((~finite).any(-1).any(0)[None].float(), width)
    broken = max_pool2d(spots, 5, stride=1, padding=2) > 0
    colours = torch.where(broken, torch.tensor(_NOT_FINITE, dtype=torch.float32).view(3, 1, 1), colours)
    return Image.fromarray(rearrange(colours.round().to(torch.uint8), "c h w -> h w c").numpy())
