"""The folders checkpoints come in: which files hold which part, seen from configs and headers alone.

The diffusers layout, as the official releases have it::

    model_index.json
    transformer/   config.json + one safetensors file, or shards and their index
    text_encoder/  config.json + the same
    tokenizer/     spiece.model
    vae/           config.json + the same
    scheduler/     scheduler_config.json
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ..variants import DEFAULT_TEXT_TOKENS, TRANSFORMER_CLASS, Variant, identify
from .headers import StoredTensor, read_header

#: part -> (what to call it, the class in its config.json)
PARTS = {
    "transformer": ("transformer", TRANSFORMER_CLASS),
    "text_encoder": ("text encoder", "T5EncoderModel"),
    "vae": ("VAE", "AutoencoderKLCogVideoX"),
}
_WHERE = (
    "A CogVideoX checkpoint is a folder with transformer/, text_encoder/, tokenizer/, vae/ and scheduler/ in it, such as "
    "zai-org/CogVideoX1.5-5B on huggingface.co."
)


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a checkpoint on disk: its config and the place of every tensor. Nothing of the weights is read.

    Attributes:
        kind: ``transformer``, ``text_encoder`` or ``vae``.
        folder: where it lies.
        config: its ``config.json``.
        tensors: every tensor by name.
    """

    kind: str
    folder: Path
    config: Mapping
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def stored(self) -> dict[torch.dtype, int]:
        """Bytes on disk by dtype, largest first."""
        count: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.nbytes
        return dict(sorted(count.items(), key=lambda item: -item[1]))

    @property
    def fingerprint(self) -> tuple:
        """Changes when a file of the part is replaced: ``(path, size, mtime)`` of each."""
        files = sorted({tensor.file for tensor in self.tensors.values()} | {self.folder / "config.json"})
        return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint in diffusers layout, opened but not read: ``open_checkpoint`` makes one."""

    folder: Path
    variant: Variant
    scheduler_config: Mapping
    parts: Mapping[str, Part] = field(repr=False)

    def part(self, kind: str) -> Part:
        """The part ``kind``.

        Raises:
            ValueError: if the folder does not hold it.
        """
        if kind not in self.parts:
            raise ValueError(
                f"{self.folder} holds no {PARTS[kind][0]}: there is no folder {kind}/ in it. The step you asked for needs it. "
                f"Download {kind}/ from the same repository into this folder."
            )
        return self.parts[kind]

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def text_tokens(self) -> int:
        """Tokens a prompt is padded or cut to (``max_text_seq_length`` of the transformer; 226 in released models)."""
        return self.part("transformer").config.get("max_text_seq_length") or DEFAULT_TEXT_TOKENS


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a CogVideoX checkpoint, by its transformer's config (one small file is read)."""
    try:
        config = json.loads((Path(folder) / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == TRANSFORMER_CLASS


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Open a checkpoint in diffusers layout: configs and headers, a few hundred kilobytes.

    Raises:
        ValueError: if it is not a CogVideoX checkpoint, or a file of it is missing, truncated or damaged.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise ValueError(f"There is no {folder}, so there is nothing to load. Check the path. {_WHERE}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; this loader opens folders in diffusers layout. {_WHERE}")
    if not any(folder.iterdir()):
        raise ValueError(f"{folder} is empty: the download has not begun or went elsewhere. Download the checkpoint into it. {_WHERE}")
    if not (folder / "transformer").is_dir():
        raise ValueError(f"{folder} is not a CogVideoX checkpoint: it has no folder transformer/{_pipeline_name(folder)}. {_WHERE}")
    parts = {kind: _open_part(folder, kind) for kind in PARTS if (folder / kind).is_dir()}
    transformer = parts["transformer"]
    _check_shapes(transformer)
    return Checkpoint(folder, identify(transformer.config), _scheduler_config(folder), parts)


def _pipeline_name(folder: Path) -> str:
    index = folder / "model_index.json"
    name = _read_json(index).get("_class_name") if index.is_file() else None
    return f" (its model_index.json says {name})" if name else ""


def _open_part(folder: Path, kind: str) -> Part:
    here, (name, class_name) = folder / kind, PARTS[kind]
    config_file = here / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{here} has no config.json, so how to build the {name} is unknown. Download config.json from the same repository into it.")
    config = _read_json(config_file)
    seen = config.get("_class_name") or ", ".join(config.get("architectures") or ["no class"])
    if class_name not in seen:
        raise ValueError(
            f"{config_file} describes {seen}, not {class_name}: this is another model's {name}, and CogVideoX cannot run with it. "
            f"Choose a CogVideoX checkpoint. {_WHERE}"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(here, name):
        tensors |= read_header(file)
    return Part(kind, here, config, tensors)


def _weight_files(here: Path, name: str) -> list[Path]:
    indexes = sorted(here.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
    singles = sorted(path for path in here.glob("*.safetensors") if not re.search(r"-\d{5}-of-\d{5}", path.name))
    shards = sorted(path for path in here.glob("*.safetensors") if path not in singles)
    if indexes:
        weight_map = _read_json(indexes[0]).get("weight_map")
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


def _scheduler_config(folder: Path) -> dict:
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: it holds the noise schedule the model was trained with, and guessing one would spoil the picture. "
            "Download scheduler/ from the same repository into the checkpoint's folder."
        )
    return _read_json(file)


def _check_shapes(part: Part) -> None:
    """The config must describe these weights: compare the two tensors that tell the variants apart."""
    config = part.config
    width = config.get("num_attention_heads", 30) * config.get("attention_head_dim", 64)
    patch, patch_t = config.get("patch_size", 2), config.get("patch_size_t")
    channels = config.get("in_channels", 16)
    wanted = {
        "patch_embed.proj.weight": (width, channels * patch * patch * patch_t) if patch_t else (width, channels, patch, patch),
        "patch_embed.text_proj.weight": (width, config.get("text_embed_dim", 4096)),
    }
    for name, shape in wanted.items():
        seen = part.tensors[name].shape if name in part.tensors else "missing"
        if seen != shape:
            raise ValueError(
                f"The weights in {part.folder} do not fit its config.json: {name} is {seen}, and the config says {shape}. They come "
                "from different models. Download the whole transformer/ folder from one repository."
            )


def _read_json(file: Path) -> dict:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}), so it cannot be used. Download this file again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} should hold a JSON object but holds a {type(data).__name__}. Download this file again.")
    return data
