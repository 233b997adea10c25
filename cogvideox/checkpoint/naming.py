"""What the tensors of a single file are: which parts it holds, in whose names, and what diffusers and transformers call them.

Three programs name CogVideoX's tensors: diffusers, ComfyUI's core, and SAT (the authors' own; the correspondence is in their repository's
``tools/convert_weight_sat2hf.py``). Each part is known by a tensor that only it has, wherever its names are put under a prefix.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..words import listed
from .headers import StoredTensor

Tensors = Mapping[str, StoredTensor]
#: What a tensor becomes: its new name and the pieces of it that go there (None: all of it).
_Renamed = Iterator[tuple[str, StoredTensor]]


@dataclass(frozen=True)
class FoundPart:
    """One part that a file holds.

    Attributes:
        kind: ``transformer``, ``text_encoder`` or ``vae``.
        layout: whose names it has: ``diffusers``, ``ComfyUI`` or ``SAT``; T5's are the same everywhere (``single file``).
        prefix: what stood before every name.
        tensors: by the names that diffusers' or transformers' modules have.
    """

    kind: str
    layout: str
    prefix: str
    tensors: Tensors


def find_parts(tensors: Tensors, file: Path) -> list[FoundPart]:
    """The CogVideoX parts among the tensors of a file.

    Raises:
        ValueError: if it is a LoRA, another family's model, or nothing that is known.
    """
    found = []
    tensors = _without_wrappers(tensors)
    for kind, layout, markers, rename in _LAYOUTS:
        for prefix in _prefixes(tensors, markers):
            inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if prefix == "":
                # What stands under the prefix of another part is that part's.
                inside = {name: tensor for name, tensor in inside.items() if not name.startswith(tuple(part.prefix for part in found if part.prefix))}
            renamed: dict[str, StoredTensor] = {}
            for name, tensor in inside.items():
                renamed.update(rename(name, tensor))
            found.append(FoundPart(kind, layout, prefix, renamed))
    if not found:
        raise _unknown(tensors, file)
    return found


#: What torch puts between a module's name and its parent's: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")


def _without_wrappers(tensors: Tensors) -> Tensors:
    return {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def unwrapped(kind: str, tensors: Tensors, source: Path) -> Tensors:
    """The tensors of a part in a folder of its own by its module's names, whatever program named them or put them under a prefix (``module.`` of
    training on several cards); those that stand outside of the prefix keep their names.

    Raises:
        ValueError: if the part is there under several prefixes.
    """
    tensors = _without_wrappers(tensors)
    found = [(prefix, rename) for part, _, markers, rename in _LAYOUTS if part == kind for prefix in _prefixes(tensors, markers)]
    if len(found) > 1:
        places = listed((f"{prefix}…" for prefix, _ in found), 4)
        raise ValueError(
            f"{source} holds several sets of weights in one ({places}), and which is meant is not known: one may be the average that training keeps "
            "(EMA). Save the one you want in a file of its own."
        )
    for prefix, rename in found:
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        renamed = {new: piece for name, tensor in inside.items() for new, piece in rename(name[len(prefix) :], tensor)}
        return {name: tensor for name, tensor in tensors.items() if name not in inside} | renamed
    return tensors


#: How the scales of fp8 weights are named, and what else files of scaled weights hold that is of no use here.
_SCALES = (".scale_weight", ".weight_scale")
_SCALE_EXTRAS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8", "spiece_model")


def split_scales(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The weights among the tensors of a part, and the scales of fp8 weights, by the weight's name."""
    scales = {f"{name[: -len(end)]}.weight": tensor for name, tensor in tensors.items() for end in _SCALES if name.endswith(end)}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith((*_SCALES, *_SCALE_EXTRAS))}, scales


def _prefixes(tensors: Tensors, markers: tuple[str, ...]) -> list[str]:
    """Every prefix under which all ``markers`` stand, the longest first."""
    first = markers[0]
    prefixes = {name[: -len(first)] for name in tensors if name == first or name.endswith(f".{first}")}
    return sorted((prefix for prefix in prefixes if all(prefix + marker in tensors for marker in markers)), key=len, reverse=True)


def _unknown(tensors: Tensors, file: Path) -> ValueError:
    names = sorted(tensors)
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    if any(re.search(r"lora_(A|B|up|down)\b|\.alpha$|lokr_|hada_", name) for name in names):
        return ValueError(
            f"{file} is a LoRA ({len(names)} tensors: {few}), not a model: it changes a model and cannot run alone. "
            "Load the model it was made for here."
        )
    return ValueError(
        f"{file} holds no CogVideoX transformer, VAE or T5 text encoder that is known here: its {len(names)} tensors ({few or 'none'}) are another "
        "model's. Choose a CogVideoX file with the names of diffusers, ComfyUI or SAT."
    )


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
    """What ComfyUI's core calls a module or tensor of diffusers' transformer: ``transformer_blocks.0.attn1.to_q`` -> ``blocks.0.q``."""
    name = re.sub(r"^transformer_blocks\.", "blocks.", name)
    for comfy, module in _COMFY_BLOCK.items():
        name = re.sub(rf"^(blocks\.\d+)\.{re.escape(module)}(?=\.|$)", rf"\1.{comfy}", name)
    return re.sub(r"^(time|ofs)_embedding\.linear_", r"\1_embedding_linear_", name)


_SAT_LAYER = {
    "attention.dense": "attn1.to_out.0",
    "mlp.dense_h_to_4h": "ff.net.0.proj",
    "mlp.dense_4h_to_h": "ff.net.2",
    "input_layernorm": "norm1.norm",
    "post_attention_layernorm": "norm2.norm",
}
_SAT_OTHERS = {
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
    """SAT fuses q, k and v, and the modulations of a layer's two norms for video and for text; each goes where it belongs, as a view."""
    path, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", path)
    norm = re.fullmatch(r"mixins\.adaln_layer\.(query|key)_layernorm_list\.(\d+)", path)
    modulation = re.fullmatch(r"mixins\.adaln_layer\.adaLN_modulations\.(\d+)\.1", path)
    if any(unused in name for unused in _SAT_UNUSED):
        return
    if layer and layer[2] == "attention.query_key_value":
        for number, part in enumerate("qkv"):
            yield f"transformer_blocks.{layer[1]}.attn1.to_{part}.{leaf}", tensor.rows(number, of=3)
    elif layer:
        yield f"transformer_blocks.{layer[1]}.{_SAT_LAYER.get(layer[2], layer[2])}.{leaf}", tensor
    elif norm:
        yield f"transformer_blocks.{norm[2]}.attn1.norm_{norm[1][0]}.{leaf}", tensor
    elif modulation:
        yield f"transformer_blocks.{modulation[1]}.norm1.linear.{leaf}", tensor.rows(0, 1, 2, 6, 7, 8, of=12)
        yield f"transformer_blocks.{modulation[1]}.norm2.linear.{leaf}", tensor.rows(3, 4, 5, 9, 10, 11, of=12)
    elif name == "mixins.pos_embed.pos_embedding":
        yield "patch_embed.pos_embedding", tensor
    else:
        yield f"{_SAT_OTHERS.get(path, path)}.{leaf}", tensor


def _from_sat_vae(name: str, tensor: StoredTensor) -> _Renamed:
    """``decoder.up.3.block.0.nin_shortcut.weight`` -> ``decoder.up_blocks.0.resnets.0.conv_shortcut.weight``: SAT counts up blocks backwards."""
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
    ("transformer", "SAT", ("transformer.layers.0.attention.query_key_value.weight", f"mixins.{_TEXT_PROJECTION}"), _from_sat),
    ("vae", "diffusers", ("decoder.mid_block.resnets.0.norm1.norm_layer.weight",), _same),
    ("vae", "SAT", ("decoder.mid.block_1.norm1.norm_layer.weight",), _from_sat_vae),
    ("text_encoder", "single file", ("encoder.block.0.layer.0.SelfAttention.q.weight",), _same),
]
