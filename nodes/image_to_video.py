"""CogVideoX-1.5 Image to Video: the image a video starts from."""

import torch

from ..cogvideox.conditioning import check_parts
from ..cogvideox.geometry import (
    check_batch_size,
    check_frames,
    check_side,
    check_video_room,
    empty_latent,
    latent_shape,
)
from . import host
from .base import LENGTH, SIZE, VAE, Node, with_latents
from .queued import UNKNOWN


class ImageToVideo(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Image to Video"
    DESCRIPTION = (
        "The image a video starts from, and its size and length, for image-to-video checkpoints (CogVideoX1.5-5B-I2V, "
        "CogVideoX-5b-I2V). The image is scaled and centre-cropped to the size, encoded with the checkpoint's own "
        "VAE, and put into both conditionings."
    )
    SEARCH_ALIASES = [
        "CogVideo ImageEncode",
        "cogvideo i2v",
        "cogvideox image to video",
        "start image",
        "first frame",
        "end image",
        "first last frame",
        "animate image",
        "起始图像",
        "首帧",
        "首尾帧",
    ]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    OUTPUT_TOOLTIPS = (
        "The positive conditioning with the start image, for the sampler.",
        "The negative conditioning with the start image, for the sampler.",
        "An empty video latent of this size, for the sampler's latent_image.",
    )

    FIELD = "length"

    @classmethod
    def INPUT_TYPES(cls):
        trained = (
            "a multiple of 16. CogVideoX1.5-5B-I2V was trained with one side of 768 and the other from 768 to 1360; "
            "CogVideoX-5b-I2V takes 720x480."
        )
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "What the video shows, from CogVideoX-1.5 Text Encode."}),
                "negative": ("CONDITIONING", {"tooltip": "What it should not show; an empty prompt is usual."}),
                "vae": VAE,
                "start_image": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "The first frame. Any size: it is scaled and centre-cropped to width x height. Of several "
                            "images the first is used."
                        )
                    },
                ),
                "width": ("INT", {"default": 1360, **SIZE, "tooltip": f"Width in pixels, {trained}"}),
                "height": ("INT", {"default": 768, **SIZE, "tooltip": f"Height in pixels, {trained}"}),
                "length": LENGTH,
                "batch_size": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 64,
                        "tooltip": "Videos to make at once from the one image. Each takes as much memory as the first.",
                    },
                ),
            },
            "optional": {
                "end_image": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "The last frame, for checkpoints that were fine-tuned to go from one image to another. "
                            "The released ones were not, and the sampler says so."
                        )
                    },
                ),
            },
        }

    @classmethod
    def checks(cls, width=None, height=None, length=None, batch_size=None):
        # CogVideoX-5b-I2V makes 8N+1 frames; only the model says which it is.
        eights = isinstance(length, int) and length % 8 == 1
        return [
            ("width", check_side, "width", width),
            ("height", check_side, "height", height),
            ("length", check_frames, length, 8 if eights else 16),
            ("batch_size", check_batch_size, batch_size),
            ("length", check_video_room, width, height, length, batch_size),
        ]

    @classmethod
    def foresee(cls, positive, negative, vae, width, height, length, batch_size, end_image=None, **_):
        if length is not UNKNOWN:
            check_parts(length, video=False, mask=False, both_images=end_image is not None)
        if UNKNOWN in (positive, negative, vae, width, height, length, batch_size):
            return None
        # What the sampler asks of them: their size, and whether there is an end image.
        shape = latent_shape(width, height, length, batch_size, vae.frame_step)
        image = torch.zeros(shape[2], 1, 1)
        image[-1] = float(end_image is not None)
        image = image.expand(1, *shape[1:])
        return *with_latents(positive, negative, image), {"samples": torch.zeros(()).expand(shape)}

    def execute(self, positive, negative, vae, start_image, width, height, length, batch_size=1, end_image=None):
        from ..cogvideox.memory import WANTED_BYTES
        from ..cogvideox.pictures import check_images, fit_size
        from ..cogvideox.vae import image_latents

        vae = host.own_vae(vae)
        samples = empty_latent(width, height, length, batch_size, vae.frame_step)
        start = fit_size(check_images(start_image, "start_image")[:1], width, height)
        end = None if end_image is None else fit_size(check_images(end_image, "end_image")[:1], width, height)
        host.make_room(vae.weights, WANTED_BYTES)
        latents = image_latents(vae, start, length, end, events=host.NodeEvents())
        return *with_latents(positive, negative, latents), {"samples": samples}
