"""Find out what a device computes in: bf16, fp16, fp8 and int8, natively, by emulation, or not at all.

Sources: CUDA C++ Programming Guide, "Arithmetic Instructions" (bf16 from compute capability 8.0; fp16 at full rate at
5.3, 6.0, 6.2 and from 7.0; fp8 tensor cores from 8.9), NVIDIA's Turing whitepaper (int8 tensor cores, which torch's
products of int8 run on, from 7.5), AMD's CDNA and RDNA ISA guides (bf16 matrix instructions from CDNA 1 and
RDNA 3) and hipBLASLt's table of data types (fp8), Apple's Metal feature set (bfloat from macOS 14).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..words import short

NATIVE, EMULATED, ABSENT = "native", "emulated", "absent"

# Turing cards without tensor cores, whose half-precision convolutions are known to give NaN.
_BROKEN_HALF_CONVOLUTIONS = ("GTX 16", "T500", "T550", "T600", "T1000", "T1200", "T2000", "MX450", "MX550", "CMP 30HX")
_OLD_ROCM = ("gfx8", "gfx900", "gfx906", "gfx10")


@dataclass(frozen=True)
class Hardware:
    """The device a model will run on and what it computes in.

    Attributes:
        name: what to call it.
        bf16, fp16: ``native``, ``emulated`` (right but slow) or ``absent``.
        fp8, int8: ``native`` or ``absent``, for matrix products, of fp8 those of ``float8_e4m3fn``; weights can be
            stored in them on any device, but fp8 not on Apple's.
        half_convolutions: whether convolutions in fp16 give right results (they do not on GTX 16xx).
        forced: per part, the dtype that the program around us was started with and the flag that said so; ``auto``
            follows it.
    """

    device: torch.device
    name: str
    bf16: str = NATIVE
    fp16: str = NATIVE
    fp8: str = ABSENT
    int8: str = ABSENT
    half_convolutions: bool = True
    forced: Mapping[str, tuple[torch.dtype, str]] = field(default_factory=dict)

    def support(self, dtype: torch.dtype) -> str:
        """Return ``native``, ``emulated`` or ``absent``."""
        return {torch.bfloat16: self.bf16, torch.float16: self.fp16}.get(dtype, NATIVE)

    @property
    def text(self) -> str:
        return f"{self.name} (bf16 {self.bf16}, fp16 {self.fp16}, fp8 {self.fp8})"

    @classmethod
    def detect(
        cls, device: torch.device | str | None = None, forced: Mapping[str, tuple[torch.dtype, str]] | None = None
    ) -> "Hardware":
        """Ask torch what ``device`` (default: the GPU if there is one) computes in.

        Raises:
            ValueError: for a device that torch does not know or does not find, or was not built for.
        """
        device = default_device() if device is None else device
        if isinstance(device, str):
            device = _chosen(device)
        forced = dict(forced or {})
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    f"The device is {device}, but this torch ({torch.__version__}) sees no GPU, so nothing can run "
                    "there. Install the torch build for your card, or choose cpu."
                )
            name = torch.cuda.get_device_name(device)
            if torch.version.hip:
                return cls(
                    device, name, forced=forced, **rocm_support(torch.cuda.get_device_properties(device).gcnArchName)
                )
            capability = torch.cuda.get_device_capability(device)
            _check_build(name, capability)
            with torch.cuda.device(device):
                emulates = torch.cuda.is_bf16_supported()
            return cls(device, name, forced=forced, **cuda_support(name, capability, emulates))
        if device.type == "mps":
            return cls(
                device,
                "Apple GPU (MPS)",
                NATIVE if torch.backends.mps.is_macos_or_newer(14, 0) else ABSENT,
                forced=forced,
            )
        if device.type == "cpu":
            return cls(device, "CPU", forced=forced, **_cpu_support())
        if device.type == "xpu":
            return cls(
                device,
                torch.xpu.get_device_name(device),
                NATIVE if torch.xpu.is_bf16_supported() else EMULATED,
                forced=forced,
            )
        if device.type == "privateuseone":
            # DirectML's tensors are of 16 bits in fp16 only; ComfyUI's should_use_bf16 and should_use_fp16 say the
            # same. What was trained in bf16 then runs in range-safe fp16, and the VAE's fp16 is checked.
            return cls(device, "DirectML", bf16=ABSENT, forced=forced)
        return cls(device, device.type.upper(), forced=forced)


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU, whatever they compute in."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _check_build(name: str, capability: tuple[int, int]) -> None:
    """Refuse an NVIDIA card that torch was built without code for: the first thing that runs there would fail with "no
    kernel image".

    Raises:
        ValueError: with the card's compute capability, and what torch was built for.
    """
    built_for = torch.cuda.get_arch_list()
    if not has_code(built_for, capability):
        raise ValueError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, and this torch ({torch.__version__}) was "
            f"built for {', '.join(built_for)}, so nothing can run there. Install the torch build for your card "
            "(https://pytorch.org/get-started/locally): for a new card a newer CUDA, for an old card an older one. Or "
            "choose cpu."
        )


def has_code(built_for: Iterable[str], capability: tuple[int, int]) -> bool:
    """Return whether code that was built for some architectures runs on an NVIDIA card.

    By the CUDA C++ Programming Guide, "Application Compatibility": binary code (``sm_86``) runs on cards of the same
    major version and no lower minor one, PTX (``compute_90``) on all later cards too. What ends in ``a`` runs on
    that one capability only, what ends in ``f`` on those of the same major version.

    Args:
        built_for: as ``torch.cuda.get_arch_list`` has them.
    """
    known = [found for name in built_for if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name))]
    for kind, major, minor, suffix in (found.groups() for found in known):
        built = int(major), int(minor)
        if suffix == "a":
            runs = built == capability
        elif kind == "sm" or suffix == "f":
            runs = built[0] == capability[0] and built <= capability
        else:
            runs = built <= capability
        if runs:
            return True
    # Of names that are none of NVIDIA's nothing is known.
    return not known


def _chosen(name: str) -> torch.device:
    """Find the device that a person names.

    Raises:
        ValueError: naming what there is, for one that torch does not know, or that is not there.
    """
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        kind = accelerator.type
        there += [
            other
            for other in (kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count())))
            if other not in there
        ]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"The device is '{short(name)}', which torch does not know, so nothing can run there. Here are "
            f"{', '.join(there)}."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        # ``detect`` can say more than that it is not there.
        return device
    if device.type not in {other.partition(":")[0] for other in there} or (
        device.index is not None and device.index > 0 and str(device) not in there
    ):
        raise ValueError(
            f"The device is {device}, which is not there, so nothing can run there. Here are {', '.join(there)}."
        )
    return device


def cuda_support(name: str, capability: tuple[int, int], emulates_bf16: bool = True) -> dict:
    """Return what an NVIDIA card computes in, by its compute capability and whether torch emulates bf16 on it: the
    arguments of ``Hardware``."""
    # Of Turing; older ones have none either, and newer ones all do.
    lacks_tensor_cores = any(card in name for card in _BROKEN_HALF_CONVOLUTIONS)
    fast_fp16 = capability >= (7, 0) or capability in {(5, 3), (6, 0), (6, 2)}
    return dict(
        bf16=NATIVE if capability >= (8, 0) else EMULATED if emulates_bf16 else ABSENT,
        fp16=NATIVE if fast_fp16 else EMULATED,
        fp8=NATIVE if capability >= (8, 9) else ABSENT,
        int8=NATIVE if capability >= (7, 5) and not lacks_tensor_cores else ABSENT,
        half_convolutions=not lacks_tensor_cores,
    )


def rocm_support(architecture: str) -> dict:
    """Return what an AMD card computes in, by its architecture (``gfx942:sramecc+:xnack-``): the arguments of
    ``Hardware``."""
    old = architecture.startswith(_OLD_ROCM)
    # gfx94 (MI300) multiplies another fp8, whose exponents are off by one (``float8_e4m3fnuz``), only.
    fp8 = architecture.startswith(("gfx95", "gfx12"))
    int8 = architecture.startswith(("gfx90a", "gfx94", "gfx95"))
    return dict(
        bf16=EMULATED if old else NATIVE, fp16=NATIVE, fp8=NATIVE if fp8 else ABSENT, int8=NATIVE if int8 else ABSENT
    )


def _cpu_support() -> dict:
    """Return what this CPU computes in: the arguments of ``Hardware``."""

    def has(*instructions: str) -> str:
        return (
            NATIVE
            if any(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in instructions)
            else EMULATED
        )

    return dict(bf16=has("avx512_bf16", "amx_tile"), fp16=has("amx_fp16"), int8=NATIVE)
