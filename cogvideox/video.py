"""Files of videos (through PyAV), images (through Pillow) and latents."""

from collections.abc import Callable
from itertools import count, islice
from pathlib import Path

import torch


def write_mp4(images: torch.Tensor, path: Path | str, fps: int, on_frame: Callable[[int, int], None] | None = None) -> None:
    """Write frames as H.264 in an mp4 that every player opens (yuv420p, BT.709).

    Args:
        images: float ``[F, H, W, 3]`` in 0..1, H and W even.
        fps: frames per second.
        on_frame: called with (frames written, frames in all).

    Raises:
        ValueError: for a path that is not an mp4, or in a folder that does not exist.
    """
    import av

    path = Path(path)
    check_output(path)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17"})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = 1
        for attribute in ("colorspace", "color_primaries", "color_trc"):
            setattr(stream.codec_context, attribute, 1)
        for index, image in enumerate(images):
            pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
            for packet in stream.encode(frame):
                container.mux(packet)
            if on_frame is not None:
                on_frame(index + 1, len(images))
        for packet in stream.encode():
            container.mux(packet)


def read_video(path: Path | str, limit: int | None = None) -> torch.Tensor:
    """Read the frames of a video file.

    Args:
        limit: frames to read at most.

    Returns:
        float32 ``[F, H, W, 3]`` in 0..1.

    Raises:
        ValueError: if it is not there, or no video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in islice(container.decode(video=0), limit)]
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}). Check the path, or convert it to mp4.") from error
    if not frames:
        raise ValueError(f"{path} holds no frames. Choose another video.")
    return torch.stack(frames).float() / 255


def read_image(path: Path | str) -> torch.Tensor:
    """Read an image file, turned as its EXIF data says: float32 ``[1, H, W, 3]`` in 0..1.

    Raises:
        ValueError: if it is not there, or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            pixels = ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error}). Check the path, or convert it to PNG.") from error
    flat = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    return flat.view(1, pixels.height, pixels.width, 3).float() / 255


def write_latent(samples: torch.Tensor, folder: Path, name: str = "CogVideoX_unfinished") -> Path:
    """Write a latent ``[B, 16, T, H/8, W/8]`` so that core's Load Latent reads it; returns the new file, numbered so that none is overwritten."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = next(path for number in count(1) if not (path := folder / f"{name}_{number:05}.latent").exists())
    # The second tensor is what core knows an unscaled latent by.
    save_file({"latent_tensor": samples.contiguous(), "latent_format_version_0": torch.tensor([])}, path)
    return path


def check_output(path: Path | str) -> None:
    """Refuse an output path that could not be written, so that it is known before the run and not after.

    Raises:
        ValueError: for a path that is not an mp4, or in a folder that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"The output is {path}, but only mp4 files are written. Give it a name that ends in .mp4.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"The output is {path}, but the folder {path.absolute().parent} does not exist. Create it or choose another.")
