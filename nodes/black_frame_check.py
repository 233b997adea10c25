"""CogVideoX-1.5 Black Frame Check: no black video is saved unseen."""

from ..cogvideox.choices import ON_BLACK, check_choice
from . import host
from .base import Node


class BlackFrameCheck(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Black Frame Check"
    DESCRIPTION = (
        "Looks at every frame before the video is saved, as ffmpeg's blackdetect does, and for NaN and Inf, which "
        "turn black when saved. Shows the frames it objects to. Works behind any model."
    )
    SEARCH_ALIASES = ["black video", "black frames", "blackdetect", "nan check", "validate video", "黑屏", "黑色视频"]
    RETURN_TYPES = ("IMAGE", "BOOLEAN", "INT", "STRING")
    RETURN_NAMES = ("images", "is_black", "black_frame_count", "report")
    OUTPUT_TOOLTIPS = (
        "The frames, unchanged.",
        "True if the verdict is black.",
        "How many frames are black.",
        "The verdict and the black frames, as text.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The frames to check, from any node."}),
                "action": (
                    list(ON_BLACK),
                    {
                        "tooltip": (
                            "What to do when the video is black. stop: an error that says why, and nothing is saved. "
                            "warn: log it and go on. pass: only report."
                        )
                    },
                ),
            },
            "optional": {
                "pixel_black_threshold": (
                    "FLOAT",
                    {
                        "advanced": True,
                        "default": 0.10,
                        **share,
                        "tooltip": (
                            "A pixel is black if its luma is at most this share of white (blackdetect's "
                            "pixel_black_th)."
                        ),
                    },
                ),
                "picture_black_ratio": (
                    "FLOAT",
                    {
                        "advanced": True,
                        "default": 0.98,
                        **share,
                        "tooltip": (
                            "A frame is black if at least this share of its pixels is black (blackdetect's "
                            "picture_black_ratio_th)."
                        ),
                    },
                ),
                "video_black_ratio": (
                    "FLOAT",
                    {
                        "advanced": True,
                        "default": 1.0,
                        **share,
                        "tooltip": (
                            "The video is black if at least this share of its frames is black, or any value is NaN or "
                            "Inf."
                        ),
                    },
                ),
            },
        }

    @classmethod
    def checks(cls, action=None, pixel_black_threshold=None, picture_black_ratio=None, video_black_ratio=None):
        from ..cogvideox.black_frames import check_threshold

        shares = dict(
            pixel_black_threshold=pixel_black_threshold,
            picture_black_ratio=picture_black_ratio,
            video_black_ratio=video_black_ratio,
        )
        return [
            ("action", check_choice, "action", action, ON_BLACK),
            *((name, check_threshold, name, value) for name, value in shares.items()),
        ]

    def execute(self, images, action, pixel_black_threshold=0.10, picture_black_ratio=0.98, video_black_ratio=1.0):
        from ..cogvideox.black_frames import BlackVideoError, check_black_frames, enforce
        from ..cogvideox.contact_sheet import contact_sheet

        report = check_black_frames(
            images,
            pixel_black_threshold,
            picture_black_ratio,
            video_black_ratio,
            events=host.NodeEvents(),
        )
        # What is advised has no room beside the sheet; it is in the log, and in the error.
        host.show(report.text)
        sheet = contact_sheet(images, report, host.said)
        pictures = {} if sheet is None else host.pictures(sheet)
        try:
            enforce(report, action)
        except BlackVideoError:
            host.show_pictures(pictures)
            raise
        outputs = images, report.verdict == "black", len(report.black_frames), report.text
        return {"ui": pictures, "result": outputs} if pictures else outputs
