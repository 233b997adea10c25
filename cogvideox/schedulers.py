"""diffusers' schedulers as the sampler uses them: with the checkpoint's own noise schedule."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .checkpoint.configs import known_fields
from .choices import DDIM_ORIGIN, SCHEDULERS, check_choice, check_share
from .variants import TRAINED_STEPS
from .words import setting

#: ``snr_shift_scale`` of diffusers' ``CogVideoXDDIMScheduler`` where a config has none.
_SHIFT = 3.0


def make_scheduler(config: Mapping, name: str):
    """A fresh diffusers scheduler with the checkpoint's noise schedule.

    Raises:
        ValueError: as ``check_scheduler``.
    """
    check_scheduler(config, name)
    import diffusers

    # Checked when the checkpoint was opened (``check_config``): what no table names is not used.
    known = known_fields("scheduler", config)
    if name != DDIM_ORIGIN:
        return getattr(diffusers, SCHEDULERS[name]).from_config(known)
    # What a config leaves out has CogVideoX's default, not that of the other class.
    known = known_fields("scheduler", diffusers.CogVideoXDDIMScheduler.from_config(known).config)
    known.pop("snr_shift_scale")
    # CogVideoX's own schedulers have that flag and never clip.
    return diffusers.DDIMScheduler.from_config(known | {"clip_sample": config.get("clip_sample") is True})


def check_scheduler(config: Mapping, name: str) -> None:
    """Refuse a scheduler that the checkpoint's noise schedule cannot be run with.

    Raises:
        ValueError: for a name that is not one of ``SCHEDULERS``, and for ``ddim_origin`` where the noise schedule is
            shifted, which ``DDIMScheduler`` would ignore: the video would be another (relative L2 0.16 at 2b's shift).
    """
    check_choice("scheduler", name, SCHEDULERS)
    shift = known_fields("scheduler", config).get("snr_shift_scale", _SHIFT)
    if name == DDIM_ORIGIN and shift != 1:
        raise ValueError(
            f"The scheduler ddim_origin is diffusers' DDIMScheduler, which knows no snr_shift_scale, and this "
            f"checkpoint was trained with one of {shift}: the video would come out wrong. Choose ddim."
        )


def schedule_timesteps(scheduler, steps: int, denoise: float) -> torch.Tensor:
    """Set the scheduler to ``steps`` and return the timesteps that ``denoise`` leaves to run, as ``steps_to_run``
    counts them.

    Raises:
        ValueError: if the noise schedule has no such timesteps.
    """
    trained = scheduler.config.num_train_timesteps
    count = steps_to_run(steps, denoise, trained)
    scheduler.set_timesteps(steps)
    # "trailing" adds up fractions: at 61 steps, 103 and others diffusers' makes one more, at a timestep of -1, which
    # would end a video in noise.
    scheduler.timesteps = scheduler.timesteps[:steps]
    if len(scheduler.timesteps) < steps or not 0 <= scheduler.timesteps.min() <= scheduler.timesteps.max() < trained:
        raise ValueError(
            f"The noise schedule of this checkpoint cannot be run in {steps} steps: with its steps_offset of "
            f"{scheduler.config.steps_offset} they would pass the {trained} timesteps it was trained with. Set steps "
            "to 50, or download scheduler/scheduler_config.json again."
        )
    return scheduler.timesteps[steps - count :]


def steps_to_run(steps: int, denoise: float, trained: int = TRAINED_STEPS) -> int:
    """How many of ``steps`` run at this ``denoise``: ``int(steps * denoise)``, as the reference's video-to-video
    pipeline counts them.

    Raises:
        ValueError: if no step would run, or more than the model was trained with.
    """
    if not 1 <= steps <= trained:
        raise ValueError(
            f"steps is {steps}; the model's noise schedule has 1 to {trained}, so this cannot be run. The model card "
            "uses 50."
        )
    check_share("denoise", denoise, "Set it to 1 to make all.", "how much of the video is made anew")
    count = min(int(steps * denoise), steps)
    if count == 0:
        raise ValueError(
            f"{setting('denoise')} {denoise} of {steps} steps leaves no step to run, so nothing would change. Raise "
            f"{setting('denoise')} to {math.ceil(10_000 / steps) / 10_000} or more, or steps."
        )
    return count


def advance(
    scheduler: Any,
    prediction: torch.Tensor,
    previous_clean: torch.Tensor | None,
    timestep: torch.Tensor,
    earlier: torch.Tensor | None,
    latents: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step: return the next latents and the predicted clean ones. The schedulers differ only in what they are
    told, and in that dpm draws noise.

    Args:
        previous_clean: the clean latents predicted one step earlier, None at the first step.
        timestep, earlier: of this step and of the one before, None at the first step.
    """
    if type(scheduler).__name__ == SCHEDULERS["dpm"]:
        with NoiseInFp32():
            return scheduler.step(
                prediction, previous_clean, timestep, earlier, latents, generator=generator, return_dict=False
            )
    return scheduler.step(prediction, timestep, latents, generator=generator, return_dict=False)


class NoiseInFp32(TorchFunctionMode):
    """Noise that a library draws in this ``with`` block is drawn in fp32 and cast to the dtype it asks for: torch
    before 2.13 draws other numbers in 16 bits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.randn or kwargs.get("dtype") in (None, torch.float32):
            return function(*args, **kwargs)
        return function(*args, **kwargs | {"dtype": torch.float32}).to(kwargs["dtype"])
