"""CogVideoX-1.5 to ComfyUI: the engine's parts for core's own nodes."""

from . import host
from .base import Node
from .queued import UNKNOWN


class ToComfyUI(Node):
    DISPLAY_NAME = "CogVideoX-1.5 to ComfyUI"
    DESCRIPTION = (
        "Hands the transformer, the text encoder and the VAE to ComfyUI's own nodes as MODEL, CLIP and VAE: KSampler "
        "and other samplers, guiders, Context Windows, EasyCache, LoRA loaders, CLIP Text Encode, VAE Decode. They run "
        "in the engine as they are set up, exact and range-safe, with their LoRAs, attention and cache; a step that is "
        "not finite is healed. In KSampler choose ddim and simple for the reference's own schedule."
    )
    SEARCH_ALIASES = [
        "cogvideo model",
        "cogvideox bridge",
        "ksampler",
        "convert to model",
        "model clip vae",
        "native nodes",
        "K采样器",
    ]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    RETURN_NAMES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The transformer, for KSampler and other nodes that take a MODEL.",
        "The text encoder, for CLIP Text Encode.",
        "The VAE, for VAE Decode and VAE Encode: exact and untiled, whichever of them it is.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {},
            "optional": {
                "model": (
                    "COGVIDEOX_MODEL",
                    {"tooltip": "The transformer, from the model loader or another node; LoRAs and caches go with it."},
                ),
                "text_encoder": (
                    "COGVIDEOX_TEXT_ENCODER",
                    {"tooltip": "The text encoder, from the model loader or CogVideoX-1.5 Quantize."},
                ),
                "vae": ("COGVIDEOX_VAE", {"tooltip": "The video VAE, from the model loader."}),
            },
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def foresee(cls, model=None, text_encoder=None, vae=None, prompt=None, unique_id=None):
        cls._check_wired((model, text_encoder, vae), prompt, unique_id)
        if model not in (None, UNKNOWN):
            _check(model)
        return None

    def execute(self, model=None, text_encoder=None, vae=None, prompt=None, unique_id=None):
        self._check_wired((model, text_encoder, vae), prompt, unique_id)
        if model is not None:
            _check(model)
        return host.to_core(model, text_encoder, vae)

    @classmethod
    def _check_wired(cls, parts, prompt, unique_id):
        """Refuse an output that is connected without the input that it is made of.

        Raises:
            ValueError: naming both.
        """
        names = cls.INPUT_TYPES()["optional"]
        for slot, (name, part) in enumerate(zip(names, parts, strict=True)):
            if part is None and host.is_connected(prompt, unique_id, slot):
                raise ValueError(
                    f"{cls.RETURN_NAMES[slot]} of {cls.DISPLAY_NAME} is connected and its input {name} is not, so "
                    f"there is nothing to hand on. Connect {name} of CogVideoX-1.5 Model Loader."
                )


def _check(model):
    """Refuse a model that only our own sampler can run.

    Raises:
        ValueError: saying why, and what to do.
    """
    from ..cogvideox.handles import check_one_device
    from ..cogvideox.requests import refuse_windows

    refuse_windows(model)
    check_one_device(model)
    if model.variant.in_pairs:
        raise ValueError(
            f"{model.variant.name} reads a mask and a video beside the noise, which ComfyUI's own samplers do not give "
            "it. Connect it to CogVideoX-1.5 Sampler; text encoder and VAE can go through this node."
        )
