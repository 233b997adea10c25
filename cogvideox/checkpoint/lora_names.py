"""The names of tensors in LoRAs' files: which half of which layer's change each is, whoever wrote it.

A name in such a file is four things: what trainers put around the model (``transformer.``, ``base_model.model.``,
``module.``, in any number and order), the layer, which half of its change this is, and the name of the adapter. The
layer is called as diffusers, ComfyUI's core, SAT or DiffSynth call it, with dots or, by kohya's trainers, with
underscores throughout; as dots and underscores never tell two layers apart, all are looked up with underscores.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..words import listed, short
from .headers import StoredTensor
from .naming import SAT_LAYER, SAT_OTHERS, SAT_QKV, comfy_name, find_parts, sat_modules

DOWN, UP = "down", "up"
_MARKERS = {"lora_A": DOWN, "lora_a": DOWN, "lora_down": DOWN, "lora_B": UP, "lora_b": UP, "lora_up": UP}
#: Halves named in two words, behind one of the first: ``lora.down``, ``to_q_lora.up``.
_WORDS, _HALVES = ("lora", "lora_layer", "lora_linear_layer"), {"down": DOWN, "A": DOWN, "up": UP, "B": UP}
_SAT_MARKERS = {"matrix_A": DOWN, "matrix_B": UP}
_ALPHAS = ("alpha", "lora_alpha", "network_alpha")
_SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale")
#: What names of tensors for the text encoder hold: its name in pipelines, T5's layers.
_TEXT_ENCODER = ("text_encoder", "SelfAttention", "DenseReluDense")
#: How a part of a name begins that only a relative of LoRAs has -> what it is called.
_RELATIVES = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    "on_input": "IA3",
    "lora_E": "AdaLoRA",
    "vera_": "VeRA",
    "lora_mid": "LoCon with a middle part",
    "lambda_layer": "T-LoRA",
    "lora_embedding_": "LoRA of an embedding",
    "lllite_": "ControlNet-LLLite",
    "controlnet": "ControlNet",
    "string_to_param": "textual inversion",
    "emb_params": "textual inversion",
}
#: What a LoRA is called of which peft saved biases of the model that were trained with it.
BIASES = "LoRA with biases"
_FULL_WEIGHTS = ("diff", "diff_b", "set_weight", "w_norm", "b_norm", "modules_to_save")
_GLORA = re.compile(r"\.[ab][12]\.weight")
#: What only other models' layers are called, with underscores, all of a line -> whose they are. The first that fits
#: counts.
_OTHER_MODELS = (
    (("double_blocks",), "Flux or HunyuanVideo"),
    (("single_blocks",), "Flux or HunyuanVideo"),
    (("single_transformer_blocks",), "Flux or HunyuanVideo"),
    (("joint_blocks",), "Stable Diffusion 3"),
    (("joint_transformer_blocks",), "Stable Diffusion 3"),
    (("motion_modules",), "AnimateDiff"),
    (("down_blocks",), "Stable Diffusion"),
    (("up_blocks",), "Stable Diffusion"),
    (("mid_block",), "Stable Diffusion"),
    (("input_blocks",), "Stable Diffusion"),
    (("output_blocks",), "Stable Diffusion"),
    (("middle_block",), "Stable Diffusion"),
    (("img_mlp",), "Qwen-Image"),
    (("img_mod",), "Qwen-Image"),
    (("qkv_x",), "Mochi"),
    (("noise_refiner",), "Lumina or Z-Image"),
    (("add_k_proj",), "Stable Diffusion 3, Flux or HunyuanVideo"),
    (("ff_context",), "Stable Diffusion 3, Flux or HunyuanVideo"),
    (("blocks", "self_attn"), "Wan"),
    (("blocks", "cross_attn"), "Wan"),
    (("attn2",), "LTX-Video or another model with cross-attention"),
    (("layers", "self_attn"), "a language model"),
)

#: Words that the names around a model are made of.
_AROUND = set(
    "lora lycoris unet transformer transformer3d base model diffusion module orig mod pipeline pipe dit net network "
    "denoiser backbone fsdp wrapped "
    "checkpoint state dict ema student generator adapter cogvideox cogvideo weights forward compiled root".split()
)
#: What compiling and sharding put into the middle of names, and diffusers' first format, with underscores.
_WRAPPERS = re.compile(r"(?:^|(?<=_))(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|processor)(?:_|$)")
#: Where the layers of blocks are, with underscores.
_BLOCK = re.compile(
    r"(?:^|(?<=_))(transformer_blocks|blocks|transformer_layers|mixins_adaln_layer_adaLN_modulations)_([0-9]{1,4})_"
)
_BLOCK_LAYERS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
    "norm2.linear",
)
_OTHER_LAYERS = (
    "patch_embed.proj",
    "patch_embed.text_proj",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "ofs_embedding.linear_1",
    "ofs_embedding.linear_2",
    "norm_out.linear",
    "proj_out",
)
#: Other names of layers of a block: of diffusers with q, k and v fused, of its first format of LoRAs, of DiffSynth.
_BLOCK_ALIASES = {"attn1_to_out": "attn1.to_out.0", "ff_0": "ff.net.0.proj", "ff_2": "ff.net.2"}
_FUSED = ("attn1_to_qkv", "attn1_qkv", "qkv")
_OTHER_ALIASES = {
    "context_embedder": "patch_embed.text_proj",
    "time_embedder_timestep_embedder_0": "time_embedding.linear_1",
    "time_embedder_timestep_embedder_2": "time_embedding.linear_2",
}


@dataclass(frozen=True)
class Target:
    """A layer of the transformer, by diffusers' name, that a half belongs to.

    Attributes:
        rows, of: which of how many equal pieces of the up half's rows are the layer's; no rows stand for all.
    """

    module: str
    rows: tuple[int, ...] = ()
    of: int = 1


def _tables() -> tuple[dict[str, tuple[Target, ...]], dict[str, tuple[Target, ...]]]:
    """Names of layers with underscores -> the layers: of those in a block (``#`` for its number) and of the others."""
    block: dict[str, tuple[Target, ...]] = {}
    others: dict[str, tuple[Target, ...]] = {}
    for layer in _BLOCK_LAYERS:
        name = f"transformer_blocks.#.{layer}"
        for alias in (name, comfy_name(name.replace("#", "0")).replace("blocks.0", "blocks.#"), f"blocks.#.{layer}"):
            block[_flat(alias)] = (Target(name),)
    for container in ("transformer_blocks", "blocks"):
        block |= {
            f"{container}_#_{alias}": (Target(f"transformer_blocks.#.{layer}"),)
            for alias, layer in _BLOCK_ALIASES.items()
        }
        fused = tuple(
            Target(f"transformer_blocks.#.attn1.to_{part}", (number,), 3) for number, part in enumerate("qkv")
        )
        block |= {f"{container}_#_{alias}": fused for alias in _FUSED}
    for path in (
        *(f"transformer.layers.0.{layer}" for layer in (SAT_QKV, *SAT_LAYER)),
        "mixins.adaln_layer.adaLN_modulations.0.1",
    ):
        targets = tuple(Target(module.replace(".0.", ".#.", 1), rows, of) for module, rows, of in sat_modules(path))
        if all(target.module.removeprefix("transformer_blocks.#.") in _BLOCK_LAYERS for target in targets):
            block[_flat(path.replace(".0.", ".#.", 1))] = targets
    for layer in _OTHER_LAYERS:
        others |= {_flat(alias): (Target(layer),) for alias in (layer, comfy_name(layer))}
    others |= {
        _flat(alias): (Target(layer),)
        for alias, layer in (SAT_OTHERS | _OTHER_ALIASES).items()
        if layer in _OTHER_LAYERS
    }
    return block, dict(sorted(others.items(), key=lambda item: -len(item[0])))


def _flat(path: str) -> str:
    return re.sub("_+", "_", path.replace(".", "_"))


_IN_BLOCKS, _OUTSIDE = _tables()


@dataclass
class Names:
    """The tensors of a file by what their names say they are."""

    halves: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    alphas: dict[str, list[str]] = field(default_factory=dict)
    text_encoder: int = 0
    model: int = 0
    biases: int = 0
    sat: bool = False


@dataclass(frozen=True)
class _Name:
    """What a name says: which half (or that it is an alpha) of which path, of which adapter; SAT numbers the halves of
    fused layers."""

    kind: str
    path: str
    adapter: str = ""
    number: int | None = None


def sort_names(tensors: Mapping[str, StoredTensor], where: str) -> Names:
    """Know every tensor by its name.

    Raises:
        ValueError: for names that are not a LoRA's, or not of a CogVideoX transformer.
    """
    known, strange, names = {}, [], Names()
    # The model that it was trained on is there by its weights: biases alone were saved because they were trained.
    trained_on = any(name.endswith((".original.weight", ".base_layer.weight")) for name in tensors)
    for name in tensors:
        said = _parse(name)
        if said is not None and (any(mark in name for mark in _TEXT_ENCODER) or name.startswith("lora_te")):
            names.text_encoder += 1
        elif said is None:
            strange.append(name)
        else:
            known[name] = said
    if strange and not (trained_on and known and not _relative(strange)):
        raise _not_a_lora(tensors, strange, any(said.kind != "alpha" for said in known.values()), where)
    names.model, names.sat = len(strange), any(said.number is not None for said in known.values())
    names.biases = sum(name.endswith(".bias") for name in strange)
    # A layer's halves and its alpha say the same.
    places = {place: _layer(*place) for place in {(said.path, said.number) for said in known.values()}}
    layers = {name: places[said.path, said.number] for name, said in known.items()}
    unknown = {around for around, _ in layers.values() if not _is_around(around)}
    # A prefix that nobody else has is taken for one where it is before every name.
    common = (
        len(unknown) == 1
        and all(around in unknown for around, _ in layers.values())
        and _may_be_around(next(iter(unknown)))
    )
    unmatched = [
        name for name, (around, targets) in layers.items() if not targets or not (common or _is_around(around))
    ]
    if unmatched:
        raise _no_layer(tensors, unmatched, where)
    given: dict[tuple[str, str], str] = {}
    for name, said in known.items():
        targets = layers[name][1]
        if said.kind == "alpha":
            names.alphas[name] = [target.module for target in targets]
            continue
        for target in targets:
            first = given.setdefault((target.module, said.kind), name)
            if first != name:
                raise ValueError(
                    f"{where} holds the {said.kind} half of {target.module} twice, as {short(first)} and as "
                    f"{short(name)}: it is two LoRAs in one file, and which is meant is not known. Save them in files "
                    "of their own."
                )
            stored = tensors[name]
            half = (
                stored.rows(*target.rows, of=target.of)
                if target.rows and said.kind == UP and said.number is None
                else stored
            )
            names.halves.setdefault(target.module, {})[said.kind] = half
    adapters = sorted({said.adapter for said in known.values() if said.kind != "alpha"})
    if len(adapters) > 1:
        raise ValueError(
            f"{where} holds {len(adapters)} LoRAs, called {listed(adapter or '(no name)' for adapter in adapters)}, "
            "and which is meant is not known. Save them in files of their own."
        )
    return names


def _parse(name: str) -> _Name | None:
    """``transformer.a.lora_A.my-style.weight`` -> the down half of ``transformer.a``, of the adapter ``my-style``."""
    words = name.split(".")
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        if word in _SAT_MARKERS and re.fullmatch("[0-9]{1,3}", following):
            return (
                _Name(_SAT_MARKERS[word], ".".join(words[:place]), number=int(following))
                if len(words) == place + 2
                else None
            )
        if following in _HALVES and (word in _WORDS or word.endswith("_lora")):
            return _half(
                _HALVES[following],
                words[:place] + [word.removesuffix("_lora")] * (word not in _WORDS),
                words[place + 2 :],
            )
        marker = next((marker for marker in _MARKERS if word == marker or word.endswith(f"_{marker}")), None)
        if marker is not None:
            return _half(
                _MARKERS[marker], words[:place] + [word[: -len(marker) - 1]] * (word != marker), words[place + 1 :]
            )
    if words[-1] in _ALPHAS:
        path = words[:-2] if len(words) > 1 and words[-2] in _WORDS else words[:-1]
        return _Name("alpha", ".".join(path).removesuffix("_lora"))
    if len(words) > 2 and words[-1] == "weight" and words[-2] in (DOWN, UP):
        return _Name(words[-2], ".".join(words[:-2]))
    return None


def _half(kind: str, path: list[str], rest: list[str]) -> _Name | None:
    """A half, by what follows its mark: the adapter's name, which may hold dots, and ``weight``; None for a bias or a
    scale of it."""
    if rest and (rest[-1] == "bias" or rest[-1] in _SCALES):
        return None
    if rest and rest[-1] in _ALPHAS:
        return _Name("alpha", ".".join(path))
    return _Name(kind, ".".join(path), ".".join(rest[:-1] if rest and rest[-1] == "weight" else rest))


def _layer(path: str, number: int | None) -> tuple[str, tuple[Target, ...]]:
    """What is around the name of a layer, with underscores, and the layers; none if it is no layer of a CogVideoX
    transformer."""
    flat = _flat(_WRAPPERS.sub("", _flat(path))).strip("_")
    around = ""
    targets: tuple[Target, ...] = ()
    for match in _BLOCK.finditer(flat):
        targets = _IN_BLOCKS.get(f"{match[1]}_#_{flat[match.end() :]}", ())
        if targets:
            around = flat[: match.start()]
            targets = tuple(
                replace(target, module=target.module.replace("#", str(int(match[2])))) for target in targets
            )
            break
    if not targets:
        alias = next((alias for alias in _OUTSIDE if flat == alias or flat.endswith(f"_{alias}")), None)
        if alias is not None:
            around, targets = flat[: -len(alias)], _OUTSIDE[alias]
    if number is not None:
        # SAT gives each of the layers that are fused a pair of its own; modulations are one layer there.
        fused = [target for target in targets if target.of == 3]
        if fused:
            targets = tuple(replace(target, rows=()) for target in fused[number : number + 1])
        elif number:
            targets = ()
    return around.strip("_"), targets


def _is_around(prefix: str) -> bool:
    return all(word in _AROUND for word in prefix.split("_") if word)


def _may_be_around(prefix: str) -> bool:
    """Whether a prefix that is not known can be one: the name of a trainer's own wrapper, not of a part of another
    model."""
    words = prefix.split("_")
    return not any(
        word.isdigit()
        or word in ("blocks", "block", "controlnet", "control", "text", "encoder", "vae", "clip", "single")
        for word in words
    )


def _relative(names: Iterable[str]) -> list[str]:
    """What relatives of LoRAs are called that have such names."""
    kinds = set()
    for name in names:
        words = name.split(".")
        kinds |= {kind for mark, kind in _RELATIVES.items() if any(word.startswith(mark) for word in words)}
        if any(word in _FULL_WEIGHTS for word in words):
            kinds.add("change in full weights")
        if _GLORA.search(name):
            kinds.add("GLoRA")
        if "bias" in words and any(marker in words for marker in _MARKERS):
            kinds.add("LoRA with biases (lora_bias)")
        if words[-1] in _SCALES:
            kinds.add("LoRA in scaled fp8")
    return sorted(kinds)


def _not_a_lora(tensors: Mapping[str, StoredTensor], strange: list[str], has_halves: bool, where: str) -> ValueError:
    kinds = _relative(strange)
    if not kinds and has_halves and all(name.endswith(".bias") for name in strange):
        kinds = [BIASES]
    if kinds:
        what = f"it is {article(' and '.join(kinds))}, and only LoRAs are known here"
    elif has_halves:
        what = "it holds whole weights beside its LoRA, and a LoRA alone is less than what was trained"
    elif _is_model(tensors, where):
        what = "it is not a LoRA but a model or a part of one"
    else:
        what = "it is not a LoRA"
    return ValueError(
        f"{where} cannot be applied: {what}. {len(strange)} of its {len(tensors)} tensors are not a LoRA's "
        f"({listed(sorted(strange))}). A model is loaded with CogVideoX-1.5 Model Loader; of other kinds, ask their "
        "maker for a LoRA."
    )


def article(kind: str) -> str:
    """Put ``a`` or ``an`` before what something is called."""
    return f"an {kind}" if kind[:1] in "AEIOU" else f"a {kind}"


def _is_model(tensors: Mapping[str, StoredTensor], where: str) -> bool:
    try:
        return bool(find_parts(tensors, Path(where)))
    except ValueError:
        return False


def _no_layer(tensors: Mapping[str, StoredTensor], unmatched: list[str], where: str) -> ValueError:
    return ValueError(
        f"{where} does not fit: {len(unmatched)} of its {len(tensors)} tensors ({listed(sorted(unmatched))}) match no "
        f"layer of this CogVideoX transformer. {_made_for(tensors)} Choose a LoRA of CogVideoX."
    )


def _made_for(tensors: Iterable[str]) -> str:
    flat = [f"_{_flat(name)}_" for name in tensors]
    for marks, model in _OTHER_MODELS:
        if any(all(f"_{mark}_" in name for mark in marks) for name in flat):
            return f"Its layers are called as those of {model}."
    return "It was made for another model."
