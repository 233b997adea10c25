"""CogVideoX-1.5 Model Loader: a checkpoint's transformer, text encoder and VAE, and a report of their dtypes."""

import logging

from ..cogvideox.handles import open_handles
from ..cogvideox.precision.policy import CHOICES
from . import host
from .base import Node

logger = logging.getLogger(__name__)


class ModelLoader(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Model Loader"
    DESCRIPTION = (
        "Opens a CogVideoX checkpoint (a folder in diffusers layout in models/CogVideo or models/diffusers), checks what its weights are stored "
        "in and were trained in, and decides in which dtype each part runs. Weights are read when a node first needs them, not here."
    )
    SEARCH_ALIASES = ["cogvideo", "cogvideox", "load cogvideox", "text to video", "checkpoint loader"]
    RETURN_TYPES = ("COGVIDEOX_MODEL", "COGVIDEOX_TEXT_ENCODER", "COGVIDEOX_VAE", "STRING")
    RETURN_NAMES = ("model", "text_encoder", "vae", "report")
    OUTPUT_TOOLTIPS = (
        "The transformer, for the sampler.",
        "The T5 text encoder, for CogVideoX-1.5 Text Encode.",
        "The video VAE, for CogVideoX-1.5 VAE Decode.",
        "Per part: the dtype it is stored in, was trained in, and will run in. Connect it to Preview as Text to read it.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    list(host.checkpoints()),
                    {"tooltip": "A CogVideoX checkpoint folder in models/CogVideo or models/diffusers. Only real CogVideoX checkpoints are listed."},
                ),
                "dtype": (
                    list(CHOICES),
                    {
                        "default": "auto",
                        "tooltip": "The dtype to run in. auto: the one the weights were trained in, where your device can compute in it, else fp32. "
                        "CogVideoX-1.5 was trained in bf16; running such weights in fp16 is the usual cause of a black video.",
                    },
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model):
        try:
            host.checkpoint_path(model)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, model, **_):
        folder = host.checkpoint_path(model)
        return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*/*")))

    def execute(self, model, dtype="auto"):
        handles = open_handles(host.checkpoint_path(model), dtype, host.hardware())
        logger.info("%s", handles.plan.text)
        return handles.model, handles.text_encoder, handles.vae, handles.plan.text
