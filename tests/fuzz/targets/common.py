"""What several targets share: tiny checkpoints, and what a person would do with one."""

import json
import logging
import random
import struct
import warnings
from pathlib import Path

import torch

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")

from cogvideox.checkpoint.layout import open_checkpoint  # noqa: E402
from cogvideox.dtypes import Precision  # noqa: E402
from cogvideox.handles import make_handles  # noqa: E402
from cogvideox.loading import load_module  # noqa: E402
from cogvideox.memory import memory_text  # noqa: E402
from cogvideox.precision.hardware import Hardware  # noqa: E402
from tests.layouts import build_modules, comfy_names, write_file, write_gguf, write_sat  # noqa: E402
from tests.tiny_checkpoint import TEXT_WIDTH  # noqa: E402

_warm: list = []
CPU = Hardware(torch.device("cpu"), "CPU")
FP32 = Precision(torch.float32)


def build(base: Path) -> dict:
    """All layouts of one tiny model, built once."""
    if not (base / "done").exists():
        _, modules = build_modules(base / "folder")
        state = modules["transformer"].to(torch.bfloat16).state_dict()
        write_file(base / "diffusers.safetensors", state)
        write_file(base / "comfy.safetensors", comfy_names(state), "model.diffusion_model.")
        write_file(base / "vae.safetensors", modules["vae"].float().state_dict())
        te = {
            k: v for k, v in modules["text_encoder"].float().state_dict().items() if k != "encoder.embed_tokens.weight"
        }
        write_file(base / "t5.safetensors", te)
        fp8 = {k: (v.to(torch.float8_e4m3fn) if v.ndim == 2 and "block" in k else v) for k, v in state.items()}
        write_file(
            base / "fp8.safetensors",
            fp8
            | {
                k.replace(".weight", ".scale_weight"): torch.ones(1)
                for k, v in fp8.items()
                if v.dtype == torch.float8_e4m3fn
            },
        )
        write_gguf(base / "q8.gguf", state, "Q8_0")
        write_gguf(base / "q4.gguf", state, "Q4_0")
        write_sat(base / "sat", {k: m.to(torch.bfloat16) for k, m in modules.items()})
        torch.save({"module": {"a": torch.ones(3)}}, base / "small.pt")
        torch.save(modules["vae"].state_dict(), base / "old.pt", _use_new_zipfile_serialization=False)
        (base / "done").touch()
    if _warm:
        return {"base": base}
    _warm.append(True)
    # What is imported late is imported now, once for all children.
    import gguf  # noqa: F401
    import transformers  # noqa: F401

    from cogvideox.text import encode_prompt

    handles = use(base / "folder", random.Random(0), ("transformer", "vae", "text_encoder"))
    encode_prompt(handles.text_encoder, "a panda")
    for name in ("ddim", "dpm"):
        sample_once(handles, scheduler=name)
    open_checkpoint(base / "sat"), open_checkpoint(base / "q8.gguf")
    return {"base": base}


def use(path, rng, parts=("transformer",), loads=1.0, **others):
    """Open a checkpoint, look at it in every way that reads no weights, and load parts of it."""
    checkpoint = open_checkpoint(path, **others)
    handles = make_handles(
        checkpoint, rng.choice(("auto", "fp32", "fp16", "bf16")), CPU, rng.choice(("fix", "warn", "stop"))
    )
    handles.plan.text, json.dumps(handles.plan.as_dict()), checkpoint.fingerprint
    if rng.random() < 0.25:
        memory_text(handles.model)
    for kind in parts:
        if kind in checkpoint.parts and rng.random() < loads:
            load_module(checkpoint.parts[kind], rng.choice((FP32, handles.plan.precision(kind))), torch.device("cpu"))
    return handles


def sample_once(handles, steps=2, **settings):
    from cogvideox.sampling import sample

    prompt = torch.full((1, 226, TEXT_WIDTH), 0.1)
    latents = torch.zeros(1, 16, 1, 2, 2)
    return sample(handles.model, prompt, prompt, latents, seed=1, steps=steps, **settings)


def split(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data
