"""CogVideoX-1.5 Model Check: what ComfyUI's own CogVideoX will run in, and the first step that is not finite."""

from ..cogvideox.choices import STOP, WARN, check_choice
from . import host
from .base import Node

_ACTIONS = (STOP, WARN)


class ModelCheck(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Model Check"
    DESCRIPTION = (
        "Goes behind any loader of ComfyUI's own CogVideoX. It says what the weights are stored in, what they were "
        "trained in, what ComfyUI will compute in on this card and what follows, and watches the run: the first step "
        "that is not finite stops it and names the module, instead of a black video after a quarter of an hour."
    )
    SEARCH_ALIASES = [
        "cogvideo check",
        "cogvideox nan",
        "black video",
        "fp16 bf16 mismatch",
        "native cogvideo dtype",
        "黑屏",
    ]
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The same model, watched, for KSampler and other nodes.",
        "What it is stored in, trained in and computed in, and what to do.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "A CogVideoX model, such as of Load Diffusion Model or Load Checkpoint."},
                )
            },
            "optional": {
                "action": (
                    list(_ACTIONS),
                    {
                        "default": STOP,
                        "tooltip": (
                            "At a step that is not finite. stop: an error that names the module. warn: say it on the "
                            "node and go on."
                        ),
                    },
                )
            },
        }

    @classmethod
    def checks(cls, action=None):
        return [("action", check_choice, "action", action, _ACTIONS)]

    def execute(self, model, action=STOP):
        check_choice("action", action, _ACTIONS)
        watched, report, warns = host.watched(model, action == STOP)
        host.tell(report, warns)
        return watched, report
