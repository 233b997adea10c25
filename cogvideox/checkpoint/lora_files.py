"""LoRAs on disk: which layers a file changes, by which halves and how strongly, whoever wrote it. Nothing of the
weights is read but the alphas.

A name in such a file is four things: what trainers put around the model (``transformer.``, ``base_model.model.``,
``module.``, in any number and order), the layer, which half of its change this is, and the name of the adapter. The
layer is called as diffusers, ComfyUI's core, SAT or DiffSynth call it, with dots or, by kohya's trainers, with
underscores throughout; as dots and underscores never tell two layers apart, all are looked up with underscores.

What a file says about itself (peft's ``adapter_config.json``, metadata, what lies beside the weights in a pickle) is
data: numbers are checked, and its patterns are matched here, as they would be regular expressions of a stranger.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..files import parse_json, read_json, read_text, unreadable
from ..words import listed, reason, short
from .folders import is_checkpoint, sat_weights
from .headers import StoredTensor, read_metadata, read_tensor
from .naming import SAT_LAYER, SAT_OTHERS, SAT_QKV, comfy_name, find_parts, sat_modules
from .parts import Part
from .pickles import read_pickle
from .reading import read_any_header

_SAFETENSORS, _PICKLES = (".safetensors", ".sft"), (".pt", ".pth", ".ckpt", ".bin")
#: What a LoRA in a folder of its own is called, by peft and by diffusers, and what its optimizer's and other states are
#: called beside it.
_FILES = tuple(f"{name}{end}" for end in (".safetensors", ".bin") for name in ("adapter_model", "pytorch_lora_weights"))
_STATES = ("optimizer", "scheduler", "random_states", "rng_state", "training_args", "scaler", "sampler")
_SETTINGS_FILE = "adapter_config.json"
#: Folders below the one that was given that are looked into, and levels of them: trainers write ``checkpoint-500/``.
_MOST_FOLDERS, _LEVELS = 200, 3
#: Bytes of a file with settings, and entries of a table of patterns: more than a transformer has layers.
_MOST_SETTINGS, _MOST_PATTERNS = 4 << 20, 400
#: Patterns in a file that are more than a name; each is tried on every layer.
_MOST_CHOICES = 60

_DOWN, _UP = "down", "up"
_MARKERS = {"lora_A": _DOWN, "lora_a": _DOWN, "lora_down": _DOWN, "lora_B": _UP, "lora_b": _UP, "lora_up": _UP}
#: Halves named in two words, behind one of the first: ``lora.down``, ``to_q_lora.up``.
_WORDS, _HALVES = ("lora", "lora_layer", "lora_linear_layer"), {"down": _DOWN, "A": _DOWN, "up": _UP, "B": _UP}
_SAT_MARKERS = {"matrix_A": _DOWN, "matrix_B": _UP}
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
    "lora_embedding_": "LoRA of an embedding",
    "lllite_": "ControlNet-LLLite",
    "controlnet": "ControlNet",
    "string_to_param": "textual inversion",
    "emb_params": "textual inversion",
}
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


@dataclass(frozen=True)
class Pair:
    """The two halves of one layer's change: ``down [rank, in]`` and ``up [out, rank]`` (of a convolution ``[rank, in,
    k, k]`` and ``[out, rank, 1, 1]``), and ``scale``, alpha / rank."""

    down: StoredTensor
    up: StoredTensor
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA changes in a CogVideoX transformer, of whatever size.

    Attributes:
        path: its file.
        pairs: by the module they belong to, as diffusers calls it.
        base: the model that its settings say it was trained on, if they do.
        notes: sentences for the user.
    """

    path: Path
    pairs: Mapping[str, Pair] = field(repr=False)
    base: str | None = None
    notes: tuple[str, ...] = ()


def find_lora(path: Path) -> Path:
    """The file of a LoRA, of which it or a folder that trainers wrote is given.

    Raises:
        ValueError: if there is none, or more than one.
    """
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise ValueError(f"There is no LoRA {short(path, 400)}. Check the path.")
        return path
    if is_checkpoint(path):
        raise ValueError(
            f"{short(path, 400)} is a CogVideoX checkpoint and no LoRA. A model is loaded with CogVideoX-1.5 Model "
            "Loader, or --model."
        )
    folders = [path]
    for _ in range(_LEVELS):
        found = {folder: files for folder in folders if (files := _lora_files(folder))}
        if len(found) > 1:
            raise ValueError(
                f"{short(path, 400)} holds {len(found)} LoRAs, in "
                f"{listed(folder.relative_to(path).as_posix() for folder in found)}, and which is meant is not known. "
                "Give the path of one of them."
            )
        for files in found.values():
            if len(files) > 1:
                raise ValueError(
                    f"{short(path, 400)} holds {len(files)} files that can be the LoRA "
                    f"({listed(file.name for file in files)}), and which is meant is not known. Give the path of one "
                    "of them."
                )
            return files[0]
        folders = [inner for folder in folders for inner in _inside(folder) if inner.is_dir()][:_MOST_FOLDERS]
    raise ValueError(
        f"{short(path, 400)} is a folder without a LoRA in it: no adapter_model.safetensors, "
        "pytorch_lora_weights.safetensors or other file of weights. Check the path, or give that of the file."
    )


def _lora_files(folder: Path) -> list[Path]:
    """The files in a folder that can be the LoRA: the one with a usual name, else those that are no trainer's
    states."""
    usual = next((folder / name for name in _FILES if (folder / name).is_file()), None) or sat_weights(folder)
    if usual is not None:
        return [usual]
    for endings in (_SAFETENSORS, _PICKLES):
        found = [
            file
            for file in _inside(folder)
            if file.suffix.lower() in endings and not file.name.startswith(_STATES) and file.is_file()
        ]
        if found:
            return found
    return []


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(unreadable(folder, error)) from error


def read_lora(path: Path) -> LoraFile:
    """Read what a LoRA changes: header, alphas and settings.

    Args:
        path: a safetensors, GGUF or torch file (no code in it is run).

    Raises:
        ValueError: if it is not a LoRA of a CogVideoX transformer, or is damaged or more than that.
    """
    tensors, beside = read_pickle(path) if path.suffix.lower() in _PICKLES else (read_any_header(path), {})
    return _lora_of(tensors, path, _settings(path, beside))


def lora_inside(part: Part) -> LoraFile:
    """The LoRA that was being trained on a transformer when it was saved, as ``read_lora`` has it.

    Raises:
        ValueError: if it is damaged, or more than a LoRA.
    """
    file = next(iter(part.lora.values())).file
    beside = read_pickle(file)[1] if file.suffix.lower() in _PICKLES else {}
    return _lora_of(part.lora, file, _settings(file, beside))


def _lora_of(tensors: Mapping[str, StoredTensor], path: Path, settings: "Settings") -> LoraFile:
    """``read_lora`` of tensors that are known by name already."""
    where = short(path, 400)
    if not tensors:
        raise ValueError(f"{where} holds no tensors, so there is no LoRA in it. Download it again, or choose another.")
    names = _sort(tensors, where)
    if not names.halves:
        raise ValueError(
            f"{where} holds no change of the transformer: all its {names.text_encoder} tensors are for the text "
            "encoder. Choose another LoRA."
        )
    alphas = _alphas(names, tensors, where, settings)
    pairs: dict[str, Pair] = {}
    for module, found in sorted(names.halves.items()):
        if set(found) != {_DOWN, _UP}:
            (there,) = found
            missing = _UP if there == _DOWN else _DOWN
            raise ValueError(
                f"{where} holds the {there} half of {module} and not its {missing} half, so the change it was trained "
                "for is not whole. Download it again."
            )
        down, up = found[_DOWN], found[_UP]
        rank = _rank(where, module, down, up)
        pairs[module] = Pair(down, up, settings.scale(module, rank, alphas.get(module), names.sat, where))
    notes = []
    if names.text_encoder:
        notes.append(
            f"{short(path.name)} trains the text encoder too ({names.text_encoder} tensors), which is left as it is."
        )
    if names.sat:
        alpha = (
            "alpha 1, as SAT's trainer has it"
            if settings.alpha is None
            else f"alpha {settings.alpha:g}, as its training_config.yaml says"
        )
        notes.append(f"SAT's LoRA: strength 1 is {alpha}, divided by the rank.")
    if names.model:
        notes.append(
            f"{short(path.name)} holds the model it was trained on too ({names.model} tensors), of which nothing is "
            "used here."
        )
    return LoraFile(path, pairs, settings.base, tuple(notes))


def _alphas(names: "_Names", tensors: Mapping[str, StoredTensor], where: str, settings: "Settings") -> dict[str, float]:
    """Alphas by module."""
    alphas: dict[str, float] = {}
    for name, modules in names.alphas.items():
        alpha = _number(_value(where, name, tensors[name]), f"the alpha {short(name)}", where)
        for module in modules:
            if module not in names.halves:
                raise ValueError(
                    f"{where} holds an alpha of {module} and no halves of its change, so it is not whole. Download it "
                    "again."
                )
            if alphas.setdefault(module, alpha) != alpha:
                raise ValueError(
                    f"{where} gives {module} two alphas, {alphas[module]:g} and {alpha:g}, so how strongly it was "
                    "trained is not known. Download it again."
                )
    return alphas


@dataclass
class _Names:
    """The tensors of a file by what their names say they are."""

    halves: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    alphas: dict[str, list[str]] = field(default_factory=dict)
    text_encoder: int = 0
    model: int = 0
    sat: bool = False


@dataclass(frozen=True)
class _Name:
    """What a name says: which half (or that it is an alpha) of which path, of which adapter; SAT numbers the halves of
    fused layers."""

    kind: str
    path: str
    adapter: str = ""
    number: int | None = None


def _sort(tensors: Mapping[str, StoredTensor], where: str) -> _Names:
    """Know every tensor by its name.

    Raises:
        ValueError: for names that are not a LoRA's, or not of a CogVideoX transformer.
    """
    known, strange, names = {}, [], _Names()
    trained_on = any(".original." in name or ".base_layer." in name for name in tensors)
    for name in tensors:
        said = _parse(name)
        if said is not None and (any(mark in name for mark in _TEXT_ENCODER) or name.startswith("lora_te")):
            names.text_encoder += 1
        elif said is None:
            strange.append(name)
        else:
            known[name] = said
    if strange and not (trained_on and known and not _relative(strange)):
        raise _not_a_lora(tensors, strange, bool(known), where)
    names.model, names.sat = len(strange), any(said.number is not None for said in known.values())
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
                if target.rows and said.kind == _UP and said.number is None
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
    if len(words) > 2 and words[-1] == "weight" and words[-2] in (_DOWN, _UP):
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
            kinds.add("full weights")
        if _GLORA.search(name):
            kinds.add("GLoRA")
        if "bias" in words and any(marker in words for marker in _MARKERS):
            kinds.add("LoRA with biases (lora_bias)")
        if words[-1] in _SCALES:
            kinds.add("LoRA in scaled fp8")
    return sorted(kinds)


def _not_a_lora(tensors: Mapping[str, StoredTensor], strange: list[str], has_halves: bool, where: str) -> ValueError:
    kinds = _relative(strange)
    if kinds:
        what = f"it is {_article(' and '.join(kinds))}, and only LoRAs are known here"
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


def _article(kind: str) -> str:
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


def _rank(where: str, module: str, down: StoredTensor, up: StoredTensor) -> int:
    """The rank of a pair.

    Raises:
        ValueError: if its halves are not floating-point matrices, or convolutions, of one rank.
    """
    for half, stored in ((_DOWN, down), (_UP, up)):
        if stored.quantization is not None or not stored.dtype.is_floating_point:
            kind = stored.kind if stored.quantization is not None else str(stored.dtype).removeprefix("torch.")
            raise ValueError(
                f"{where} cannot be applied: the {half} half of {module} is stored as {kind}, and a LoRA is needed in "
                "floating-point numbers (fp32, bf16, fp16 or fp8). Get the original from its maker."
            )
    shapes = f"(shapes {list(down.shape)} and {list(up.shape)})"
    if len(down.shape) not in (2, 4) or len(up.shape) not in (2, 4) or any(size != 1 for size in up.shape[2:]):
        raise ValueError(
            f"{where} does not fit: the halves of {module} are neither matrices nor convolutions {shapes}. Download "
            "it again."
        )
    if down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{where} is damaged: the halves of {module} have the ranks {down.shape[0]} and {up.shape[1]} {shapes}, "
            "and must have one. Download it again."
        )
    if not down.nbytes or not up.nbytes:
        raise ValueError(
            f"{where} is empty where it should change {module}: its halves are of rank {down.shape[0]} {shapes}. "
            "Download it again."
        )
    return down.shape[0]


def _value(where: str, name: str, stored: StoredTensor) -> Any:
    if stored.nbytes != stored.dtype.itemsize or stored.quantization is not None:
        raise ValueError(
            f"{where} is damaged: an alpha has the shape {short(list(stored.shape))} and should be one number "
            f"({short(name)}). Download it again."
        )
    return read_tensor(stored).to(torch.float64 if stored.dtype.is_floating_point else stored.dtype).item()


def _number(value: Any, what: str, where: str) -> float:
    """A finite number that is at least 1, as alphas and ranks are.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf or value > 1e30:
        shown = f"the text '{short(value)}'" if isinstance(value, str) else short(value)
        raise ValueError(
            f"{where} is refused: {what} is {shown}, and it must be a finite number of at least 1, or how strongly "
            "the LoRA was trained is not known. Download it again, or ask its maker."
        )
    return float(value)


# --- Settings ---

#: What settings of peft mean a change that two halves do not show -> what to call it.
_MORE_THAN_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "LoRA with biases",
    "modules_to_save": "LoRA and whole layers (modules_to_save)",
    "layer_replication": "LoRA of replicated layers",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "LoRA and trained tokens",
}
#: peft's ways to begin that leave the base weights as they are.
_BEGUN = ("gaussian", "eva", "orthogonal", "default", "true", "false", "")
_BASES = (
    "base_model_name_or_path",
    "base_model",
    "ss_base_model_version",
    "ss_sd_model_name",
    "modelspec.architecture",
)


@dataclass(frozen=True)
class Settings:
    """What a LoRA's maker wrote beside its weights.

    Attributes:
        alpha, rank: of every layer that the patterns do not name.
        alphas, ranks: patterns of layers' names, and numbers; the first that fits counts.
        by_root: divided is by the root of the rank (``use_rslora``).
        base: the model that it was trained on.
    """

    alpha: float | None = None
    rank: float | None = None
    alphas: tuple[tuple["_Pattern", float], ...] = ()
    ranks: tuple[tuple["_Pattern", float], ...] = ()
    by_root: bool = False
    base: str | None = None

    def scale(self, module: str, rank: int, alpha: float | None, sat: bool, where: str) -> float:
        """alpha / rank of a layer whose alpha the weights may tell; 1 where nothing tells one, as diffusers has it, and
        1 / rank for SAT's.

        Raises:
            ValueError: if these are the settings of another LoRA.
        """
        said = next((value for pattern, value in self.ranks if pattern.matches(module)), self.rank)
        if said is not None and said != rank:
            raise ValueError(
                f"{where} does not fit its settings: they say rank {said:g} for {module}, and it has {rank}, so its "
                "alpha is another's too. Download both again, from one place."
            )
        if alpha is None:
            alpha = next((value for pattern, value in self.alphas if pattern.matches(module)), self.alpha)
        if alpha is None:
            alpha = 1.0 if sat else float(rank)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _settings(path: Path, beside: Mapping[str, Any]) -> Settings:
    """The settings of a LoRA's file: peft's, diffusers' or finetrainers', or what lies beside the weights in a pickle.

    Raises:
        ValueError: if they cannot be read, are none, or say that it is more than a LoRA.
    """
    where = short(path, 400)
    file = path.with_name(_SETTINGS_FILE)
    if os.path.lexists(file) and (path.stem == "adapter_model" or _lora_files(path.parent) == [path]):
        return _checked(read_json(file, _MOST_SETTINGS), where)
    if path.suffix.lower() in _PICKLES:
        found = next(
            (
                value
                for key in ("lora_config", "peft_config", "adapter_config", "config")
                if isinstance(value := beside.get(key), dict)
            ),
            {},
        )
        # peft keeps the settings of its adapters by their names.
        found = found["default"] if isinstance(found.get("default"), dict) else found
        numbers = {
            "lora_alpha": ("lora_alpha", "alpha", "network_alpha"),
            "r": ("lora_r", "lora_rank", "rank", "r", "network_dim"),
        }
        flat = {
            name: value
            for name, keys in numbers.items()
            for key in reversed(keys)
            if (value := found.get(key, beside.get(key))) is not None
        }
        if "lora_alpha" not in flat:
            # Where no alpha is said, a rank may be that of a process among several.
            flat.pop("r", None)
        flat |= {key: value for key, value in found.items() if isinstance(key, str) and key not in flat}
        alpha = _sat_alpha(path)
        return _checked(flat if alpha is None else flat | {"lora_alpha": alpha}, where)
    if path.suffix.lower() == ".gguf":
        return Settings()
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        raise ValueError(
            f"The settings of the LoRA {where} cannot be read ({reason(error)}), so its strength is not known. "
            "Download it again."
        ) from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"The settings of the LoRA {where} are a {type(metadata).__name__} and no table, so its strength is not "
            "known. Download it again."
        )
    written: dict = {}
    for key in ("lora_adapter_metadata", "lora_config"):
        if key in metadata:
            written = _table(metadata[key], key, where)
            break
    written = {name.removeprefix("transformer."): value for name, value in written.items()}
    return _checked({key: metadata[key] for key in _BASES if key in metadata} | written, where)


def _table(text: Any, key: str, where: str) -> dict:
    try:
        found = parse_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise ValueError(
            f"The settings of the LoRA {where} ({key} in its metadata) cannot be read ({reason(error)}), so its "
            "strength is not known. Download it again."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"The settings of the LoRA {where} ({key} in its metadata) are a {type(found).__name__} and no table, so "
            "its strength is not known. Download it again."
        )
    return found


def _sat_alpha(path: Path) -> int | float | str | None:
    """``lora_alpha`` of the configuration that SAT's trainer writes into the folder of a run, if it is said there."""
    file = path.parent.parent / "training_config.yaml"
    if not path.name.endswith("_model_states.pt") or not file.is_file():
        return None
    said = re.search(r"^[ \t]*lora_alpha[ \t]*:[ \t]*([^\s#]+)", read_text(file, _MOST_SETTINGS), re.MULTILINE)
    if said is None:
        return None
    try:
        return float(said[1])
    except ValueError:
        return said[1]


def _checked(given: Mapping, where: str) -> Settings:
    """Settings as they are to be used.

    Raises:
        ValueError: if a number is none, a pattern cannot be matched safely, or they say that it is more than a LoRA.
    """
    kind = given.get("peft_type")
    more = next((what for key, what in _MORE_THAN_LORA.items() if given.get(key)), None)
    if kind is not None and str(kind).split(".")[-1].upper() != "LORA":
        more = short(kind)
    if more is not None:
        raise ValueError(
            f"{where} cannot be applied: its settings say that it is {_article(more)}, and only LoRAs are known here. "
            "Ask its maker for a LoRA, or for the whole model."
        )
    begun = given.get("init_lora_weights")
    if begun is not None and str(begun).lower() not in _BEGUN:
        raise ValueError(
            f"{where} cannot be applied: its training began with {short(begun)} (init_lora_weights), which changes the "
            "model's own weights too, and they are not in the file. Ask its maker for a LoRA that was converted "
            "(peft's path_initial_model_for_weight_conversion)."
        )
    by_root = given.get("use_rslora")
    if by_root not in (None, True, False) or isinstance(by_root, float):
        raise ValueError(
            f"{where} is refused: use_rslora in its settings is {short(by_root)} and must be true or false. Download "
            "it again."
        )

    def number(key: str) -> float | None:
        return None if given.get(key) is None else _number(given[key], f"{key} in its settings", where)

    base = next((given[key] for key in _BASES if isinstance(given.get(key), str) and given[key]), None)
    alphas, ranks = (tuple(_patterns(given.get(key), key, where)) for key in ("alpha_pattern", "rank_pattern"))
    return Settings(number("lora_alpha"), number("r"), alphas, ranks, bool(by_root), base)


def _patterns(given: Any, key: str, where: str) -> Iterator[tuple["_Pattern", float]]:
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{where} is refused: {key} in its settings is {short(given)} and must be a table of layers and numbers. "
            "Download it again."
        )
    if len(given) > _MOST_PATTERNS:
        raise ValueError(
            f"{where} is refused: {key} in its settings has {len(given):,} entries, more than a transformer has "
            "layers. Download it again."
        )
    choices = 0
    for pattern, value in given.items():
        found = _Pattern.parse(pattern)
        choices += 0 if found is None else len(found.choices)
        if found is None or choices > _MOST_CHOICES:
            raise ValueError(
                f"{where} is refused: {key} in its settings names layers by {short(pattern)}, a regular expression "
                "that is not run here, as it could run for ever. Names, and those with . .* .+ \\d+ ^ $ and (a|b) in "
                "them, are known: write it so, or name the layers."
            )
        yield found, _number(value, f"{short(pattern)} of {key} in its settings", where)


@dataclass(frozen=True)
class _Pattern:
    """A name of layers as peft has them: the end of their names, from a dot on, or all of it (``^``); matched in time
    that its length bounds.

    Attributes:
        name: all of it, where it is a name and nothing else.
        choices: else sequences of what must follow: letters (None: any), whether there may be none of them, and whether
            many.
        whole: whether it must begin where the name does.
    """

    name: str | None
    choices: tuple[tuple[tuple[str | None, bool, bool], ...], ...] = ()
    whole: bool = False

    @classmethod
    def parse(cls, pattern: Any) -> "_Pattern | None":
        """The pattern of a text in the simple forms, or None. ``(a|b)`` may stand in it once."""
        if not isinstance(pattern, str) or not 1 <= len(pattern) <= 300:
            return None
        whole = pattern.startswith("^")
        text = pattern[whole:].removesuffix("$")
        if re.fullmatch(r"[\w.-]+", text):
            return cls(text, whole=whole)
        group = re.fullmatch(r"([^()|]*)\((?:\?:)?([^()]*)\)([^()|]*)", text)
        if group is not None:
            texts = [group[1] + choice + group[3] for choice in group[2].split("|")]
        else:
            texts = [text] if whole else text.split("|")
        choices = [steps for choice in texts if (steps := _steps(choice)) is not None]
        if (
            len(texts) > 30
            or len(choices) < len(texts)
            or any(sum(many for *_, many in steps) > 5 for steps in choices)
        ):
            return None
        return cls(None, tuple(choices), whole)

    def matches(self, name: str) -> bool:
        if self.name is not None:
            return name == self.name or (not self.whole and name.endswith(f".{self.name}"))
        starts = {0} if self.whole else {0, *(place + 1 for place, letter in enumerate(name) if letter == ".")}
        return any(self._fits(name, starts, steps) for steps in self.choices)

    @staticmethod
    def _fits(name: str, places: set[int], steps: tuple) -> bool:
        for letters, none, many in steps:
            reached = set(places) if none else set()
            for place in places:
                while place < len(name) and (letters is None or name[place] in letters):
                    place += 1
                    if not many or place in reached:
                        reached.add(place)
                        break
                    reached.add(place)
            places = reached
            if not places:
                return False
        return len(name) in places


def _steps(text: str) -> tuple[tuple[str | None, bool, bool], ...] | None:
    """What a text in the simple forms demands, letter by letter; None if it has others."""
    steps, place = [], 0
    while place < len(text):
        if text.startswith("[0-9]", place):
            letters, place = "0123456789", place + 5
        elif text[place] == "\\" and text[place + 1 : place + 2] in ("d", ".", "-", "_"):
            letters, place = ("0123456789" if text[place + 1] == "d" else text[place + 1]), place + 2
        elif text[place] == ".":
            letters, place = None, place + 1
        elif text[place] in "\\[](){}*+?|^$":
            return None
        else:
            letters, place = text[place], place + 1
        sign = text[place] if text[place : place + 1] in ("*", "+") else ""
        place += len(sign)
        steps.append((letters, sign == "*", bool(sign)))
    return tuple(steps)
