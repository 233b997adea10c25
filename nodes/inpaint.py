"""CogVideoX-1.5 Inpaint: what CogVideoX-Fun-V1.5-InP keeps of a video or of images, and what it makes anew."""

import torch

from ..cogvideox.conditioning import NOISE_AUGMENTATION, check_parts
from ..cogvideox.geometry import (
    check_batch_size,
    check_frames,
    check_side,
    check_video_room,
    empty_latent,
    latent_shape,
)
from ..cogvideox.variants import CONDITIONING_CHANNELS, INPAINT
from . import host
from .base import IN_PAIRS, LENGTH_IN_PAIRS, SIZE, VAE, Node, with_latents
from .queued import UNKNOWN

#: Frames of a clip beyond one: ``_STEP * N + 5``.
_STEP = 8


class Inpaint(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Inpaint"
    DESCRIPTION = (
        "What CogVideoX-Fun-V1.5-5b-InP keeps and what it makes anew: parts of a video by a mask, all that follows a "
        "start image, precedes an end image or lies between two, or, with denoise below 1 in the sampler, a whole "
        "video. With nothing connected it makes a video of the text alone. Equal to VideoX-Fun's own pipeline."
    )
    SEARCH_ALIASES = [
        "CogVideo ImageEncodeFunInP",
        "CogVideoX-Fun Sampler",
        "cogvideox fun",
        "fun inp",
        "inpaint video",
        "outpaint video",
        "mask video",
        "first last frame",
        "start end image",
        "修复视频",
        "遮罩",
        "首尾帧",
    ]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    OUTPUT_TOOLTIPS = (
        "The positive conditioning with mask and masked video, for the sampler.",
        "The negative conditioning with mask and masked video, for the sampler.",
        "For the sampler's latent_image: the video's latent, empty without a video.",
    )

    FIELD = "length"

    @classmethod
    def INPUT_TYPES(cls):
        trained = "a multiple of 16. CogVideoX-Fun-V1.5 was trained with areas of 512x512, 768x768 and 1024x1024."
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "What the video shows, from CogVideoX-1.5 Text Encode."}),
                "negative": ("CONDITIONING", {"tooltip": "What it should not show."}),
                "vae": VAE,
                "width": ("INT", {"default": 1008, **SIZE, "tooltip": f"Width in pixels, {trained}"}),
                "height": ("INT", {"default": 576, **SIZE, "tooltip": f"Height in pixels, {trained}"}),
                "length": LENGTH_IN_PAIRS,
                "batch_size": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 64,
                        "tooltip": "Videos to make at once. Each takes as much memory as the first.",
                    },
                ),
            },
            "optional": {
                "video": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "The video to change: parts of it by mask, or all of it with denoise below 1 in the "
                            "sampler. Scaled and centre-cropped to width x height; cut to length, or its last frame "
                            "repeated."
                        )
                    },
                ),
                "mask": (
                    "MASK",
                    {
                        "tooltip": (
                            "Where the video is made anew: 1 anew, 0 kept, cut at a half. One frame for all, or as "
                            "many as the video. Without it all is made anew."
                        )
                    },
                ),
                "start_image": (
                    "IMAGE",
                    {"tooltip": "The first frame, which is kept. Scaled and centre-cropped; of several the first."},
                ),
                "end_image": (
                    "IMAGE",
                    {"tooltip": "The last frame, which is kept. Scaled and centre-cropped; of several the first."},
                ),
                "noise_aug": (
                    "FLOAT",
                    {
                        "default": NOISE_AUGMENTATION,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.0001,
                        "round": 0.0001,
                        "advanced": True,
                        "tooltip": (
                            "Noise on what is kept before it is encoded, as the model was trained with. The same noise "
                            "in every run (a seed of 0 of its own): a run's seed does not change what is kept. 0 "
                            "switches it off."
                        ),
                    },
                ),
            },
        }

    @classmethod
    def checks(cls, width=None, height=None, length=None, batch_size=None):
        return [
            ("width", check_side, "width", width),
            ("height", check_side, "height", height),
            ("length", check_frames, length, _STEP, True),
            ("batch_size", check_batch_size, batch_size),
            ("length", check_video_room, width, height, length, batch_size),
        ]

    @classmethod
    def foresee(
        cls,
        positive,
        negative,
        width,
        height,
        length,
        batch_size,
        video=None,
        mask=None,
        start_image=None,
        end_image=None,
        **_,
    ):
        if length is not UNKNOWN:
            _check_parts(length, video, mask, start_image, end_image)
        if UNKNOWN in (positive, negative, width, height, length, batch_size):
            return None
        # Of both the sampler asks the shape alone.
        shape = latent_shape(width, height, length, batch_size, _STEP, in_pairs=True)
        samples = torch.zeros(()).expand(shape)
        latents = samples[:1, :1].expand(1, CONDITIONING_CHANNELS[INPAINT], *shape[2:])
        return *with_latents(positive, negative, latents), {"samples": samples, IN_PAIRS: True}

    def execute(
        self,
        positive,
        negative,
        vae,
        width,
        height,
        length,
        batch_size=1,
        video=None,
        mask=None,
        start_image=None,
        end_image=None,
        noise_aug=NOISE_AUGMENTATION,
    ):
        from ..cogvideox.conditioning import fit_area, fit_mask_frames, hold_last, inpaint_canvas, inpaint_latents
        from ..cogvideox.memory import WANTED_BYTES
        from ..cogvideox.pictures import check_images, check_mask, fit_size
        from ..cogvideox.vae import encode

        vae = host.own_vae(vae)
        _check_parts(length, video, mask, start_image, end_image)
        samples = empty_latent(width, height, length, batch_size, _STEP, in_pairs=True)
        clip = marked = None
        if video is not None:
            clip = check_images(video, "video")
            if mask is not None:
                marked = fit_mask_frames(check_mask(mask, "mask"), len(clip), length)
                marked = fit_area(marked[..., None], width, height)[..., 0]
            if len(clip) < length:
                host.tell(
                    f"The video has {len(clip)} frames and length is {length}: its last was repeated.",
                    warns=True,
                )
            clip = hold_last(fit_area(clip[:length], width, height), length)
        start, end = (
            None if image is None else fit_size(check_images(image, name)[:1], width, height)
            for name, image in (("start_image", start_image), ("end_image", end_image))
        )
        canvas = inpaint_canvas(width, height, length, clip, marked, start, end)
        host.make_room(vae.weights, WANTED_BYTES)
        events, generator = host.NodeEvents(), torch.Generator("cpu").manual_seed(0)
        latents = inpaint_latents(vae, canvas, noise_aug, generator, events=events)
        if clip is not None:
            samples = encode(vae, clip, events=events).repeat(batch_size, 1, 1, 1, 1)
        return *with_latents(positive, negative, latents), {"samples": samples, IN_PAIRS: True}


def _check_parts(length, video, mask, start_image, end_image):
    check_parts(length, video is not None, mask is not None, start_image is not None and end_image is not None)
