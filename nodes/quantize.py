"""CogVideoX-1.5 Quantize: the transformer's weights, and T5's, in int8 or fp8."""

from ..cogvideox.choices import QUANTIZE
from . import host
from .base import Node
from .queued import UNKNOWN


class Quantize(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Quantize"
    DESCRIPTION = (
        "Keeps the weights of attention and feed-forward in int8 or fp8, a byte each, made of the checkpoint while it "
        "loads; the layers that rounding breaks stay as they are. Reports what that saves and how far the weights are "
        "off. Works with every dtype, memory mode and LoRA; taking the node away restores the model exactly. The "
        "weights are read here, once."
    )
    SEARCH_ALIASES = [
        "cogvideo quantize",
        "cogvideox quantize",
        "int8",
        "fp8",
        "torchao",
        "low vram",
        "省显存",
        "低显存",
    ]
    RETURN_TYPES = ("COGVIDEOX_MODEL", "COGVIDEOX_TEXT_ENCODER", "STRING")
    RETURN_NAMES = ("model", "text_encoder", "report")
    OUTPUT_TOOLTIPS = (
        "The transformer, quantized, for the sampler or a LoRA loader.",
        "The text encoder that was connected, quantized, for CogVideoX-1.5 Text Encode.",
        "Per part: its size before and after, and the relative error of its weights. Also shown on the node.",
    )

    FIELD = "method"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("COGVIDEOX_MODEL", {"tooltip": "The transformer, from the model loader or a LoRA loader."}),
                "method": (
                    list(QUANTIZE),
                    {
                        "tooltip": (
                            "int8_weight_only: half the memory of bf16, on any card, nearest to the original. "
                            "fp8_weight_only: the same size, a few times farther off. int8_dynamic, fp8_dynamic: the "
                            "products are of int8 or fp8 too, which can be faster on cards that have them (int8: RTX "
                            "20xx and newer; fp8: RTX 40xx, H100 and newer) and loses more."
                        )
                    },
                ),
            },
            "optional": {
                "text_encoder": (
                    "COGVIDEOX_TEXT_ENCODER",
                    {
                        "tooltip": (
                            "T5, if it is to be quantized too. With a dynamic method its weights alone are: it runs "
                            "only once per prompt."
                        )
                    },
                ),
            },
        }

    @classmethod
    def checks(cls, method=None):
        return [("method", _check_method, method)]

    @classmethod
    def foresee(cls, model, method, text_encoder=None):
        from ..cogvideox.handles import quantized

        if method is UNKNOWN:
            return None
        handles = (model, text_encoder)
        return *(handle and (handle if handle is UNKNOWN else quantized(handle, method)) for handle in handles), UNKNOWN

    def execute(self, model, method, text_encoder=None):
        from ..cogvideox.handles import quantized

        # Both are checked before minutes are spent on one.
        handles = [handle and quantized(handle, method) for handle in (model, text_encoder)]
        report = "\n".join(
            handle.weights.quantization_text(host.NodeEvents()) for handle in handles if handle is not None
        )
        host.tell(report)
        return (*handles, report)


def _check_method(method):
    from ..cogvideox.precision.quantizing import check_method

    # Asked for here, not in ``checks``: a card that nothing can run on is said as any other objection.
    check_method(method, host.hardware())
