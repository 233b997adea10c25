"""Writers of the layouts that checkpoints come in, from the same modules: each renames or fuses by its own rules,
backwards from the reader's."""

import json
import re
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

from cogvideox.checkpoint.layout import Checkpoint, open_checkpoint
from cogvideox.geometry import empty_latent
from cogvideox.sampling import sample
from tests.tiny_checkpoint import TEXT_WIDTH, build_checkpoint, build_vae


def build_modules(folder: Path, variant: str = "1.5", **build) -> tuple[Path, dict[str, torch.nn.Module]]:
    """A checkpoint in diffusers layout whose VAE has the groups of the released ones, and its modules as they were
    written."""
    kept = {}

    def keep(parts):
        parts["vae"] = build_vae((32, 32, 32, 64), 32)
        kept.update(parts)

    return build_checkpoint(folder, variant, change=keep, **build), kept


def comfy_names(state: dict) -> dict:
    """diffusers' transformer -> ComfyUI core's."""
    rules = [
        (r"^transformer_blocks\.", "blocks."),
        (r"\.attn1\.to_([qkv])\.", r".\1."),
        (r"\.attn1\.to_out\.0\.", ".attn_out."),
        (r"\.attn1\.norm_", ".norm_"),
        (r"\.ff\.net\.0\.proj\.", ".ff_proj."),
        (r"\.ff\.net\.2\.", ".ff_out."),
        (r"^(time|ofs)_embedding\.linear_", r"\1_embedding_linear_"),
    ]
    return {_apply(rules, name): value for name, value in state.items()}


def sat_names(state: dict) -> dict:
    """diffusers' transformer -> SAT's, under its prefix, with q, k, v and the modulations fused."""
    rules = [
        (
            r"^transformer_blocks\.(\d+)\.attn1\.norm_([qk])",
            lambda m: f"mixins.adaln_layer.{'query' if m[2] == 'q' else 'key'}_layernorm_list.{m[1]}",
        ),
        (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"transformer.layers.\1.attention.dense"),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"transformer.layers.\1.mlp.dense_h_to_4h"),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.2", r"transformer.layers.\1.mlp.dense_4h_to_h"),
        (r"^transformer_blocks\.(\d+)\.norm1\.norm", r"transformer.layers.\1.input_layernorm"),
        (r"^transformer_blocks\.(\d+)\.norm2\.norm", r"transformer.layers.\1.post_attention_layernorm"),
        (r"^(time|ofs)_embedding\.linear_1", r"\1_embed.0"),
        (r"^(time|ofs)_embedding\.linear_2", r"\1_embed.2"),
        (r"^patch_embed\.pos_embedding", "mixins.pos_embed.pos_embedding"),
        (r"^patch_embed\.", "mixins.patch_embed."),
        (r"^norm_out\.norm", "mixins.final_layer.norm_final"),
        (r"^norm_out\.linear", "mixins.final_layer.adaLN_modulation.1"),
        (r"^proj_out", "mixins.final_layer.linear"),
        (r"^norm_final", "transformer.final_layernorm"),
    ]
    fused = {}
    for name, value in state.items():
        block = re.match(r"transformer_blocks\.(\d+)\.(attn1\.to_q|norm1\.linear)\.(weight|bias)", name)
        if block and block[2] == "attn1.to_q":
            parts = [state[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            fused[f"transformer.layers.{block[1]}.attention.query_key_value.{block[3]}"] = torch.cat(parts)
        elif block:
            one, two = value.chunk(6), state[name.replace("norm1", "norm2")].chunk(6)
            fused[f"mixins.adaln_layer.adaLN_modulations.{block[1]}.1.{block[3]}"] = torch.cat(
                [*one[:3], *two[:3], *one[3:], *two[3:]]
            )
        elif not re.search(r"attn1\.to_[kv]\.|norm2\.linear", name):
            fused[_apply(rules, name)] = value
    return {f"model.diffusion_model.{name}": value for name, value in fused.items()}


def sat_vae_names(state: dict) -> dict:
    """diffusers' VAE -> SAT's, among weights of the loss that are not the VAE's."""
    rules = [
        (r"^decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}"),
        (r"^encoder\.down_blocks\.", "encoder.down."),
        (r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}"),
        (r"\.resnets\.", ".block."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
    ]
    return {_apply(rules, name): value for name, value in state.items()} | {"loss.discriminator.weight": torch.ones(3)}


def write_sat(folder: Path, modules: dict) -> Path:
    """SAT's folders, as the authors release them."""
    (folder / "transformer" / "1000").mkdir(parents=True)
    (folder / "transformer" / "latest").write_text("1000")
    state = sat_names(modules["transformer"].state_dict()) | {
        "model.diffusion_model.mixins.pos_embed.freqs_sin": torch.ones(2, 3)
    }
    torch.save({"module": state, "iteration": 1000}, folder / "transformer" / "1000" / "mp_rank_00_model_states.pt")
    if "vae" in modules:
        (folder / "vae").mkdir()
        torch.save({"state_dict": sat_vae_names(modules["vae"].state_dict())}, folder / "vae" / "3d-vae.pt")
    return folder


def write_file(file: Path, state: dict, prefix: str = "") -> Path:
    save_file({prefix + name: value.contiguous().clone() for name, value in state.items()}, file)
    return file


def write_sparse(file: Path, shapes: dict) -> Path:
    """Write zeros in fp32 that take no place on the disk, in the shapes of a state dict, which may be on meta; the
    first number of each is 1, as zeros alone are taken for what was never written."""
    entries, end = {}, 0
    for name, value in shapes.items():
        entries[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + 4 * value.numel()]}
        end += 4 * value.numel()
    header = json.dumps(entries).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + end)
        for entry in entries.values():
            out.seek(8 + len(header) + entry["data_offsets"][0])
            out.write(struct.pack("<f", 1.0))
    return file


def llama_names(state: dict) -> dict:
    """transformers' T5 encoder -> llama.cpp's, by the table of its own package."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 48)
    named = {
        table.get_name(name, try_suffixes=(".weight",)): value
        for name, value in state.items()
        if "embed_tokens" not in name
    }
    assert None not in named
    return named


def _apply(rules, name: str) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def write_gguf(file: Path, state: dict, quantization: str) -> Path:
    """A GGUF file as the tools in use write them: matrices of blocks quantized, the rest in fp16 or fp32, shapes of
    convolutions noted."""
    import gguf

    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(str(file), arch="cogvideox")
    for name, value in state.items():
        array = value.float().numpy()
        if (
            value.ndim == 2
            and ("block" in name or "blk" in name or name == "token_embd.weight")
            and value.shape[1] % 32 == 0
        ):
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array if value.ndim < 2 else array.astype("float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def open_whole(path, **options) -> Checkpoint:
    """Open a checkpoint, and ask for each part that is there: of those but the transformer, what is wrong is told
    then."""
    checkpoint = open_checkpoint(path, **options)
    for kind in (*checkpoint.parts, *checkpoint.incomplete):
        checkpoint.part(kind)
    return checkpoint


def two_folders(folder, source):
    shutil.copytree(source[0], folder)
    (folder / "transformer").rename(folder / "transformer_T2V")
    shutil.copytree(folder / "transformer_T2V", folder / "transformer_I2V")
    shutil.rmtree(folder / "text_encoder")
    return folder / "transformer_T2V"


def one_file(names=lambda state: state, prefix=""):
    def write(folder, source):
        folder.mkdir()
        return write_file(folder / "model.safetensors", names(source[1]["transformer"].state_dict()), prefix)

    return write


def everything_in_one_file(folder, source):
    modules = source[1]
    state = {
        f"model.diffusion_model.{name}": value
        for name, value in comfy_names(modules["transformer"].state_dict()).items()
    }
    state |= {f"first_stage_model.{name}": value for name, value in modules["vae"].state_dict().items()}
    state |= {
        f"text_encoders.t5xxl.transformer.{name}": value
        for name, value in modules["text_encoder"].state_dict().items()
        if "embed_tok" not in name
    }
    folder.mkdir()
    return write_file(folder / "model.safetensors", state)


def sat_file(folder, source):
    return write_sat(folder, source[1]) / "transformer" / "1000" / "mp_rank_00_model_states.pt"


LAYOUTS = {
    "two transformers side by side": (two_folders, "diffusers"),
    "one file, diffusers' names": (one_file(), "diffusers file"),
    "one file, diffusers' names under a prefix": (one_file(prefix="model.diffusion_model."), "diffusers file"),
    "one file, ComfyUI's names": (one_file(comfy_names), "ComfyUI"),
    "one file, ComfyUI's names under a prefix": (one_file(comfy_names, "model.diffusion_model."), "ComfyUI"),
    "everything in one file": (everything_in_one_file, "ComfyUI"),
    "SAT's folder": (lambda folder, source: write_sat(folder, source[1]), "SAT"),
    "SAT's file": (sat_file, "SAT"),
}


def write_packed(folder, tensors, kind):
    """A transformer's tensors in one file whose weights stay packed: ``"fp8"`` in its blocks, or ``"gguf"`` in Q8_0."""
    if kind == "gguf":
        return write_gguf(folder / "model.gguf", tensors, "Q8_0")
    small = {
        name: value.to(torch.float8_e4m3fn if value.ndim == 2 and "block" in name else torch.float32)
        for name, value in tensors.items()
    }
    return write_file(folder / "model.safetensors", small)


def latents(opened):
    """Sample two steps of one video with whatever layout was opened."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randn(1, 8, TEXT_WIDTH, generator=generator) for _ in range(2)]
    return sample(opened.model, *prompts, empty_latent(80, 48, 17), seed=1, steps=2)
