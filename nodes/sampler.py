"""CogVideoX-1.5 Sampler: noise and a prompt to video latents."""

import logging
import math
from contextlib import suppress

import torch

from ..cogvideox.choices import ON_NAN, SCHEDULERS, check_choice
from ..cogvideox.tensors import check_tensor
from . import host
from .base import IN_PAIRS, SHARE, Node
from .inputs import of_field
from .queued import UNKNOWN

logger = logging.getLogger(__name__)

#: What core's nodes put into a CONDITIONING for their own samplers to read, and what of it changes nothing.
_OF_CORE = {"start_percent": 0, "end_percent": 1, "area": None, "mask": None, "control": None, "hooks": None}


class Sampler(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Sampler"
    DESCRIPTION = (
        "Makes the video's latents from noise and a prompt, and from an image or a video, step by step, exactly as "
        "diffusers' pipelines do for the same seed. Every step is checked for NaN and Inf and healed if need be, so "
        "that no run ends in a black video. Shows a preview while it runs, where ComfyUI's settings have one. Can be "
        "cancelled between two steps."
    )
    SEARCH_ALIASES = [
        "CogVideo Sampler",
        "CogVideoX-Fun Sampler",
        "cogvideo sampler",
        "cogvideox sampler",
        "ksampler",
        "denoise",
        "generate video",
        "文生视频",
        "生成视频",
    ]
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The finished latents, for CogVideoX-1.5 VAE Decode.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("COGVIDEOX_MODEL", {"tooltip": "The transformer, from the model loader."}),
                "positive": ("CONDITIONING", {"tooltip": "What the video shows."}),
                "negative": (
                    "CONDITIONING",
                    {"tooltip": "What it should not show; an empty prompt is usual. Not used at cfg 1."},
                ),
                "latent_image": (
                    "LATENT",
                    {
                        "tooltip": (
                            "Size and length of the video (an empty latent), or the latents of a video to start from "
                            "with denoise below 1."
                        )
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "control_after_generate": True,
                        "tooltip": "The same seed, prompt and settings give the same video, here and in diffusers.",
                    },
                ),
                "steps": (
                    "INT",
                    {"default": 50, "min": 1, "max": 1000, "tooltip": "Denoising steps. The model card uses 50."},
                ),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 6.0,
                        "min": 1.0,
                        "max": 100.0,
                        "step": 0.1,
                        "round": 0.01,
                        "tooltip": (
                            "Classifier-free guidance: how strictly the prompt is followed. The model card uses 6; 1 "
                            "switches it off and halves the time."
                        ),
                    },
                ),
                "scheduler": (
                    list(SCHEDULERS),
                    {
                        "tooltip": "ddim: deterministic steps, as the checkpoint is set up. "
                        "dpm: DPM-Solver++ with added noise, which the reference's own script uses for the 5B models. "
                        "ddim_origin: diffusers' plain DDIM, which CogVideoX-Fun and VOID are used with; the same as "
                        "ddim up to rounding."
                    },
                ),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": (
                            "1 makes the video from noise. Below 1 starts from the latents given and runs that share "
                            "of the steps."
                        ),
                    },
                ),
            },
            "optional": {
                "dynamic_cfg": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": (
                            "Change the guidance from step to step along a cosine, as the reference's use_dynamic_cfg "
                            "does. Its script switches it on with dpm."
                        ),
                    },
                ),
                "on_nan": (
                    list(ON_NAN),
                    {
                        "advanced": True,
                        "default": "heal",
                        "tooltip": (
                            "If a step gives NaN or Inf. heal: repeat that step in the next safer precision, finish "
                            "the run, and say so. stop: an error that names the module."
                        ),
                    },
                ),
                "noise": (
                    "LATENT",
                    {
                        "tooltip": (
                            "Start from this noise instead of what the seed draws: standard normal, of the size and "
                            "length of latent_image, such as warped noise."
                        )
                    },
                ),
                "cfg_start": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        **SHARE,
                        "advanced": True,
                        "tooltip": (
                            "The share of the steps after which cfg acts. Steps before it follow the positive prompt "
                            "alone and take half the time."
                        ),
                    },
                ),
                "cfg_end": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        **SHARE,
                        "advanced": True,
                        "tooltip": (
                            "The share of the steps after which cfg no longer acts, which halves their time: 0.8 saves "
                            "a tenth of the run. The model card guides every step; what this does to the video is "
                            "not published for CogVideoX."
                        ),
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def checks(cls, steps=None, cfg=None, scheduler=None, denoise=None, on_nan=None, cfg_start=None, cfg_end=None):
        from ..cogvideox.requests import check_guidance, check_guidance_range, guided_steps
        from ..cogvideox.schedulers import steps_to_run
        from ..cogvideox.variants import TRAINED_STEPS

        some, run = None if steps is None or not 1 <= steps <= TRAINED_STEPS else steps, None
        with suppress(TypeError, ValueError):
            run = steps_to_run(steps, denoise)
        return [
            ("steps", steps_to_run, steps, 1.0),
            ("denoise", steps_to_run, some, denoise),
            ("cfg", check_guidance, cfg),
            ("cfg_end", check_guidance_range, cfg_start, cfg_end, math.inf if cfg is None else cfg),
            ("cfg_end", guided_steps, cfg, cfg_start, cfg_end, run),
            ("scheduler", check_choice, "scheduler", scheduler, SCHEDULERS),
            ("on_nan", check_choice, "on_nan", on_nan, ON_NAN),
        ]

    @classmethod
    def foresee(cls, model, positive, negative, latent_image, scheduler, unique_id=None, **_):
        from ..cogvideox.requests import (
            check_conditioning,
            check_length,
            check_request,
            check_windows,
            outside_training,
        )
        from ..cogvideox.schedulers import check_scheduler

        if model is not UNKNOWN and scheduler is not UNKNOWN:
            with of_field("scheduler"):
                check_scheduler(model.scheduler_config, scheduler)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            if conditioning is not UNKNOWN:
                with of_field(name):
                    _embeddings(conditioning, name)
        if UNKNOWN in (model, positive, negative):
            return None
        image = _image_latents(positive, negative)
        check_conditioning(model, image)
        if latent_image is UNKNOWN:
            return None
        samples = latent_image["samples"]
        with of_field("latent_image.length"):
            check_length(model, samples)
        with of_field("latent_image.width"):
            check_request(model, samples, image)
        if scheduler is not UNKNOWN:
            with of_field("scheduler"):
                check_windows(model, samples, scheduler)
        for note in outside_training(model, samples, image):
            # Again when it runs, in the log too.
            host.show(note, unique_id)
        return (_sampled(model, latent_image, samples),)

    def execute(
        self,
        model,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        scheduler,
        denoise,
        dynamic_cfg=False,
        on_nan="heal",
        noise=None,
        cfg_start=0.0,
        cfg_end=1.0,
        unique_id=None,
    ):
        from ..cogvideox.memory import WANTED_BYTES
        from ..cogvideox.sampling import sample

        host.make_room(model.weights, WANTED_BYTES)
        with host.saving_latents():
            samples = sample(
                model,
                _embeddings(positive, "positive"),
                _embeddings(negative, "negative"),
                latent_image["samples"],
                image_latents=_image_latents(positive, negative),
                noise=None if noise is None else noise["samples"],
                noise_mask=latent_image.get("noise_mask"),
                batch_index=latent_image.get("batch_index"),
                seed=seed,
                steps=steps,
                cfg=cfg,
                scheduler=scheduler,
                denoise=denoise,
                dynamic_cfg=dynamic_cfg,
                on_nan=on_nan,
                cfg_start=cfg_start,
                cfg_end=cfg_end,
                events=host.NodeEvents(model.variant.fps),
            )
        return (_sampled(model, latent_image, samples),)


def _sampled(model, latent_image, samples):
    """Return the LATENT that a run gives: what else the one that came in holds goes with it, as in core's samplers."""
    return {**latent_image, "samples": samples, IN_PAIRS: model.variant.in_pairs}


def _image_latents(positive, negative):
    """Return what CogVideoX-1.5 Image to Video, Inpaint or Object Removal put into both conditionings; None without.

    Raises:
        ValueError: if they are no such latents, or differ.
    """
    what, remedy = (
        "The start image's latent in the conditioning",
        "Connect CogVideoX-1.5 Image to Video between the prompt and the sampler.",
    )
    given = [conditioning[0][1].get("concat_latent_image") for conditioning in (positive, negative)]
    given = [
        None if latents is None else check_tensor(latents, what, remedy).to("cpu", torch.float32) for latents in given
    ]
    if (
        given[0] is not None
        and given[1] is not None
        and (given[0].shape != given[1].shape or not given[0].equal(given[1]))
    ):
        raise ValueError(
            "The positive and the negative conditioning hold different start images, and a video starts from one. "
            "Connect both to the same CogVideoX-1.5 Image to Video."
        )
    return given[0] if given[0] is not None else given[1]


def _embeddings(conditioning, name):
    """Return the embeddings ``[B, tokens, width]`` of a CONDITIONING with one entry.

    Raises:
        ValueError: if it has several, or says what this sampler does not read.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"The {name} conditioning holds {len(conditioning)} prompts side by side (Conditioning Combine makes "
            "such), and CogVideoX reads one. Write them as one prompt, or mix them with Conditioning Average."
        )
    embeddings, more = conditioning[0]
    given = {name: more[name] for name in _OF_CORE if more.get(name) is not None}
    unread = [name for name, value in given.items() if torch.is_tensor(value) or value != _OF_CORE[name]]
    if unread:
        raise ValueError(
            f"The {name} conditioning is limited to a part of the video or of the steps, or steered by another model "
            f"({', '.join(unread)}), which CogVideoX-1.5 Sampler does not read, so it would have no effect. Take the "
            "node that says so away, or sample with KSampler behind CogVideoX-1.5 to ComfyUI."
        )
    return embeddings
