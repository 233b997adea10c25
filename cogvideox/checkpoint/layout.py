"""The layouts checkpoints come in: which files hold which part, seen from configs, headers and shapes alone.

Folders as diffusers has them (the official releases)::

    model_index.json
    transformer/   config.json + one safetensors file, or shards and their index
    text_encoder/  config.json + the same
    tokenizer/     spiece.model
    vae/           config.json + the same
    scheduler/     scheduler_config.json

with ``transformer_T2V/`` and ``transformer_I2V/`` side by side in the place of ``transformer/``; single safetensors files with the names of
diffusers or of ComfyUI; and SAT's folders (``transformer/1000/mp_rank_00_model_states.pt``, ``vae/3d-vae.pt``).
"""

import json
import logging
import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from ..files import read_bytes, read_json
from ..variants import DEFAULT_TEXT_TOKENS, TRANSFORMER_CLASS, Variant, identify
from ..words import listed, short
from .architecture import check_part, check_together
from .configs import check_config
from .gguf import read_gguf_header
from .headers import StoredTensor, read_header
from .naming import ForeignError, FoundPart, check_unpacked, find_parts, module_tensors, packed_error, split_lora, split_scales
from .pickles import read_pickle_header
from .shapes import infer_config
from .tokenizer import check_tokenizer, has_tokenizer

logger = logging.getLogger(__name__)

#: part -> (what to call it, the class in its config.json)
PARTS = {
    "transformer": ("transformer", TRANSFORMER_CLASS),
    "text_encoder": ("text encoder", "T5EncoderModel"),
    "vae": ("VAE", "AutoencoderKLCogVideoX"),
}
#: Classes that have the part's tensors and more: whole T5s, whose encoder is the same.
_WHOLE = {"text_encoder": ("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")}
#: What to do where a part is not there.
_INSTEAD = {
    "transformer": "Choose another checkpoint.",
    "text_encoder": "Choose one in the loader's text_encoder_name (a T5-XXL file in models/text_encoders), or connect ComfyUI's CLIPLoader (t5xxl, "
    "type cogvideox) to CogVideoX-1.5 Text Encode.",
    "vae": "Choose one in the loader's vae_name (a CogVideoX VAE in models/vae).",
}
_TRANSFORMER_FOLDERS = ("transformer", "transformer_T2V", "transformer_I2V")
_SAT_WEIGHTS = "mp_rank_00_model_states.pt"
_SAT_STEPS = ("1000", "1", ".")
_WHERE = (
    "A CogVideoX checkpoint is a folder with transformer/, text_encoder/, tokenizer/, vae/ and scheduler/ in it, such as "
    "zai-org/CogVideoX1.5-5B on huggingface.co, or a single safetensors file of its transformer."
)


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a checkpoint on disk: its config and the place of every tensor. Nothing of the weights is read.

    Attributes:
        kind: ``transformer``, ``text_encoder`` or ``vae``.
        source: the folder or file it comes from.
        layout: ``diffusers`` (a folder), or whose names a file has: ``diffusers file``, ``ComfyUI``, ``SAT``, ``llama.cpp``, ``single file`` (T5).
        config: its ``config.json``, or what its shapes say.
        tensors: every tensor, by the name that the module has for it.
        scales: what fp8 weights are to be multiplied by, by the weight's name.
        lora: the halves of a LoRA that was being trained on it when it was saved, by the names they have in the file: a part of the model.
    """

    kind: str
    source: Path
    layout: str
    config: Mapping
    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor] = field(default_factory=dict)
    lora: Mapping[str, StoredTensor] = field(default_factory=dict)

    @cached_property
    def stored(self) -> dict[torch.dtype | str, int]:
        """Bytes on disk by dtype (GGUF's quantizations by name), largest first."""
        return stored_bytes(self.tensors)

    @property
    def files(self) -> list[Path]:
        """Every file it is read from."""
        config = {self.source / "config.json"} if self.source.is_dir() else set()
        return sorted({tensor.file for tensor in (*self.tensors.values(), *self.lora.values())} | config)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, opened but not read: ``open_checkpoint`` makes one.

    Attributes:
        path: the folder or file it was opened from.
        tokenizer: the folder of the tokenizer.
    """

    path: Path
    variant: Variant
    scheduler_config: Mapping
    tokenizer: Path
    parts: Mapping[str, Part] = field(repr=False)

    def part(self, kind: str) -> Part:
        """The part ``kind``.

        Raises:
            ValueError: if there is none, saying what to use instead.
        """
        if kind not in self.parts:
            raise ValueError(f"{self.path} holds no {PARTS[kind][0]}, and the step you asked for needs one. {_INSTEAD[kind]}")
        return self.parts[kind]

    @property
    def fingerprint(self) -> tuple:
        """Changes when a file of it is replaced: ``(path, size, mtime)`` of each."""
        files = {file for part in self.parts.values() for file in part.files}
        return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files))

    @property
    def text_tokens(self) -> int:
        """Tokens a prompt is padded or cut to (``max_text_seq_length`` of the transformer; 226 in released models)."""
        return self.part("transformer").config.get("max_text_seq_length") or DEFAULT_TEXT_TOKENS


def stored_bytes(tensors: Mapping[str, StoredTensor]) -> dict[torch.dtype | str, int]:
    """Bytes by dtype (GGUF's quantizations by name), largest first."""
    count: dict[torch.dtype | str, int] = {}
    for tensor in tensors.values():
        count[tensor.kind] = count.get(tensor.kind, 0) + tensor.nbytes
    return dict(sorted(count.items(), key=lambda item: -item[1]))


def open_checkpoint(
    path: Path | str, text_encoder: Path | str | None = None, vae: Path | str | None = None, tokenizer: Path | str | None = None
) -> Checkpoint:
    """Open a checkpoint in any of the layouts: configs and headers, a few hundred kilobytes.

    Args:
        path: a checkpoint's folder, a transformer's folder in it (``transformer_I2V``), or a single file of a transformer.
        text_encoder, vae: files or folders of these parts, in the place of the checkpoint's own.
        tokenizer: the tokenizer's folder, for where neither the checkpoint nor the text encoder brings one.

    Raises:
        ValueError: if it is not a CogVideoX checkpoint, or a file of it is missing, truncated or damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"There is no {path}, so there is nothing to load. Check the path. {_WHERE}")
    given = {kind: source for kind, source in (("text_encoder", text_encoder), ("vae", vae)) if source is not None}
    parts = _open_folder(path) if path.is_dir() else _open_file(path, given)
    if "transformer" not in parts:
        kinds = ", ".join(PARTS[kind][0] for kind in file_kinds(path))
        raise ValueError(f"{path} holds a {kinds} and no transformer, so it is not a checkpoint by itself. Choose it beside one. {_WHERE}")
    transformer = parts["transformer"]
    if transformer.lora:
        # Those who read LoRAs' files need this module.
        from .lora_files import lora_inside

        lora_inside(transformer)
    check_part(transformer)
    for kind in ("text_encoder", "vae"):
        if kind in given:
            parts[kind] = open_part(given[kind], kind)
        elif kind in parts:
            check_part(parts[kind])
        if kind in parts:
            check_together(transformer, parts[kind])
    variant = identify(transformer.config)
    if "vae" in parts and parts["vae"].config.get("scaling_factor") is None:
        # Two numbers that no shape shows: those of the release the transformer belongs to.
        known = {"scaling_factor": variant.latent_scale, "invert_scale_latents": variant.inverts_image_latents}
        if parts["vae"].layout == "diffusers":
            logger.warning("%s gives no scaling_factor: taken is %s, that of %s.", parts["vae"].source, variant.latent_scale, variant.name)
        parts["vae"] = replace(parts["vae"], config=known | {name: value for name, value in parts["vae"].config.items() if value is not None})
    root = transformer.source.parent if transformer.source != path or path.is_file() or path.name in _TRANSFORMER_FOLDERS else path
    return Checkpoint(path, variant, _scheduler_config(root, transformer, variant), _tokenizer(root, parts, tokenizer), parts)


def open_part(path: Path | str, kind: str) -> Part:
    """Open one part from a file or a folder of its own.

    Raises:
        ValueError: if it is not there, is not whole, or is another part or model.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"There is no {path}, so there is no {PARTS[kind][0]} to load. Check the path.")
    if path.is_dir():
        part = _open_part(path, kind)
    else:
        parts = _open_file(path, set(PARTS) - {kind})
        if kind not in parts:
            held = ", ".join(PARTS[found][0] for found in file_kinds(path))
            raise ValueError(f"{path} holds a {held} and no {PARTS[kind][0]}. Choose another file.")
        part = parts[kind]
    check_part(part)
    return part


def file_kinds(file: Path) -> list[str]:
    """The kinds of parts that a single file holds, whole or not.

    Raises:
        ValueError: if it cannot be read, or holds none.
    """
    return list(dict.fromkeys(found.kind for found in find_parts(read_any_header(file), file)))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a CogVideoX checkpoint in diffusers layout, by its transformer's config (one small file is read)."""
    return bool(transformer_folders(folder))


def transformer_folders(folder: Path) -> list[Path]:
    """The folders of CogVideoX transformers in a checkpoint's folder, by their configs."""
    return [Path(folder) / name for name in _TRANSFORMER_FOLDERS if _is_transformer_folder(Path(folder) / name)]


def _is_transformer_folder(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == TRANSFORMER_CLASS


def sat_weights(folder: Path) -> Path | None:
    """The file of a SAT transformer in its folder, or in ``transformer/`` of it, or None."""
    return sat_step(folder) or sat_step(folder / "transformer")


def sat_step(folder: Path) -> Path | None:
    """The file of a SAT transformer in its own folder: of the training step that ``latest`` names, else of those that releases have."""
    latest = folder / "latest"
    # A name of thousands of letters is none.
    named = [Path(read_bytes(latest).decode("utf-8", "replace").strip()[:255]).name] if os.path.isfile(latest) else []
    return next((file for step in (*named, *_SAT_STEPS) if os.path.isfile(file := folder / step / _SAT_WEIGHTS)), None)


def _open_folder(path: Path) -> dict[str, Part]:
    if not any(path.iterdir()):
        raise ValueError(f"{path} is empty: the download has not begun or went elsewhere. Download the checkpoint into it. {_WHERE}")
    sat = sat_weights(path)
    if sat is not None:
        return _open_sat(path, sat)
    if path.name in _TRANSFORMER_FOLDERS and (path / "config.json").is_file():
        root, transformer = path.parent, path
    else:
        found = [path / name for name in _TRANSFORMER_FOLDERS if (path / name).is_dir()]
        if not found:
            raise ValueError(f"{path} is not a CogVideoX checkpoint: it has no folder transformer/{_pipeline_name(path)}. {_WHERE}")
        if len(found) > 1:
            names = " and ".join(folder.name for folder in found)
            raise ValueError(f"{path} holds {len(found)} checkpoints, {names}, and which is meant is not known. Give the path of one of them.")
        root, transformer = path, found[0]
    parts = {"transformer": _open_part(transformer, "transformer")}
    return parts | {kind: _open_part(root / kind, kind) for kind in ("text_encoder", "vae") if (root / kind).is_dir()}


def _open_sat(folder: Path, weights: Path) -> dict[str, Part]:
    """SAT's transformer, and beside it (or beside the folder it is in) its VAE, and T5 where its guide puts it."""
    parts = _open_file(weights)
    for root in (folder, folder.parent):
        if "vae" not in parts and (root / "vae" / "3d-vae.pt").is_file():
            parts["vae"] = open_part(root / "vae" / "3d-vae.pt", "vae")
        if "text_encoder" not in parts and (root / "t5-v1_1-xxl" / "config.json").is_file():
            parts["text_encoder"] = _open_part(root / "t5-v1_1-xxl", "text_encoder")
    return parts


def _open_file(file: Path, without: Container[str] = ()) -> dict[str, Part]:
    """The parts that a single file holds, with configs from its shapes; kinds that are not wanted are not looked into."""
    found = [part for part in find_parts(read_any_header(file), file) if part.kind not in without]
    return {kind: _file_part(kind, [part for part in found if part.kind == kind], file) for kind in dict.fromkeys(part.kind for part in found)}


def _file_part(kind: str, found: list[FoundPart], file: Path) -> Part:
    if len(found) > 1:
        places = " and ".join(short(part.prefix + "…") for part in found)
        raise ValueError(
            f"{file} holds {len(found)} {PARTS[kind][0]}s ({places}), and which is meant is not known: one may be the average that "
            "training keeps (EMA). Save the one you want in a file of its own."
        )
    shard = re.search(r"-(\d{5})-of-(\d{5})$", file.stem)
    if shard and int(shard[2]) > 1:
        raise ValueError(
            f"{file} is piece {int(shard[1])} of {int(shard[2])} of a {PARTS[kind][0]}, and one piece alone cannot run. Give the "
            "folder that all of them lie in, with its config.json and index, or choose a file that is whole."
        )
    check_unpacked(found[0].tensors, file)
    tensors, scales = split_scales(found[0].tensors)
    config = infer_config(kind, tensors, file)
    if kind == "transformer" and not config["use_rotary_positional_embeddings"]:
        # 2b's positions are sines and cosines, which its module makes itself; SAT keeps them among the weights.
        config["use_learned_positional_embeddings"] = False
        tensors = {name: tensor for name, tensor in tensors.items() if name != "patch_embed.pos_embedding"}
    layout = "diffusers file" if found[0].layout == "diffusers" else found[0].layout
    lora = found[0].lora
    part = Part(kind, file, f"{layout}, with a LoRA inside" if lora else layout, config, tensors, scales, lora)
    _check_floats(part)
    return part


def read_any_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors, GGUF or torch file.

    Raises:
        ValueError: if it cannot be read.
    """
    if file.suffix == ".gguf":
        return read_gguf_header(file)
    return read_pickle_header(file) if file.suffix in (".pt", ".pth", ".ckpt", ".bin") else read_header(file)


def _pipeline_name(folder: Path) -> str:
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return f" (its model_index.json says {name})" if name else ""


def _open_part(here: Path, kind: str) -> Part:
    name, class_name = PARTS[kind]
    config_file = here / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{here} has no config.json, so how to build the {name} is unknown. Download config.json from the same repository into it.")
    config = read_json(config_file)
    names = config.get("_class_name") or config.get("architectures") or (class_name if config.get("model_type") == "t5" else "no class")
    names = names if isinstance(names, list) else [names]
    if not {class_name, *_WHOLE.get(kind, ())}.intersection(name for name in names if isinstance(name, str)):
        raise ForeignError(
            f"{config_file} describes {listed(names)}, not {class_name}: this is another model's {name}, and CogVideoX cannot run with it. "
            f"Choose a CogVideoX checkpoint. {_WHERE}"
        )
    packing = config.get("quantization_config")
    if isinstance(packing, dict) and packing.get("quant_method"):
        raise packed_error(short(packing["quant_method"]), here, "its config.json says so")
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(here, name):
        tensors |= read_header(file)
    tensors, lora = split_lora(tensors)
    check_unpacked(tensors, here)
    tensors = module_tensors(kind, tensors)
    check_config(kind, config, config_file, tensors)
    part = Part(kind, here, "diffusers", config, *split_scales(tensors), lora=lora)
    _check_floats(part)
    return part


def _check_floats(part: Part) -> None:
    """No part of CogVideoX has integers among its weights: cast to floats, they would be other numbers than were trained.

    Raises:
        ValueError: if there are some.
    """
    tensors = (*part.tensors.items(), *part.scales.items())
    odd = {name: stored for name, stored in tensors if not (stored.dtype.is_floating_point or stored.quantization)}
    if odd:
        kinds = ", ".join(sorted({str(stored.dtype).removeprefix("torch.") for stored in odd.values()}))
        raise ValueError(
            f"{short(part.source, 400)} holds {len(odd)} of {len(part.tensors)} weights of the {PARTS[part.kind][0]} as {kinds} ({listed(odd)}), and "
            "floating-point numbers belong there: it is damaged, or a copy that another program has quantized in a way that is not known here. "
            "Choose a file in bf16, fp16, fp32, fp8 or GGUF."
        )


def _weight_files(here: Path, name: str) -> list[Path]:
    indexes = sorted(here.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
    singles = sorted(path for path in here.glob("*.safetensors") if not re.search(r"-\d{5}-of-\d{5}", path.name))
    shards = sorted(path for path in here.glob("*.safetensors") if path not in singles)
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{indexes[0]} lists no weights, so the shards cannot be put together. Download this file again.")
        files = sorted({here / Path(file).name for file in weight_map.values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"{here} lacks {len(missing)} of {len(files)} shards of the {name}: {', '.join(missing)}. Without them weights are "
                "missing. Download them from the same repository into this folder."
            )
        return files
    if shards and not singles:
        raise ValueError(
            f"{here} holds {len(shards)} shards of the {name} but no index (*.safetensors.index.json), so it is not known whether "
            "they are all there. Download the index from the same repository into this folder."
        )
    if len(singles) != 1:
        found = ", ".join(path.name for path in singles) or "none"
        others = sorted(path.name for path in here.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        hint = f" {', '.join(others)} may run code when opened and is not read." if others else ""
        raise ValueError(
            f"{here} should hold the {name}'s weights in one safetensors file or in shards with an index; safetensors found: {found}."
            f"{hint} Keep exactly one set, or download the part again."
        )
    return singles


def _scheduler_config(root: Path, transformer: Part, variant: Variant) -> Mapping:
    """The checkpoint's own noise schedule; that of the release, where the layout has none."""
    file = root / "scheduler" / "scheduler_config.json"
    if file.is_file():
        config = read_json(file)
        check_config("scheduler", config, file)
        return config
    if transformer.layout != "diffusers":
        return variant.scheduler_config
    raise ValueError(
        f"{file} is missing: it holds the noise schedule the model was trained with, and guessing one would spoil the picture. "
        "Download scheduler/ from the same repository into the checkpoint's folder."
    )


def _tokenizer(root: Path, parts: Mapping[str, Part], given: Path | str | None) -> Path:
    """The folder with the tokenizer's files: the checkpoint's, the text encoder's, else the one given.

    Raises:
        ValueError: if there is a text encoder, and the tokenizer is damaged or not its own.
    """
    places = [root / "tokenizer"]
    if "text_encoder" in parts:
        source = parts["text_encoder"].source
        places += [source.parent / "tokenizer", source if source.is_dir() else source.parent]
    places += [Path(given).expanduser()] if given is not None else []
    found = next((place for place in places if has_tokenizer(place)), places[0])
    if "text_encoder" in parts:
        tensors = parts["text_encoder"].tensors
        table = tensors.get("shared.weight") or tensors.get("encoder.embed_tokens.weight")
        check_tokenizer(found, table.shape[0] if table and table.shape else None)
    return found
