"""What a person can choose, in the nodes' widgets and on the command line alike. Imports no library, so that the nodes
appear in milliseconds."""

from collections.abc import Iterable

from .words import short

#: In which dtype to run: ``auto`` is the trained one where the device has it natively, else the next best that gives
#: the same picture.
DTYPES = ("auto", "bf16", "fp16", "fp32")
#: What to do where the dtype would give a wrong picture: run in a way that gives a right one, run as chosen and warn,
#: or refuse.
ON_MISMATCH = ("fix", "warn", "stop")
#: Where the weights are while a part runs, the fastest first: all on the device; or in the host's memory, with one
#: block, or one layer, at a time on the device.
MODES = ("gpu", "offload_blocks", "offload_layers")
#: ``auto`` is the first of them that fits; ``cpu`` leaves the device alone.
MEMORY = ("auto", *MODES, "cpu")
#: How weights are made smaller while they load: as int8 or fp8 that is widened for each product, or multiplied as it
#: is.
QUANTIZE = ("int8_weight_only", "fp8_weight_only", "int8_dynamic", "fp8_dynamic")
#: What to do about a result that is not finite.
ON_NAN = ("heal", "stop")
#: Noise schedulers, and the diffusers class of each.
SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
#: What to do about a black video.
ON_BLACK = ("stop", "warn", "pass")
#: Kernels of the attention, and diffusers' name of each; None where PyTorch chooses. All but sage, which computes in 8
#: bits, differ by rounding only.
BACKENDS = {
    "auto": None,
    "sdpa": "native",
    "cudnn": "_native_cudnn",
    "flash": "flash",
    "flash3": "_flash_3",
    "xformers": "xformers",
    "sage": "sage",
}
#: Ways to reuse what changes little from step to step.
CACHES = ("first_block", "taylorseer", "pab", "faster_cache")
#: Ways to compile the transformer's blocks, torch's names.
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of ``choices``.

    Raises:
        ValueError: with the name, the value and the choices.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f"{name} is {short(repr(value))}, which is not known here, so it cannot be done. Choose one of "
            f"{', '.join(choices)}."
        )
