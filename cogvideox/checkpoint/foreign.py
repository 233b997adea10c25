"""What is told of files that are not read here: another model's, or packed by a program whose packing is not known."""

from pathlib import Path

from ..words import short


class ForeignError(ValueError):
    """What is on disk is another model's, or of a kind that is not run here: no download of it would help."""


#: Dtypes of safetensors that only packed weights and their scales have -> the program that packs so
#: (github.com/huggingface/safetensors, safetensors/src/tensor.rs).
PACKED_DTYPES = {
    "F8_E8M0": "ComfyUI or torchao (MXFP8 or MXFP4)",
    "F4": "ComfyUI or torchao (NVFP4 or MXFP4)",
    "F6_E2M3": "torchao (MXFP6)",
    "F6_E3M2": "torchao (MXFP6)",
    "F8_E4M3FNUZ": "a program for AMD's cards (fp8 fnuz)",
    "F8_E5M2FNUZ": "a program for AMD's cards (fp8 fnuz)",
}


def packed_error(program: str, source: Path, seen: str) -> ForeignError:
    """Weights packed by a program whose packing is not read here."""
    return ForeignError(
        f"{short(source, 400)} is packed by {program} ({seen}), and such weights are not read here. Choose the same "
        "model in bf16, fp16 or fp8, or as GGUF; CogVideoX-1.5 Quantize in ComfyUI, or --quantize of generate.py, "
        "makes it small here."
    )
