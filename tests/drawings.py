"""Draws what the examples bring along: the clip that ``video_to_video`` opens with, and the templates' thumbnails.

``python -m tests.drawings`` writes both into example_workflows. No model has drawn any of it: the thumbnails show what
goes in and what comes out, and promise no quality. Those of another language are in a folder of that name, and need a
font that has its letters.
"""

import math
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cogvideox.video import write_mp4
from tests.conftest import ROOT

CLIP = ROOT / "example_workflows" / "input" / "cogvideox15_example.mp4"
#: Of the clip: half of what the model was trained for, five seconds at 16 frames a second.
SIZE, FRAMES, FPS = (680, 384), 81, 16
#: Drawn so many times larger, then shrunk: pillow draws no smooth edges.
_FINE = 2
_SUMMER = {"sky": ((86, 156, 214), (250, 214, 165)), "hills": ((96, 125, 139), (69, 110, 92), (46, 90, 62))}
_WINTER = {"sky": ((150, 165, 182), (226, 230, 236)), "hills": ((176, 188, 198), (205, 214, 222), (236, 240, 244))}
#: Where Linux has fonts with Chinese letters.
_FONTS = (
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc",
)
_CHINESE = {
    "5 seconds, 1360 x 768": "5 秒，1360 x 768",
    "10 seconds, 1360 x 768": "10 秒，1360 x 768",
    "19.5 seconds, 1360 x 768": "19.5 秒，1360 x 768",
    "a drawing, not made by the model": "示意图，不是模型生成的",
    "Text to video": "文生视频",
    "Text to video with LoRA": "文生视频加 LoRA",
    "Text to video, faster": "文生视频（更快）",
    "With ComfyUI's own nodes": "ComfyUI 自带节点",
    "Super-resolution": "超分辨率",
    "Image to video": "图生视频",
    "Long video": "长视频",
    "Extend a video": "续写视频",
    "Inpaint": "局部重绘",
    "Object removal (VOID)": "移除物体（VOID）",
    "Video to video": "视频生视频",
    "Prompt\nA sailing boat crosses a lake\nbetween green hills, the sun is low …": (
        "提示词\n一艘帆船驶过青山环绕的湖面，\n太阳已经很低……"
    ),
    "Prompt\nA sailing boat crosses\na lake …": "提示词\n一艘帆船驶过湖面……",
    "Your LoRA\nadds its style:\nink.safetensors": "你的 LoRA\n加上它的风格：\nink.safetensors",
    "Faster\nkernels, TeaCache,\ncompile": "更快\n注意力内核、TeaCache、\n编译",
    "Core nodes\nKSampler, CLIP Text\nEncode, VAE Decode": "自带节点\nK采样器、CLIP 文本\n编码、VAE 解码",
    "DOVE, SparkVSR\none step, no prompt,\nany size and length": (
        "DOVE、SparkVSR\n只需一步，不用提示词，\n任意尺寸和长度"
    ),
    "Prompt\nThe boat sails\nto the right …": "提示词\n小船向右驶去……",
    "Windows\n161 frames each,\nin the memory of one": "窗口\n每个 161 帧，\n只占一个的内存",
    "Prompt\nThe boat sails on …": "提示词\n小船继续\n前行……",
    "Prompt\nA boat drawn\nin ink …": "提示词\n水墨画中的\n小船……",
    "Prompt\nDeep winter,\nsnow falls …": "提示词\n隆冬，\n大雪纷飞……",
}
_CARD, _INK, _PALE, _ACCENT = (30, 33, 40), (240, 240, 240), (160, 166, 176), (143, 111, 232)


def scene(time: float, size: tuple[int, int] = SIZE, winter: bool = False, boat: bool = True) -> Image.Image:
    """Draw a boat that crosses a lake, at a share of its way: ``time`` in 0..1; or the lake alone."""
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
            (
                x,
                shore
                - height * (0.26 - 0.08 * depth) * (0.6 + 0.4 * math.sin(0.006 * x / _FINE * (2 + depth) + phase)),
            )
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
    if boat:
        _boat(draw, width * (0.2 + 0.5 * time), height * (0.76 + 0.006 * math.sin(20 * time)), height)
    if winter:
        for flake in range(90):
            # Martin Roberts' R2 sequence: evenly spread, without a pattern.
            x, y = (flake * 0.7549 + 0.05 * time) % 1 * width, (flake * 0.5698 + 0.5 * time) % 1 * height
            draw.ellipse([x, y, x + 3 * _FINE, y + 3 * _FINE], (255, 255, 255))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _boat(draw: ImageDraw.ImageDraw, x: float, y: float, height: int) -> None:
    one = height / 100
    draw.polygon(
        [(x - 11 * one, y), (x + 11 * one, y), (x + 7 * one, y + 6 * one), (x - 7 * one, y + 6 * one)], (120, 62, 38)
    )
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
    return (
        torch.stack(
            [
                torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(SIZE[1], SIZE[0], 3)
                for frame in frames
            ]
        ).float()
        / 255
    )


def thumbnail(
    title: str,
    inputs: list[str | Image.Image],
    output: list[Image.Image],
    size: str = "5 seconds, 1360 x 768",
    language: str = "en",
) -> Image.Image:
    """Draw what goes in, as texts or pictures beside one another, above the film that comes out of it."""
    font_of = ImageFont.load_default if language == "en" else partial(ImageFont.truetype, font())
    said = {text: text for text in _CHINESE} if language == "en" else _CHINESE
    width, height, edge = 720, 480, 24
    card = Image.new("RGB", (width, height), _CARD)
    draw = ImageDraw.Draw(card)
    draw.text((edge, 16), said[title], _INK, font_of(size=46))
    across = (width - edge * (len(inputs) + 1)) // len(inputs)
    top, deep = 84, 142
    for place, given in enumerate(inputs):
        left = edge + place * (across + edge)
        if isinstance(given, str):
            draw.rounded_rectangle([left, top, left + across, top + deep], 12, fill=(46, 50, 60))
            head, _, rest = said[given].partition("\n")
            draw.text((left + 16, top + 10), head, _ACCENT, font_of(size=24))
            draw.multiline_text((left + 16, top + 44), rest, _INK, font_of(size=23), spacing=7)
        else:
            shown = ImageOps.fit(given, (across, deep))
            card.paste(shown, (left, top))
    middle = width // 2
    draw.polygon([(middle - 26, 238), (middle + 26, 238), (middle, 262)], _ACCENT)
    _film(card, output, 274, edge)
    draw.text((edge, height - 36), said[size], _INK, font_of(size=24))
    drawn, small = said["a drawing, not made by the model"], font_of(size=18)
    draw.text((width - edge - draw.textlength(drawn, small), height - 31), drawn, _PALE, small)
    return card


def font() -> str | None:
    """Return a font with Chinese letters, if there is one here."""
    return next((path for path in _FONTS if Path(path).exists()), None)


def _film(card: Image.Image, frames: list[Image.Image], top: int, edge: int) -> None:
    """Draw frames as a strip of film, across the card."""
    draw, deep, gap = ImageDraw.Draw(card), 160, 6
    draw.rectangle([0, top, card.width, top + deep], fill=(12, 12, 14))
    for x in range(6, card.width, 24):
        for y in (top + 5, top + deep - 15):
            draw.rounded_rectangle([x, y, x + 12, y + 10], 3, fill=(70, 74, 84))
    across = (card.width - 2 * edge - gap * (len(frames) - 1)) // len(frames)
    for place, frame in enumerate(frames):
        card.paste(ImageOps.fit(frame, (across, deep - 44)), (edge + place * (across + gap), top + 22))


def thumbnails(language: str = "en") -> dict[str, Image.Image]:
    """Draw the thumbnail of each workflow, by its name, with words in a language; Chinese ones need ``font``."""
    card = partial(thumbnail, language=language)
    times = (0.0, 0.4, 0.8)
    film, snow = ([scene(time, winter=winter) for time in times] for winter in (False, True))
    prompt = "Prompt\nA sailing boat crosses a lake\nbetween green hills, the sun is low …"
    return {
        "text_to_video": card("Text to video", [prompt], film),
        "text_to_video_lora": card(
            "Text to video with LoRA",
            ["Prompt\nA sailing boat crosses\na lake …", "Your LoRA\nadds its style:\nink.safetensors"],
            [_ink(frame) for frame in film],
        ),
        "text_to_video_fast": card(
            "Text to video, faster",
            ["Prompt\nA sailing boat crosses\na lake …", "Faster\nkernels, TeaCache,\ncompile"],
            film,
        ),
        "native_nodes": card(
            "With ComfyUI's own nodes",
            ["Prompt\nA sailing boat crosses\na lake …", "Core nodes\nKSampler, CLIP Text\nEncode, VAE Decode"],
            film,
        ),
        "super_resolution": card(
            "Super-resolution",
            [film[0].resize((60, 34)), "DOVE, SparkVSR\none step, no prompt,\nany size and length"],
            film,
        ),
        "image_to_video": card("Image to video", [film[0], "Prompt\nThe boat sails\nto the right …"], film),
        "long_video": card(
            "Long video",
            ["Prompt\nA sailing boat crosses\na lake …", "Windows\n161 frames each,\nin the memory of one"],
            [scene(time) for time in (0.0, 0.2, 0.4, 0.6, 0.8)],
            "19.5 seconds, 1360 x 768",
        ),
        "extend": card(
            "Extend a video",
            [film[0], film[1], "Prompt\nThe boat sails on …"],
            [scene(time) for time in (0.0, 0.4, 0.8, 1.0)],
            "10 seconds, 1360 x 768",
        ),
        "inpaint": card(
            "Inpaint",
            [film[1], _marked(film[1], times[1], "black", "white"), "Prompt\nA boat drawn\nin ink …"],
            [Image.composite(_ink(frame), frame, _mask(time)) for frame, time in zip(film, times, strict=True)],
        ),
        "object_removal": card(
            "Object removal (VOID)",
            [film[1], _marked(film[1], times[1], "white", "black")],
            [scene(time, boat=False) for time in times],
        ),
        "video_to_video": card("Video to video", [film[0], film[2], "Prompt\nDeep winter,\nsnow falls …"], snow),
    }


def _mask(time: float) -> Image.Image:
    """Draw where the boat is, white on black."""
    mask, (width, height) = Image.new("L", SIZE), SIZE
    x, y = width * (0.2 + 0.5 * time), height * 0.68
    ImageDraw.Draw(mask).ellipse([x - 0.16 * height, y - 0.2 * height, x + 0.18 * height, y + 0.2 * height], 255)
    return mask


def _marked(picture: Image.Image, time: float, rest: str, boat: str) -> Image.Image:
    """Draw the mask of a frame in the colours of two parts."""
    return Image.composite(*(Image.new("RGB", picture.size, colour) for colour in (boat, rest)), _mask(time))


def _ink(picture: Image.Image) -> Image.Image:
    return ImageOps.colorize(
        ImageOps.posterize(ImageOps.grayscale(picture), 3), (40, 28, 72), (255, 244, 226), (214, 92, 96)
    )


if __name__ == "__main__":
    CLIP.parent.mkdir(exist_ok=True)
    write_mp4(clip(), CLIP, FPS, overwrite=True)
    for language, folder in (("en", CLIP.parent.parent), ("zh", CLIP.parent.parent / "zh")):
        if language == "en" or font():
            folder.mkdir(exist_ok=True)
            for name, picture in thumbnails(language).items():
                picture.save(folder / f"{name}.jpg", quality=78, optimize=True, progressive=True)
