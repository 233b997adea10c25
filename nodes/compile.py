"""CogVideoX-1.5 Compile: the transformer's blocks through torch.compile."""

from ..cogvideox.choices import COMPILE_DEFAULT, COMPILE_MODES, check_choice
from . import host
from .base import Node
from .queued import UNKNOWN


class Compile(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Compile"
    DESCRIPTION = (
        "Compiles the transformer's blocks with torch.compile: faster steps and the same video within the dtype's "
        "rounding, for a longer first step. One block is compiled and serves for all; the code stays for the next "
        "runs of the same size until ComfyUI ends. Where no compiler is, the run goes on without and says so."
    )
    SEARCH_ALIASES = [
        "CogVideo TorchCompileSettings",
        "cogvideo compile",
        "cogvideox compile",
        "torch compile",
        "inductor",
        "triton",
        "speed up",
        "加速",
    ]
    RETURN_TYPES = ("COGVIDEOX_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The transformer with compiled blocks, for the sampler.",)

    FIELD = "mode"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "COGVIDEOX_MODEL",
                    {
                        "tooltip": (
                            "The transformer, from the model loader, a LoRA loader or another node that changes it."
                        )
                    },
                ),
                "mode": (
                    list(COMPILE_MODES),
                    {
                        "default": COMPILE_DEFAULT,
                        "tooltip": (
                            "default: compiles in a minute or so. max-autotune-no-cudagraphs: tries more ways to run "
                            "each product, which takes several minutes once."
                        ),
                    },
                ),
                "dynamic": (
                    "BOOLEAN",
                    {
                        "advanced": True,
                        "default": False,
                        "tooltip": (
                            "Off: compiled anew for each size and length, to the fastest code. On: compiled once for "
                            "all of them."
                        ),
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, mode=None):
        return [("mode", check_choice, "mode", mode, COMPILE_MODES)]

    @classmethod
    def foresee(cls, model, mode, dynamic):
        from ..cogvideox.handles import with_compile
        from ..cogvideox.modules.compiled import Compiled

        return (with_compile(model, Compiled(mode, dynamic)),) if UNKNOWN not in (model, mode, dynamic) else None

    def execute(self, model, mode, dynamic=False):
        from ..cogvideox.handles import with_compile
        from ..cogvideox.modules.compiled import Compiled, compile_text

        compiled = Compiled(mode, dynamic)
        changed = with_compile(model, compiled)
        report = compile_text(compiled, model.weights.device)
        host.tell(report, warns=report != compiled.text)
        return (changed,)
