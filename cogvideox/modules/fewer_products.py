"""Convolutions in fewer products, for fp32 on a CPU, where these take nine tenths of a decode. Only rounding differs.

- **Over time**: two frames of a convolution over three frames take six products of a frame with a slice of the weights.
  Of sums and differences of four frames, four products do: Winograd's F(2, 3) (Winograd, 1980; for neural networks
  Lavin and Gray, 2015, arXiv:1509.09308).
- **After doubling**: where rows and columns are doubled, a 3 x 3 kernel meets 2 x 2 different pixels only, and takes 4
  products instead of 9 with sums of its weights.

Both are 2D convolutions with sums of weights, made beforehand and less than twice as large.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

#: Frames x rows x columns of a strip from which on the weights' sums cost less than they save: on an AMD EPYC the two
#: break even at some 400.
_LEAST_SIZE = 1000
#: Which of a row of three weights are added for either of two doubled pixels, and either of the two that it meets; and
#: the same of a kernel: 4 doubled pixels, 9 weights, 4 pixels.
_ROW = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
_DOUBLED = torch.einsum("aiy,bjx->abyxij", _ROW, _ROW).reshape(4, 9, 4)


def pay(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Return whether a strip of ``size`` frames x rows x columns is to be convolved so. Meta stands for a CPU; in 16
    bits sums would be rounded that convolutions keep in fp32."""
    return device.type in ("cpu", "meta") and dtype == torch.float32 and size >= _LEAST_SIZE


def weights_over_time(weight: torch.Tensor) -> torch.Tensor:
    """Return what ``convolve_over_time`` takes of the weights ``[O, C, 3, 3, 3]``: ``[4, O, C, 3, 3]``."""
    before, middle, after = weight.unbind(2)
    result = weight.new_empty(4, *before.shape)
    result[0], result[3] = before, after
    torch.add(before, after, out=result[1]).mul_(0.5)
    torch.sub(result[1], middle, alpha=0.5, out=result[2])
    result[1].add_(middle, alpha=0.5)
    return result


def convolve_over_time(frames: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Convolve frames with padded rows: ``[2 + T, C, H + 2, W]`` -> ``[1, O, T, H, W]``.

    Args:
        frames: frame by frame, two frames before the first; those equal the first where ``T`` is odd.
        weights: from ``weights_over_time``.
        bias: ``[O]``.
    """
    before, plus, minus, after = weights
    count, odd = len(frames) - 2, len(frames) % 2
    _, _, height, width = frames.shape
    result = frames.new_empty(1, len(before), count, height - 2, width)
    by_frame = rearrange(result, "1 o t h w -> t o h w")
    if odd:
        # Three times the same frame: one product with the sum of the weights, which is twice `plus`.
        by_frame[:1] = F.conv2d(frames[2:3] * 2, plus, bias, padding=(0, 1))
    if count > 1:
        first, second, third, fourth = (frames[odd + index : count + index : 2] for index in range(4))
        even, uneven = by_frame[odd::2], by_frame[odd + 1 :: 2]
        even.copy_(F.conv2d(second + third, plus, bias, padding=(0, 1)))
        uneven.copy_(even)
        product = F.conv2d(third - second, minus, padding=(0, 1))
        even.add_(product)
        uneven.sub_(product)
        even.add_(F.conv2d(first - third, before, padding=(0, 1)))
        uneven.sub_(F.conv2d(second - fourth, after, padding=(0, 1)))
    return result


def weights_doubled(weight: torch.Tensor) -> torch.Tensor:
    """Return what ``convolve_doubled`` takes of the weights ``[O, C, 3, 3]``: ``[4, O, C, 2, 2]``, for even and odd
    rows and in these for even and odd columns."""
    sums = torch.matmul(weight.reshape(-1, 9), _DOUBLED.to(weight.device))
    return sums.reshape(4, *weight.shape[:2], 2, 2)


def convolve_doubled(frames: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Double the rows and columns of padded pictures and convolve them: ``[T, C, H + 2, W + 2]`` ->
    ``[T, O, 2H, 2W]``, with ``weights`` from ``weights_doubled``."""
    count, _, height, width = frames.shape
    result = frames.new_empty(count, weights.shape[1], 2 * height - 4, 2 * width - 4)
    for index, weight in enumerate(weights):
        row, column = divmod(index, 2)
        piece = frames[..., row : row + height - 1, column : column + width - 1]
        result[..., row::2, column::2] = F.conv2d(piece, weight, bias)
    return result
