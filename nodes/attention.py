"""CogVideoX-1.5 Attention: which kernel computes the attention."""

import torch

from ..cogvideox.modules.attention import available, check_attention
from . import host
from .base import Node
from .queued import UNKNOWN


class Attention(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Attention"
    DESCRIPTION = (
        "Chooses the kernel that computes the attention, which takes two thirds of a step. Only what will run here is "
        "listed. All but those named sage give the same picture up to rounding. Another branch of the graph can use "
        "another; taking the node away restores the model exactly."
    )
    SEARCH_ALIASES = [
        "cogvideo attention",
        "sage attention",
        "flash attention",
        "sdpa",
        "cudnn",
        "xformers",
        "speed",
        "加速",
    ]
    RETURN_TYPES = ("COGVIDEOX_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The transformer with this attention, for the sampler or another node.",)

    FIELD = "attention"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("COGVIDEOX_MODEL", {"tooltip": "The transformer, from the model loader or another node."}),
                "attention": (
                    list(available(host.device())),
                    {
                        "tooltip": (
                            "auto, sdpa: PyTorch's own choice. fastest: times the exact kernels at the run's own size "
                            "before the first step and takes the best. cudnn: often the fastest exact one on H100 and "
                            "newer. flash, flash3, xformers: exact, from their packages. sage: 8 bits, faster, changes "
                            "the picture a little; auto and fastest never take it. Those that end in _hub are "
                            "downloaded from the Hugging Face hub, as code, when they are first used."
                        )
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, attention=None):
        # Only the model says whether it runs in 16 bits.
        return [("attention", check_attention, attention, host.device(), torch.float16)]

    @classmethod
    def foresee(cls, model, attention):
        from ..cogvideox.handles import with_attention

        return (with_attention(model, attention),) if UNKNOWN not in (model, attention) else None

    def execute(self, model, attention="auto"):
        from ..cogvideox.handles import with_attention

        return (with_attention(model, attention),)
