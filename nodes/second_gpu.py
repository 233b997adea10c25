"""CogVideoX-1.5 Second GPU: one half of guidance on another card."""

from ..cogvideox.handles import check_other_device, other_devices
from . import host
from .base import Node
from .queued import UNKNOWN


class SecondGPU(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Second GPU"
    DESCRIPTION = (
        "Evaluates the halves of guidance on two cards at the same time, which nearly halves the time of a step. The "
        "second card gets a copy of the transformer. The video is that of one card up to rounding; with two cards of "
        "one kind bit for bit that of one that evaluates the halves one after the other. Where the second runs out of "
        "memory, the first does both, and says so."
    )
    SEARCH_ALIASES = [
        "cogvideo multi gpu",
        "second gpu",
        "two gpus",
        "multigpu",
        "cfg parallel",
        "cuda:1",
        "speed",
        "双卡",
        "多卡",
        "双显卡",
    ]
    RETURN_TYPES = ("COGVIDEOX_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The transformer on two cards, for the sampler or another node.",)

    FIELD = "device"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("COGVIDEOX_MODEL", {"tooltip": "The transformer, from the model loader or another node."}),
                "device": (
                    list(other_devices(host.device())),
                    {
                        "tooltip": (
                            "The card for the second half: those that ComfyUI does not run on. none: one card does "
                            "both halves; it is alone in the list where there is no second card."
                        )
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, device=None):
        return [("device", check_other_device, device, host.device())]

    @classmethod
    def foresee(cls, model, device):
        from ..cogvideox.handles import with_second

        return (with_second(model, device),) if UNKNOWN not in (model, device) else None

    def execute(self, model, device="none"):
        from ..cogvideox.handles import with_second

        return (with_second(model, device),)
