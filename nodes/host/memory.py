"""ComfyUI's device and its memory management, which knows of the pack's models as it knows of its own."""

import uuid
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ...cogvideox.choices import AUTO, CPU
from . import comfyui

if TYPE_CHECKING:
    from ...cogvideox.precision.hardware import Hardware
    from ...cogvideox.weights import Weights


def device() -> torch.device:
    """Return the device ComfyUI runs models on, or torch's default, even if nothing can run there: lists are made for
    it."""
    from ...cogvideox.precision.hardware import default_device

    return comfyui.comfy.model_management.get_torch_device() if comfyui.IN_COMFYUI else default_device()


def hardware(memory: str = AUTO) -> "Hardware":
    """Detect what ``device`` can do, or the CPU where ``memory`` says so, and add the dtypes that ComfyUI was started
    with.

    Raises:
        ValueError: for a device that torch was not built for.
    """
    from ...cogvideox.precision.hardware import Hardware

    forced = forced_dtypes(comfyui.comfy.cli_args.args) if comfyui.IN_COMFYUI else {}
    return Hardware.detect(CPU if memory == CPU else device(), forced)


def forced_dtypes(arguments: object) -> dict[str, tuple[torch.dtype, str]]:
    """Read what ComfyUI's own flags ask for: per part, the dtype and the flag. ``arguments`` is
    ``comfy.cli_args.args``."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    flags = {"transformer": "unet", "text_encoder": "text-enc", "vae": "vae"}
    forced: dict[str, tuple[torch.dtype, str]] = {}
    for kind, suffix in flags.items():
        # The general flags come first: ComfyUI turns --force-fp16 into --fp16-unet itself.
        for flag in ("force-fp32", "force-fp16", *(f"{name}-{suffix}" for name in dtypes)):
            if (
                kind not in forced
                and getattr(arguments, flag.replace("-", "_"), False)
                and (kind == "transformer" or flag != "force-fp16")
            ):
                forced[kind] = (dtypes[flag.replace("force-", "").split("-")[0]], f"--{flag}")
    return forced


def make_room(weights: "Weights", room: int = 0) -> None:
    """Tell ComfyUI that a part is about to run on its device, and needs ``room`` bytes beside its weights. ComfyUI
    unloads other models for that, and from now on knows of this one, so as to unload it in its turn when others need
    room."""
    if comfyui.IN_COMFYUI:
        comfyui.comfy.model_management.load_models_gpu(
            [_registered.setdefault(weights, _Registered(weights))], memory_required=room
        )


def owned_by(weights: "Weights", patcher: object) -> None:
    """Note that it is ComfyUI that keeps a part's weights, as those of a patcher of its own."""
    _registered[weights] = patcher


def whole_bytes(weights: "Weights") -> int:
    """Return the bytes that a part takes on its device where it runs whole: what is offloaded by blocks or layers is
    never there as a whole."""
    return weights.nbytes if weights.memory in ("auto", "gpu") else 0


class _Registered:
    """A part in ComfyUI's list of loaded models: it answers what ComfyUI asks of a ``ModelPatcher``, for as long as the
    part's weights live."""

    parent = None

    def __init__(self, weights: "Weights"):
        self._weights = weakref.ref(weights)
        self.load_device, self.offload_device, self.clone_base_uuid = weights.device, torch.device("cpu"), uuid.uuid4()

    @property
    def model(self) -> "Weights | None":
        return self._weights()

    def model_size(self) -> int:
        weights = self.model
        return 0 if weights is None else whole_bytes(weights)

    def loaded_size(self) -> int:
        weights = self.model
        return 0 if weights is None else min(weights.resident, self.model_size())

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def partially_load(self, device, extra_memory=0, force_patch_weights=False) -> int:
        """Load nothing: the engine brings the weights when they run, in the way that fits."""
        return 0

    def partially_unload(self, device, memory_to_free=0, **_) -> int:
        freed = self.loaded_size()
        self.detach()
        return freed

    def detach(self, unpatch_all=True) -> None:
        if unpatch_all and self.model is not None:
            self.model.park()

    def is_clone(self, other) -> bool:
        # In a core graph the same weights stand in the list as a patcher's.
        return self.model is not None and other.weights is self.model if hasattr(other, "weights") else other is self

    def is_dynamic(self) -> bool:
        return False

    def model_patches_to(self, device) -> None:
        pass

    def model_patches_models(self) -> list:
        return []

    def model_dtype(self) -> None:
        return None

    def lowvram_patch_counter(self) -> int:
        return 0


_registered: "weakref.WeakKeyDictionary[Weights, Any]" = weakref.WeakKeyDictionary()
