"""CogVideoX-1.5 LoRA Loader: a LoRA for the transformer."""

import os

from . import host
from .base import Node
from .queued import UNKNOWN


class LoraLoader(Node):
    DISPLAY_NAME = "CogVideoX-1.5 LoRA Loader"
    DESCRIPTION = (
        "Has the transformer run with a LoRA (formats of diffusers, peft, finetrainers, kohya, CogVideoX-Fun and "
        "SAT). It is added while the model runs and the weights stay as they are: nodes can be chained, another "
        "branch of the graph can use another LoRA, and taking the node away restores the model exactly. Works with "
        "every dtype and file format."
    )
    SEARCH_ALIASES = [
        "CogVideo LoraSelect",
        "Load CogVideoX-Fun Lora",
        "LoraLoaderModelOnly",
        "lora stack",
        "cogvideo lora",
        "cogvideox lora",
        "load lora",
        "style",
        "adapter",
        "加载 LoRA",
    ]
    RETURN_TYPES = ("COGVIDEOX_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The transformer with the LoRA, for the sampler or another LoRA loader.",)

    FIELD = "lora_name"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "COGVIDEOX_MODEL",
                    {"tooltip": "The transformer, from the model loader or another LoRA loader."},
                ),
                "lora_name": (
                    host.loras(),
                    {"tooltip": "A LoRA trained on this CogVideoX model, in models/loras or models/CogVideo/loras."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -100.0,
                        "max": 100.0,
                        "step": 0.05,
                        # Fine enough for the strengths of migrated workflows, such as 1 / 256.
                        "round": 0.000001,
                        "tooltip": (
                            "How strongly it is applied: 1 as it was trained, 0 not at all, negative the other way."
                        ),
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, lora_name=None):
        return [("lora_name", host.lora_path, lora_name)]

    @classmethod
    def foresee(cls, model, lora_name, strength):
        from ..cogvideox.handles import with_lora

        known = UNKNOWN not in (model, lora_name, strength)
        return (with_lora(model, host.lora_path(lora_name), strength),) if known else None

    @classmethod
    def IS_CHANGED(cls, lora_name=None, **_):
        def look():
            path = host.lora_path(lora_name)
            stat = path.stat() if os.path.exists(path) else None
            return str(path), stat and (stat.st_size, stat.st_mtime_ns)

        return cls.fingerprint({"lora_name": lora_name}, look)

    def execute(self, model, lora_name, strength=1.0):
        from ..cogvideox.handles import with_lora

        changed = with_lora(model, host.lora_path(lora_name), strength)
        report = changed.loras[-1].text
        host.tell(report)
        return (changed,)
