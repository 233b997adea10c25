"""What a person can choose, in the nodes' widgets and on the command line alike. Imports nothing, so that the nodes appear in milliseconds."""

from collections.abc import Iterable

#: In which dtype to run: ``auto`` is the trained one where the device has it natively, else the next best that gives the same picture.
DTYPES = ("auto", "bf16", "fp16", "fp32")
#: What to do where the dtype would give a wrong picture: run in a way that gives a right one, run as chosen and warn, or refuse.
ON_MISMATCH = ("fix", "warn", "stop")
#: Where the weights are while a part runs, the fastest first: all on the device; or in the host's memory, with one block, or one layer, at a time on
#: the device.
MODES = ("gpu", "offload_blocks", "offload_layers")
#: ``auto`` is the first of them that fits; ``cpu`` leaves the device alone.
MEMORY = ("auto", *MODES, "cpu")
#: What to do about a result that is not finite.
ON_NAN = ("heal", "stop")
#: Noise schedulers, and the diffusers class of each.
SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
#: What to do about a black video.
ON_BLACK = ("stop", "warn", "pass")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of ``choices``.

    Raises:
        ValueError: with the name, the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, which is not known here, so it cannot be done. Choose one of {', '.join(choices)}.")
