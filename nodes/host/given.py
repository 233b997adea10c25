"""What core's own nodes hand to ours: a handle of the engine's that is inside of it, or core's CogVideoX VAE, whose
weights are used where they are."""

from typing import TYPE_CHECKING, Any

import torch

from ...cogvideox.words import short
from . import memory

if TYPE_CHECKING:
    from ...cogvideox.handles import VAE
    from ...cogvideox.weights import Weights

#: A clip's frames are 8N+1 where the VAE alone is known: both families of CogVideoX make such, 1.5 only 16N+1.
_FRAME_STEP = 8


def own_text_encoder(value: Any) -> Any:
    """Return the handle in a CLIP of CogVideoX-1.5 to ComfyUI; anything else as it is."""
    return getattr(getattr(value, "cond_stage_model", None), "cogvideox15", value)


def own_vae(value: Any) -> "VAE":
    """Return the handle of a VAE: ours as it is, that in a VAE of CogVideoX-1.5 to ComfyUI, or one that shares the
    weights of core's CogVideoX VAE.

    Raises:
        ValueError: for another model's VAE, by name.
    """
    from ...cogvideox.handles import VAE

    if isinstance(value, VAE):
        return value
    module: Any = getattr(value, "first_stage_model", None)
    inside = getattr(module, "cogvideox15", None)
    if inside is not None:
        return inside
    cls = type(module)
    if cls.__name__ != "AutoencoderKLCogVideoX":
        raise ValueError(
            f"The VAE that is connected is another model's ({short(cls.__module__)}.{short(cls.__name__)}), and "
            "CogVideoX's latents are its own VAE's. Connect the vae of CogVideoX-1.5 Model Loader, or load CogVideoX's "
            "VAE."
        )
    return VAE(_shared_weights(value, module), _FRAME_STEP)


def _shared_weights(core: Any, module: torch.nn.Module) -> "Weights":
    from ...cogvideox.dtypes import Precision
    from ...cogvideox.precision.hardware import Hardware
    from ...cogvideox.weights import SharedWeights

    weights = SharedWeights(
        "vae",
        module.state_dict,
        "ComfyUI's VAE",
        Precision(core.vae_dtype),
        Hardware.detect(core.device),
    )
    memory.owned_by(weights, core.patcher)
    return weights
