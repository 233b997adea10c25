"""List what a person can choose, in the nodes' widgets and on the command line alike, and check one value at a time.

Each choice has a name here, so that no code relies on its place in a list. ``combinations`` looks at
settings that exclude each other. Imports no library, so that the nodes appear in milliseconds.
"""

import math
from collections.abc import Iterable

from .words import setting, short

#: The choice that leaves the decision to the program: of dtypes, of memory modes, of the attention's kernel.
AUTO = "auto"
#: In which dtype to run: ``auto`` is the trained one where the device has it natively, else the next best that gives
#: the same picture.
DTYPES = (AUTO, "bf16", "fp16", "fp32")
#: What a check does about what it objects to.
STOP, WARN, PASS = "stop", "warn", "pass"
#: What to do where the dtype would give a wrong picture: choose one that gives a right one, run as chosen and warn, or
#: refuse.
FIX = "fix"
ON_MISMATCH = (FIX, WARN, STOP)
#: The memory modes, which say where the weights are while a part runs: all on the device; or in the host's memory, with
#: one block, or one layer, at a time on the device.
GPU, OFFLOAD_BLOCKS, OFFLOAD_LAYERS = "gpu", "offload_blocks", "offload_layers"
#: The fastest mode first, that with the least memory last.
MODES = (GPU, OFFLOAD_BLOCKS, OFFLOAD_LAYERS)
#: ``auto`` is the fastest mode that fits; ``cpu`` leaves the device alone.
CPU = "cpu"
MEMORY = (AUTO, *MODES, CPU)
#: How weights are made smaller while they load: as int8 or fp8 that is widened for each product, or multiplied as it
#: is.
INT8_WEIGHT_ONLY, FP8_WEIGHT_ONLY = "int8_weight_only", "fp8_weight_only"
INT8_DYNAMIC, FP8_DYNAMIC = "int8_dynamic", "fp8_dynamic"
QUANTIZE = (INT8_WEIGHT_ONLY, FP8_WEIGHT_ONLY, INT8_DYNAMIC, FP8_DYNAMIC)
#: What to do about a result that is not finite.
HEAL = "heal"
ON_NAN = (HEAL, STOP)
#: Noise schedulers, and the diffusers class of each.
DDIM, DPM, DDIM_ORIGIN = "ddim", "dpm", "ddim_origin"
SCHEDULERS = {DDIM: "CogVideoXDDIMScheduler", DPM: "CogVideoXDPMScheduler", DDIM_ORIGIN: "DDIMScheduler"}
#: How what context windows make is joined where they overlap: with weights that rise and fall in a line.
LINEAR = "linear"
BLENDS = (LINEAR,)
#: One-step super-resolution: how a checkpoint was trained to do it. ``auto`` goes by its channels and its name.
DOVE, SPARKVSR = "dove", "sparkvsr"
SUPER_RESOLUTION = (AUTO, DOVE, SPARKVSR)
#: The passes of VOID: the second starts from noise that moves as the first's video does.
FIRST, SECOND = "first", "second"
STAGES = (FIRST, SECOND)
#: What to do about a black video.
ON_BLACK = (STOP, WARN, PASS)
#: Kernels of the attention, and diffusers' name of each; None where a run times them. PyTorch's own choice is named,
#: too: without a name diffusers takes what its environment variable, or another program in this process, has set. All
#: but those of sage, which compute in 8 bits, differ by rounding only. Those of the hub are code that is downloaded
#: when first used.
SDPA, CUDNN, FLASH, FLASH3, XFORMERS, SAGE = "sdpa", "cudnn", "flash", "flash3", "xformers", "sage"
FLASH_HUB, FLASH3_HUB, SAGE_HUB = "flash_hub", "flash3_hub", "sage_hub"
FASTEST = "fastest"
BACKENDS = {
    AUTO: "native",
    SDPA: "native",
    CUDNN: "_native_cudnn",
    FLASH: "flash",
    FLASH3: "_flash_3",
    XFORMERS: "xformers",
    SAGE: "sage",
    FLASH_HUB: "flash_hub",
    FLASH3_HUB: "_flash_3_hub",
    SAGE_HUB: "sage_hub",
    FASTEST: None,
}
#: Methods that reuse what changes little from step to step.
TEACACHE, FIRST_BLOCK, TAYLORSEER = "teacache", "first_block", "taylorseer"
PAB, FASTER_CACHE = "pab", "faster_cache"
CACHES = (TEACACHE, FIRST_BLOCK, TAYLORSEER, PAB, FASTER_CACHE)
#: How the transformer's blocks are compiled, in torch's names: within a minute or so, or after trying more kernels.
COMPILE_DEFAULT, COMPILE_TUNED = "default", "max-autotune-no-cudagraphs"
COMPILE_MODES = (COMPILE_DEFAULT, COMPILE_TUNED)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of ``choices``, whatever else is set (``combinations.check_combination`` looks at
    several settings together).

    Raises:
        ValueError: with the name, the value and the choices.
    """
    name, choices = setting(name), list(choices)
    if value not in choices:
        raise ValueError(
            f"{name} is {short(repr(value))}, which is not known here, so it cannot be done. Choose one of "
            f"{', '.join(choices)}."
        )


def check_share(name: str, value: float, remedy: str, meaning: str = "") -> None:
    """Refuse a number that is no share.

    Args:
        remedy: what to do, a sentence.
        meaning: what it is a share of, a clause; "" where the name says it.

    Raises:
        ValueError: outside 0..1, or NaN.
    """
    if not 0.0 <= value <= 1.0:
        name, what = setting(name), f": {meaning}" if meaning else ""
        raise ValueError(f"{name} is {value}, but it is a share between 0 and 1{what}. {remedy}")


def steps_between(start: float, end: float, steps: int) -> range:
    """Return the steps of a run between two shares of them."""
    # A share of the steps that is a whole number of them must not miss it by a rounding error.
    return range(math.ceil(start * steps - 1e-9), math.ceil(end * steps - 1e-9))
