"""Refuse settings that exclude each other. ``choices.check_choice`` says whether a single value is known at all."""

from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from .choices import FASTER_CACHE, FIRST_BLOCK, PAB, TAYLORSEER, TEACACHE
from .dependencies import is_at_least

#: Caches that act within a block, by changing what its attention gives.
_INSIDE_BLOCKS = (PAB, FASTER_CACHE)


def check_combination(caches: Sequence[str], methods: Sequence[str], compiled: bool, layers: bool) -> None:
    """Refuse settings that are each allowed but exclude each other, as they stand in a graph.

    Args:
        caches: the methods of all caches that skip something.
        methods: those of all quantizations.
        compiled: whether the blocks are compiled.
        layers: whether ``memory`` is ``offload_layers`` on a card.

    Raises:
        ValueError: saying what does not go with what, why, and what to do.
    """
    if len(caches) > 1:
        raise ValueError(
            f"The model has a cache already ({caches[0]}), and each would reuse what the other made up. Take one of "
            "the nodes CogVideoX-1.5 Cache away."
        )
    if len(methods) > 1:
        refuse_second_method("transformer", methods[0])
    for cache in caches:
        if compiled and cache in _INSIDE_BLOCKS:
            raise ValueError(
                f"The cache {cache} and compiling do not work together: this cache replaces parts of the blocks, "
                "which then cannot be compiled as a whole. Choose teacache, first_block or taylorseer, or take "
                "CogVideoX-1.5 Compile (--compile) away."
            )
        if layers and loses_layers(cache):
            raise ValueError(
                f"The cache {cache} and memory offload_layers do not work together with diffusers "
                f"{metadata.version('diffusers')}: layers that were skipped are not brought to the card when they run "
                "again. Install diffusers 0.37 or newer, choose taylorseer, or set memory to offload_blocks in the "
                "loader (--memory)."
            )
    if compiled and layers:
        raise ValueError(
            "Compiling and memory offload_layers do not work together: layers are brought to the card one by one, "
            "within what would be compiled. Set memory to offload_blocks in the loader (--memory), or take "
            "CogVideoX-1.5 Compile (--compile) away."
        )


def loses_layers(cache: str) -> bool:
    """Return whether diffusers does not bring layers to the card again that this cache has skipped."""
    return cache != TAYLORSEER and not is_at_least("diffusers", "0.37")


def check_second(cache: str | None, compiled: bool) -> None:
    """Refuse what a second copy of the transformer, which runs at the same time, does not go with.

    Args:
        cache: the method of a cache that skips something.
        compiled: whether the blocks are compiled.

    Raises:
        ValueError: saying what does not go together, why, and what to do.
    """
    if compiled:
        raise ValueError(
            "Compiling and a second GPU do not work together: both copies would be compiled at the same time. Take "
            "CogVideoX-1.5 Compile or CogVideoX-1.5 Second GPU away."
        )
    if cache == FIRST_BLOCK:
        raise ValueError(
            "The cache first_block and a second GPU do not work together: it decides at each step by what it measures "
            "of both halves of guidance, and each GPU has one. Choose teacache, whose steps are known before."
        )
    if cache == FASTER_CACHE:
        raise ValueError(
            "The cache faster_cache and a second GPU do not work together: it predicts one half of guidance from the "
            "other, and each GPU has one, so the video would be another. Choose teacache, taylorseer or pab."
        )


def check_sharing(guidance: bool, tokens: bool, cache: str | None, compiled: bool, offloads: bool) -> None:
    """Refuse what cannot be shared among processes that make one video.

    Args:
        guidance: whether the halves of guidance are shared.
        tokens: whether the tokens are.
        cache: the method of a cache that skips something.
        compiled: whether the blocks are compiled.
        offloads: whether weights are brought to a card while they run.

    Raises:
        ValueError: saying what does not go together, why, and what to do.
    """
    if cache == FIRST_BLOCK and (guidance or tokens):
        raise ValueError(
            "The cache first_block decides at each step by what it measures, and processes that share a video would "
            "decide differently and wait for each other for ever. Choose teacache, whose steps are known before."
        )
    if cache == FASTER_CACHE and (guidance or tokens):
        raise ValueError(
            "The cache faster_cache acts inside the attention, and predicts one half of guidance from the other, while "
            "processes that share a video have a part of it each. Choose teacache or taylorseer."
        )
    if not tokens:
        return
    if cache not in (None, TEACACHE, TAYLORSEER):
        raise ValueError(
            f"The cache {cache} acts inside the attention, where processes exchange the tokens that they share. Choose "
            "teacache or taylorseer, or --split guidance."
        )
    if compiled:
        raise ValueError(
            "Compiled blocks and shared tokens do not go together: in the middle of each block processes exchange "
            "tokens, which is not compiled. Leave --compile away, or take --split guidance."
        )
    if offloads:
        raise ValueError(
            "Offloading and shared tokens do not go together: both put hooks on the same blocks. Set --memory to gpu, "
            "quantize with --quantize int8_weight_only, or take --split guidance."
        )


def refuse_second_method(part: str, method: str) -> NoReturn:
    """Refuse to quantize a part that is quantized.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"The {part} is quantized already ({method}), and rounding it again would only lose more. Use one "
        "CogVideoX-1.5 Quantize."
    )
