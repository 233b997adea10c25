"""CogVideoX-1.5 Object Removal (VOID): a video, and what is to be taken out of it."""

import torch

from ..cogvideox.choices import STAGES, check_choice
from ..cogvideox.geometry import check_frames, check_side, check_video_room, empty_latent, latent_shape
from ..cogvideox.variants import CONDITIONING_CHANNELS, VOID
from . import host
from .base import IN_PAIRS, LENGTH_IN_PAIRS, SIZE, VAE, Node, with_latents
from .queued import UNKNOWN

#: Frames of a clip beyond one: ``_STEP * N + 5``.
_STEP = 8


class Void(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Object Removal (VOID)"
    DESCRIPTION = (
        "Takes an object out of a video, and what it does there: shadows, reflections, things that it moves. For "
        "VOID's checkpoints (void_pass1, void_pass2), prepared as Netflix's own code does. What void_pass1 makes is "
        "a result by itself; void_pass2 goes on from it and starts from noise that moves as the first's video does."
    )
    SEARCH_ALIASES = [
        "void",
        "remove object",
        "object removal",
        "erase object",
        "quadmask",
        "VOID Inpaint Conditioning",
        "cogvideox void",
        "去除物体",
        "消除物体",
    ]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    OUTPUT_TOOLTIPS = (
        "The positive conditioning with quadmask and video, for the sampler.",
        "The negative conditioning with quadmask and video, for the sampler.",
        "An empty video latent of this size, for the sampler's latent_image.",
    )

    FIELD = "length"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "positive": (
                    "CONDITIONING",
                    {"tooltip": "What is seen without the object: the background. From CogVideoX-1.5 Text Encode."},
                ),
                "negative": (
                    "CONDITIONING",
                    {"tooltip": "What it should not show. Not used at cfg 1."},
                ),
                "vae": VAE,
                "video": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "The video that the object is in. Scaled and centre-cropped to width x height; cut to "
                            "length, or run back and forth until it is as long."
                        )
                    },
                ),
                "quadmask": (
                    "IMAGE,MASK",
                    {
                        "tooltip": (
                            "What is in each frame, in greys of 255: 0 the object, 127 what it affects, 63 where it "
                            "covers that, 255 the rest; what is between counts as the nearest. As the video of VOID's "
                            "mask reasoner has it, not as VOID Quadmask Preprocessor gives it, which turns it round."
                        )
                    },
                ),
                "width": (
                    "INT",
                    {
                        "default": 672,
                        **SIZE,
                        "tooltip": "Width in pixels, a multiple of 16. VOID was trained at 672x384.",
                    },
                ),
                "height": (
                    "INT",
                    {
                        "default": 384,
                        **SIZE,
                        "tooltip": "Height in pixels, a multiple of 16. VOID was trained at 672x384.",
                    },
                ),
                "length": LENGTH_IN_PAIRS,
                "stage": (
                    list(STAGES),
                    {
                        "tooltip": (
                            "first: for void_pass1, with cfg 1, 30 steps and ddim_origin. second: for void_pass2, with "
                            "cfg 6, 50 steps and ddim, and warped noise at the sampler's noise."
                        )
                    },
                ),
            },
        }

    @classmethod
    def checks(cls, width=None, height=None, length=None, stage=None):
        return [
            ("width", check_side, "width", width),
            ("height", check_side, "height", height),
            ("length", check_frames, length, _STEP, True),
            ("length", check_video_room, width, height, length),
            ("stage", check_choice, "stage", stage, STAGES),
        ]

    @classmethod
    def foresee(cls, positive, negative, width, height, length, **_):
        if UNKNOWN in (positive, negative, width, height, length):
            return None
        # Of both the sampler asks the shape alone.
        shape = latent_shape(width, height, length, 1, _STEP, in_pairs=True)
        samples = torch.zeros(()).expand(shape)
        latents = samples[:1, :1].expand(1, CONDITIONING_CHANNELS[VOID], *shape[2:])
        return *with_latents(positive, negative, latents), {"samples": samples, IN_PAIRS: True}

    def execute(self, positive, negative, vae, video, quadmask, width, height, length, stage):
        from ..cogvideox.conditioning import fit_area, fit_mask_frames, mirror, void_latents
        from ..cogvideox.memory import WANTED_BYTES
        from ..cogvideox.pictures import check_images, check_mask

        vae = host.own_vae(vae)
        samples = empty_latent(width, height, length, 1, _STEP, in_pairs=True)
        clip, greys = check_images(video, "video"), check_mask(quadmask, "quadmask")
        greys = fit_mask_frames(greys, len(clip), min(len(clip), length)).expand(min(len(clip), length), -1, -1)
        if len(clip) < length:
            host.tell(
                f"The video has {len(clip)} frames and length is {length}: it runs back and forth until then.",
                warns=True,
            )
        clip = mirror(fit_area(clip[:length], width, height), length)
        greys = mirror(fit_area(greys[..., None], width, height)[..., 0], length)
        host.make_room(vae.weights, WANTED_BYTES)
        generator = torch.Generator("cpu").manual_seed(0)
        latents = void_latents(vae, clip, greys, stage, generator=generator, events=host.NodeEvents())
        return *with_latents(positive, negative, latents), {"samples": samples, IN_PAIRS: True}
