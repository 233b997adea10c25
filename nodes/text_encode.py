"""CogVideoX-1.5 Text Encode: a prompt to conditioning."""

import logging

from . import host
from .base import Node
from .queued import UNKNOWN

logger = logging.getLogger(__name__)


class TextEncode(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Text Encode"
    DESCRIPTION = (
        "Encodes a prompt with T5 as CogVideoX was trained with it: 226 tokens, padded, no mask. Write English, in "
        "full sentences; the model was trained on long descriptions. A prompt that is too long is cut, and the log "
        "says which part."
    )
    SEARCH_ALIASES = [
        "CogVideo TextEncode",
        "FunTextBox",
        "cogvideo prompt",
        "cogvideox prompt",
        "t5 encode",
        "clip text encode",
        "positive",
        "negative",
        "提示词",
        "文生视频",
    ]
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The prompt's embeddings, for the sampler's positive or negative input.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "text_encoder": (
                    "COGVIDEOX_TEXT_ENCODER,CLIP",
                    {"tooltip": "The text encoder of the model loader, or a T5 loaded by ComfyUI's CLIP loader."},
                ),
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "tooltip": (
                            "What the video shows, in English; for the negative prompt, what it should not. At most "
                            "226 tokens (150 words)."
                        ),
                    },
                ),
            }
        }

    @classmethod
    def foresee(cls, text_encoder, prompt):
        # The embeddings are the run's; the sampler asks whether there is an image beside them.
        return ([[UNKNOWN, {}]],)

    def execute(self, text_encoder, prompt):
        return ([[embeddings_of(text_encoder, prompt), {}]],)


def embeddings_of(text_encoder, prompt):
    """Encode a prompt with our text encoder or a CLIP of ComfyUI's: ``[1, tokens, width]``."""
    from ..cogvideox.finite import check_finite
    from ..cogvideox.handles import TextEncoder
    from ..cogvideox.text import encode_prompt
    from ..cogvideox.variants import DEFAULT_TEXT_TOKENS

    text_encoder = host.own_text_encoder(text_encoder)
    if not isinstance(text_encoder, TextEncoder):
        embeddings = host.encode_with_clip(text_encoder, prompt, DEFAULT_TEXT_TOKENS)
        check_finite(
            embeddings,
            "What ComfyUI's T5 made of the prompt",
            "Start ComfyUI with --bf16-text-enc or --fp32-text-enc, or use ours.",
        )
        return embeddings
    host.make_room(text_encoder.weights)
    encoded = encode_prompt(text_encoder, prompt, events=host.NodeEvents())
    for note in encoded.notes:
        logger.warning("%s", note)
    return encoded.embeddings
