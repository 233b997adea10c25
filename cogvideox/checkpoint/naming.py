"""What the tensors of a single file are: which parts it holds, in whose names, and what diffusers and transformers call
them.

Three programs name CogVideoX's tensors: diffusers, ComfyUI's core, and SAT (the authors' own; the correspondence is in
their repository's ``tools/convert_weight_sat2hf.py``). Each part is known by a tensor that only it has, wherever its
names are put under a prefix. One file, as each program's names are told from all the others'.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..words import listed, short
from .foreign import ForeignError, packed_error
from .headers import StoredTensor

Tensors = Mapping[str, StoredTensor]
#: What a tensor becomes: its new name and the pieces of it that go there (None: all of it).
_Renamed = Iterator[tuple[str, StoredTensor]]


@dataclass(frozen=True)
class FoundPart:
    """One part that a file holds.

    Attributes:
        kind: ``transformer``, ``text_encoder`` or ``vae``.
        layout: whose names it has: ``diffusers``, ``ComfyUI`` or ``SAT``; T5's are llama.cpp's or the same everywhere
            (``single file``).
        prefix: what stood before every name.
        tensors: by the names that diffusers' or transformers' modules have.
        lora: the halves of a LoRA that was being trained on it when it was saved, by their own names.
    """

    kind: str
    layout: str
    prefix: str
    tensors: Tensors
    lora: Tensors = field(default_factory=dict)


def find_parts(tensors: Tensors, file: Path) -> list[FoundPart]:
    """The CogVideoX parts among the tensors of a file.

    Raises:
        ValueError: if it is a LoRA, another family's model, or nothing that is known.
    """
    found: list[FoundPart] = []
    tensors, lora = split_lora(_without_wrappers(tensors))
    for kind, layout, markers, rename in _LAYOUTS:
        for prefix in _prefixes(tensors, markers, file):
            inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if prefix == "":
                # What stands under the prefix of another part is that part's.
                inside = {
                    name: tensor
                    for name, tensor in inside.items()
                    if not name.startswith(tuple(part.prefix for part in found if part.prefix))
                }
            renamed = dict(pair for name, tensor in inside.items() for pair in rename(name, tensor))
            found.append(FoundPart(kind, layout, prefix, renamed, lora if kind == "transformer" else {}))
    if not found:
        raise _unknown(tensors, file)
    return found


def module_tensors(kind: str, tensors: Tensors) -> Tensors:
    """The tensors of a part in a folder of its own, whose names are its module's, less what the module has no use for
    (T5's decoder)."""
    return (
        dict(pair for name, tensor in tensors.items() for pair in _from_t5(name, tensor))
        if kind == "text_encoder"
        else tensors
    )


#: How programs name what a packed weight needs beside it: the program, and beginnings of the last words of names. The
#: first that fits counts.
_PACKED = (
    ("nunchaku (SVDQuant)", ("wscales", "wtscale", "wcscales", "smooth_factor")),
    (
        "bitsandbytes (nf4, fp4 or int8)",
        ("bitsandbytes__", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format"),
    ),
    ("Quanto", ("_data", "_scale", "_shift", "_zeropoint")),
    ("torchao", ("_weight_", "weight:")),
    ("GPTQ or AWQ", ("qweight", "qzeros", "g_idx")),
    ("HQQ", ("W_q",)),
    ("transformers or DeepSeek (fp8 in blocks)", ("weight_scale_inv",)),
    ("NVIDIA's ModelOpt", ("_amax", "_pre_quant_scale")),
    ("compressed-tensors", ("weight_packed", "weight_zero_point", "weight_shape")),
    ("NVFP4", ("weight_scale_2",)),
)
#: What ComfyUI puts beside each weight that it quantized.
_COMFY_MARK = ".comfy_quant"
_ANY_PACKED = tuple(word for _, words in _PACKED for word in words)


def check_unpacked(tensors: Tensors, source: Path) -> None:
    """Make sure that weights are not packed by a program whose packing is not read here.

    Raises:
        ForeignError: if they are, naming the program.
    """
    marked = sorted(name for name in tensors if name.startswith(_ANY_PACKED, name.rfind(".") + 1))
    for program, words in _PACKED if marked else ():
        fitting = [name for name in marked if name.rpartition(".")[2].startswith(words)]
        if fitting:
            raise packed_error(program, source, f"{len(fitting)} tensors such as {short(fitting[0])}")
    # ComfyUI's mark stands beside fp8 with plain scales, too, which is read.
    whole = [
        name
        for mark in tensors
        if mark.endswith(_COMFY_MARK) and (name := f"{mark.removesuffix(_COMFY_MARK)}.weight") in tensors
        if tensors[name].dtype in (torch.int8, torch.uint8) and tensors[name].quantization is None
    ]
    if whole:
        kind = str(tensors[whole[0]].dtype).removeprefix("torch.")
        raise packed_error(
            "ComfyUI (int8 or int4)", source, f"{len(whole)} weights such as {short(whole[0])} in {kind}"
        )


#: What torch puts between a module's name and its parent's: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")


def _without_wrappers(tensors: Tensors) -> Tensors:
    if not _WRAPPERS.search("." + ".".join(tensors)):
        return tensors
    return {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def unwrapped(kind: str, tensors: Tensors, source: Path) -> Tensors:
    """The tensors of a part in a folder of its own by its module's names, whatever program named them or put them under
    a prefix (``module.`` of training on several cards); those that stand outside of the prefix keep their names.

    Raises:
        ValueError: if the part is there under several prefixes.
    """
    tensors = _without_wrappers(tensors)
    found = [
        (prefix, rename)
        for part, _, markers, rename in _LAYOUTS
        if part == kind
        for prefix in _prefixes(tensors, markers, source)
    ]
    if len(found) > 1:
        places = listed((f"{prefix}…" for prefix, _ in found), 4)
        raise ValueError(
            f"{short(source, 400)} holds several sets of weights in one ({places}), and which is meant is not known: "
            "one may be the average that training keeps (EMA). Save the one you want in a file of its own."
        )
    for prefix, rename in found:
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        renamed = {new: piece for name, tensor in inside.items() for new, piece in rename(name[len(prefix) :], tensor)}
        return {name: tensor for name, tensor in tensors.items() if name not in inside} | renamed
    return tensors


#: How the scales of fp8 weights are named, and what else files of scaled weights hold that is of no use here.
_SCALES = (".scale_weight", ".weight_scale")
_SCALE_EXTRAS = (".scale_input", ".input_scale", _COMFY_MARK, "scaled_fp8", "spiece_model", "logit_scale")


def split_scales(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The weights among the tensors of a part, and the scales of fp8 weights, by the weight's name."""
    others = {name for name in tensors if name.endswith((*_SCALES, *_SCALE_EXTRAS))}
    if not others:
        return tensors, {}
    scales = {
        f"{name[: -len(end)]}.weight": tensors[name]
        for name in tensors
        if name in others
        for end in _SCALES
        if name.endswith(end)
    }
    return {name: tensor for name, tensor in tensors.items() if name not in others}, scales


#: Where a layer's own weights are while a LoRA is trained on it: SAT's trainer puts them under the first name, peft
#: under the second.
_TRAINED_ON = re.compile(r"\.(?:original|base_layer)(?=\.)")
_LORA_HALF = re.compile(r"\.(?:lora_\w+|matrix_[AB])(?:\.|$)")


def split_lora(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The weights of a model that was saved with a LoRA inside, by the names they have without it, and the LoRA's
    halves; all of them, and none, where there is no LoRA inside."""
    if not _TRAINED_ON.search("\n".join(tensors)):
        return tensors, {}
    inside = {name: _TRAINED_ON.sub("", name) for name in tensors if _TRAINED_ON.search(name)}
    halves = {name: tensor for name, tensor in tensors.items() if name not in inside and _LORA_HALF.search(name)}
    return {inside.get(name, name): tensor for name, tensor in tensors.items() if name not in halves}, halves


#: Models that a file may hold: those that are known hold one of each kind, and perhaps its average.
_MOST_PREFIXES = 16


def _prefixes(tensors: Tensors, markers: tuple[str, ...], file: Path) -> list[str]:
    """Every prefix under which all ``markers`` stand, the longest first."""
    first = markers[0]
    prefixes = {name[: -len(first)] for name in tensors if name == first or name.endswith(f".{first}")}
    if len(prefixes) > _MOST_PREFIXES:
        raise ValueError(
            f"{short(file, 400)} holds {len(prefixes):,} tensors called {first} under as many prefixes, and no file "
            "has so many models. It is damaged: download it again."
        )
    return sorted(
        (prefix for prefix in prefixes if all(prefix + marker in tensors for marker in markers)), key=len, reverse=True
    )


#: Other models' parts that lie in the same folders, by a name that only they have. The first that fits counts.
_OTHERS = (
    (r"(^|\.)text_model\.encoder\.layers\.0\.", "CLIP's text encoder"),
    (r"(^|\.)blocks\.0\.pos_embedding\.embedding\.weight$", "UMT5, the text encoder of Wan"),
    (
        r"(^|\.)(model|language_model)\.layers\.0\.|^blk\.0\.attn_q\.",
        "a language model, the text encoder of other models",
    ),
    (r"(^|\.)decoder\.middle\.0\.residual\.0\.|(^|\.)decoder\.mid_block\.resnets\.0\.norm1\.gamma$", "Wan's VAE"),
    (r"(^|\.)decoder\.up_blocks\.\d+\.res_blocks\.|per_channel_statistics|(^|\.)latents_mean$", "LTX-Video's VAE"),
    (
        r"(^|\.)decoder\.block_in\.resnets\.0\.|(^|\.)decoder\.blocks\.0\.\d+\.|^layers\.\d+\.layers\.\d+\.",
        "Mochi's VAE",
    ),
    (r"(^|\.)decoder\.mid(\.block_1|_block\.resnets\.0)\.conv1\.conv\.weight$", "HunyuanVideo's VAE"),
    (
        r"(^|\.)decoder\.mid(\.block_1|_block\.resnets\.0)\.conv1\.weight$",
        "a VAE of pictures (Stable Diffusion's, FLUX's or another's)",
    ),
    (
        r"(^|\.)encoder\.(down_blocks\.0\.resnets|down\.0\.block)\.0\.conv1\.conv\.weight$",
        "the encoder of a VAE without its decoder",
    ),
)


def _unknown(tensors: Tensors, file: Path) -> ValueError:
    names = sorted(tensors)
    few = listed(names)
    check_unpacked(tensors, file)
    if not names:
        return ForeignError(
            f"{short(file, 400)} holds no weights that have names: it is what a training keeps beside its model, such "
            "as the states of an optimizer or an average (EMA) in a list. Choose the file of the model itself."
        )
    if any(
        re.search(r"lora_(A|B|up|down)\b|lora\.(up|down)\b|\.matrix_[AB]\.|\.alpha$|lokr_|hada_", name)
        for name in names
    ):
        return ValueError(
            f"{short(file, 400)} is a LoRA ({len(names)} tensors: {few}), not a model: it changes a model and cannot "
            "run alone. Load the model it was made for here."
        )
    for pattern, what in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            return ForeignError(
                f"{short(file, 400)} holds {what}, and none of CogVideoX's transformer, video VAE or T5 text encoder: "
                f"its {len(names)} tensors ({few}) are another model's. Choose a CogVideoX file with the names of "
                "diffusers, ComfyUI or SAT."
            )
    return ForeignError(
        f"{short(file, 400)} holds no CogVideoX transformer, VAE or T5 text encoder that is known here: its "
        f"{len(names)} tensors ({few or 'none'}) are another model's. Choose a CogVideoX file with the names of "
        "diffusers, ComfyUI or SAT."
    )


def _from_t5(name: str, tensor: StoredTensor) -> _Renamed:
    """T5's encoder, less the decoder that whole T5s have beside it: the encoder is the same."""
    if not name.startswith(("decoder.", "lm_head.")):
        yield name, tensor


#: llama.cpp's names of T5's modules (in a block, and outside),
#: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py
_LLAMA_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_LLAMA_OTHERS = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}


def _from_llama(name: str, tensor: StoredTensor) -> _Renamed:
    """``enc.blk.0.attn_q.weight`` -> ``encoder.block.0.layer.0.SelfAttention.q.weight``; its decoder and output are
    left."""
    path, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)", path)
    if block:
        yield f"encoder.block.{block[1]}.{_LLAMA_BLOCK.get(block[2], block[2])}.{leaf}", tensor
    elif not name.startswith(("dec.", "output.")):
        yield f"{_LLAMA_OTHERS.get(path, path)}.{leaf}", tensor


def _same(name: str, tensor: StoredTensor) -> _Renamed:
    yield name, tensor


_COMFY_BLOCK = {
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "norm_q": "attn1.norm_q",
    "norm_k": "attn1.norm_k",
    "attn_out": "attn1.to_out.0",
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}


def _from_comfy(name: str, tensor: StoredTensor) -> _Renamed:
    """``blocks.0.q.weight`` -> ``transformer_blocks.0.attn1.to_q.weight``"""
    block = re.fullmatch(r"blocks\.(\d+)\.([a-z_0-9]+)\.(.+)", name)
    if block:
        number, module, rest = block.groups()
        yield f"transformer_blocks.{number}.{_COMFY_BLOCK.get(module, module)}.{rest}", tensor
    else:
        yield re.sub(r"^(time|ofs)_embedding_linear_", r"\1_embedding.linear_", name), tensor


def comfy_name(name: str) -> str:
    """What ComfyUI's core calls a module or tensor of diffusers' transformer: ``transformer_blocks.0.attn1.to_q`` ->
    ``blocks.0.q``."""
    name = re.sub(r"^transformer_blocks\.", "blocks.", name)
    for comfy, module in _COMFY_BLOCK.items():
        name = re.sub(rf"^(blocks\.\d+)\.{re.escape(module)}(?=\.|$)", rf"\1.{comfy}", name)
    return re.sub(r"^(time|ofs)_embedding\.linear_", r"\1_embedding_linear_", name)


#: SAT's layers within a block and outside the blocks, and what diffusers calls them; q, k and v are one layer.
SAT_QKV = "attention.query_key_value"
SAT_LAYER = {
    "attention.dense": "attn1.to_out.0",
    "mlp.dense_h_to_4h": "ff.net.0.proj",
    "mlp.dense_4h_to_h": "ff.net.2",
    "input_layernorm": "norm1.norm",
    "post_attention_layernorm": "norm2.norm",
}
SAT_OTHERS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.linear": "proj_out",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "transformer.final_layernorm": "norm_final",
}
#: Tables that the modules compute themselves, and SAT's unused word embeddings.
_SAT_UNUSED = ("freqs_sin", "freqs_cos", "position_embeddings", "word_embeddings", "embed_tokens")


def _from_sat(name: str, tensor: StoredTensor) -> _Renamed:
    """SAT fuses q, k and v, and the modulations of a layer's two norms for video and for text; each goes where it
    belongs, as a view."""
    if any(unused in name for unused in _SAT_UNUSED):
        return
    if name == "mixins.pos_embed.pos_embedding":
        yield "patch_embed.pos_embedding", tensor
        return
    path, _, leaf = name.rpartition(".")
    for module, rows, of in sat_modules(path):
        yield f"{module}.{leaf}", tensor.rows(*rows, of=of) if rows else tensor


def sat_modules(path: str) -> list[tuple[str, tuple[int, ...], int]]:
    """What diffusers calls a module of SAT's transformer, or the modules that are fused in it: (name, which of its
    rows, of how many pieces); no rows stand for all of them."""
    layer = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", path)
    norm = re.fullmatch(r"mixins\.adaln_layer\.(query|key)_layernorm_list\.(\d+)", path)
    modulation = re.fullmatch(r"mixins\.adaln_layer\.adaLN_modulations\.(\d+)\.1", path)
    if layer and layer[2] == SAT_QKV:
        return [(f"transformer_blocks.{layer[1]}.attn1.to_{part}", (number,), 3) for number, part in enumerate("qkv")]
    if layer:
        return [(f"transformer_blocks.{layer[1]}.{SAT_LAYER.get(layer[2], layer[2])}", (), 1)]
    if norm:
        return [(f"transformer_blocks.{norm[2]}.attn1.norm_{norm[1][0]}", (), 1)]
    if modulation:
        block = f"transformer_blocks.{modulation[1]}"
        return [(f"{block}.norm1.linear", (0, 1, 2, 6, 7, 8), 12), (f"{block}.norm2.linear", (3, 4, 5, 9, 10, 11), 12)]
    return [(SAT_OTHERS.get(path, path), (), 1)]


def _from_sat_vae(name: str, tensor: StoredTensor) -> _Renamed:
    """``decoder.up.3.block.0.nin_shortcut.weight`` -> ``decoder.up_blocks.0.resnets.0.conv_shortcut.weight``: SAT
    counts up blocks backwards."""
    if not name.startswith(("encoder.", "decoder.")):
        return
    up = re.match(r"decoder\.up\.(\d)\.", name)
    if up:
        name = f"decoder.up_blocks.{_SAT_VAE_LEVELS - 1 - int(up[1])}.{name[up.end() :]}"
    name = re.sub(r"^encoder\.down\.(\d)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}.", name)
    name = name.replace(".block.", ".resnets.").replace(".nin_shortcut.", ".conv_shortcut.")
    yield name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0."), tensor


#: Levels of the VAE's decoder (block_out_channels of every release).
_SAT_VAE_LEVELS = 4
_TEXT_PROJECTION = "patch_embed.text_proj.weight"
_LAYOUTS: list[tuple[str, str, tuple[str, ...], Callable[[str, StoredTensor], _Renamed]]] = [
    ("transformer", "diffusers", ("transformer_blocks.0.attn1.to_q.weight", _TEXT_PROJECTION), _same),
    ("transformer", "ComfyUI", ("blocks.0.attn_out.weight", _TEXT_PROJECTION), _from_comfy),
    (
        "transformer",
        "SAT",
        ("transformer.layers.0.attention.query_key_value.weight", f"mixins.{_TEXT_PROJECTION}"),
        _from_sat,
    ),
    ("vae", "diffusers", ("decoder.mid_block.resnets.0.norm1.norm_layer.weight",), _same),
    ("vae", "SAT", ("decoder.mid.block_1.norm1.norm_layer.weight",), _from_sat_vae),
    ("text_encoder", "single file", ("encoder.block.0.layer.0.SelfAttention.q.weight",), _from_t5),
    ("text_encoder", "llama.cpp", ("enc.blk.0.attn_q.weight", "token_embd.weight"), _from_llama),
]
