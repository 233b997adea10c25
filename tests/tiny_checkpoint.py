"""Tiny random-weight CogVideoX checkpoints in the real layout: real classes, real file format, real sharding.

For the tests and for ``make demo``. Run as a script: ``python -m tests.tiny_checkpoint FOLDER``.
"""

import argparse
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

VARIANTS = {
    "1.5": dict(in_channels=16, patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False),
    "1.5-i2v": dict(
        in_channels=32, patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False, ofs_embed_dim=64
    ),
    "fun-inp": dict(in_channels=33, patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False),
    "void": dict(in_channels=48, patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False),
    "5b": dict(in_channels=16, use_rotary_positional_embeddings=True),
    "5b-i2v": dict(in_channels=32, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True),
    "2b": dict(in_channels=16, use_rotary_positional_embeddings=False),
}
#: dtype on disk, as the official folders have it
STORED = {"transformer": torch.bfloat16, "text_encoder": torch.float32, "vae": torch.float32}
TEXT_WIDTH = 32
#: Of the transformer of ``build_deep``.
LAYERS = 4


def build_checkpoint(
    folder: Path | str,
    variant: str = "1.5",
    seed: int = 0,
    stored: dict | None = None,
    change: Callable[[dict], None] | None = None,
) -> Path:
    """Write a checkpoint of 2 layers x 2 heads that diffusers' pipelines open with ``from_pretrained``.

    Args:
        variant: a key of ``VARIANTS``.
        stored: dtype on disk by part, where it should differ from ``STORED``; None leaves it as ``change`` made it.
        change: called with the modules by part before they are written.
    """
    import diffusers

    folder = Path(folder)
    stored = STORED | (stored or {})
    parts = {}
    for name, build in (
        ("transformer", partial(build_transformer, variant)),
        ("text_encoder", build_text_encoder),
        ("vae", partial(build_vae, invert=variant == "1.5-i2v")),
    ):
        # Each anew: how many numbers a library draws for its part depends on its version.
        torch.manual_seed(seed)
        parts[name] = build()
    if change is not None:
        change(parts)
    for name, module in parts.items():
        if stored[name] is not None:
            module.to(stored[name])
        size = sum(p.nbytes for p in module.parameters())
        shards = 1 if name == "vae" else 3
        module.save_pretrained(folder / name, max_shard_size=int(size / shards * 1.1) if shards > 1 else "10GB")
    build_tokenizer(folder / "tokenizer")
    build_scheduler(variant).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if "i2v" in variant else "CogVideoXPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def build_deep(folder: Path | str, variant: str = "1.5") -> Path:
    """A checkpoint whose transformer has ``LAYERS`` layers, stored in fp32, for what works block by block."""

    def deepen(parts: dict) -> None:
        torch.manual_seed(0)
        parts["transformer"] = build_transformer(variant, num_layers=LAYERS)

    return build_checkpoint(folder, variant, change=deepen, stored={"transformer": torch.float32})


def build_transformer(variant: str = "1.5", **changes) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    config = dict(
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=2,
        out_channels=16,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        sample_width=170,
        sample_height=96,
        sample_frames=81,
        max_text_seq_length=226,
    )
    if VARIANTS[variant].get("patch_size_t") is None:
        config |= dict(sample_width=90, sample_height=60, sample_frames=49)
    return CogVideoXTransformer3DModel(**config | VARIANTS[variant] | changes)


def build_text_encoder(
    vocabulary: int = 256, layers: int = 2, width: int = TEXT_WIDTH, inner: int | None = None
) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=16,
            d_ff=inner or 2 * width,
            num_layers=layers,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,  # as in the official config
        )
    )


def build_vae(channels: tuple[int, ...] = (8, 8, 8, 16), groups: int = 4, invert: bool = False) -> torch.nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=channels,
        norm_num_groups=groups,
        layers_per_block=1,
        latent_channels=16,
        scaling_factor=0.7,
        invert_scale_latents=invert,
    )


def build_scheduler(variant: str = "1.5"):
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        snr_shift_scale=3.0 if variant == "2b" else 1.0,
    )


def build_tokenizer(folder: Path) -> None:
    """A SentencePiece model of a few English sentences with T5's special tokens: only ``spiece.model``, as the official
    folder."""
    import sentencepiece

    text = [
        "a panda plays the guitar in a bamboo forest",
        "the sun rises over the sea while waves roll onto the beach",
        "a cat walks through a garden, slow camera pan, soft light",
        "a city at night in the rain, neon signs and umbrellas",
    ] * 8
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default="1.5")
    options = parser.parse_args()
    print(build_checkpoint(options.folder, options.variant))
