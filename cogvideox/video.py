"""Write what a run leaves behind: videos (through PyAV) and latents, in places that were tried before, whole or not at
all.

What a run starts from is read by ``image_files`` and ``clip_files``, and can be had from here too.
"""

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .clip_files import read_shape, read_sound, read_video
from .dependencies import installed, reinstall, unimportable
from .events import Events
from .files import exists, open_regular, write_whole, written_whole
from .image_files import read_image
from .words import reason, short

__all__ = [
    "check_output",
    "check_room",
    "free_name",
    "read_image",
    "read_latent",
    "read_shape",
    "read_sound",
    "read_video",
    "write_latent",
    "write_mp4",
]

#: Bytes of a video for each of its pixels, and beside them, so that a full disk is noticed before the run: many times
#: what most take.
_BYTES_PER_PIXEL, _BYTES_ASIDE = 0.25, 16 << 20
#: Of H.264.
_ENCODER = "libx264"
#: What latents are in, as safetensors calls it.
_LATENT_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
#: What latents are called that are kept of a run that ended.
_UNFINISHED = "CogVideoX_unfinished"


def write_mp4(
    images: torch.Tensor,
    path: Path | str,
    fps: Fraction | int,
    events: Events | None = None,
    *,
    overwrite: bool = False,
    sound: tuple[np.ndarray, int] | None = None,
) -> None:
    """Write frames as H.264 in an mp4 that every player opens (yuv420p, BT.709), whole or not at all.

    Args:
        images: float ``[F, H, W, 3]`` in 0..1, or uint8 in 0..255, H and W even.
        fps: frames per second.
        events: told of each frame that is written.
        overwrite: whether a file that has the name already is replaced.
        sound: float32 ``[2, samples]`` in -1..1 and samples per second, written as AAC and cut to the video's length.

    Raises:
        ValueError: for a path that cannot be written (``check_output``).
        RuntimeError: if writing fails all the same, such as on a disk that is full.
    """
    path = check_output(path, overwrite)
    import av

    try:
        with written_whole(path, overwrite) as partial:
            _encode(images, partial, Fraction(fps).limit_denominator(1001), events, sound)
            # On the disk before it has its name: --prompts takes what has one for made, after a loss of power too.
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
    except (OSError, av.error.FFmpegError) as error:
        raise RuntimeError(
            f"{short(path, 400)} could not be written ({reason(error)}), and nothing of it was left behind. Is the "
            "disk full?"
        ) from error


def _encode(
    images: torch.Tensor, path: Path, fps: Fraction, events: Events | None, sound: tuple[np.ndarray, int] | None
) -> None:
    """Write frames and sound to a file that is given its name later."""
    import av

    # An absolute path: ffmpeg takes what stands before a colon for a protocol.
    with av.open(str(path.absolute()), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(_ENCODER, rate=fps, options={"crf": "17"})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = 1
        for attribute in ("colorspace", "color_primaries", "color_trc"):
            setattr(stream.codec_context, attribute, 1)
        spoken: Any = None
        pieces: Iterator[Any] = iter(())
        if sound is not None:
            spoken, pieces = _sound_stream(container, *sound, len(images) / fps)
        for index, image in enumerate(images):
            pixels = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)
            frame = av.VideoFrame.from_ndarray(pixels.cpu().numpy(), format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709"
            )
            for packet in stream.encode(frame):
                container.mux(packet)
            for piece in pieces:
                container.mux(spoken.encode(piece))
                if piece.pts * piece.time_base > (index + 1) / fps:
                    break
            if events is not None:
                events.progress("writing", index + 1, len(images), "frame")
        for packet in stream.encode():
            container.mux(packet)
        if spoken is not None:
            container.mux(spoken.encode())


def _sound_stream(container: Any, samples: np.ndarray, rate: int, seconds: Fraction) -> tuple[Any, Iterator[Any]]:
    """Add a stream for sound; return it and what it is to encode: pieces of 1024 samples, as long as the video."""
    import av

    stream = container.add_stream("aac", rate=rate)
    stream.codec_context.layout = "stereo"
    stream.codec_context.bit_rate = 192_000
    samples = samples[:, : round(seconds * rate)]

    def pieces() -> Iterator[Any]:
        for start in range(0, samples.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples[:, start : start + 1024]), format="fltp", layout="stereo"
            )
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            yield frame

    return stream, pieces()


def check_output(path: Path | str, overwrite: bool = False, made_from: Iterable[Path] = ()) -> Path:
    """Refuse an output path that could not be written, by trying it, so that it is known before the run and not after.

    Args:
        overwrite: whether a file that has the name already is replaced.
        made_from: files and folders that the run reads, none of which is replaced in any case.

    Returns:
        The path.

    Raises:
        ValueError: for a path that is not an mp4, in a folder that is not there, taken, or that the system refuses.
        RuntimeError: if no mp4 can be written here at all.
    """
    path = Path(path)
    name, folder = short(path, 400), path.absolute().parent
    if os.path.isdir(path):
        raise ValueError(f"The output is {name}, which is a folder. Give the name of a file in it, that ends in .mp4.")
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"The output is {name}, but only mp4 files are written. Give it a name that ends in .mp4.")
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise ValueError(
            f"The output is {name}, but the folder {short(folder, 400)} {what}. Create it or choose another."
        )
    taken = os.path.lexists(path)
    if taken:
        for source in made_from:
            if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
                raise ValueError(
                    f"The output is {name}, which the video is made from: it would be lost. Give another name."
                )
        if os.path.exists(path) and not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"The output is {name}, which is a pipe or device and no regular file. Give another name.")
        if not overwrite:
            raise exists(path)
    _check_encoder()
    # A file beside it, as it will be in the making; and the name itself, which may be too long, or not allowed here.
    trial = folder / f".{os.getpid()}.trial.mp4"
    for attempt in (trial, *(() if taken else (path,))):
        try:
            attempt.open("xb").close()
            attempt.unlink()
        except FileExistsError:
            # Somebody else's trial, or a name that came meanwhile: written_whole sees to it.
            continue
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The output is {name}, and it cannot be written ({reason(error)}). Choose another folder or name."
            ) from error
    return path


def _check_encoder() -> None:
    """Refuse a PyAV that cannot be imported, or that was built without the encoder, as some of conda's are.

    Raises:
        RuntimeError: saying how to install it again.
    """
    lacking = unimportable(["av"])
    if lacking is not None:
        raise lacking
    import av

    try:
        av.codec.Codec(_ENCODER, "w")
    except (ValueError, av.error.FFmpegError) as error:
        raise reinstall(
            "av",
            f"The package av {installed('av') or ''} was built without {_ENCODER}, the encoder of the videos that are "
            "written.",
        ) from error


def check_room(path: Path, frames: int, width: int, height: int) -> None:
    """Refuse a disk that is too full for a video of that size.

    Raises:
        ValueError: with what is free and what it may take.
    """
    needed = _BYTES_ASIDE + int(_BYTES_PER_PIXEL * frames * width * height)
    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed:
        raise ValueError(
            f"The output is {short(path, 400)}, but its disk has {free / 1e6:,.0f} MB free, and {frames} frames of "
            f"{width}x{height} may take {needed / 1e6:,.0f} MB. Make room, or choose another disk."
        )


def free_name(path: Path) -> Path:
    """Return the path, or the first of ``out_00002.mp4``, ``out_00003.mp4`` … where it is taken."""
    if not path.name or not os.path.lexists(path):
        return path
    return next(new for number in count(2) if not os.path.lexists(new := path.with_stem(f"{path.stem}_{number:05}")))


def write_latent(samples: torch.Tensor, folder: Path, name: str = _UNFINISHED) -> Path:
    """Write a latent ``[B, 16, T, H/8, W/8]`` so that core's Load Latent reads it, whole or not at all.

    Returns:
        The new file, numbered so that none is overwritten.

    Raises:
        ValueError: if it cannot be written there.
    """
    content = latent_bytes(samples)
    while True:
        path = next(path for number in count(1) if not os.path.lexists(path := folder / f"{name}_{number:05}.latent"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
            return path
        except OSError as error:
            raise ValueError(
                f"{short(path, 400)} cannot be written ({reason(error)}), so the latents are not kept there. Choose "
                "another folder."
            ) from error
        except ValueError:
            # Another came first: the next number.
            if not os.path.lexists(path):
                raise


def latent_bytes(samples: torch.Tensor) -> bytes:
    """Make the file of a latent ``[B, 16, T, H/8, W/8]`` that core's Load Latent reads."""
    from safetensors.torch import save

    # The second tensor is what core knows an unscaled latent by.
    return save({"latent_tensor": samples.cpu().contiguous(), "latent_format_version_0": torch.tensor([])})


def keep_latent(samples: torch.Tensor, folders: Iterable[Path], name: str = _UNFINISHED) -> Path:
    """Write a latent into the first of some folders that can be written, as ``write_latent`` does.

    Raises:
        ValueError: if none of them can, with what was wrong with each.
    """
    failed = []
    for folder in folders:
        try:
            return write_latent(samples, folder, name)
        except ValueError as error:
            failed.append(str(error))
    raise ValueError(" ".join(failed))


def read_latent(path: Path) -> torch.Tensor:
    """Read a latent as ``write_latent`` and core's Save Latent write it: float32 ``[B, 16, T, H/8, W/8]``.

    Raises:
        ValueError: if it is not there, damaged, or of another kind.
    """
    from safetensors import SafetensorError, deserialize

    samples = None
    with open_regular(path, " as a latent") as file:
        try:
            # Not by safetensors.torch: 0.4.3's fails at the empty tensor beside it. Nor from its path, which has to be
            # UTF-8 for that.
            stored = dict(deserialize(file.read()))
            found = stored.get("latent_tensor", {})
            dtype = _LATENT_DTYPES.get(found.get("dtype"))
            if dtype is not None:
                samples = torch.frombuffer(found["data"], dtype=dtype).reshape(found["shape"])
        except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
            raise ValueError(
                f"{short(path, 400)} cannot be read as a latent ({reason(error)}): it is cut off, or something else. "
                "Choose a file that ends in .latent, as this program and Save Latent write them."
            ) from error
    if samples is None or "latent_format_version_0" not in stored:
        raise ValueError(
            f"{short(path, 400)} holds no latent of a video "
            f"({', '.join(map(short, sorted(stored)[:3])) or 'nothing'}). Choose a file that ends in .latent, as "
            "this program and Save Latent write them."
        )
    return samples.float()
