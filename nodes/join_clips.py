"""CogVideoX-1.5 Join Clips: two parts of a video in one."""

from ..cogvideox.geometry import LONGEST
from .base import Node


class JoinClips(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Join Clips"
    DESCRIPTION = (
        "Puts one clip behind another. The last frames of the first and the first frames of the second, which show the "
        "same, are faded into each other; with an overlap of 1 the first clip's own frame stays."
    )
    SEARCH_ALIASES = [
        "cogvideo join",
        "cogvideox concatenate",
        "cross-fade",
        "crossfade",
        "combine videos",
        "append",
        "拼接视频",
        "合并视频",
    ]
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("The frames of both, for CogVideoX-1.5 Black Frame Check, Extend again, or Create Video.",)

    FIELD = "overlap"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "first": ("IMAGE", {"tooltip": "The clip that comes first."}),
                "second": ("IMAGE", {"tooltip": "The clip that follows, of the same size."}),
                "overlap": (
                    "INT",
                    {
                        "default": 1,
                        "min": 0,
                        "max": LONGEST,
                        "tooltip": (
                            "Frames that both clips have: what CogVideoX-1.5 Extend was told. 0 puts one behind the "
                            "other."
                        ),
                    },
                ),
            }
        }

    def execute(self, first, second, overlap=1):
        from ..cogvideox.going_on import join_clips
        from ..cogvideox.pictures import check_images

        return (join_clips(check_images(first, "first"), check_images(second, "second"), overlap),)
