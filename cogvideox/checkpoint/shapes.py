"""Configs from shapes: what a part's config.json would say, for files that come without one.

Numbers that no shape shows (which rows of a table, how many groups of a norm) are those of the released models; where
even they cannot be told, it is an error and not a guess.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..variants import TRANSFORMER_CLASS
from ..words import short


class Shaped(Protocol):
    """A tensor, in memory or on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def infer_config(kind: str, tensors: Mapping[str, Shaped], file: Path) -> dict:
    """The config of a part, by the names of its diffusers or transformers module.

    Args:
        tensors: by the module's own names.
        file: where they come from, for messages.

    Raises:
        ValueError: if a tensor that tells a number is missing or has a shape that no CogVideoX has.
    """
    try:
        return {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}[kind](
            {name: t.shape for name, t in tensors.items()}
        )
    except (KeyError, IndexError, ZeroDivisionError, _Odd) as error:
        raise ValueError(
            f"{short(file, 400)} looks like a {kind.replace('_', ' ')} of CogVideoX, but how it is built cannot be "
            f"told from its shapes ({error}). It is incomplete or of another model: download it again, or use the "
            "folder in diffusers layout, which has a config.json."
        ) from error


class _Odd(Exception):
    """A shape that none of the released models has."""


def _transformer(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    width = shapes["patch_embed.text_proj.weight"][0]
    head = shapes["transformer_blocks.0.attn1.norm_q.weight"][0]
    patch = shapes["patch_embed.proj.weight"]
    config = {
        "_class_name": TRANSFORMER_CLASS,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": _count(shapes, "transformer_blocks."),
        "out_channels": 16,
        "time_embed_dim": shapes["time_embedding.linear_1.weight"][0],
        "text_embed_dim": shapes["patch_embed.text_proj.weight"][1],
        "patch_size": 2,
        # Of the convolution; 1.5's linear layer always has a bias, and the releases say false.
        "patch_bias": len(patch) == 4 and "patch_embed.proj.bias" in shapes,
        "max_text_seq_length": 226,
        "use_learned_positional_embeddings": "patch_embed.pos_embedding" in shapes,
    }
    if len(patch) == 2:
        # A linear layer over patches of 2 x 2 x 2: the 1.5 family. Its rotary grid has absolute positions, whatever it
        # was trained at.
        config |= {"in_channels": patch[1] // 8, "patch_size_t": 2, "use_rotary_positional_embeddings": True}
        config |= {"sample_width": 170, "sample_height": 96, "sample_frames": 81}
        if "ofs_embedding.linear_1.weight" in shapes:
            config["ofs_embed_dim"] = shapes["ofs_embedding.linear_1.weight"][1]
    else:
        # No tensor shows how positions are made: 2b, with 30 heads, has sin-cos tables; the others turn q and k.
        config |= {"in_channels": patch[1], "use_rotary_positional_embeddings": config["num_attention_heads"] != 30}
        config |= {"sample_width": 90, "sample_height": 60, "sample_frames": 49}
    if width % head or (len(patch) == 2 and patch[1] % 8):
        raise _Odd(f"a width of {width} in heads of {head}, patches of {patch[1]} numbers")
    return config


def _text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    table = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": table[0],
        "d_model": table[1],
        "num_heads": heads[1],
        "relative_attention_num_buckets": heads[0],
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads[1],
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        "num_layers": _count(shapes, "encoder.block."),
        "feed_forward_proj": "gated-gelu" if any(name.endswith(".wi_0.weight") for name in shapes) else "relu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }


def _vae(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    levels = _count(shapes, "decoder.up_blocks.")
    if not any(name.startswith("encoder.") for name in shapes):
        raise _Odd("it is the decoder of a VAE without its encoder")
    channels = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight"][0] for level in range(levels)]
    if any(count % 32 for count in channels):
        raise _Odd(f"channels {channels}, which do not divide into the 32 groups of the released models")
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        "block_out_channels": channels,
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
    }


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
