"""Run models in fp16 that cannot overflow: weights and matrix products in fp16, everything between them in fp32.

For y = W x + b, Hölder's inequality bounds every output, and every partial sum on the way to it, by max|x| times the L1
norm of the row of W. So if each stored row has an L1 norm of at most 2^9, and each token of x is scaled to at most 2^6
in magnitude, nothing in the product can pass 2^15, half of fp16's largest number, whatever the weights and the
activations are. Both scales are powers of two, so scaling loses nothing by itself; what remains is fp16's rounding of x
and W, at most 2^-11 of each value (bf16: 2^-8), and, below 2^-14, 2^-25 of the scaled values. Scales of x are one per
token and stay on the device; scales of W are fixed when it is loaded, one for the matrix or, where rows differ too much
for one, one per row. Where columns differ too much (an outlier channel that meets small weights), x is scaled by the
columns' binades first, so that a token's largest channel is the one that counts most in the result. The result is
scaled back, and the bias added, in fp32.

Attention: q and k come out of LayerNorms, so bounds on their lengths follow from those norms' weights; the softmax's
output is a convex combination of the values, so v is scaled per channel and scaled back after.

What it holds for: finite x, and finite W whose rows' L1 norms lie within fp32's range (2^128), as far as the result
does. Wraps the unmodified modules of diffusers (``CogVideoXTransformer3DModel``) and transformers (``T5EncoderModel``).
"""

import math
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import internals
from .internals import LibraryModule
from .joint import Attending, rotate_, side_by_side
from .packed import DynamicWeight, PackedWeight, in_pieces

#: Largest magnitude of a scaled token, and largest L1 norm of a stored row: 2^6 * 2^9 = 2^15 < 65504.
_TOKEN_EXPONENT = 6
_ROW_EXPONENT = 9
#: Largest Euclidean length of a query or key: 2^7 each, so that their product stays below 2^14.
_LENGTH_EXPONENT = 7
#: Rows whose L1 norms lie within this many binades share one scale: the smallest keep fp16's full precision at that.
_SHARED_BINADES = 6
#: Columns whose largest weights lie within this many binades need no scale of their own.
_LEVEL_BINADES = 8
# Scales that fp32 holds, and so their inverses; the smallest with room for a product of two.
_MIN_EXPONENT, _MAX_EXPONENT = -60, 126
#: Tokens that go through a feed-forward at once: its inner activations, in fp32, are the largest tensors of a block.
_FEED_FORWARD_TOKENS = 4096


class ScaledWeight(nn.Module):
    """A weight ``[rows, columns]`` kept in fp16 with powers of two for its rows: the common ground of the layers below.

    ``load_weight`` fills it. ``weight`` itself is None: T5 casts activations to its dtype, which is the very overflow
    to be avoided.
    """

    weight = None
    #: None where the weight is packed (``RangeSafeLinear.load_packed``).
    scaled_weight: nn.Parameter
    #: None where the weight is packed and has scales of its own.
    row_scale: torch.Tensor

    def __init__(self, rows: int, columns: int, device: torch.device | str | None = None):
        super().__init__()
        self.scaled_weight = nn.Parameter(
            torch.empty(rows, columns, dtype=torch.float16, device=device), requires_grad=False
        )
        self.register_buffer("row_scale", torch.empty(1, device=device), persistent=False)

    def load_weight(self, weight: torch.Tensor, device: torch.device) -> None:
        """Take a finite weight of any floating dtype, piece by piece, and keep it as scaled fp16 on ``device``."""
        norms, _ = _row_norms_and_column_maxima(weight, None, device)
        self.scaled_weight, self.row_scale = _scale_rows(weight, None, norms, device)


class RangeSafeLinear(ScaledWeight):
    """A Linear with fp16 weights that takes and gives fp32 ``[..., in]`` -> ``[..., out]`` and cannot overflow in
    between.

    The weight is ``row_scale * scaled_weight * column_scale``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None = None):
        super().__init__(out_features, in_features, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None
        self.column_scale: torch.Tensor | None
        self.register_buffer("column_scale", None, persistent=False)
        self.packed: PackedWeight | DynamicWeight | None = None
        #: What a packed weight is multiplied by when it is widened.
        self.widening = 1.0

    @classmethod
    def like(cls, linear: nn.Linear) -> "RangeSafeLinear":
        """Make one in the place of ``linear``, with its weights unless they are on the meta device."""
        safe = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device)
        if not linear.weight.is_meta:
            safe.load_weight(linear.weight.data, linear.weight.device)
            if safe.bias is not None:
                safe.bias.data.copy_(linear.bias.data)
        return safe

    def load_weight(self, weight: torch.Tensor, device: torch.device) -> None:
        """Take a weight as ``ScaledWeight`` does, with a scale for its columns where they differ too much."""
        norms, largest = _row_norms_and_column_maxima(weight, None, device)
        self.column_scale = _column_scale(largest)
        if self.column_scale is not None:
            norms, _ = _row_norms_and_column_maxima(weight, self.column_scale, device)
        self.scaled_weight, self.row_scale = _scale_rows(weight, self.column_scale, norms, device)

    def load_packed(self, packed: PackedWeight | DynamicWeight) -> None:
        """Take a weight that stays packed. It is divided by one power of two, shared by all rows, whenever it is
        widened; one that is not widened needs none."""
        if isinstance(packed, DynamicWeight):
            self._hold(packed, None)
            return
        # fp8's magnitudes, at most 34 binades wide and with at most 4 bits, and GGUF's, which are fp16's, lose next to
        # nothing by that in fp16.
        norms, _ = _row_norms_and_column_maxima(packed.widen(torch.float32), None, packed.data.device)
        exponent = max(0, math.frexp(norms.max().item())[1] - _ROW_EXPONENT)
        scale = 1.0 if packed.scale is None else packed.scale.flatten()
        self._hold(packed, 2.0**exponent * scale * torch.ones(1, device=packed.data.device))
        self.widening = 2.0**-exponent

    def load_empty(self, packed: PackedWeight | DynamicWeight) -> None:
        """Take a packed weight on the meta device, which has no numbers to look at."""
        self._hold(packed, None if packed.scale is None else packed.scale.flatten())

    def _hold(self, packed: PackedWeight | DynamicWeight, row_scale: torch.Tensor | None) -> None:
        """Keep a packed weight in the place of the scaled one."""
        self.packed = packed
        self.register_parameter("scaled_weight", None)
        self.register_buffer("row_scale", row_scale, persistent=False)

    def forward(self, x: torch.Tensor, token_scale: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply ``x``, fp32 ``[..., in]``, or fp16 that ``scale_tokens`` has scaled already and given with its fp32
        ``token_scale`` ``[..., 1]``."""
        if isinstance(self.packed, DynamicWeight):
            return self.packed(x, self.bias, token_scale)
        if token_scale is None:
            x, token_scale = scale_tokens(x if self.column_scale is None else x * self.column_scale)
        weight = self.scaled_weight if self.packed is None else self.packed(torch.float16, self.widening)
        y = F.linear(x, weight)
        if self.row_scale.numel() == 1:
            token_scale = token_scale * self.row_scale
        else:
            y = y * self.row_scale
        if self.bias is None:
            return y * token_scale
        return torch.addcmul(self.bias, y, token_scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class RangeSafeEmbedding(ScaledWeight):
    """An Embedding kept as scaled fp16, giving fp32."""

    @classmethod
    def like(cls, embedding: nn.Embedding) -> "RangeSafeEmbedding":
        """Make one in the place of ``embedding``, with its weights unless they are on the meta device."""
        rows, columns = embedding.weight.shape
        safe = cls(rows, columns, embedding.weight.device)
        if not embedding.weight.is_meta:
            safe.load_weight(embedding.weight.data, embedding.weight.device)
        return safe

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scale = self.row_scale if self.row_scale.numel() == 1 else F.embedding(ids, self.row_scale[:, None])
        return F.embedding(ids, self.scaled_weight) * scale


class RangeSafeAttention(Attending):
    """An attention processor for CogVideoX: fp32 in and out, projections and the attention product in fp16.

    Takes ``hidden_states [B, video tokens, C]`` and ``encoder_hidden_states [B, text tokens, C]``, as diffusers'
    ``CogVideoXAttnProcessor2_0``, and returns the same pair.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        text = encoder_hidden_states.shape[1]
        joint = side_by_side(encoder_hidden_states, hidden_states)
        tokens = scale_tokens(joint)

        def heads(projection: RangeSafeLinear) -> torch.Tensor:
            """Project to ``[B, tokens, heads, channels]``."""
            projected = projection(*tokens) if projection.column_scale is None else projection(joint)
            return projected.unflatten(-1, (attn.heads, -1))

        def positioned(projection: RangeSafeLinear, norm: nn.LayerNorm) -> tuple[torch.Tensor, int]:
            """Project, normalise and position, in fp16; return the binades that it shrank by, too."""
            x = norm(heads(projection))
            if image_rotary_emb is not None:
                rotate_(x[:, text:], *image_rotary_emb)
            exponent = norm_exponent(norm)
            return (x if exponent == 0 else x * 2.0**-exponent).half(), exponent

        query, query_exponent = positioned(attn.to_q, attn.norm_q)
        key, key_exponent = positioned(attn.to_k, attn.norm_k)
        value = heads(attn.to_v)
        # One scale per channel, over all tokens: a convex combination of the values keeps their bound.
        largest = torch.linalg.vector_norm(value, math.inf, dim=1, keepdim=True)
        if self.agreed is not None:
            largest = self.agreed(largest)
        value, value_scale = _scale_to(value, largest, _TOKEN_EXPONENT)
        scale = 2.0 ** (query_exponent + key_exponent) / math.sqrt(query.shape[-1])
        mixed = self.attend(query, key, value, attention_mask, scale)
        mixed = attn.to_out[1](attn.to_out[0]((mixed * value_scale).flatten(2)))
        return mixed[:, text:], mixed[:, :text]


def make_range_safe(module: LibraryModule) -> LibraryModule:
    """Turn a transformer or T5 encoder, in place, into one that runs range-safe in fp16 and takes and gives fp32.

    Its Linears and token embedding become range-safe; all else becomes fp32. On the meta device the weights are left to
    be filled with ``load_weight``; elsewhere those that are there are taken.
    """
    # T5's token embedding is one weight under two names, of one module or two: it stays one.
    replaced: dict[int, nn.Module] = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(child, nn.Linear | nn.Embedding) or name.endswith("relative_attention_bias"):
            continue
        if id(child.weight) not in replaced:
            replaced[id(child.weight)] = (
                RangeSafeLinear.like(child) if isinstance(child, nn.Linear) else RangeSafeEmbedding.like(child)
            )
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, replaced[id(child.weight)])
    for child in module.modules():
        own = {
            **dict(child.named_parameters(recurse=False, remove_duplicate=False)),
            **dict(child.named_buffers(recurse=False, remove_duplicate=False)),
        }
        for key, tensor in own.items():
            if tensor.is_floating_point() and key != "scaled_weight":
                setattr(
                    child,
                    key,
                    nn.Parameter(tensor.float(), requires_grad=False)
                    if isinstance(tensor, nn.Parameter)
                    else tensor.float(),
                )
    if hasattr(module, "set_attn_processor"):
        module.set_attn_processor(RangeSafeAttention())
        for block in module.transformer_blocks:
            block.ff.forward = types.MethodType(_feed_forward_in_pieces, block.ff)
    return module


def is_range_safe(module: nn.Module) -> bool:
    """Return whether ``make_range_safe`` was applied to ``module``."""
    return any(isinstance(child, RangeSafeLinear) for child in module.modules())


def make_alike(blocks: Sequence[LibraryModule], device: torch.device, undo: list[Callable[[], None]]) -> None:
    """Have range-safe blocks, and the LoRAs beside their layers, hold scales of one kind at each place, on ``device``,
    which changes nothing of what they compute; add to ``undo`` what takes it back, in order.

    Compilers take for constants whether a layer has a scale for its columns, or one for each row, and the powers of two
    that are no tensors: each combination of them would be compiled apart, which can be one a block.
    """

    def put(module: LibraryModule, name: str, value: Any) -> None:
        own = getattr(module, name)
        if not torch.is_tensor(value):
            undo.append(partial(setattr, module, name, own))
            setattr(module, name, value)
            return
        # No buffer: what offloads those of a block knows nothing of this one.
        undo.extend((partial(delattr, module, name), partial(module.register_buffer, name, own, persistent=False)))
        delattr(module, name)
        setattr(module, name, value)

    for norms in zip(*((block.attn1.norm_q, block.attn1.norm_k) for block in blocks), strict=True):
        most = max(map(norm_exponent, norms))
        for norm in norms:
            put(norm, "range_safe_exponent", most)
    places: dict[tuple[str, int], list[RangeSafeLinear]] = {}
    for block in blocks:
        for name, module in block.named_modules():
            for number, layer in enumerate((module, *internals.modules_in_hooks(module))):
                if isinstance(layer, RangeSafeLinear) and not isinstance(layer.packed, DynamicWeight):
                    places.setdefault((name, number), []).append(layer)
    for layers in places.values():
        least = min((layer.widening for layer in layers if layer.packed is not None), default=1.0)
        factors = [1.0 if layer.packed is None else layer.widening / least for layer in layers]
        columns = {layer.column_scale is None for layer in layers}
        rows = {layer.row_scale.numel() == 1 for layer in layers}
        for layer, factor in zip(layers, factors, strict=True):
            # All or none of a place: a compiler looks where it finds them, too.
            if len(rows) > 1 or any(other != 1.0 for other in factors):
                size = 1 if rows == {True} else layer.out_features
                put(layer, "row_scale", (layer.row_scale.to(device) * factor).expand(size).contiguous())
                put(layer, "widening", layer.widening / factor)
            if len(columns) > 1:
                ones = torch.ones(layer.in_features, device=device)
                put(layer, "column_scale", ones if layer.column_scale is None else layer.column_scale.to(device))


def scale_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each token of ``x``, fp32 ``[..., tokens, C]``, by a power of two to at most 2^6.

    Returns:
        fp16 ``[..., tokens, C]``, and the fp32 ``[..., tokens, 1]`` that undoes the scaling.
    """
    return _scale_to(x, torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True), _TOKEN_EXPONENT)


def norm_exponent(norm: LibraryModule) -> int:
    """Return the binades by which a LayerNorm's output must shrink for its Euclidean length to stay below 2^7: 0 unless
    its weights are huge. It is kept on the norm, under ``range_safe_exponent``.

    A normalised vector of n values has the length sqrt(n) at most, and rotary positions keep it. By Cauchy-Schwarz a
    product of two such vectors stays below 2^14, whatever dtype a kernel adds it up in.
    """
    if not hasattr(norm, "range_safe_exponent"):
        weight = norm.weight.abs().max().item() if norm.weight is not None else 1.0
        bias = norm.bias.norm().item() if norm.bias is not None else 0.0
        length = math.sqrt(norm.normalized_shape[-1]) * weight + bias
        norm.range_safe_exponent = max(0, math.frexp(length)[1] - _LENGTH_EXPONENT) if math.isfinite(length) else 0
    return norm.range_safe_exponent


def _scale_to(x: torch.Tensor, largest: torch.Tensor, exponent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale ``x`` so that ``largest`` (its maxima) stays below 2^exponent: fp16, and the fp32 scale that undoes it.

    Inf and NaN have no exponent that would shrink them: they stay what they are, for the sentinel to see.
    """
    power = (_exponent(largest) - exponent).clamp(_MIN_EXPONENT, _MAX_EXPONENT)
    if torch.compiler.is_compiling():
        scaled = (x * _power(-power)).half()
    else:
        scaled = torch.empty_like(x, dtype=torch.float16)
        torch.mul(x, _power(-power), out=scaled)
    return scaled, _power(power)


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """Return int32 e with x < 2^e, and 2^(e-1) <= x where x is normal, for fp32 x >= 0. From its bits: not every device
    has frexp."""
    return (x.view(torch.int32) >> 23) - 126


def _power(exponents: torch.Tensor) -> torch.Tensor:
    """Return fp32 2^e for int32 e in -126..127. From its bits: pow is not exact on every device."""
    return ((exponents + 127) << 23).view(torch.float32)


def _row_norms_and_column_maxima(
    weight: torch.Tensor, columns: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the L1 norms of a weight's rows, in fp64 on the host, and the magnitudes of its columns' largest weights,
    fp32 on ``device``; the columns are divided by ``columns`` first."""
    norms, largest = [], torch.zeros(weight.shape[1], device=device)
    for _, rows in in_pieces(weight, device, columns):
        rows = rows.abs_()
        row_norms = rows.sum(-1)
        # Sums of weights near fp32's largest number pass it. On the host: not every device has fp64.
        norms.append(row_norms.cpu().double() if row_norms.isfinite().all() else rows.cpu().double().sum(-1))
        largest = torch.maximum(largest, rows.amax(0))
    return torch.cat(norms), largest


def _column_scale(largest: torch.Tensor) -> torch.Tensor | None:
    """Return per column the power of two by which its largest weight lies below the matrix's largest: fp32 ``[in]``, or
    None if all are level."""
    exponents = _exponent(largest)
    used = exponents[largest > 0]
    if len(used) == 0 or used.max() - used.min() <= _LEVEL_BINADES:
        return None
    return _power(torch.where(largest > 0, exponents - used.max(), 0).clamp(_MIN_EXPONENT, 0))


def _scale_rows(
    weight: torch.Tensor, columns: torch.Tensor | None, norms: torch.Tensor, device: torch.device
) -> tuple[nn.Parameter, torch.Tensor]:
    """Scale rows to an L1 norm of at most 2^9, in fp16, and return the scale that undoes it, too: fp32 ``[out]``, or
    ``[1]`` where one serves all rows."""
    exponents = (torch.frexp(norms).exponent - _ROW_EXPONENT).clamp(_MIN_EXPONENT, _MAX_EXPONENT)
    used = exponents[norms > 0]
    shared = len(used) == 0 or used.max() - used.min() <= _SHARED_BINADES
    if shared:
        exponents[:] = used.max() if len(used) else 0
    divisor = _power(-exponents).to(device)[:, None]
    scaled = torch.empty(weight.shape, dtype=torch.float16, device=device)
    for place, rows in in_pieces(weight, device, columns):
        scaled[place] = rows.mul_(divisor[place])
    return nn.Parameter(scaled, requires_grad=False), _power(exponents[:1] if shared else exponents).to(device)


def _feed_forward_in_pieces(self: LibraryModule, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Stand in for a FeedForward's ``forward``, which looks at each token alone: a few thousand tokens at a time."""
    forward = type(self).forward
    if hidden_states.shape[1] <= _FEED_FORWARD_TOKENS:
        return forward(self, hidden_states, *args, **kwargs)
    result = torch.empty_like(hidden_states)
    for start in range(0, hidden_states.shape[1], _FEED_FORWARD_TOKENS):
        piece = slice(start, start + _FEED_FORWARD_TOKENS)
        result[:, piece] = forward(self, hidden_states[:, piece], *args, **kwargs)
    return result
