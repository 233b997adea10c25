"""What of a user's choices does not work together."""

from importlib import metadata
from typing import TYPE_CHECKING

from ..dependencies import is_at_least

if TYPE_CHECKING:
    from ..handles import Model

#: Caches that act within a block, by changing what its attention gives.
_INSIDE_BLOCKS = ("pab", "faster_cache")


def check_combination(model: "Model") -> None:
    """Refuse what cannot work, from the handle alone: nothing is read.

    Raises:
        ValueError: saying what does not go with what, why, and what to do.
    """
    cache, compiled, weights = model.cache, model.compiled, model.weights
    layers = weights.memory == "offload_layers" and weights.device.type != "cpu"
    if cache is not None and cache.strength > 0:
        if compiled is not None and cache.method in _INSIDE_BLOCKS:
            raise ValueError(
                f"The cache {cache.method} and compiling do not work together: this cache replaces parts of the blocks, which then cannot be "
                "compiled as a whole. Choose first_block or taylorseer, or take CogVideoX-1.5 Compile away."
            )
        if layers and cache.method != "taylorseer" and not is_at_least("diffusers", "0.37"):
            raise ValueError(
                f"The cache {cache.method} and memory offload_layers do not work together with diffusers {metadata.version('diffusers')}: layers "
                "that were skipped are not brought to the card when they run again. Install diffusers 0.37 or newer, choose taylorseer, or set "
                "memory to offload_blocks in the loader."
            )
    if compiled is not None and layers:
        raise ValueError(
            "Compiling and memory offload_layers do not work together: layers are brought to the card one by one, within what would be compiled. "
            "Set memory to offload_blocks in the loader, or take CogVideoX-1.5 Compile away."
        )
