"""Run the VAE's encoder and decoder layer by layer and strip by strip: exactly, in as little memory as there is.

Untiled, every layer holds a whole chunk of frames several times over. Tiles, the usual remedy, each have GroupNorm
statistics of their own, which shows as seams. Here each layer runs over horizontal strips of the whole chunk: its
convolution sees one row of the neighbours on either side, and its normalisation the statistics of the whole chunk,
gathered strip by strip while the layer before was written. So the result is that of diffusers'
``AutoencoderKLCogVideoX`` but for rounding, whatever the strips' height.

Less is done, too: frames that are repeated in time are convolved once, and the spatial norm's 1 x 1 convolutions run on
the latent before it is stretched, as they commute with nearest-neighbour upsampling. In fp32 on a CPU convolutions take
two thirds of the products (``fewer_products``).
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange

from . import fewer_products, internals
from .internals import LibraryModule

#: Bytes of a strip's own tensors where memory is plentiful: enough to keep a GPU busy; on a CPU smaller ones are
#: faster.
_STRIP_BYTES = {"cpu": 64 << 20, "other": 512 << 20}
#: On a CPU, PyTorch hands a convolution of one video to oneDNN if channels x frames x rows are more than this
#: (``use_mkldnn`` in ATen/native/Convolution.cpp), and otherwise to a kernel that takes three times as long.
_ONEDNN_SIZE = 20480
#: The least a strip takes, in bytes, before nothing smaller helps.
_MIN_STRIP_BYTES = 4 << 20


@dataclass
class Plane:
    """The activations of a layer, ``[1, C, T, H, W]``, on the device or the host, and what is known of each strip of
    them.

    Attributes:
        statistics: per strip and group, what it counts and its mean and variance: ``(count, [G], [G])``.
    """

    data: torch.Tensor
    statistics: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance of each group over all strips: fp32 ``[G]`` each."""
        total = sum(count for count, _, _ in self.statistics)
        means = torch.stack([mean for _, mean, _ in self.statistics])
        variances = torch.stack([variance for _, _, variance in self.statistics])
        shares = torch.tensor([count / total for count, _, _ in self.statistics], device=means.device)[:, None]
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean).square())).sum(0)


class _Held:
    """Bytes that are held on the device."""

    def __init__(self):
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        self.nbytes += nbytes


class Strips:
    """Runs a VAE's encoder or decoder chunk by chunk over one video, keeping what each convolution has to know of the
    frames before.

    Args:
        module: an ``AutoencoderKLCogVideoX`` on its device.
        dtype: of the activations.
        device: where strips are computed.
        budget: bytes that activations may take on the device; None: all that is wanted. What does not fit stays in the
            host's memory.
        check_cancelled: called after every strip; what it raises (an interruption) stops the work.
    """

    def __init__(
        self,
        module: LibraryModule,
        dtype: torch.dtype,
        device: torch.device,
        budget: int | None = None,
        check_cancelled: Callable[[], None] | None = None,
    ):
        self.module, self._dtype, self._device, self._check_cancelled = module, dtype, device, check_cancelled
        self._groups = module.config.norm_num_groups
        self._budget, self._held = budget, _Held()
        most = _STRIP_BYTES["cpu" if device.type == "cpu" else "other"]
        self._strip_bytes = most if budget is None else max(_MIN_STRIP_BYTES, min(most, budget // 8))
        self._past: dict[str, torch.Tensor] = {}
        self._latent: torch.Tensor | None = None
        self._begun = False

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode the next frames of a video: ``[1, 16, t, h, w]`` -> ``[1, 3, T, 8h, 8w]`` in about -1..1, fp32, on the
        host. Of a first chunk with an odd number the first frame is not stretched in time."""
        decoder = self.module.decoder
        latent = latent.to(self._device, self._dtype)
        if self.module.post_quant_conv is not None:
            latent = self.module.post_quant_conv(latent)
        self._latent = latent
        x = self._first("conv_in", decoder.conv_in, latent)
        x = self._block("mid", decoder.mid_block, x)
        for level, block in enumerate(decoder.up_blocks):
            x = self._block(f"up.{level}", block, x)
        result = self._last("conv_out", decoder.conv_out, decoder.norm_out, x)
        internals.call_forward_hooks(decoder, latent, result)
        self._latent, self._begun = None, True
        return result

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode the next frames of a video to moments: ``[1, 3, T, H, W]`` in -1..1 -> ``[1, 32, t, H/8, W/8]``, fp32,
        on the host."""
        encoder = self.module.encoder
        x = self._first("conv_in", encoder.conv_in, frames)
        for level, block in enumerate(encoder.down_blocks):
            x = self._block(f"down.{level}", block, x)
        x = self._block("mid", encoder.mid_block, x)
        moments = self._last("conv_out", encoder.conv_out, encoder.norm_out, x)
        internals.call_forward_hooks(encoder, frames, moments)
        if self.module.quant_conv is not None:
            moments = self.module.quant_conv(moments.to(self._device, self._dtype)).to("cpu", torch.float32)
        return moments

    def _block(self, key: str, block: LibraryModule, x: Plane) -> Plane:
        entered = x.data
        for index, resnet in enumerate(block.resnets):
            x = self._resnet(f"{key}.{index}", resnet, x)
        for upsampler in getattr(block, "upsamplers", None) or ():
            x = self._upsample(upsampler, x)
        for downsampler in getattr(block, "downsamplers", None) or ():
            x = self._downsample(downsampler, x)
        internals.call_forward_hooks(block, entered, x.data)
        return x

    def _first(self, key: str, conv: LibraryModule, source: torch.Tensor) -> Plane:
        out = self._new(conv.conv.out_channels, source.shape[2:])
        self._convolve(
            key, conv, source, lambda target, first, last: target.copy_(source[..., first:last, :]), self._writer(out)
        )
        internals.call_forward_hooks(conv, source, out.data)
        return out

    def _last(self, key: str, conv: LibraryModule, norm: LibraryModule, x: Plane) -> torch.Tensor:
        out = self._away((1, conv.conv.out_channels, *x.shape[2:]), torch.float32)

        def write(first: int, last: int, strip: torch.Tensor) -> None:
            out[..., first:last, :].copy_(strip)

        self._convolve(key, conv, x.data, self._normed(norm, x), write)
        internals.call_forward_hooks(conv, x.data, out)
        return out

    def _resnet(self, key: str, resnet: LibraryModule, x: Plane) -> Plane:
        entered = x.data.to("cpu", copy=True) if internals.is_watched(resnet) else None
        hidden = self._new(resnet.out_channels, x.shape[2:])
        self._convolve(f"{key}.conv1", resnet.conv1, x.data, self._normed(resnet.norm1, x), self._writer(hidden))
        # Written where it was read: `x` takes the sum, or `hidden` where the shortcut changes the number of channels.
        shortcut = getattr(resnet, "conv_shortcut", None)
        out = x if shortcut is None else hidden
        normed, source = self._normed(resnet.norm2, hidden), x.data
        out.statistics = []
        write = self._writer(out)

        def add(first: int, last: int, strip: torch.Tensor) -> None:
            rest = source[..., first:last, :].to(self._device)
            write(first, last, strip.add_(rest if shortcut is None else F.conv3d(rest, shortcut.weight, shortcut.bias)))

        self._convolve(f"{key}.conv2", resnet.conv2, hidden.data, normed, add)
        if entered is not None:
            internals.call_forward_hooks(resnet, entered, out.data)
        return out

    def _upsample(self, upsampler: LibraryModule, x: Plane) -> Plane:
        """Double rows and columns, and where time was compressed the frames but for a first one; then convolve each
        frame."""
        _, _, frames, height, width = x.shape
        repeated = _repeats(frames, not self._begun) if upsampler.compress_time else torch.arange(frames)
        out = self._new(upsampler.conv.out_channels, (len(repeated), 2 * height, 2 * width))
        write, index = self._writer(out), repeated.to(self._device)
        # The piece three times stretched, and what comes out of it.
        numbers = 11 * x.shape[1] * frames + 4 * upsampler.conv.out_channels * (frames + 3 * len(repeated))
        rows = self._rows(width * numbers, height)
        conv = upsampler.conv
        weights = self._sums(fewer_products.weights_doubled, conv.weight, frames * rows * width)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            piece = x.data[0, ..., max(start - 1, 0) : stop + 1, :].to(self._device).transpose(0, 1)
            # Beyond the picture there are zeros.
            above, below = int(start == 0), int(stop == height)
            if weights is None:
                piece = piece.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
                # Of the neighbours' doubled rows one is enough.
                piece = piece[..., 1 - above : piece.shape[-2] - 1 + below, :]
                strip = F.conv2d(F.pad(piece, (0, 0, above, below)), conv.weight, conv.bias, padding=(0, 1))
            else:
                strip = fewer_products.convolve_doubled(F.pad(piece, (1, 1, above, below)), weights, conv.bias)
            write(2 * start, 2 * stop, strip.index_select(0, index).transpose(0, 1)[None])
            self._tick()
        return out

    def _downsample(self, downsampler: LibraryModule, x: Plane) -> Plane:
        """Halve rows and columns, and where time is compressed the frames but for a first one."""
        _, channels, frames, height, width = x.shape
        first = frames % 2 if downsampler.compress_time else frames
        out = self._new(downsampler.conv.out_channels, (first + (frames - first) // 2, height // 2, width // 2))
        write = self._writer(out)
        rows = self._rows(2 * width * channels * (3 * frames + 1), height // 2)
        for start in range(0, height // 2, rows):
            stop = min(start + rows, height // 2)
            piece = x.data[..., 2 * start : 2 * stop + 1, :].to(self._device)
            if first < frames:
                piece = torch.cat(
                    [piece[:, :, :first], piece[:, :, first::2].add(piece[:, :, first + 1 :: 2]).mul_(0.5)], dim=2
                )
            piece = F.pad(piece[0].transpose(0, 1), (0, 1, 0, int(stop == height // 2)))
            strip = F.conv2d(piece, downsampler.conv.weight, downsampler.conv.bias, stride=2)
            write(start, stop, strip.transpose(0, 1)[None])
            self._tick()
        return out

    def _convolve(
        self,
        key: str,
        conv: LibraryModule,
        source: torch.Tensor,
        prepare: Callable[[torch.Tensor, int, int], object],
        sink: Callable[[int, int, torch.Tensor], None],
    ) -> None:
        """Run a causal convolution over strips: ``prepare`` fills rows of its input, once each and in order; ``sink``
        takes rows of its output.

        A row is read before any row above it is given out, so that the output may be written over the input.
        """
        _, channels, frames, height, width = source.shape
        past, out_channels = conv.time_kernel_size - 1, conv.conv.out_channels
        known = self._past.get(key)
        if known is None:
            self._past[key] = self._keep((1, channels, past, height, width))
        kept = self._past[key]
        numbers = width * (channels * (2 * frames + past) + 4 * out_channels * frames)
        rows = self._rows(numbers, height)
        taller = min(height, _ONEDNN_SIZE // (channels * (past + frames)))
        if self._device.type == "cpu" and (
            self._budget is None or taller * numbers * self._dtype.itemsize <= 2 * self._strip_bytes
        ):
            rows = max(rows, taller)
        weights = None
        if past == 2 and (known is None or frames % 2 == 0):
            weights = self._sums(fewer_products.weights_over_time, conv.conv.weight, frames * rows * width)
        # What a convolution reads lies side by side: all frames of a channel, or, where pictures are convolved, all
        # channels of a frame.
        shape = (1, channels, past + frames, rows + 2, width)
        if weights is None:
            buffer = torch.empty(shape, device=self._device, dtype=self._dtype)
        else:
            buffer = torch.empty(shape[2], *shape[:2], *shape[3:], device=self._device, dtype=self._dtype)
            buffer = rearrange(buffer, "t 1 c h w -> 1 c t h w")
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            if start == 0:
                buffer[..., :1, :] = 0
                place, first = 1, 0
            else:
                buffer[..., :2, :] = buffer[..., rows : rows + 2, :].clone()
                place, first = 2, start + 1
            last = min(stop + 1, height)
            target = buffer[..., place : place + last - first, :]
            if first < last:
                prepare(target[:, :, past:], first, last)
                # Before a video's first frame there is that frame again.
                target[:, :, :past].copy_(target[:, :, past : past + 1] if known is None else kept[..., first:last, :])
            if stop == height:
                buffer[..., stop - start + 1, :] = 0
            strip = buffer[..., : stop - start + 2, :]
            kept[..., start:stop, :].copy_(strip[:, :, -past:, 1:-1])
            if weights is None:
                result = F.conv3d(strip, conv.conv.weight, conv.conv.bias, padding=(0, 0, 1))
            else:
                by_frame = rearrange(strip, "1 c t h w -> t c h w")
                result = fewer_products.convolve_over_time(by_frame, weights, conv.conv.bias)
            sink(start, stop, result)
            self._tick()

    def _normed(self, norm: LibraryModule, x: Plane) -> Callable[[torch.Tensor, int, int], None]:
        """Return what fills rows with ``silu(norm(x))``, by the statistics of all of ``x``."""
        group_norm: LibraryModule = getattr(norm, "norm_layer", norm)
        # The decoder's norms are scaled and shifted by the latent, too.
        latent = None if group_norm is norm else self._latent
        mean, variance = (moment.repeat_interleave(x.shape[1] // self._groups) for moment in x.moments())
        scale = torch.rsqrt(variance + group_norm.eps) * group_norm.weight.float()
        shift = group_norm.bias.float() - mean * scale
        scale, shift = (tensor[None, :, None, None, None] for tensor in (scale, shift))
        if latent is not None:
            factor = x.shape[3] // latent.shape[3]
            rows = torch.arange(latent.shape[3], device=self._device).repeat_interleave(factor)
            frames = _stretched(latent.shape[2], x.shape[2]).to(self._device)
            times, plus = (F.conv3d(latent, c.conv.weight, c.conv.bias) for c in (norm.conv_y, norm.conv_b))

        def fill(target: torch.Tensor, first: int, last: int) -> None:
            torch.addcmul(shift, x.data[..., first:last, :].to(self._device), scale, out=target)
            if latent is not None:
                here = rows[first:last]
                y, b = (table.index_select(3, here).index_select(2, frames)[..., None] for table in (times, plus))
                # Columns are stretched by broadcasting.
                target.unflatten(-1, (-1, factor)).mul_(y).add_(b)
            F.silu(target, inplace=True)

        return fill

    def _writer(self, out: Plane) -> Callable[[int, int, torch.Tensor], None]:
        """Return what writes strips into a plane and notes their statistics."""

        def write(first: int, last: int, strip: torch.Tensor) -> None:
            # A group's channels lie side by side.
            groups = strip.float().reshape(self._groups, -1)
            if fewer_products.pay(self._device, self._dtype, strip[0, 0].numel()):
                mean = groups.mean(1)
                variance = (groups - mean[:, None]).square_().mean(1)
            else:
                variance, mean = torch.var_mean(groups, dim=1, correction=0)
            out.statistics.append((strip.numel() // self._groups, mean, variance))
            out.data[..., first:last, :].copy_(strip)

        return write

    def _new(self, channels: int, size: tuple[int, ...]) -> Plane:
        """Make room for a layer's output, on the device if it fits."""
        return Plane(self._keep((1, channels, *size)))

    def _keep(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Make room for activations, on the device if they fit, and count them until they are let go."""
        if not self._fits(torch.Size(shape).numel() * self._dtype.itemsize):
            return self._away(shape, self._dtype)
        return self._counted(torch.empty(shape, dtype=self._dtype, device=self._device))

    def _sums(
        self, make: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, size: int
    ) -> torch.Tensor | None:
        """Return what ``fewer_products`` makes of a convolution's weights, where that is faster for strips of ``size``
        frames x rows x columns, and fits."""
        if fewer_products.pay(self._device, self._dtype, size) and self._fits(2 * weight.nbytes):
            return self._counted(make(weight))
        return None

    def _fits(self, nbytes: int) -> bool:
        """Return whether so much can be held on the device beside a strip's own tensors."""
        return self._budget is None or self._held.nbytes + nbytes + 2 * self._strip_bytes <= self._budget

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor on the device as held until it is let go."""
        self._held.add(tensor.nbytes)
        # Not a method of ours: what a finalizer refers to lives as long as the tensor, and we hold tensors.
        weakref.finalize(tensor, self._held.add, -tensor.nbytes)
        return tensor

    def _away(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Make room in the host's memory."""
        return torch.empty(shape, dtype=dtype)

    def _rows(self, numbers: int, height: int) -> int:
        """Return how many rows a strip has whose tensors hold ``numbers`` numbers a row: as many as its bytes allow."""
        return max(1, min(height, self._strip_bytes // (numbers * self._dtype.itemsize)))

    def _tick(self) -> None:
        if self._check_cancelled is not None:
            self._check_cancelled()


def _repeats(frames: int, first: bool) -> torch.Tensor:
    """Return which frame each of twice as many comes from; a video's first chunk, if it has an odd number, begins with
    one that is not repeated."""
    index = torch.arange(frames)
    if first and frames % 2:
        return torch.cat([index[:1], index[1:].repeat_interleave(2)])
    return index.repeat_interleave(2)


def _stretched(frames: int, wanted: int) -> torch.Tensor:
    """Return which of the latent's frames each of a layer's frames belongs to, as nearest-neighbour interpolation has
    it."""
    if wanted > 1 and wanted % 2:
        return torch.cat(
            [torch.zeros(1, dtype=torch.long), 1 + torch.arange(wanted - 1) * (frames - 1) // (wanted - 1)]
        )
    return torch.arange(wanted) * frames // wanted
