"""Run diffusers' CogVideoX transformer with text and video side by side in one tensor all the way: the same
arithmetic, without the copies.

``CogVideoXBlock`` holds text and video apart, and joins them for the attention and again for the feed-forward; its
rotary positions take ten passes over queries and keys. Here the stream stays joined, and a block works on its own
results in place, on each number by the same operations in the same order: the result is equal bit for bit on a CPU, and
up to rounding on a card. Modules are called as diffusers calls them, so that hooks on them (LoRAs, offloading, caches)
work.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from ..choices import AUTO, BACKENDS
from . import internals
from .internals import LibraryModule

#: Tokens from which on a CPU has queries, keys and values head by head in memory: a step takes 8 % less at 12k tokens
#: and 2 % at 2k; at 1k as much as without, and at 0.6k the copies cost 2 %.
_LONG = 1536
#: Bytes of one score of the attention where they are kept: in fp32, before softmax and after, and half as much again
#: for what is made on the way.
SCORE_BYTES = 12


def join(module: LibraryModule) -> LibraryModule:
    """Have a ``CogVideoXTransformer3DModel``, or one that was made range-safe, run with its stream joined; return
    it."""
    from diffusers.models.activations import GELU

    for block in module.transformer_blocks:
        block.forward = types.MethodType(_block, block)
        for norm in (block.norm1, block.norm2):
            norm.forward = types.MethodType(_modulate, norm)
        if isinstance(block.ff.net[0], GELU):
            block.ff.net[0].gelu = types.MethodType(_gelu, block.ff.net[0])
        if type(block.attn1.processor).__name__ == "CogVideoXAttnProcessor2_0":
            block.attn1.set_processor(JointAttention())
    return module


class Attending:
    """An attention processor of ours, with what is attached to it for a run."""

    #: A backend of diffusers' attention dispatch.
    backend: Any = BACKENDS[AUTO]
    #: Where processes share the tokens, what attends to all of them: ``Team.attend``.
    shared: Callable[..., torch.Tensor] | None = None
    #: Then: takes maxima over a part of the tokens to those over all. Asked for by who scales by them.
    agreed: Callable[[torch.Tensor], torch.Tensor] | None = None
    #: Bytes that scores may take, where the device has no kernel that goes without them; None where it has one.
    most_scores: int | None = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float | None = None
    ) -> torch.Tensor:
        """Attend, from ``[B, tokens, heads, channels]`` of each to the same."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        kernel: Callable[..., torch.Tensor] = partial(
            dispatch_attention_fn, attn_mask=mask, scale=scale, backend=self.backend
        )
        if self.most_scores is not None and mask is None:
            kernel = partial(attend_in_pieces, kernel, self.most_scores)
        return kernel(query, key, value) if self.shared is None else self.shared(kernel, query, key, value)


def attend_in_pieces(
    kernel: Callable[..., torch.Tensor], most: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attend head by head and a few queries at a time, each of which looks at the keys alone, so that their scores take
    no more than ``most`` bytes."""
    batch, tokens, heads, _ = query.shape
    row = key.shape[1] * SCORE_BYTES
    if batch * heads * tokens * row <= most:
        return kernel(query, key, value)
    result, step = torch.empty_like(query), max(1, most // row)
    for video, head in product(range(batch), range(heads)):
        of_head = slice(video, video + 1), slice(None), slice(head, head + 1)
        for start in range(0, tokens, step):
            place = of_head[0], slice(start, start + step), of_head[2]
            result[place] = kernel(query[place], key[of_head], value[of_head])
    return result


class JointAttention(Attending):
    """An attention processor like ``CogVideoXAttnProcessor2_0``, through diffusers' dispatch.

    Takes ``hidden_states [B, video tokens, C]`` and ``encoder_hidden_states [B, text tokens, C]``, which need no copy
    if they lie side by side in one tensor, and returns the same pair, side by side. Queries, keys and values are three
    products: a single one of the same numbers, with the three weights in one tensor, took 0.96 to 1.08 of the time on
    two CPU cores, at widths of 512 and 3072.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        text = encoder_hidden_states.shape[1]
        joint = side_by_side(encoder_hidden_states, hidden_states)

        # A CPU reads each head's keys and values over and over.
        apart = joint.device.type == "cpu" and self.shared is None and not torch.compiler.is_compiling()
        apart = apart and joint.shape[1] >= _LONG

        def heads_of(layer, norm=None):
            projected = layer(joint)
            heads = projected.unflatten(-1, (attn.heads, -1))
            heads = heads if norm is None else norm(heads)
            if not apart:
                return heads
            # What was normed needs its place no more.
            free = internals.storage_id(heads) != internals.storage_id(projected) and projected.is_contiguous()
            by_head = (projected if free else torch.empty_like(projected)).view(heads.transpose(1, 2).shape)
            return by_head.copy_(heads.transpose(1, 2)).transpose(1, 2)

        query, key = heads_of(attn.to_q, attn.norm_q), heads_of(attn.to_k, attn.norm_k)
        value = heads_of(attn.to_v)
        if image_rotary_emb is not None:
            for x in (query, key):
                rotate_(x[:, text:], *image_rotary_emb)
        mixed = self.attend(query, key, value, attention_mask)
        if apart and not mixed.is_contiguous():
            # As the queries lie, which nobody needs any more.
            mixed = query.transpose(1, 2).view(mixed.shape).copy_(mixed)
        del query, key, value
        mixed = attn.to_out[1](attn.to_out[0](mixed.flatten(2)))
        return mixed[:, text:], mixed[:, :text]


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Apply rotary positions in place: turn pairs of channels of ``x`` ``[B, tokens, heads, channels]``, in fp32, by
    the angles of diffusers' tables ``[tokens, channels]``, which hold each angle twice."""
    wide = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Compilers know no complex numbers, and make one pass of this.
        (one, other), cos, sin = wide.unbind(-1), cos[:, None, ::2], sin[:, None, ::2]
        x.copy_(torch.stack([one * cos - other * sin, other * cos + one * sin], dim=-1).flatten(-2))
        return
    torch.view_as_complex(wide).mul_(torch.complex(cos[:, ::2], sin[:, ::2])[:, None])
    if x.dtype != torch.float32:
        x.copy_(wide.flatten(-2))


@contextmanager
def projection_attached(module: LibraryModule) -> Iterator[None]:
    """Have each prompt's embeddings projected to the transformer's width only once in a ``with`` block."""
    layer = module.patch_embed.text_proj
    forward, own = layer.forward, layer.__dict__.get("forward")
    # By identity: the embeddings are kept too, so that none takes the place of another.
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def remembered(embeddings: torch.Tensor) -> torch.Tensor:
        if id(embeddings) not in known:
            known[id(embeddings)] = embeddings, forward(embeddings)
        # A copy: what hooks on the layer do with it (LoRAs add to it in place) is not kept for the next step.
        return known[id(embeddings)][1].clone()

    layer.forward = remembered
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


@contextmanager
def room_attached(module: LibraryModule) -> Iterator[None]:
    """Have the largest products of all blocks, queries, keys, values and the feed-forward's inner activations, written
    into the same memory in a ``with`` block: none of them leaves its block, and not both are needed at once.

    For a CPU, which gives large tensors back to the system when they are freed, and has their pages made anew in the
    next block: in fp32, at a width of 512, the first product of a feed-forward takes 1.3 times as long in new memory.
    In bf16 it takes 1.01 times as long. Layers that are not plain ones (quantized, hooked, with LoRAs beside them) are
    left as they are.
    """
    room: list[torch.Tensor] = []

    def product(layer: nn.Linear, behind: int, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            return nn.functional.linear(x, layer.weight, layer.bias)
        rows, wide = x.shape[:-1], layer.out_features
        size = rows.numel() * widest
        if not room or room[0].numel() != size:
            room[:] = [x.new_empty(size)]
        place = room[0][rows.numel() * behind :][: rows.numel() * wide].view(-1, wide)
        return torch.addmm(layer.bias, x.flatten(0, -2), layer.weight.t(), out=place).unflatten(0, rows)

    layers: list[tuple[nn.Linear, int]] = []
    for block in module.transformer_blocks:
        projections = block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
        wide = getattr(projections[0], "out_features", 0)
        layers += zip(projections, (0, wide, 2 * wide), strict=True)
        layers.append((getattr(block.ff.net[0], "proj", block.ff), 0))
    layers = [(layer, behind) for layer, behind in layers if _is_plain(layer)]
    widest = max((behind + layer.out_features for layer, behind in layers), default=0)
    with ExitStack() as stack:
        for layer, behind in layers:
            stack.callback(internals.replace_forward(layer, partial(product, layer, behind)))
        yield


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is torch's own ``Linear`` in fp32, and nothing else changes how it runs or keeps what it
    gives."""
    return (
        type(layer) is nn.Linear
        and layer.bias is not None
        and layer.weight.dtype == torch.float32
        and not ("forward" in vars(layer) or internals.is_hooked(layer) or internals.is_watched(layer))
    )


@contextmanager
def blocks_replaced(module: LibraryModule, replacements: Mapping[int, Callable]) -> Iterator[None]:
    """Have something else run in the place of blocks in a ``with`` block, below what caches, offloading and LoRAs do.

    Args:
        replacements: by the number of a block, what is called with the block's own ``forward``, and with what that is
            called with; it returns what that returns. Numbers that no block has are passed over.
    """
    with ExitStack() as stack:
        for number, block in enumerate(module.transformer_blocks):
            if number in replacements:
                changed = partial(replacements[number], internals.own_forward(block))
                stack.callback(internals.replace_forward(block, changed))
        yield


def side_by_side(text: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """Join ``[B, text tokens, C]`` and ``[B, video tokens, C]`` to ``[B, tokens, C]``: a view where they are neighbours
    in one tensor, else a copy."""
    # What is compiled is joined by the compiler.
    neighbours = not torch.compiler.is_compiling() and (
        text.stride() == video.stride()
        and text.stride(2) == 1
        and internals.storage_id(text) == internals.storage_id(video)
        and text.storage_offset() + text.shape[1] * text.stride(1) == video.storage_offset()
    )
    if not neighbours:
        return torch.cat([text, video], dim=1)
    return text.as_strided((text.shape[0], text.shape[1] + video.shape[1], text.shape[2]), text.stride())


def _block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
    """Stand in for ``CogVideoXBlock.forward``: the same steps on the joined stream."""
    text = encoder_hidden_states.shape[1]
    stream = side_by_side(encoder_hidden_states, hidden_states)
    video_part, text_part, gate, text_gate = self.norm1(stream[:, text:], stream[:, :text], temb)
    video_part, text_part = self.attn1(
        hidden_states=video_part,
        encoder_hidden_states=text_part,
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    # What a hook of diffusers gives may be what it keeps for the next step, and must stay as it is.
    own = not internals.is_hooked(self.attn1)
    stream = _gated(stream, side_by_side(text_part, video_part), gate, text_gate, text, own)
    video_part, text_part, gate, text_gate = self.norm2(stream[:, text:], stream[:, :text], temb)
    stream = _gated(stream, self.ff(side_by_side(text_part, video_part)), gate, text_gate, text, own)
    return stream[:, text:], stream[:, :text]


def _gated(stream, change, gate, text_gate, text, own):
    """Compute ``stream + gate * change``, in the place of ``change`` if it is the block's own, as nobody needs it
    afterwards."""
    change = change if own else change.clone()
    change[:, text:].mul_(gate)
    change[:, :text].mul_(text_gate)
    return change.add_(stream)


def _gelu(self, projected):
    """Stand in for ``GELU.gelu`` of diffusers: in the place of its projection, the largest tensor of a block."""
    return torch.ops.aten.gelu_(projected, approximate=self.approximate)


def _modulate(self, hidden_states, encoder_hidden_states, temb):
    """Stand in for ``CogVideoXLayerNormZero.forward``: one norm over the joined stream, scaled and shifted in
    place."""
    text = encoder_hidden_states.shape[1]
    shift, scale, gate, text_shift, text_scale, text_gate = self.linear(self.silu(temb))[:, None].chunk(6, dim=-1)
    normed = self.norm(side_by_side(encoder_hidden_states, hidden_states))
    video_part, text_part = normed[:, text:], normed[:, :text]
    video_part.mul_(1 + scale).add_(shift)
    text_part.mul_(1 + text_scale).add_(text_shift)
    return video_part, text_part, gate, text_gate
