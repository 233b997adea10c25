"""Run by ComfyUI's interpreter in its checkout: a small T5 with the same weights in ComfyUI's own classes and in ours
gives the same embeddings, and the same video where core's CLIP Text Encode goes straight into our sampler."""

import importlib
import sys
import tempfile
from pathlib import Path

from inside import pack, tiny  # isort: skip # It comes first: it makes the others importable.

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.cogvideo
import comfy.text_encoders.genmo
import comfy.text_encoders.sd3_clip
import torch
from safetensors.torch import save_file

import nodes

SIZES = {"d_model": 4096, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
PROMPTS = ["a panda plays the guitar in a bamboo forest", "", "word " * 400]


def clip_of(module, tokenizer, **options):
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(tokenizer, module),
        model_options={"t5xxl_model_config": SIZES, "dtype": torch.float32},
        parameters=0,
    )
    clip.load_sd(STATE)
    return clip


torch.manual_seed(0)
t5 = tiny.build_text_encoder(vocabulary=32128, layers=2, width=4096, inner=64)
STATE = {name: value.clone() for name, value in t5.state_dict().items()}
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # Windows deletes no file that is mapped.
    folder = tiny.build_checkpoint(
        Path(name) / "tiny", change=lambda parts: parts.update(transformer=tiny.build_transformer(text_embed_dim=4096))
    )
    save_file(STATE, Path(name) / "t5xxl.safetensors")
    layout, handles, text = (
        importlib.import_module(f"pack.cogvideox.{part}") for part in ("checkpoint.layout", "handles", "text")
    )
    host = sys.modules["pack.nodes.host"]
    (folder / "tokenizer" / "spiece.model").unlink()
    checkpoint = layout.open_checkpoint(
        folder, text_encoder=Path(name) / "t5xxl.safetensors", tokenizer=host.tokenizer_folder()
    )
    opened = handles.make_handles(checkpoint, "fp32")
    ours = opened.text_encoder
    clips = {
        "cogvideox": clip_of(
            comfy.text_encoders.cogvideo.cogvideo_te(), comfy.text_encoders.cogvideo.CogVideoXTokenizer
        ),
        "sd3": clip_of(
            comfy.text_encoders.sd3_clip.sd3_clip(clip_l=False, clip_g=False, t5=True),
            comfy.text_encoders.sd3_clip.SD3Tokenizer,
        ),
        "mochi": clip_of(comfy.text_encoders.genmo.mochi_te(), comfy.text_encoders.genmo.MochiT5Tokenizer),
    }
    for kind, clip in clips.items():
        for prompt in PROMPTS:
            theirs = pack.NODE_CLASS_MAPPINGS["CogVideoX15TextEncode"]().run(text_encoder=clip, prompt=prompt)[0][0][0]
            wanted = text.encode_prompt(ours, prompt).embeddings
            error = ((theirs - wanted).norm() / wanted.norm()).item()
            print(f"{kind} {len(prompt)}: {list(theirs.shape)} relative L2 {error:.1e}")
            assert theirs.shape == wanted.shape == (1, 226, 4096)
            assert error < 1e-5

    def video(positive, negative):
        latent = {"samples": torch.zeros(1, 16, 5, 12, 20)}
        sampler = pack.NODE_CLASS_MAPPINGS["CogVideoX15Sampler"]()
        settings = dict(latent_image=latent, seed=1, steps=3, cfg=6.0, scheduler="ddim", denoise=1.0)
        return sampler.run(model=opened.model, positive=positive, negative=negative, **settings)[0]["samples"]

    def ours_of(prompt):
        return pack.NODE_CLASS_MAPPINGS["CogVideoX15TextEncode"]().run(text_encoder=ours, prompt=prompt)[0]

    wanted, another = (video(ours_of(prompt), ours_of("")) for prompt in (PROMPTS[0], "a city at night"))
    theirs = video(*(nodes.CLIPTextEncode().encode(clips["cogvideox"], prompt)[0] for prompt in (PROMPTS[0], "")))
    error, other = (((found - wanted).norm() / wanted.norm()).item() for found in (theirs, another))
    print(f"CLIP Text Encode into the sampler: relative L2 {error:.1e}, another prompt's {other:.1e}")
    assert error < 1e-5 < 1e-3 < other
