"""The layouts checkpoints come in: which files hold which part, seen from configs, headers and shapes alone.

Folders as diffusers has them (the official releases)::

    model_index.json
    transformer/   config.json + one safetensors file, or shards and their index
    text_encoder/  config.json + the same
    tokenizer/     spiece.model
    vae/           config.json + the same
    scheduler/     scheduler_config.json

with ``transformer_T2V/`` and ``transformer_I2V/`` side by side in the place of ``transformer/``; single safetensors files with the names of
diffusers or of ComfyUI; and SAT's folders (``transformer/1000/mp_rank_00_model_states.pt``, ``vae/3d-vae.pt``). ``folders`` has what else a folder
may look like.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from ..files import read_json
from ..variants import DEFAULT_TEXT_TOKENS, TRANSFORMER_CLASS, Variant, identify
from .folders import WHERE as _WHERE
from .folders import Place, choose_weights, find_place, names_scheduler, part_path, what_else
from .folders import is_checkpoint as is_checkpoint
from .folders import sat_step as sat_step
from .gguf import read_gguf_header
from .headers import StoredTensor, read_header
from .naming import FoundPart, find_parts, split_scales, unwrapped
from .pickles import read_pickle_header
from .shapes import infer_config

logger = logging.getLogger(__name__)

#: part -> (what to call it, the class in its config.json)
PARTS = {
    "transformer": ("transformer", TRANSFORMER_CLASS),
    "text_encoder": ("text encoder", "T5EncoderModel"),
    "vae": ("VAE", "AutoencoderKLCogVideoX"),
}
#: What to do where a part is not there.
_INSTEAD = {
    "transformer": "Choose another checkpoint.",
    "text_encoder": "Choose one in the loader's text_encoder_name (a T5-XXL file in models/text_encoders), or connect ComfyUI's CLIPLoader (t5xxl, "
    "type cogvideox) to CogVideoX-1.5 Text Encode.",
    "vae": "Choose one in the loader's vae_name (a CogVideoX VAE in models/vae).",
}


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a checkpoint on disk: its config and the place of every tensor. Nothing of the weights is read.

    Attributes:
        kind: ``transformer``, ``text_encoder`` or ``vae``.
        source: the folder or file it comes from.
        layout: ``diffusers`` (a folder), or whose names a file has: ``diffusers file``, ``ComfyUI``, ``SAT``, ``single file`` (T5).
        config: its ``config.json``, or what its shapes say.
        tensors: every tensor, by the name that the module has for it.
        scales: what fp8 weights are to be multiplied by, by the weight's name.
        note: which files were read where others lay beside them, in a sentence, or nothing.
    """

    kind: str
    source: Path
    layout: str
    config: Mapping
    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor] = field(default_factory=dict)
    note: str = ""

    @cached_property
    def stored(self) -> dict[torch.dtype | str, int]:
        """Bytes on disk by dtype (GGUF's quantizations by name), largest first."""
        return stored_bytes(self.tensors)

    @property
    def files(self) -> list[Path]:
        """Every file it is read from."""
        config = {self.source / "config.json"} if os.path.isfile(self.source / "config.json") else set()
        return sorted({tensor.file for tensor in self.tensors.values()} | config)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, opened but not read: ``open_checkpoint`` makes one.

    Attributes:
        path: the folder or file it was opened from.
        tokenizer: the folder of the tokenizer.
        incomplete: part -> why the checkpoint's own cannot be used, as ``part`` raises it: it is not whole, or not CogVideoX's.
        notes: what was decided where the folder left it open, in sentences.
    """

    path: Path
    variant: Variant
    scheduler_config: Mapping
    tokenizer: Path
    parts: Mapping[str, Part] = field(repr=False)
    incomplete: Mapping[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def part(self, kind: str) -> Part:
        """The part ``kind``.

        Raises:
            ValueError: if there is none, or none that is whole, saying what to use instead.
        """
        if kind in self.incomplete:
            raise ValueError(f"{self.incomplete[kind]} Or use another: {_INSTEAD[kind]}")
        if kind not in self.parts:
            raise ValueError(f"{self.path} holds no {PARTS[kind][0]}, and the step you asked for needs one. {_INSTEAD[kind]}")
        return self.parts[kind]

    @property
    def fingerprint(self) -> tuple:
        """Changes when a file of it is replaced: ``(path, size, mtime)`` of each."""
        files = {file for part in self.parts.values() for file in part.files}
        return (*((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)), *self.incomplete.values())

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
        path: a checkpoint's folder, a transformer's folder in it (``transformer_I2V``), or a single file of a transformer; or what stands for one of
            them, as ``find_place`` says.
        text_encoder, vae: files or folders of these parts, in the place of the checkpoint's own.
        tokenizer: the tokenizer's folder, for where neither the checkpoint nor the text encoder brings one.

    Raises:
        ValueError: if it is not a CogVideoX checkpoint, or a file of its transformer is missing, truncated or damaged. Of the other parts, those
            that are not whole are told when they are asked for.
    """
    place = find_place(path)
    path, given = place.path, {kind: source for kind, source in (("text_encoder", text_encoder), ("vae", vae)) if source is not None}
    parts = _open_transformer(place)
    if "transformer" not in parts:
        kinds = ", ".join(PARTS[kind][0] for kind in parts)
        raise ValueError(f"{path} holds a {kinds} and no transformer, so it is not a checkpoint by itself. Choose it beside one. {_WHERE}")
    parts |= {kind: open_part(source, kind) for kind, source in given.items()}
    own, incomplete = _open_own(place, without=parts)
    parts |= own
    transformer = parts["transformer"]
    _check_shapes(transformer)
    variant = identify(transformer.config)
    if "vae" in parts and "scaling_factor" not in parts["vae"].config:
        # Two numbers that no shape shows: those of the release the transformer belongs to.
        known = {"scaling_factor": variant.latent_scale, "invert_scale_latents": variant.inverts_image_latents}
        parts["vae"] = replace(parts["vae"], config={**parts["vae"].config, **known})
    schedule, note = _scheduler_config(place.root, transformer, variant)
    notes = tuple(filter(None, (*place.notes, *(part.note for part in parts.values()), note)))
    return Checkpoint(path, variant, schedule, _tokenizer(place.root, parts, tokenizer), parts, incomplete, notes)


def open_part(path: Path | str, kind: str) -> Part:
    """Open one part from a file or a folder of its own.

    Raises:
        ValueError: if it is not there, or another part or model.
    """
    path = part_path(path, kind)
    if path.is_dir():
        return _open_part(path, kind)
    parts = _open_file(path)
    if kind not in parts:
        raise ValueError(f"{path} holds a {', '.join(PARTS[found][0] for found in parts)} and no {PARTS[kind][0]}. Choose another file.")
    return parts[kind]


def _open_transformer(place: Place) -> dict[str, Part]:
    """The transformer, and what else lies in the same file."""
    source = place.transformer
    if not os.path.isdir(source):
        return _open_file(source)
    if os.path.lexists(source / "config.json"):
        return {"transformer": _open_part(source, "transformer")}
    chosen = choose_weights(source, "transformer")
    return {kind: replace(part, note=chosen.note) for kind, part in _open_file(source, chosen.files).items()}


def _open_own(place: Place, without: Mapping[str, Part]) -> tuple[dict[str, Part], dict[str, str]]:
    """The checkpoint's own text encoder and VAE, and why one that is there cannot be used."""
    parts, incomplete = {}, {}
    for kind in ("text_encoder", "vae"):
        source = place.own(kind) if kind not in without else None
        if source is not None:
            try:
                parts[kind] = open_part(source, kind)
            except ValueError as error:
                logger.info("The %s is left until it is asked for: %s", PARTS[kind][0], error)
                incomplete[kind] = str(error)
    return parts, incomplete


def _open_file(file: Path, files: Sequence[Path] = ()) -> dict[str, Part]:
    """The parts that a single file holds, or the ``files`` of a folder, with configs from their shapes."""
    stored = {name: tensor for one in files or (file,) for name, tensor in read_any_header(one).items()}
    parts: dict[str, Part] = {}
    for found in find_parts(stored, file):
        if found.kind not in parts:
            tensors, scales = split_scales(found.tensors)
            parts[found.kind] = Part(found.kind, file, _file_layout(found), infer_config(found.kind, tensors, file), tensors, scales)
    return parts


def read_any_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors, GGUF or torch file.

    Raises:
        ValueError: if it cannot be read.
    """
    ending = file.suffix.lower()
    if ending == ".gguf":
        return read_gguf_header(file)
    return read_pickle_header(file) if ending in (".pt", ".pth", ".ckpt", ".bin") else read_header(file)


def _file_layout(found: FoundPart) -> str:
    return "diffusers file" if found.layout == "diffusers" else found.layout


def _open_part(here: Path, kind: str) -> Part:
    name, class_name = PARTS[kind]
    config_file = here / "config.json"
    if not os.path.lexists(config_file):
        raise ValueError(
            f"{here} has no config.json, so how to build the {name} is unknown. {what_else(here)}Download config.json from the same repository "
            "into it."
        )
    config = read_json(config_file)
    seen = config.get("_class_name") or ", ".join(config.get("architectures") or ["no class"])
    if class_name not in seen:
        raise ValueError(
            f"{config_file} describes {seen}, not {class_name}: this is another model's {name}, and CogVideoX cannot run with it. "
            f"Choose a CogVideoX checkpoint. {_WHERE}"
        )
    tensors: dict[str, StoredTensor] = {}
    chosen = choose_weights(here, kind, name, _EXACT if kind == "transformer" and identify(config).trained_dtype == torch.float16 else ())
    for file in chosen.files:
        tensors |= read_any_header(file)
    return Part(kind, here, "diffusers", config, unwrapped(kind, tensors, here), note=chosen.note)


#: Of a model that was trained in fp16, a copy in fp16 says more than one in bf16.
_EXACT = ("fp32", "float32", "fp16", "float16")


def _scheduler_config(root: Path, transformer: Part, variant: Variant) -> tuple[Mapping, str]:
    """The checkpoint's own noise schedule, or that of the release where it comes without one; and what to say about that.

    Raises:
        ValueError: if it is to have one, by its ``model_index.json``, and that is missing.
    """
    file = root / "scheduler" / "scheduler_config.json"
    if os.path.lexists(file):
        return read_json(file), ""
    if transformer.layout != "diffusers":
        return variant.scheduler_config, ""
    if names_scheduler(root):
        raise ValueError(
            f"{file} is missing: it holds the noise schedule the model was trained with, and guessing one would spoil the picture. "
            "Download scheduler/ from the same repository into the checkpoint's folder."
        )
    return variant.scheduler_config, (
        f"{transformer.source} comes without a noise schedule, as fine-tunes do, so that of {variant.name} is used. If it was trained with "
        f"another, put its scheduler/ into {root}."
    )


def _tokenizer(root: Path, parts: Mapping[str, Part], given: Path | str | None) -> Path:
    """The folder with the tokenizer's files: the checkpoint's, the text encoder's, else the one given."""
    places = [root / "tokenizer"]
    if "text_encoder" in parts:
        source = parts["text_encoder"].source
        places += [source.parent / "tokenizer", source if source.is_dir() else source.parent]
    places += [Path(given).expanduser()] if given is not None else []
    return next((place for place in places if has_tokenizer(place)), places[0])


def has_tokenizer(folder: Path) -> bool:
    """Whether T5's tokenizer lies in a folder, as SentencePiece or in the format of tokenizers."""
    return any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json"))


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
                f"The weights in {part.source} do not fit its config.json: {name} is {seen}, and the config says {shape}. They come "
                "from different models. Download the whole transformer/ folder from one repository."
            )
