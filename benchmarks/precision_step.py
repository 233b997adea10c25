"""What range-safe fp16 costs: one guided transformer step (batch 2) in fp32, bf16, plain fp16 and range-safe fp16, in
one run.

Serves the claim that range-safe fp16 takes at most 1.25 times the time of plain fp16, with weights no larger. Three
parts:

1. Measured on this machine: time, peak memory, weights, and the error against fp32. On a CUDA device the full model at
   full size; on the CPU a small one.
2. Counted from the shapes of the full model at 81 frames of 1360x768, on the meta device: every operation's matrix
   FLOPs and the bytes it reads and writes, and the most memory alive at once beyond weights and inputs. Attention
   counts as one fused operation.
3. Estimated from the counts for cards that are not here (a roofline): an operation takes as long as its FLOPs, or its
   bytes, or a kernel's launch, whichever is longest.

The cards' figures are those of NVIDIA's datasheets (V100, T4, A100, H100 SXM) and architecture whitepapers (Turing: RTX
2080 Ti reference card; GA102: RTX 3090): dense, and for tensor cores with accumulation in fp32, as PyTorch runs them.

Run as ``python -m benchmarks.precision_step``.
"""

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cogvideox.geometry import latent_frames, padding_frames, rotary_embedding
from cogvideox.memory import FusedAttention, LiveBytes
from cogvideox.modules import internals
from cogvideox.modules.range_safe import make_range_safe

aten = torch.ops.aten

#: Operations in place that do not read what they change; nor does any that is given an ``out``.
OVERWRITING = (aten.copy_, aten.fill_, aten.zero_)

SAFE = "range-safe fp16"
#: side of the comparison -> dtype of its inputs
SIDES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, SAFE: torch.float32}
#: CogVideoX1.5-5B on its own default clip, and what a CPU can run while one watches.
FULL = dict(layers=42, heads=48, frames=81, width=1360, height=768)
SMALL = dict(layers=4, heads=8, frames=17, width=240, height=160)
TEXT_TOKENS, TEXT_WIDTH = 226, 4096


@dataclass(frozen=True)
class Card:
    """Peak TFLOP/s of matrix products by dtype (None: not in hardware), and GB/s of memory."""

    fp32: float
    fp16: float
    bf16: float | None
    bandwidth: float


CARDS = {
    "V100 SXM2": Card(15.7, 125, None, 900),
    "T4": Card(8.1, 65, None, 320),
    "RTX 2080 Ti": Card(13.4, 53.8, None, 616),
    "RTX 3090": Card(35.6, 71, 71, 936),
    "A100 40GB": Card(19.5, 312, 312, 1555),
    "H100 SXM": Card(67, 989, 989, 3350),
}
#: Seconds that the shortest kernel takes.
LAUNCH = 5e-6


@dataclass(frozen=True)
class Operation:
    name: str
    flops: int
    dtype: torch.dtype
    bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in FULL:
        parser.add_argument(
            f"--{name}", type=int, help=f"of the measured step (default: {FULL[name]} on CUDA, {SMALL[name]} elsewhere)"
        )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-measured", action="store_true")
    parser.add_argument("--skip-counted", action="store_true")
    parser.add_argument(
        "--tensor-share", type=float, default=0.6, help="of their peak that 16-bit matrix products reach"
    )
    parser.add_argument("--fp32-share", type=float, default=0.85, help="of its peak that fp32 matrix products reach")
    parser.add_argument("--bandwidth-share", type=float, default=0.85, help="of its peak that memory reaches")
    parser.add_argument("--operations", action="store_true", help="also print the bytes moved by kind of operation")
    options = parser.parse_args()
    with torch.no_grad():
        if not options.skip_measured:
            size = {
                name: getattr(options, name) or default
                for name, default in (FULL if options.device.startswith("cuda") else SMALL).items()
            }
            print_measured(size, options.device, options.repeats)
        if not options.skip_counted:
            counts = {side: count(side) for side in SIDES}
            print_counted(counts)
            if options.operations:
                print_operations(counts)
            print_estimated(
                counts,
                {"fp32": options.fp32_share, "16-bit": options.tensor_share, "bandwidth": options.bandwidth_share},
            )


def build(side: str, device: str, layers: int, heads: int) -> nn.Module:
    """CogVideoX1.5-5B, or less of it, with the same random weights on every side: drawn in bf16, as the trained ones
    are stored."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = CogVideoXTransformer3DModel(
                num_layers=layers,
                num_attention_heads=heads,
                patch_size_t=2,
                use_rotary_positional_embeddings=True,
                text_embed_dim=TEXT_WIDTH,
                sample_width=170,
                sample_height=96,
                sample_frames=81,
                max_text_seq_length=TEXT_TOKENS,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    # Module's own ``to``: diffusers' warns of parts to keep in fp32, of which this model has none.
    model = make_range_safe(model) if side == SAFE else nn.Module.to(model, SIDES[side])
    if device == "meta":
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.range_safe_exponent = 0  # there are no weights to take it from
    return model.requires_grad_(False).eval()


def step_inputs(side: str, config, device: str, frames: int, width: int, height: int) -> dict:
    """What one guided step reads, the same on every side: drawn as bf16 can hold it."""
    count = latent_frames(frames)
    count += padding_frames(count, config)
    shape = (2, count, config.in_channels, height // 8, width // 8)
    generator = torch.Generator().manual_seed(1)
    if device == "meta":
        latents, text = torch.empty(shape), torch.empty(2, TEXT_TOKENS, TEXT_WIDTH)
    else:
        latents, text = (
            torch.randn(shape, generator=generator),
            torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator),
        )
    return dict(
        hidden_states=latents.bfloat16().to(device, SIDES[side]),
        encoder_hidden_states=text.bfloat16().to(device, SIDES[side]),
        timestep=torch.tensor([500, 500]).to(device),
        image_rotary_emb=tuple(
            table.to(device) for table in rotary_embedding(config, count, *shape[3:], torch.device("cpu"))
        ),
        return_dict=False,
    )


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


# 1. Measured


def print_measured(size: dict, device: str, repeats: int) -> None:
    """Time the sides in turn, ``repeats`` times over. Each is built for its turn, as four full models at once would not
    fit."""
    cuda = device.startswith("cuda")
    sides = [
        side for side in SIDES if side != "bf16" or not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    ]
    seconds = {side: [] for side in sides}
    peak, weights, error, truth = {}, {}, {}, None
    for repeat in range(repeats):
        for side in sides:
            try:
                result, elapsed, peak[side], weights[side] = measure(side, device, **size)
            except torch.cuda.OutOfMemoryError:
                sides = [other for other in sides if other != side]
                seconds.pop(side)
                print(f"{side}: out of memory, left out")
                continue
            seconds[side].append(elapsed)
            if repeat == 0:
                truth = result if side == "fp32" else truth
                error[side] = None if truth is None else ((result - truth).norm() / truth.norm()).item()
    name = torch.cuda.get_device_name(device) if cuda else device
    print(
        f"MEASURED on {name}, torch {torch.__version__}, median of {repeats}: "
        f"{', '.join(f'{value} {key}' for key, value in size.items())}"
    )
    if device == "cpu":
        print("(A CPU emulates fp16, so these times say little about a GPU; the errors do.)")
    print(f"{'':16} {'time':>10} {'/ fp16':>7} {'peak memory':>12} {'weights':>11} {'error against fp32':>19}")
    median = {side: statistics.median(values) for side, values in seconds.items()}
    for side, value in median.items():
        ratio = f"{value / median['fp16']:.2f}" if "fp16" in median else "-"
        memory = f"{peak[side] / 1e9:.2f} GB" if cuda else "-"
        off = "-" if error[side] is None else f"{error[side]:.1e}"
        print(f"{side:16} {value * 1e3:7.0f} ms {ratio:>7} {memory:>12} {weights[side] / 1e6:8.1f} MB {off:>19}")
    print()


def measure(
    side: str, device: str, layers: int, heads: int, frames: int, width: int, height: int
) -> tuple[torch.Tensor, float, int, int]:
    """One step: its result in fp32 on the CPU, its seconds, its peak CUDA memory (0 elsewhere) and the bytes of its
    weights."""
    cuda = device.startswith("cuda")
    try:
        model = build(side, device, layers, heads)
        model(**step_inputs(side, model.config, device, frames=1, width=64, height=64))  # warms up
        inputs = step_inputs(side, model.config, device, frames, width, height)
        if device != "cpu":
            torch.accelerator.synchronize()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        result = model(**inputs)[0]
        if device != "cpu":
            torch.accelerator.synchronize()
        elapsed = time.perf_counter() - start
        return (
            result.float().cpu(),
            elapsed,
            torch.cuda.max_memory_allocated(device) if cuda else 0,
            weight_bytes(model),
        )
    finally:
        model = inputs = result = None
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


# 2. Counted


class Counter(LiveBytes):
    """Records every operation that runs under it, beside the bytes that are alive."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        inputs, written = tensor_arguments(func, args, kwargs)
        known = {internals.storage_id(tensor) for tensor in inputs + written}
        new = [tensor for tensor in tensors(result) if internals.storage_id(tensor) not in known]
        # A layer norm on CUDA first makes its input contiguous.
        copy = args[0].nbytes if func is aten.native_layer_norm.default and not args[0].is_contiguous() else 0
        self.peak = max(self.peak, self.live + copy)
        # Views neither make nor write anything.
        if (new or written) and "empty" not in func.__name__:
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            moved = sum(map(traffic, inputs + written + new)) + 2 * copy
            self.operations.append(Operation(func._overloadpacket.__name__, flops, (new or written)[0].dtype, moved))
        return result


def tensors(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def traffic(tensor: torch.Tensor) -> int:
    """Bytes that reading or writing ``tensor`` moves: an expanded dimension once, and what lies between the elements of
    a strided one too."""
    sizes_strides = [
        (size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and stride > 0
    ]
    step = min((stride for _, stride in sizes_strides), default=1)
    # Memory is read in sectors of 32 bytes.
    return (
        prod(size for size, _ in sizes_strides)
        * tensor.itemsize
        * min(step, 32 // tensor.itemsize)
        * (tensor.numel() > 0)
    )


def tensor_arguments(func, args, kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors among the arguments that ``func`` reads, and those that it writes; what it changes in place is in
    both."""
    read, written = [], []
    for index, argument in enumerate(func._schema.arguments):
        values = tensors(args[index] if index < len(args) else kwargs.get(argument.name))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if not (writes and (argument.kwarg_only or func._overloadpacket in OVERWRITING)):
            read += values
        if writes:
            written += values
    return read, written


def count(side: str) -> tuple[Counter, int]:
    """The operations of one step of the full model at full size, and the bytes of its weights."""
    model = build(side, "meta", FULL["layers"], FULL["heads"])
    inputs = step_inputs(side, model.config, "meta", FULL["frames"], FULL["width"], FULL["height"])
    with FusedAttention(), Counter() as counter:
        model(**inputs)
    return counter, weight_bytes(model)


def print_counted(counts: dict) -> None:
    print(f"COUNTED from the shapes: {', '.join(f'{value} {key}' for key, value in FULL.items())}")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    print(
        f"{'':16} {'TFLOP in fp32':>14} {'in bf16':>8} {'in fp16':>8} {'moved':>10} {'weights':>10} "
        f"{'activations, peak':>18} {'operations':>11}"
    )
    for side, (counter, weights) in counts.items():
        fp32, bf16, fp16 = (sum(op.flops for op in counter.operations if op.dtype == dtype) / 1e12 for dtype in dtypes)
        moved = sum(op.bytes for op in counter.operations) / 1e9
        print(
            f"{side:16} {fp32:14.1f} {bf16:8.1f} {fp16:8.1f} {moved:7.0f} GB {weights / 1e9:7.3f} GB "
            f"{counter.peak / 1e9:15.2f} GB {len(counter.operations):11}"
        )
    print()


def print_operations(counts: dict) -> None:
    print(f"COUNTED, GB moved by kind of operation\n{'':42}" + "".join(f"{side:>17}" for side in counts))
    totals = {side: {} for side in counts}
    for side, (counter, _) in counts.items():
        for op in counter.operations:
            totals[side][op.name] = totals[side].get(op.name, 0) + op.bytes
    names = sorted({name for total in totals.values() for name in total}, key=lambda name: -totals[SAFE].get(name, 0))
    for name in names:
        print(f"{name:42}" + "".join(f"{totals[side].get(name, 0) / 1e9:17.1f}" for side in counts))
    print()


# 3. Estimated


def print_estimated(counts: dict, shares: dict) -> None:
    tensor, fp32, memory = (f"{shares[key]:.0%}" for key in ("16-bit", "fp32", "bandwidth"))
    print(
        "ESTIMATED, not measured: a roofline over the counted operations, one after another, in seconds a step,\nif "
        f"matrix products reach {tensor} of the tensor cores' peak and {fp32} of fp32's, memory {memory} of its peak, "
        f"and no kernel takes under {LAUNCH * 1e6:.0f} us.\n(Where products reach less, range-safe / fp16 is smaller. "
        "Whether a step fits a card's memory is another question.)"
    )
    print(
        f"{'':16}" + "".join(f"{side:>17}" for side in counts) + f"{'range-safe / fp16':>20}{'fp32 / range-safe':>20}"
    )
    for name, card in CARDS.items():
        seconds = {side: estimate(counter.operations, card, shares) for side, (counter, _) in counts.items()}
        cells = "".join(f"{'-' if value is None else f'{value:.2f} s':>17}" for value in seconds.values())
        print(f"{name:16}{cells}{seconds[SAFE] / seconds['fp16']:20.2f}{seconds['fp32'] / seconds[SAFE]:20.2f}")


def estimate(operations: list[Operation], card: Card, shares: dict) -> float | None:
    """Seconds of ``operations`` one after another, or None where the card has no such matrix products."""
    peaks = {torch.float32: card.fp32 * shares["fp32"], torch.float16: card.fp16 * shares["16-bit"]}
    if card.bf16 is not None:
        peaks[torch.bfloat16] = card.bf16 * shares["16-bit"]
    if any(op.flops and op.dtype not in peaks for op in operations):
        return None
    bandwidth = card.bandwidth * 1e9 * shares["bandwidth"]
    return sum(
        max(op.flops / (peaks[op.dtype] * 1e12) if op.flops else 0, op.bytes / bandwidth, LAUNCH) for op in operations
    )


if __name__ == "__main__":
    main()
