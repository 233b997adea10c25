"""The nodes that a migrated workflow has, as its file describes them: a table that a test holds against the nodes
themselves."""

from typing import NamedTuple

from .workflow import OURS


class Input(NamedTuple):
    """An input of a node: a widget if it has a default, else a socket."""

    name: str
    type: str
    default: object = None
    optional: bool = False


class Kind(NamedTuple):
    """A node as a workflow's file has to describe it."""

    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]


#: The nodes that are written: ours, in their own order, and two of ComfyUI's.
KINDS = {
    OURS: Kind(
        (
            Input("model", "COMBO", ""),
            Input("dtype", "COMBO", "auto"),
            Input("on_mismatch", "COMBO", "fix", True),
            Input("memory", "COMBO", "auto", True),
            Input("scan_weights", "BOOLEAN", False, True),
            Input("text_encoder_name", "COMBO", "auto", True),
            Input("vae_name", "COMBO", "auto", True),
        ),
        (
            ("model", "COGVIDEOX_MODEL"),
            ("text_encoder", "COGVIDEOX_TEXT_ENCODER"),
            ("vae", "COGVIDEOX_VAE"),
            ("report", "STRING"),
        ),
    ),
    "CogVideoX15TextEncode": Kind(
        (Input("text_encoder", "COGVIDEOX_TEXT_ENCODER,CLIP"), Input("prompt", "STRING", "")),
        (("conditioning", "CONDITIONING"),),
    ),
    "CogVideoX15EmptyLatent": Kind(
        (
            Input("width", "INT", 1360),
            Input("height", "INT", 768),
            Input("length", "INT", 81),
            Input("batch_size", "INT", 1),
        ),
        (("latent", "LATENT"),),
    ),
    "CogVideoX15ImageToVideo": Kind(
        (
            Input("positive", "CONDITIONING"),
            Input("negative", "CONDITIONING"),
            Input("vae", "COGVIDEOX_VAE"),
            Input("start_image", "IMAGE"),
            Input("width", "INT", 1360),
            Input("height", "INT", 768),
            Input("length", "INT", 81),
            Input("batch_size", "INT", 1),
            Input("end_image", "IMAGE", None, True),
        ),
        (("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent", "LATENT")),
    ),
    "CogVideoX15VAEEncode": Kind((Input("images", "IMAGE"), Input("vae", "COGVIDEOX_VAE")), (("latent", "LATENT"),)),
    "CogVideoX15LoraLoader": Kind(
        (Input("model", "COGVIDEOX_MODEL"), Input("lora_name", "COMBO", ""), Input("strength", "FLOAT", 1.0)),
        (("model", "COGVIDEOX_MODEL"),),
    ),
    "CogVideoX15Quantize": Kind(
        (
            Input("model", "COGVIDEOX_MODEL"),
            Input("method", "COMBO", "int8_weight_only"),
            Input("text_encoder", "COGVIDEOX_TEXT_ENCODER", None, True),
        ),
        (("model", "COGVIDEOX_MODEL"), ("text_encoder", "COGVIDEOX_TEXT_ENCODER"), ("report", "STRING")),
    ),
    "CogVideoX15Attention": Kind(
        (Input("model", "COGVIDEOX_MODEL"), Input("attention", "COMBO", "auto")), (("model", "COGVIDEOX_MODEL"),)
    ),
    "CogVideoX15Cache": Kind(
        (
            Input("model", "COGVIDEOX_MODEL"),
            Input("method", "COMBO", "first_block"),
            Input("strength", "FLOAT", 0.6),
            Input("start", "FLOAT", 0.1),
            Input("end", "FLOAT", 0.95),
        ),
        (("model", "COGVIDEOX_MODEL"),),
    ),
    "CogVideoX15Compile": Kind(
        (Input("model", "COGVIDEOX_MODEL"), Input("mode", "COMBO", "default"), Input("dynamic", "BOOLEAN", False)),
        (("model", "COGVIDEOX_MODEL"),),
    ),
    "CogVideoX15Sampler": Kind(
        (
            Input("model", "COGVIDEOX_MODEL"),
            Input("positive", "CONDITIONING"),
            Input("negative", "CONDITIONING"),
            Input("latent_image", "LATENT"),
            Input("seed", "INT", 0),
            Input("steps", "INT", 50),
            Input("cfg", "FLOAT", 6.0),
            Input("scheduler", "COMBO", "ddim"),
            Input("denoise", "FLOAT", 1.0),
            Input("dynamic_cfg", "BOOLEAN", False, True),
            Input("on_nan", "COMBO", "heal", True),
        ),
        (("latent", "LATENT"),),
    ),
    "CogVideoX15VAEDecode": Kind((Input("samples", "LATENT"), Input("vae", "COGVIDEOX_VAE")), (("images", "IMAGE"),)),
    "ConditioningAverage": Kind(
        (
            Input("conditioning_to", "CONDITIONING"),
            Input("conditioning_from", "CONDITIONING"),
            Input("conditioning_to_strength", "FLOAT", 1.0),
        ),
        (("CONDITIONING", "CONDITIONING"),),
    ),
    "ConditioningConcat": Kind(
        (Input("conditioning_to", "CONDITIONING"), Input("conditioning_from", "CONDITIONING")),
        (("CONDITIONING", "CONDITIONING"),),
    ),
}
