"""Empty CogVideoX-1.5 Latent: the size and length of the video to make."""

from ..cogvideox.geometry import check_batch_size, check_frames, check_side, check_video_room, empty_latent
from .base import LENGTH, SIZE, Node
from .queued import UNKNOWN


class EmptyLatent(Node):
    DISPLAY_NAME = "Empty CogVideoX-1.5 Latent"
    DESCRIPTION = (
        "The size and length of the video to make: an empty latent, which the sampler fills with noise to start from."
    )
    SEARCH_ALIASES = [
        "cogvideo latent",
        "cogvideox size",
        "empty latent video",
        "resolution",
        "frames",
        "分辨率",
        "尺寸",
        "帧数",
    ]
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("An empty video latent, for the sampler's latent_image.",)

    FIELD = "length"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "width": (
                    "INT",
                    {
                        "default": 1360,
                        **SIZE,
                        "tooltip": "Width in pixels, a multiple of 16. CogVideoX1.5-5B was trained at 1360x768.",
                    },
                ),
                "height": (
                    "INT",
                    {
                        "default": 768,
                        **SIZE,
                        "tooltip": "Height in pixels, a multiple of 16. CogVideoX1.5-5B was trained at 1360x768.",
                    },
                ),
                "length": LENGTH,
                "batch_size": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 64,
                        "tooltip": "Videos to make at once. Each takes as much memory as the first.",
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, width=None, height=None, length=None, batch_size=None):
        return [
            ("width", check_side, "width", width),
            ("height", check_side, "height", height),
            ("length", _check_length, length),
            ("batch_size", check_batch_size, batch_size),
            ("length", check_video_room, width, height, length, batch_size),
        ]

    @classmethod
    def foresee(cls, width, height, length, batch_size):
        known = UNKNOWN not in (width, height, length, batch_size)
        return ({"samples": _samples(width, height, length, batch_size)},) if known else None

    def execute(self, width, height, length, batch_size=1):
        return ({"samples": _samples(width, height, length, batch_size)},)


def _samples(width, height, length, batch_size):
    return empty_latent(width, height, length, batch_size, 8 if length % 16 == 9 else 16)


def _check_length(length):
    # CogVideoX-5b and -2b make 8N+1 frames; the sampler knows which model it is.
    if length % 8 != 1:
        check_frames(length)
