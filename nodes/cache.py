"""CogVideoX-1.5 Cache: steps that reuse what changes little."""

from ..cogvideox.choices import CACHES, TEACACHE, check_choice
from . import host
from .base import SHARE, Node
from .queued import UNKNOWN


class Cache(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Cache"
    DESCRIPTION = (
        "Makes sampling faster by not computing again what changes little from one step to the next. The video is "
        "another than without, the more so the higher strength is. The sampler says how many block evaluations were "
        "skipped; for teacache this node says it before, with the threshold of its authors. Works with LoRAs and every "
        "dtype; cleared between runs, and taking the node away restores the model exactly."
    )
    SEARCH_ALIASES = [
        "cogvideo cache",
        "cogvideox cache",
        "first block cache",
        "fbcache",
        "teacache",
        "taylorseer",
        "fastercache",
        "pab",
        "speed up",
        "加速",
    ]
    RETURN_TYPES = ("COGVIDEOX_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The transformer with the cache, for the sampler.",)

    FIELD = "method"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "COGVIDEOX_MODEL",
                    {
                        "tooltip": (
                            "The transformer, from the model loader, a LoRA loader or another node that changes it."
                        )
                    },
                ),
                "method": (
                    list(CACHES),
                    {
                        "default": TEACACHE,
                        "tooltip": (
                            "teacache: skips all blocks at the steps whose timestep embedding says that little "
                            "changes, chosen before the run. first_block: runs the first block, and where it changed "
                            "least reuses what the others did. taylorseer: extrapolates whole steps from earlier ones. "
                            "pab: reuses each block's attention. faster_cache: extrapolates each block's attention, "
                            "and the negative prompt's half from the other. The last two take much memory: every "
                            "block's attention."
                        ),
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 0.6,
                        **SHARE,
                        "tooltip": (
                            "The share of block evaluations between start and end that is to be skipped (with pab and "
                            "faster_cache: of attention evaluations). 0 changes nothing; higher is faster and further "
                            "from the video without a cache."
                        ),
                    },
                ),
                "start": (
                    "FLOAT",
                    {
                        "advanced": True,
                        "default": 0.1,
                        **SHARE,
                        "tooltip": (
                            "The share of the steps after which it may skip; the first steps decide what the video "
                            "shows."
                        ),
                    },
                ),
                "end": (
                    "FLOAT",
                    {
                        "advanced": True,
                        "default": 0.95,
                        **SHARE,
                        "tooltip": "The share of the steps after which everything is computed again.",
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, method=None):
        return [("method", check_choice, "method", method, CACHES)]

    @classmethod
    def foresee(cls, model, **how):
        from ..cogvideox.handles import with_cache
        from ..cogvideox.modules.cache import Cache

        known = UNKNOWN not in (model, *how.values())
        return (with_cache(model, Cache(**how)),) if known else None

    def execute(self, model, method, strength=0.6, start=0.1, end=0.95):
        from ..cogvideox.handles import with_cache
        from ..cogvideox.memory import memory_text
        from ..cogvideox.modules.cache import Cache
        from ..cogvideox.skips import skips_text

        cache = Cache(method, strength, start, end)
        changed = with_cache(model, cache)
        skips = skips_text(changed) if cache.strength else None
        report = "\n".join([cache.text, *([f"At 50 steps: {skips}"] if skips else []), memory_text(changed)])
        host.tell(report)
        return (changed,)
