"""Make the noise that VOID's second pass starts from: Gaussian noise that moves as the first pass's video does.

Sources: ``make_warped_noise.py`` and ``load_and_resize_warped_noise`` of Netflix/void-model (66e9c0e, Apache-2.0), and
``noise_warp.py`` and ``raft.py`` of RyannDaGreat/CommonSource (28f1b68), which they call: Go-with-the-Flow
(https://arxiv.org/abs/2501.08331). There numbers come from torch's global generator on the card; here from one on the
CPU, so that a seed gives the same noise everywhere. A flow then moves it the same bit for bit on the CPU. Frames are
scaled within a grey level of OpenCV's at 672x384, and within eight where they are larger than 720x480.

ComfyUI's VOID Warped Noise warps at the video's own size and length, and keeps a deviation of 1. Netflix's code, and
this, stretch the video to 72 frames, crop it to 720x480, and scale the noise bilinearly afterwards, which lowers the
deviation: 0.66 at 672x384.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch.nn.functional import grid_sample, interpolate

from .checkpoint.headers import read_tensor
from .checkpoint.reading import read_any_header
from .events import Events
from .variants import LATENT_CHANNELS
from .weights import make_room
from .words import listed, reason, short

#: Returns the optical flow from one frame ``[3, H, W]`` in 0..1 to another, ``[2, H, W]``: pixels right and down.
Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
#: Draws Gaussian noise of a shape.
Draw = Callable[[int, int], torch.Tensor]

#: Frames, height and width that a video is brought to, and the share of that size at which its flow is looked for.
FRAMES, HEIGHT, WIDTH, _HALF = 72, 480, 720, 2
#: How many times as fine as the flow the noise is that moves, and cells of it that become one of the latent.
FINER, CELLS = 8, 32
#: The file of RAFT's weights that torchvision's own name stands for (Raft_Large_Weights.C_T_SKHT_V2), and where it is.
WEIGHTS = "raft_large_C_T_SKHT_V2-ff5fadd5.pth"
WEIGHTS_URL = f"https://download.pytorch.org/models/{WEIGHTS}"


def warped_noise(
    video: torch.Tensor, shape: tuple[int, ...], flow: Flow, seed: int, device: torch.device, events: Events
) -> torch.Tensor:
    """Make noise that moves as a video does, two frames of which are looked at at a time.

    Args:
        video: uint8 ``[F, H, W, 3]``.
        shape: of the latents that it is for, ``[1, 16, T, H/8, W/8]``.
        flow: of ``RaftFlow``.
        device: where the noise is moved; other parts of models make way there.
        events: told of the frames, and asked whether to stop before each.

    Returns:
        float32 ``[1, 16, T, H/8, W/8]`` on the CPU.
    """
    make_room(device)
    # Of the video, and of the noise, those that are used: both are stretched to another length.
    last, length = FRAMES - 1, shape[2]
    frames = [round(number * (len(video) - 1) / last) for number in range(FRAMES)]
    wanted = [number * last // max(1, length - 1) for number in range(length)]
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(height: int, width: int) -> torch.Tensor:
        return torch.randn(height, width, generator=generator).to(device)

    moving = MovingNoise(LATENT_CHANNELS, HEIGHT * FINER // _HALF, WIDTH * FINER // _HALF, draw)
    found, before = {0: moving.shrunk()}, _seen(video[frames[0]])
    for number in range(1, FRAMES):
        events.check_cancelled()
        now = _seen(video[frames[number]])
        moving.move(flow(before.to(device), now.to(device)).to(device))
        before = now
        if number in wanted:
            found[number] = moving.shrunk()
        events.progress("warping noise", number, last, "frame")
    noise = torch.stack([found[number] for number in wanted])
    # Bilinearly and without a mean over what a cell covers, as OpenCV does.
    noise = interpolate(noise, tuple(shape[3:]), mode="bilinear", align_corners=False)
    return rearrange(noise, "t c h w -> 1 c t h w")


class MovingNoise:
    """Gaussian noise ``[C, H, W]`` that is moved by one flow after another and stays Gaussian.

    Where the flow spreads, a value is shared by the cells that it becomes, with fresh noise of mean zero beside it;
    where the flow gathers, values are summed by their weights. A channel at a time: beside the noise there is little.
    """

    def __init__(self, channels: int, height: int, width: int, draw: Draw):
        self._draw = draw
        self._noise = torch.stack([draw(height, width) for _ in range(channels)])
        self._weights = torch.ones_like(self._noise[0])

    def shrunk(self, cells: int = CELLS) -> torch.Tensor:
        """Return it ``cells`` times as coarse ``[C, h, w]`` on the CPU, of the same deviation, rounded to float16 as
        the reference stores it."""
        deviation = (self._weights**2).sqrt()
        size = tuple(-(-side // cells) for side in self._weights.shape)
        coarse = torch.stack(
            [
                interpolate((channel * self._weights / deviation)[None, None], size, mode="area")
                for channel in self._noise
            ]
        )
        return (cells * coarse)[:, 0, 0].half().float().cpu()

    def move(self, flow: torch.Tensor) -> None:
        """Move it by a flow ``[2, h, w]`` in pixels of its own, scaled to the noise's size."""
        height, width = self._weights.shape
        old_height, old_width = flow.shape[1:]
        flow = interpolate(flow[None].float(), (height, width), mode="bilinear", align_corners=False)[0]
        flow = torch.stack([flow[0] * (height / old_height), flow[1] * (width / old_width)])
        source, target = _sources(flow), _targets(flow)
        # What leaves the picture is replaced, where it was, by a cell of nothing.
        filled = _gathered(torch.ones_like(self._weights), target) > 0
        # What gathers and, right of it, what spreads: that is of use where nothing gathers.
        useful = torch.cat([torch.ones_like(filled), ~filled], dim=1)
        cells, row = useful.flatten().nonzero()[:, 0], torch.arange(height, device=flow.device)[:, None]
        spreads = source.is_inside & ~filled
        origin = source.place[spreads]
        spread = (row * 2 * width + width + torch.arange(width, device=flow.device))[spreads]

        def lay_out(channel: torch.Tensor, both: torch.Tensor, nothing: float) -> torch.Tensor:
            both[:, :width] = torch.where(target.is_inside, channel, nothing)
            both.view(-1)[spread] = channel.view(-1)[origin]
            return both.view(-1)

        both = self._noise.new_zeros(height, 2 * width)
        # Cells of one value are of one source; those of nothing are alike too, what is of no use among them.
        kinds, groups, counts = lay_out(self._noise[0], both, 0.0)[cells].unique(
            return_inverse=True, return_counts=True
        )
        counts = counts + (kinds == 0) * filled.sum()
        count, of_nothing = counts[groups], (kinds == 0)[groups]
        weights = torch.ones_like(both)
        lay_out(self._weights, weights, 1.0)[cells] /= count
        gathering, spreading = weights.chunk(2, dim=1)
        squares = _gathered(gathering**2, target).sqrt()
        together = (count > 1) & ~of_nothing
        shared, bare, root = cells[together], cells[of_nothing], count[together] ** 0.5
        empty = useful.flatten().logical_not_().index_fill_(0, bare, True)
        several = (counts > 1) & (kinds != 0)
        groups, counts, most = (several.cumsum(0) - 1)[groups[together]], counts[several], counts[kinds == 0]
        one_place = torch.zeros_like(empty, dtype=torch.long)
        for channel in self._noise:
            values, fresh = lay_out(channel, both, 0.0), self._draw(height, 2 * width).view(-1)
            own = fresh[shared]
            means = _summed(own, groups, len(counts)) / counts
            values[shared] = values[shared] / root + (own - means[groups])
            if len(bare):
                values[bare] = fresh[bare] - _total(torch.where(empty, fresh, 0.0), one_place) / most
            summed = _gathered(both[:, :width] * gathering, target)
            channel.copy_(torch.where(filled, summed / squares, both[:, width:]))
        weights = torch.where(filled, _gathered(gathering, target), spreading)
        # Neither too large nor too small, and in time towards 1.
        self._weights = (weights / weights.mean() + 1e-5) ** 0.9999


@dataclass(frozen=True)
class _Places:
    """Where cells come from, or go.

    Attributes:
        place: in ``H * W``, ``[H, W]``.
        is_inside: whether that is in the picture, ``[H, W]``.
    """

    place: torch.Tensor
    is_inside: torch.Tensor


def _sources(flow: torch.Tensor) -> _Places:
    """Return for each cell of a flow ``[2, H, W]`` the nearest that it comes from."""
    height, width = flow.shape[1:]
    across = (torch.arange(width, device=flow.device) - flow[0]) / (width - 1) * 2 - 1
    down = (torch.arange(height, device=flow.device)[:, None] - flow[1]) / (height - 1) * 2 - 1
    # Places from 1 on, as what is outside is read as 0; float32 has all of 16 million.
    places = torch.arange(1.0, height * width + 1, device=flow.device).view(1, 1, height, width)
    grid = torch.stack([across, down], dim=-1)[None]
    found = grid_sample(places, grid, mode="nearest", padding_mode="zeros", align_corners=True)[0, 0].long()
    return _Places((found - 1).clamp(min=0), found > 0)


def _targets(flow: torch.Tensor) -> _Places:
    """Return for each cell of a flow ``[2, H, W]`` where it goes, ``H * W`` for nowhere; one that leaves the picture is
    where it was."""
    height, width = flow.shape[1:]
    x, y = torch.arange(width, device=flow.device), torch.arange(height, device=flow.device)[:, None]
    across, down = (x + flow[0]).round(), (y + flow[1]).round()
    stays = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    shift = torch.where(stays, flow, 0.0).round().long()
    across, down = x + shift[0], y + shift[1]
    # Halves are rounded to even, of a place and of a shift: the two can be a cell apart.
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    return _Places(torch.where(inside, down * width + across, height * width), stays)


def _gathered(values: torch.Tensor, target: _Places) -> torch.Tensor:
    """Sum values ``[H, W]`` where they go."""
    return _summed(values.flatten(), target.place.flatten(), values.numel() + 1)[:-1].view_as(values)


def _summed(values: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """Sum values ``[N]`` by their places, ``[count]``, in the order in which they are, so that each run gives the same:
    a card would add them as they come."""
    sums = values.new_zeros(count)
    if values.device.type == "cpu":
        return sums.index_add_(0, places, values)
    return sums.index_put_((places,), values, accumulate=True)


def _total(values: torch.Tensor, one_place: torch.Tensor) -> torch.Tensor:
    """Sum many values ``[N]``, all of them in one place, ``[1]``; on the CPU one after the other, as the reference
    does."""
    return _summed(values, one_place, 1) if values.device.type == "cpu" else values.sum()[None]


def _seen(frame: torch.Tensor) -> torch.Tensor:
    """Bring a frame, uint8 ``[H, W, 3]``, to the size at which its flow is looked for: ``[3, 240, 360]`` in 0..1,
    rounded as the reference stores it."""
    picture = rearrange(frame, "h w c -> 1 c h w").float()
    height, width = picture.shape[2:]
    scale = max(HEIGHT / height, WIDTH / width)
    # Rounded up, but for what a product of floats is over a whole number.
    size = tuple(max(least, -int(-side * scale // 1)) for side, least in ((height, HEIGHT), (width, WIDTH)))
    grown = tuple(max(old, new) for old, new in zip((height, width), size, strict=True))
    picture = interpolate(picture, grown, mode="bilinear", align_corners=False)
    picture = (interpolate(picture, size, mode="area") + 0.5).floor()
    top, left = (size[0] - HEIGHT) // 2, (size[1] - WIDTH) // 2
    picture = picture[:, :, top : top + HEIGHT, left : left + WIDTH]
    picture = (interpolate(picture, (HEIGHT // _HALF, WIDTH // _HALF), mode="area") + 0.5).floor()
    return (picture[0].half() / 255).float()


def require_raft() -> Any:
    """Import torchvision's optical flow, which is no dependency of this pack.

    Raises:
        ValueError: if it cannot be, with what to do.
    """
    try:
        return import_module("torchvision.models.optical_flow")
    # Built for another torch, it lacks its operators and says so in other ways.
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ValueError(
            "The second pass's noise follows the optical flow of the first pass's video, for which torchvision is "
            f"needed, and it cannot be imported ({reason(error)}). Install the torchvision that belongs to torch "
            f"{torch.__version__}, or give --noise with a latent of ComfyUI's VOID Warped Noise."
        ) from error


class RaftFlow:
    """RAFT, torchvision's network for optical flow (raft_large)."""

    def __init__(self, weights: Path):
        """Check that ``weights`` are a file of RAFT's, safetensors or of torch.

        Raises:
            ValueError: if not, or without torchvision.
        """
        with torch.device("meta"):
            self._module = require_raft().raft_large(weights=None, progress=False)
        self._stored = read_any_header(weights)
        wanted = {name: tuple(tensor.shape) for name, tensor in self._module.state_dict().items()}
        found = {name: stored.shape for name, stored in self._stored.items()}
        wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if wrong:
            raise ValueError(
                f"{short(weights, 400)} has other weights than RAFT's ({listed(wrong)}), so it knows no optical flow. "
                f"Give {WEIGHTS}."
            )

    def to(self, device: torch.device) -> "RaftFlow":
        """Read the weights to a device, and return it itself."""
        tensors = {name: read_tensor(stored).to(device) for name, stored in self._stored.items()}
        self._module.load_state_dict(tensors, assign=True)
        self._module.eval()
        return self

    def __call__(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Return the flow between two frames ``[3, H, W]`` in 0..1, of sides that are multiples of 8: ``[2, H, W]``."""
        with torch.no_grad():
            return self._module(2 * before[None] - 1, 2 * after[None] - 1)[-1][0]
