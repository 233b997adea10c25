"""Check images and clips that come in, and fit them to the size and length that a model makes."""

import math
from collections.abc import Iterator

import torch
from einops import rearrange

from .variants import SIZE_STEP, rest_of

#: How far bicubic and lanczos resampling, which sharpen edges, go beyond 0..1 in practice: such images are clamped.
_OVERSHOOT = 0.1
#: Values looked at together: beside a clip there is no room for a copy of it.
_BLOCK = 1 << 22
#: Values that no machine has room for: a tensor may claim them all the same (torch's ``expand``), and looking at each
#: would not end.
_TOO_MANY = 1 << 38
_CHANNELS = {1: "is grey (1 channel)", 2: "is grey with alpha (2 channels)", 4: "has an alpha channel (4 channels)"}


def check_images(images: torch.Tensor, name: str) -> torch.Tensor:
    """Refuse what is not an IMAGE of colour, ``[F, H, W, 3]`` in 0..1, looking at it piece by piece.

    Args:
        name: what it is, for messages: ``start_image``.

    Returns:
        The images as float32, clamped to 0..1 where resampling went a little beyond: the tensor itself if there is
        nothing to change, else a copy.

    Raises:
        ValueError: for another shape, alpha, grey, NaN, Inf, or values outside 0..1.
    """
    shape = list(images.shape)
    if images.ndim != 4 or 0 in shape:
        raise ValueError(
            f"The {name} has the shape {shape}, but an image is [frames, height, width, 3]. Connect an IMAGE, such as "
            "of Load Image."
        )
    if images.numel() >= _TOO_MANY:
        raise ValueError(
            f"The {name} has the shape {shape}, which takes {4 * images.numel():,} bytes: no machine has that. Check "
            "the node that made it."
        )
    if shape[3] != 3:
        what = _CHANNELS.get(shape[3], f"has {shape[3]} channels")
        remedy = "Join it with a background colour first" if shape[3] == 4 else "Convert it to RGB first"
        raise ValueError(
            f"The {name} {what}, and the VAE was trained on RGB (3 channels): what lies under would be guessed. "
            f"{remedy}."
        )
    extremes = [[bound.item() for bound in piece.aminmax()] for piece in _pieces(images)]
    if not all(math.isfinite(bound) for pair in extremes for bound in pair):
        bad = sum((~piece.isfinite()).sum().item() for piece in _pieces(images))
        raise ValueError(
            f"The {name} holds {bad:,} values that are NaN or Inf (of {images.numel():,}), which would end in a black "
            "video. Check what made it."
        )
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        raise ValueError(
            f"The {name} has values from {low:.3g} to {high:.3g}, but an IMAGE goes from 0 to 1: the video would be "
            f"glaring or black. {'Divide it by 255.' if high > 2 else 'Bring it to 0..1 first.'}"
        )
    if low >= 0 and high <= 1:
        return images.float()
    return torch.clamp(images, 0, 1) if images.dtype == torch.float32 else images.float().clamp_(0, 1)


def check_mask(mask: torch.Tensor, name: str) -> torch.Tensor:
    """Refuse what is not a mask in 0..1: a MASK ``[H, W]`` or ``[F, H, W]``, or an IMAGE ``[F, H, W, C]`` of grey, of
    which the first colour counts.

    Args:
        name: what it is, for messages: ``quadmask``.

    Returns:
        float32 ``[F, H, W]``.

    Raises:
        ValueError: for another shape, NaN, Inf, or values outside 0..1.
    """
    shape = list(mask.shape)
    if mask.ndim not in (2, 3, 4) or 0 in shape:
        raise ValueError(
            f"The {name} has the shape {shape}, but a mask is [frames, height, width]. Connect a MASK, or the IMAGE of "
            "a mask's video."
        )
    flat = mask[..., 0] if mask.ndim == 4 else mask[None] if mask.ndim == 2 else mask
    return check_images(flat[..., None].expand(*flat.shape, 3), name)[..., 0]


def _pieces(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the images in bands of rows of at most ``_BLOCK`` values, or of one row."""
    rows = max(1, _BLOCK // (images.shape[2] * images.shape[3]))
    for image in images:
        yield from image.split(rows)


def fit_size(images: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Scale and centre-crop images ``[F, H, W, 3]`` to ``width`` x ``height``, with Lanczos' filter, as core's nodes
    do.

    Unlike theirs it does not round to 8 bits on the way. Images of that size are returned as they are.
    """
    old_height, old_width = images.shape[1:3]
    if (old_width, old_height) == (width, height):
        return images
    from PIL import Image

    left, top, right, bottom = crop_box(old_width, old_height, width, height)
    cropped = images[:, top:bottom, left:right].cpu()
    # One colour at a time: Pillow has a float mode for a single channel only.
    scaled = torch.empty(len(images), 3, height, width)
    for place, plane in zip(scaled.flatten(0, 1), rearrange(cropped, "f h w c -> (f c) h w"), strict=True):
        resized = Image.fromarray(plane.contiguous().numpy()).resize((width, height), Image.Resampling.LANCZOS)
        place.copy_(torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.float32).view(height, width))
    return rearrange(scaled, "f c h w -> f h w c").clamp(0, 1).contiguous()


def crop_box(width: int, height: int, new_width: int, new_height: int, aspect: float = 1) -> tuple[int, int, int, int]:
    """Return the centre of a picture that has the shape of another: left, top, right and bottom in pixels, as core's
    nodes round them.

    Args:
        aspect: width of a pixel over its height.
    """
    old, new = width * aspect / height, new_width / new_height
    left = round((width - width * (new / old)) / 2) if old > new else 0
    top = round((height - height * (old / new)) / 2) if old < new else 0
    # Of a line of pixels one is left.
    left, top = min(left, (width - 1) // 2), min(top, (height - 1) // 2)
    return left, top, width - left, height - top


def fit_grid(images: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """Centre-crop images to multiples of 16 pixels; with a sentence if something was cut.

    Raises:
        ValueError: if they are smaller than that.
    """
    height, width = images.shape[1:3]
    new_height, new_width = (size // SIZE_STEP * SIZE_STEP for size in (height, width))
    if not (new_height and new_width):
        raise ValueError(
            f"The images are {width}x{height} pixels, and the smallest that the model can read is 16x16. Scale them "
            "up first."
        )
    if (new_height, new_width) == (height, width):
        return images, None
    top, left = (height - new_height) // 2, (width - new_width) // 2
    note = (
        f"The images are {width}x{height}; the model reads multiples of {SIZE_STEP} pixels, so they were cropped to "
        f"{new_width}x{new_height}."
    )
    return images[:, top : top + new_height, left : left + new_width], note


def fit_length(images: torch.Tensor, step: int, in_pairs: bool = False) -> tuple[torch.Tensor, str | None]:
    """Cut a clip, or repeat its last frame, to the nearest length that ``check_frames`` takes; with a sentence if that
    changed it.

    A clip never becomes a single frame: up to ``step`` frames are filled up.
    """
    count = len(images)
    wanted, note = nearest_length(count, step, in_pairs)
    if wanted <= count:
        return images[:wanted], note
    return torch.cat([images, images[-1:].expand(wanted - count, -1, -1, -1)]), note


def nearest_length(count: int, step: int, in_pairs: bool = False) -> tuple[int, str | None]:
    """Return the frames nearest to ``count`` that ``geometry.check_frames`` takes, ``step * N + 1`` or, ``in_pairs``,
    ``step * N + 5``, and a sentence about what that cuts or repeats."""
    rest = rest_of(in_pairs)
    blocks = max(0 if in_pairs else 1, (count - rest + step // 2 - 1) // step)
    wanted = blocks * step + rest if count > 1 else 1
    if wanted == count:
        return count, None
    rule = f"The clip has {count} frames and this model makes {step}N+{rest}, so"
    if wanted < count:
        return wanted, f"{rule} the last {count - wanted} were cut: {wanted} are left."
    return wanted, f"{rule} the last was repeated {wanted - count} times."
