"""CogVideoX-1.5 Context Windows: clips that are longer than the model was trained for."""

from ..cogvideox.choices import BLENDS, LINEAR, check_choice
from ..cogvideox.geometry import LONGEST
from ..cogvideox.windows import check_overlap, check_window_length
from . import host
from .base import Node
from .queued import UNKNOWN


class ContextWindows(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Context Windows"
    DESCRIPTION = (
        "Makes a clip that is longer than the model was trained for in windows that overlap: each step of the sampler "
        "runs window by window, in the memory of one, and blends what they share. A clip no longer than a window is "
        "made as without this node. Works with LoRAs, caches, masks, start videos and every memory mode; the "
        "scheduler has to be ddim or ddim_origin. A start image is read by the first window alone."
    )
    SEARCH_ALIASES = [
        "cogvideo context options",
        "cogvideox long video",
        "context windows",
        "sliding window",
        "temporal multidiffusion",
        "longer video",
        "长视频",
    ]
    RETURN_TYPES = ("COGVIDEOX_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The transformer with context windows, for the sampler.",)

    FIELD = "overlap"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "COGVIDEOX_MODEL",
                    {"tooltip": "The transformer, from the model loader or another node that changes it."},
                ),
                "length": (
                    "INT",
                    {
                        "default": 161,
                        "min": 5,
                        "max": LONGEST,
                        "step": 4,
                        "tooltip": (
                            "Frames of a window, not of the video, whose length is that of the latent. 161 is the "
                            "longest that CogVideoX-1.5 was trained for, 81 takes half the memory; 49 for CogVideoX "
                            "1.0, 85 for VOID."
                        ),
                    },
                ),
                "overlap": (
                    "INT",
                    {
                        "default": 4,
                        "min": 0,
                        "max": 4000,
                        "tooltip": (
                            "Latent frames, four frames each, that a window shares with the next: even for "
                            "CogVideoX-1.5. More ties them closer together and takes longer; 0 makes clips that have "
                            "nothing to do with each other."
                        ),
                    },
                ),
                "blend": (
                    list(BLENDS),
                    {
                        "default": LINEAR,
                        "tooltip": "How what windows share is mixed. linear: with weights in a line.",
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, length=None, overlap=None, blend=None):
        some = length if isinstance(length, int) and length > 1 else None
        return [
            ("length", check_window_length, length),
            ("overlap", check_overlap, some, overlap),
            ("blend", check_choice, "blend", blend, BLENDS),
        ]

    @classmethod
    def foresee(cls, model, **how):
        from ..cogvideox.handles import with_windows
        from ..cogvideox.windows import Windows

        known = UNKNOWN not in (model, *how.values())
        return (with_windows(model, Windows(**how)),) if known else None

    def execute(self, model, length, overlap, blend=LINEAR):
        from ..cogvideox.handles import with_windows
        from ..cogvideox.windows import Windows

        windows = Windows(length, overlap, blend)
        changed = with_windows(model, windows)
        host.tell(windows.text)
        return (changed,)
