"""CogVideoX-1.5 Model Loader: a checkpoint's transformer, text encoder and VAE, and a report of their dtypes."""

import logging

from ..cogvideox.handles import open_handles
from ..cogvideox.precision.policy import CHOICES, ON_MISMATCH, scan_parts
from ..cogvideox.precision.verdict import OK
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
        "Per part: the dtype it is stored in, was trained in and will run in, a verdict, and what to do. Also shown on the node.",
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
                        "tooltip": "The dtype to run in. auto: the one the weights were trained in where your card has it, else the fastest that "
                        "gives the same picture (range-safe fp16 on cards without bf16). CogVideoX-1.5 was trained in bf16; plain fp16 turns it "
                        "black.",
                    },
                ),
            },
            "optional": {
                "on_mismatch": (
                    list(ON_MISMATCH),
                    {
                        "default": "fix",
                        "tooltip": "If the dtype does not suit the weights or the card. fix: run in a way that gives a right picture, and say what "
                        "was changed. warn: run as chosen. stop: an error before a second is spent.",
                    },
                ),
                "scan_weights": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Read every weight once and report NaN, Inf, and what an fp16 copy would lose. Takes as long as reading the "
                        "files; can be cancelled.",
                    },
                ),
            },
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

    def execute(self, model, dtype="auto", on_mismatch="fix", scan_weights=False):
        handles = open_handles(host.checkpoint_path(model), dtype, host.hardware(), on_mismatch)
        plan = scan_parts(handles.checkpoint, handles.plan, on_progress=host.progress()) if scan_weights else handles.plan
        logger.log(logging.INFO if plan.verdict == OK else logging.WARNING, "%s", plan.text)
        host.show(plan.text)
        return handles.model, handles.text_encoder, handles.vae, plan.text
