"""Pictures and clips: mutated bytes of every format and odd parameters. Oracle: the size that was asked for, finite
values in 0..1, frames as many as the model makes; what is unharmed has its brightness."""

import io
import math
from fractions import Fraction

import numpy as np
from mutate import mutate_bytes, put, replace_by

from tests.told import Told

from . import common  # noqa: F401

NAME = "media"
SIZE = (40, 24)


def _pictures() -> dict[str, bytes]:
    from PIL import Image

    ramp = np.tile(np.linspace(0, 1, SIZE[0]), (SIZE[1], 1))
    grey = Image.fromarray((ramp * 255).astype(np.uint8))
    deep = Image.fromarray((ramp * 65535).astype(np.uint16))
    clear = Image.merge("RGBA", [grey] * 3 + [grey])
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = {
        "grey.png": (grey, {}), "colour.png": (grey.convert("RGB"), {"exif": exif.tobytes()}), "deep.png": (deep, {}), "clear.png": (clear, {}),
        "palette.png": (grey.convert("P"), {"transparency": 0}), "moving.png": (grey.convert("RGB"), {"save_all": True, "append_images": [grey.convert("RGB")]}),
        "x.jpg": (grey.convert("RGB"), {"exif": exif.tobytes()}), "printing.jpg": (grey.convert("RGB").convert("CMYK"), {}),
        "deep.tiff": (deep, {}), "float.tiff": (Image.fromarray(ramp.astype(np.float32)), {}), "packed.tiff": (grey.convert("RGB"), {"compression": "tiff_lzw"}),
        "jpeg.tiff": (grey.convert("RGB"), {"compression": "jpeg"}), "x.gif": (grey.convert("P"), {"save_all": True, "append_images": [grey.convert("P").rotate(180)]}),
        "x.webp": (clear, {}), "moving.webp": (clear, {"save_all": True, "append_images": [clear.rotate(180)]}), "x.bmp": (grey.convert("RGB"), {}),
        "x.tga": (grey.convert("RGB"), {"compression": "tga_rle"}), "x.pgm": (grey, {}), "x.jp2": (grey.convert("RGB"), {}), "x.ico": (clear.resize((16, 16)), {}),
        "x.pcx": (grey.convert("RGB"), {}), "x.avif": (grey.convert("RGB"), {}), "x.sgi": (grey.convert("RGB"), {}), "x.dds": (clear, {}),
    }  # fmt: skip
    made = {}
    for name, (image, options) in forms.items():
        file = io.BytesIO()
        try:
            image.save(
                file,
                format={"jpg": "JPEG", "tiff": "TIFF", "pgm": "PPM", "jp2": "JPEG2000"}.get(
                    name.split(".")[1], name.split(".")[1].upper()
                ),
                **options,
            )
        except (KeyError, OSError):
            continue  # A Pillow without that format.
        made[name] = file.getvalue()
    return made


def _clips(base) -> dict[str, bytes]:
    import av

    made = {}
    forms = {
        "x.mp4": ("libx264", "yuv420p"), "deep.mp4": ("libx264", "yuv420p10le"), "x.mkv": ("libx264", "yuv444p"), "x.avi": ("mpeg4", "yuv420p"),
        "motion.avi": ("mjpeg", "yuvj420p"), "x.ts": ("mpeg2video", "yuv420p"), "x.webm": ("libvpx", "yuv420p"), "x.mov": ("libx264", "yuv420p"),
        "raw.avi": ("rawvideo", "yuv420p"), "x.flv": ("flv1", "yuv420p"), "x.gif": ("gif", "rgb8"), "x.y4m": ("wrapped_avframe", "yuv420p"),
    }  # fmt: skip
    for name, (codec, pix_fmt) in forms.items():
        path = base / f"media_{name}"
        try:
            with av.open(str(path), "w") as container:
                stream = container.add_stream(codec, rate=25)
                (stream.width, stream.height), stream.pix_fmt = SIZE, pix_fmt
                sound = container.add_stream("aac", rate=44100) if name in ("x.mp4", "x.mkv", "x.mov", "x.ts") else None
                for level in range(0, 240, 20):
                    frame = av.VideoFrame.from_ndarray(np.full((SIZE[1], SIZE[0], 3), level, np.uint8), format="rgb24")
                    container.mux(stream.encode(frame.reformat(format=pix_fmt)))
                if sound is not None:
                    for start in range(0, 20_480, 1024):
                        piece = av.AudioFrame.from_ndarray(
                            np.full((2, 1024), 0.1, np.float32), format="fltp", layout="stereo"
                        )
                        piece.sample_rate, piece.pts = 44100, start
                        container.mux(sound.encode(piece))
                    container.mux(sound.encode())
                container.mux(stream.encode())
            made[name] = path.read_bytes()
        except (OSError, ValueError, av.error.FFmpegError):
            continue  # A PyAV without that format.
    return made


def prepare(base):
    import cogvideox.video  # noqa: F401

    pictures, clips = _pictures(), _clips(base)
    assert "grey.png" in pictures
    assert "x.mp4" in clips
    return {"pictures": pictures, "clips": clips}


def case(state, rng, folder):
    kind = rng.choice(("picture", "picture", "clip", "clip", "clip", "sound", "other"))
    forms = state["pictures"] if kind == "picture" or (kind == "other" and rng.random() < 0.5) else state["clips"]
    name = rng.choice(sorted(forms))
    content, said = forms[name], "whole"
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        content, said = mutate_bytes(rng, content, rng.choice((64, 400, None)))
    path = folder / rng.choice((name, name, "a b'\u202e\u0645.mp4", "x" * 200, "no suffix", "%d.png", "x.mp4"))
    put(path, content)
    if rng.random() < 0.05:
        said = replace_by(rng, path)
    size = rng.choice((None, (32, 32), (16, 160), (80, 48), (1360, 768)))
    limit = rng.choice((1, 9, 17, 49))
    fps = rng.choice((None, 8, 16, Fraction(30000, 1001), 1, 240))
    step = rng.choice((None, 8, 16))
    whole = said == "whole"

    def act():
        import torch

        from cogvideox.pictures import check_images, fit_size
        from cogvideox.video import read_image, read_sound, read_video

        notes = []
        if (kind == "picture") != (kind == "other" and forms is state["clips"]) and kind != "sound":
            image = check_images(read_image(path, Told(notes)), "start_image")
            if image.dtype != torch.float32 or image.ndim != 4 or image.shape[0] != 1 or image.shape[3] != 3:
                return f"a picture of another form: {image.dtype} {list(image.shape)}"
            if whole and kind == "picture" and not 0.35 < image.mean() < 0.85:
                return f"the brightness is another: {image.mean():.3f}"
            if size is not None and fit_size(image, *size).shape != (1, size[1], size[0], 3):
                return "the size is another"
        elif kind == "sound":
            sound = read_sound(path, limit / 16, Told(notes))
            if sound is not None and (
                not np.isfinite(sound[0]).all()
                or sound[0].shape != (2, round(limit / 16 * sound[1]))
                or np.abs(sound[0]).max() > 1
            ):
                return "sound of another form"
        else:
            dtype = torch.uint8 if limit % 3 else torch.float32
            clip = read_video(path, limit, fps=fps, size=size, step=step, dtype=dtype, events=Told(notes))
            if clip.dtype != dtype or clip.ndim != 4 or clip.shape[3] != 3 or len(clip) < 1:
                return f"a clip of another form: {clip.dtype} {list(clip.shape)}"
            if size is not None and tuple(clip.shape[1:3]) != size[::-1]:
                return f"the size is another: {list(clip.shape)}"
            if (step is None and len(clip) > limit) or (step is not None and len(clip) % step != 1):
                return f"another length: {len(clip)}"
            if whole and kind == "clip" and fps is not None:
                expected = min(limit, max(1, round(12 * fps / 25)))
                if step is None and abs(len(clip) - expected) > max(1, math.ceil(fps / 25)):
                    return f"a second is no second: {len(clip)} frames for {expected}"
        for note in notes:
            note.encode()
            if len(note) > 1000:
                return "a long note"
        return None

    return f"{kind} {name} {said} {size} {limit} {fps} {step}", act
