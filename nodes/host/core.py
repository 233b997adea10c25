"""The pack's way into core's own graphs: what of it needs ComfyUI's model code is imported when a node asks for it."""

from typing import TYPE_CHECKING, Any

from . import comfyui

if TYPE_CHECKING:
    from ...cogvideox.handles import VAE, Model, TextEncoder


def to_core(
    model: "Model | None", text_encoder: "TextEncoder | None", vae: "VAE | None"
) -> tuple[Any | None, Any | None, Any | None]:
    """Make core's MODEL, CLIP and VAE of the parts there are; None for those that are not.

    Raises:
        RuntimeError: outside ComfyUI, and in one that is too old.
        ValueError: for a model that cannot be one.
    """
    _require()
    from . import bridge, core_parts

    return (
        None if model is None else bridge.to_model(model),
        None if text_encoder is None else core_parts.to_clip(text_encoder),
        None if vae is None else core_parts.BridgedVAE(vae),
    )


def watched(model: Any, stop: bool) -> tuple[Any, str, bool]:
    """Return core's CogVideoX watched for steps that are not finite, a report on it, and whether that warns.

    Args:
        stop: whether such a step ends the run, or is told.

    Raises:
        RuntimeError: outside ComfyUI, and in one that is too old.
        ValueError: for another model.
    """
    _require()
    from . import native_check

    return native_check.watched(model, stop)


def _require() -> None:
    if not comfyui.IN_COMFYUI:
        raise RuntimeError(
            "This node works with ComfyUI's own model code, which is not here. Run it in ComfyUI; in a script use the "
            "pack's own sampler."
        )
    import comfy.model_base

    if not hasattr(comfy.model_base, "CogVideoX"):
        raise RuntimeError(
            "This ComfyUI is older than its own CogVideoX model, which this node works with. Update ComfyUI, or use "
            "CogVideoX-1.5 Sampler."
        )
