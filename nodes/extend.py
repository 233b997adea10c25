"""CogVideoX-1.5 Extend: the part of a video that follows a clip."""

from ..cogvideox.geometry import LONGEST, check_frames
from ..cogvideox.going_on import check_known
from . import host
from .base import VAE, Node, with_latents
from .queued import UNKNOWN


class Extend(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Extend"
    DESCRIPTION = (
        "Goes on where a clip ends: makes the conditioning and the empty latent of the next part. For image-to-video "
        "checkpoints (CogVideoX1.5-5B-I2V) the part starts from one frame of the clip. For CogVideoX-Fun InP connect "
        "video and mask to CogVideoX-1.5 Inpaint: all frames of the overlap are then known. Join the parts with "
        "CogVideoX-1.5 Join Clips and the same overlap."
    )
    SEARCH_ALIASES = [
        "cogvideo extend",
        "cogvideox continue video",
        "last frame",
        "longer video",
        "video continuation",
        "next part",
        "延长视频",
        "长视频",
    ]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT", "IMAGE", "MASK")
    RETURN_NAMES = ("positive", "negative", "latent", "video", "mask")
    OUTPUT_TOOLTIPS = (
        "The positive conditioning with the frame that the next part starts from, for the sampler.",
        "The negative conditioning with it, for the sampler.",
        "An empty video latent of the clip's size, for the sampler's latent_image.",
        "For CogVideoX-1.5 Inpaint: the frames that are known, and behind them the last of them repeated.",
        "For CogVideoX-1.5 Inpaint: black where a frame is known and white where it is to be made.",
    )

    FIELD = "length"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "What the next part shows, from CogVideoX-1.5 Text Encode."}),
                "negative": ("CONDITIONING", {"tooltip": "What it should not show; an empty prompt is usual."}),
                "vae": VAE,
                "images": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "The clip so far, such as of CogVideoX-1.5 VAE Decode or CogVideoX-1.5 Join Clips. The "
                            "next part has its size, whose sides are multiples of 16."
                        )
                    },
                ),
                "length": (
                    "INT",
                    {
                        "default": 81,
                        "min": 5,
                        "max": LONGEST,
                        "step": 4,
                        "tooltip": (
                            "Frames of the next part, those of the overlap included: 16N+1 for CogVideoX-1.5, 8N+5 "
                            "for CogVideoX-Fun InP, 8N+1 for CogVideoX 1.0."
                        ),
                    },
                ),
                "overlap": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": LONGEST,
                        "step": 4,
                        "tooltip": (
                            "Frames at the end of the clip with which the next part begins, 4N+1: 1 for image-to-video "
                            "checkpoints, which read one image; 5 or 9 for CogVideoX-Fun InP, which then goes on in "
                            "the same movement."
                        ),
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, length=None, overlap=None):
        return [
            ("length", check_frames, length, 4),
            ("overlap", check_known, overlap, length),
        ]

    @classmethod
    def foresee(cls, positive, negative, vae, images, length, overlap):
        from ..cogvideox.going_on import part_lengths

        if UNKNOWN not in (vae, length):
            check_frames(length, *part_lengths(length, vae.frame_step, vae.in_pairs))
        return None

    def execute(self, positive, negative, vae, images, length, overlap):
        from ..cogvideox.geometry import check_size, empty_latent
        from ..cogvideox.going_on import known_frames, part_lengths
        from ..cogvideox.memory import WANTED_BYTES
        from ..cogvideox.pictures import check_images
        from ..cogvideox.vae import image_latents

        vae = host.own_vae(vae)
        images = check_images(images, "images")
        height, width = images.shape[1:3]
        check_size(width, height)
        samples = empty_latent(width, height, length, 1, *part_lengths(length, vae.frame_step, vae.in_pairs))
        video, mask = known_frames(images, length, overlap)
        host.make_room(vae.weights, WANTED_BYTES)
        latents = image_latents(vae, video[:1], length, events=host.NodeEvents())
        return *with_latents(positive, negative, latents), {"samples": samples}, video, mask
