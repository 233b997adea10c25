"""The layouts checkpoints come in: which files hold which part, seen from configs, headers and shapes alone.

Folders as diffusers has them (the official releases)::

    model_index.json
    transformer/   config.json + one safetensors file, or shards and their index
    text_encoder/  config.json + the same
    tokenizer/     spiece.model
    vae/           config.json + the same
    scheduler/     scheduler_config.json

with ``transformer_T2V/`` and ``transformer_I2V/`` side by side in the place of ``transformer/``; single safetensors
files with the names of diffusers or of ComfyUI; and SAT's folders (``transformer/1000/mp_rank_00_model_states.pt``,
``vae/3d-vae.pt``). ``folders`` has what else a folder may look like.
"""

import logging
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..files import read_json
from ..variants import DEFAULT_TEXT_TOKENS, LATENT_SCALES, PARTS, Variant, identify
from ..words import listed, short
from .architecture import check_part, check_together
from .configs import check_config
from .folders import WHERE as _WHERE
from .folders import Place, choose_weights, find_place, names_scheduler, part_path, what_else
from .folders import is_checkpoint as is_checkpoint
from .folders import sat_step as sat_step
from .foreign import ForeignError, packed_error
from .headers import StoredTensor
from .lora_files import lora_inside
from .naming import (
    FoundPart,
    check_unpacked,
    find_parts,
    module_tensors,
    split_lora,
    split_scales,
    unwrapped,
)
from .parts import Part
from .reading import read_any_header
from .shapes import infer_config
from .tokenizer import check_tokenizer, has_tokenizer, tokenizer_files
from .weight_sets import shards_of

logger = logging.getLogger(__name__)

#: Classes that have the part's tensors and more: whole T5s, whose encoder is the same.
_WHOLE = {"text_encoder": ("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")}
#: What to do where a part is not there.
_INSTEAD = {
    "transformer": "Choose another checkpoint.",
    "text_encoder": (
        "Choose one in the loader's text_encoder_name (a T5-XXL file in models/text_encoders) or with --text-encoder, "
        "or connect ComfyUI's CLIPLoader (t5xxl, type cogvideox) to CogVideoX-1.5 Text Encode."
    ),
    "vae": "Choose one in the loader's vae_name (a CogVideoX VAE in models/vae) or with --vae.",
}


class Parts(dict[str, Part]):
    """The parts of a checkpoint that can be used. Asked for another, it says why that is not one of them, and what to
    do."""

    def __init__(self, path: Path, parts: Mapping[str, Part], incomplete: Mapping[str, str], foreign: Container[str]):
        super().__init__(parts)
        self._path, self._incomplete, self._foreign = path, incomplete, foreign

    def __missing__(self, kind: str) -> Part:
        if kind in self._incomplete:
            error = ForeignError if kind in self._foreign else ValueError
            raise error(f"{self._incomplete[kind]} Or use another: {_INSTEAD[kind]}")
        raise ValueError(
            f"{self._path} holds no {PARTS[kind][0]}, and the step you asked for needs one. {_INSTEAD[kind]}"
        )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, opened but not read: ``open_checkpoint`` makes one.

    Attributes:
        path: the folder or file it was opened from.
        tokenizer: the folder of the tokenizer.
        incomplete: part -> why the checkpoint's own cannot be used, as ``part`` raises it: it is not whole, or not
            CogVideoX's.
        notes: what was decided where the folder left it open, in sentences.
    """

    path: Path
    variant: Variant
    scheduler_config: Mapping
    tokenizer: Path
    parts: Parts = field(repr=False)
    incomplete: Mapping[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def part(self, kind: str) -> Part:
        """The part ``kind``.

        Raises:
            ValueError: if there is none, or none that is whole, saying what to use instead.
        """
        return self.parts[kind]

    @property
    def fingerprint(self) -> tuple:
        """Changes when a file of it is replaced: ``(path, size, mtime)`` of each; and with its noise schedule."""
        files = {*tokenizer_files(self.tokenizer), *(file for part in self.parts.values() for file in part.files)}
        return (
            *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)),
            *self.incomplete.values(),
            repr(self.scheduler_config),
        )

    @property
    def text_tokens(self) -> int:
        """Tokens a prompt is padded or cut to (``max_text_seq_length`` of the transformer; 226 in released models)."""
        return self.part("transformer").config.get("max_text_seq_length") or DEFAULT_TEXT_TOKENS


def open_checkpoint(
    path: Path | str,
    text_encoder: Path | str | None = None,
    vae: Path | str | None = None,
    tokenizer: Path | str | None = None,
) -> Checkpoint:
    """Open a checkpoint in any of the layouts: configs and headers, a few hundred kilobytes.

    Args:
        path: a checkpoint's folder, a transformer's folder in it (``transformer_I2V``), or a single file of a
            transformer; or what stands for one of them, as ``find_place`` says.
        text_encoder, vae: files or folders of these parts, in the place of the checkpoint's own.
        tokenizer: the tokenizer's folder, for where neither the checkpoint nor the text encoder brings one.

    Raises:
        ValueError: if it is not a CogVideoX checkpoint, or a file of its transformer is missing, truncated or damaged.
            Of the other parts, those that are not whole are told when they are asked for.
    """
    place = find_place(path)
    path, given = (
        place.path,
        {kind: source for kind, source in (("text_encoder", text_encoder), ("vae", vae)) if source is not None},
    )
    parts = _open_transformer(place, given)
    if "transformer" not in parts:
        raise _other_part(path, file_kinds(path), "transformer")
    transformer = parts["transformer"]
    if transformer.lora:
        lora_inside(transformer)
    check_part(transformer)
    for kind, source in given.items():
        parts[kind] = open_part(source, kind)
        check_together(transformer, parts[kind])
    errors = _add_own(place, parts)
    incomplete = {kind: str(error) for kind, error in errors.items()}
    foreign = {kind for kind, error in errors.items() if isinstance(error, ForeignError)}
    variant = identify(transformer.config)
    if "vae" in parts:
        own = parts["transformer"].source == path / "transformer" and parts["vae"].source == path / "vae"
        parts["vae"] = replace(parts["vae"], config=_vae_config(parts["vae"], variant, own))
    schedule, note = _scheduler_config(place.root, transformer, variant)
    found = _tokenizer(place.root, parts, tokenizer)
    if "text_encoder" in parts:
        tensors = parts["text_encoder"].tensors
        table = tensors.get("shared.weight") or tensors.get("encoder.embed_tokens.weight")
        try:
            check_tokenizer(found, table.shape[0] if table and table.shape else None)
        except ValueError as error:
            # Told when a prompt is to be encoded: with another text encoder it is not needed.
            incomplete["text_encoder"] = str(error)
            del parts["text_encoder"]
    notes = tuple(filter(None, (*place.notes, *(part.note for part in parts.values()), note)))
    return Checkpoint(path, variant, schedule, found, Parts(path, parts, incomplete, foreign), incomplete, notes)


def _vae_config(vae: Part, variant: Variant, own: bool) -> Mapping:
    """Return the config of a VAE with the two numbers that no shape shows.

    Args:
        variant: of the transformer that it is used with.
        own: whether it came with that transformer alone. Of several that share a VAE it has the
            ``invert_scale_latents`` of only one, and the ``scaling_factor`` of only one line: the family decides there.
    """
    config = dict(vae.config)
    if config.get("scaling_factor") is None:
        if vae.layout == "diffusers":
            logger.warning(
                "%s gives no scaling_factor: taken is %s, that of %s.", vae.source, variant.latent_scale, variant.name
            )
        known = {"scaling_factor": variant.latent_scale, "invert_scale_latents": variant.inverts_image_latents}
        config = known | {name: value for name, value in config.items() if value is not None}
    if own:
        return config
    if config["scaling_factor"] in LATENT_SCALES.values():
        config["scaling_factor"] = variant.latent_scale
    return config | {"invert_scale_latents": variant.inverts_image_latents}


def open_part(path: Path | str, kind: str) -> Part:
    """Open one part from a file or a folder of its own.

    Raises:
        ValueError: if it is not there, is not whole, or is another part or model.
    """
    path = part_path(path, kind)
    if path.is_dir():
        part = _open_part(path, kind)
    else:
        parts = _open_file(path, set(PARTS) - {kind})
        if kind not in parts:
            raise _other_part(path, file_kinds(path), kind)
        part = parts[kind]
    check_part(part)
    return part


def file_kinds(file: Path) -> list[str]:
    """The kinds of parts that a single file holds, whole or not.

    Raises:
        ValueError: if it cannot be read, or holds none.
    """
    return list(dict.fromkeys(found.kind for found in find_parts(_stored(file), file)))


def _other_part(path: Path, held: Sequence[str], kind: str) -> ValueError:
    """The error for a file or folder that holds other parts of CogVideoX than the one that is needed."""
    kinds = ", ".join(PARTS[one][0] for one in held)
    if kind == "transformer":
        return ValueError(
            f"{short(path, 400)} holds a {kinds} and no transformer, so it is not a checkpoint by itself. Choose it "
            f"beside one. {_WHERE}"
        )
    return ValueError(f"{short(path, 400)} holds a {kinds} and no {PARTS[kind][0]}. Choose another.")


def _open_transformer(place: Place, given: Container[str] = ()) -> dict[str, Part]:
    """The transformer, and what else lies in the same file, less the kinds that are ``given`` from elsewhere."""
    source = place.transformer
    if not os.path.isdir(source):
        return _open_file(source, given)
    if os.path.lexists(source / "config.json"):
        return {"transformer": _open_part(source, "transformer")}
    chosen = choose_weights(source, "transformer")
    return {kind: replace(part, note=chosen.note) for kind, part in _open_file(source, given, chosen.files).items()}


def _add_own(place: Place, parts: dict[str, Part]) -> dict[str, ValueError]:
    """Add the checkpoint's own text encoder and VAE where ``parts`` has none; returns why those that are there and
    cannot be used cannot."""
    incomplete: dict[str, ValueError] = {}
    for kind in ("text_encoder", "vae"):
        inside, source = parts.get(kind), None
        if inside is None:
            source = place.own(kind)
        elif inside.source != parts["transformer"].source:
            continue
        try:
            if source is not None:
                parts[kind] = open_part(source, kind)
            elif inside is not None:
                check_part(inside)
            if kind in parts:
                check_together(parts["transformer"], parts[kind])
        except ValueError as error:
            logger.info("The %s is left until it is asked for: %s", PARTS[kind][0], error)
            incomplete[kind] = error
            parts.pop(kind, None)
    return incomplete


def _open_file(file: Path, without: Container[str] = (), files: Sequence[Path] = ()) -> dict[str, Part]:
    """The parts that a single file holds, or the ``files`` of a folder, with configs from their shapes; kinds that are
    not wanted are not looked into."""
    wanted = next(kind for kind in PARTS if kind not in without)
    found = [part for part in find_parts(_stored(file, wanted, files), file) if part.kind not in without]
    return {
        kind: _file_part(kind, [part for part in found if part.kind == kind], file)
        for kind in dict.fromkeys(part.kind for part in found)
    }


def _stored(file: Path, kind: str = "transformer", files: Sequence[Path] = ()) -> dict[str, StoredTensor]:
    """The tensors of a file, and of the other shards of that part if it is one; or those of the ``files`` of a
    folder."""
    files = files or shards_of(file, PARTS[kind][0])
    return {name: tensor for one in files for name, tensor in read_any_header(one).items()}


def _file_part(kind: str, found: list[FoundPart], file: Path) -> Part:
    if len(found) > 1:
        places = " and ".join(short(part.prefix + "…") for part in found)
        raise ValueError(
            f"{short(file, 400)} holds {len(found)} {PARTS[kind][0]}s ({places}), and which is meant is not known: one "
            "may be the average that training keeps (EMA). Save the one you want in a file of its own."
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
    layout = f"{layout}, with a LoRA inside" if lora else layout
    part = Part(kind, file, layout, config, tensors, scales, lora, _flan_note(kind, file))
    _check_floats(part)
    return part


def _open_part(here: Path, kind: str) -> Part:
    name, class_name = PARTS[kind]
    config_file = here / "config.json"
    if not os.path.lexists(config_file):
        raise ValueError(
            f"{short(here, 400)} has no config.json, so how to build the {name} is unknown. {what_else(here)}Download "
            "config.json from the same repository into it."
        )
    config = read_json(config_file)
    names = (
        config.get("_class_name")
        or config.get("architectures")
        or (class_name if config.get("model_type") == "t5" else "no class")
    )
    names = [name for name in (names if isinstance(names, list) else [names]) if isinstance(name, str)]
    held = next((one for one, (_, cls) in PARTS.items() if {cls, *_WHOLE.get(one, ())}.intersection(names)), None)
    if held is not None and held != kind:
        raise _other_part(here, [held], kind)
    if held is None:
        raise ForeignError(
            f"{short(config_file, 400)} describes {listed(names)}, not {class_name}: this is another model's {name}, "
            f"and CogVideoX cannot run with it. Choose a CogVideoX checkpoint. {_WHERE}"
        )
    packing = config.get("quantization_config")
    if isinstance(packing, dict) and packing.get("quant_method"):
        raise packed_error(short(packing["quant_method"]), here, "its config.json says so")
    chosen = choose_weights(here, kind, name, _EXACT if kind == "transformer" and _is_2b(config) else ())
    read: dict[str, StoredTensor] = {}
    for file in chosen.files:
        read |= read_any_header(file)
    check_unpacked(read, here)
    tensors, lora = split_lora(read)
    tensors = module_tensors(kind, unwrapped(kind, tensors, here))
    check_config(kind, config, config_file, tensors)
    note = " ".join(filter(None, (chosen.note, _flan_note(kind, here))))
    part = Part(kind, here, "diffusers", config, *split_scales(tensors), lora=lora, note=note)
    _check_floats(part)
    return part


def _flan_note(kind: str, source: Path) -> str:
    """A sentence about Flan-T5, which only its name tells from T5 v1.1: their shapes are the same."""
    if kind != "text_encoder" or "flan" not in source.name.lower():
        return ""
    return (
        f"{short(source.name)} is Flan-T5 by its name, which was trained further than T5 v1.1, the text encoder that "
        "CogVideoX was trained with: prompts may do less or other things. T5 v1.1 XXL is right, such as "
        "t5xxl_fp16.safetensors."
    )


#: Of a model that was trained in fp16, a copy in fp16 says more than one in bf16.
_EXACT = ("fp32", "float32", "fp16", "float16")


def _is_2b(config: Mapping) -> bool:
    """Whether a config, which nobody has checked yet, says that the model was trained in fp16."""
    return not config.get("patch_size_t") and not config.get("use_rotary_positional_embeddings")


def _check_floats(part: Part) -> None:
    """No part of CogVideoX has integers among its weights: cast to floats, they would be other numbers than were
    trained.

    Raises:
        ValueError: if there are some.
        ForeignError: if they are the scales of a packing that is not read here.
    """
    exponents = [name for name, scale in part.scales.items() if scale.dtype == torch.uint8]
    if exponents:
        seen = f"{len(exponents)} scales in uint8 such as that of {short(exponents[0])}"
        raise packed_error("ComfyUI or torchao (MXFP8 or MXFP4)", part.source, seen)
    tensors = (*part.tensors.items(), *part.scales.items())
    odd = {name: stored for name, stored in tensors if not (stored.dtype.is_floating_point or stored.quantization)}
    if odd:
        kinds = ", ".join(sorted({str(stored.dtype).removeprefix("torch.") for stored in odd.values()}))
        raise ValueError(
            f"{short(part.source, 400)} holds {len(odd)} of {len(part.tensors)} weights of the {PARTS[part.kind][0]} "
            f"as {kinds} ({listed(odd)}), and floating-point numbers belong there: it is damaged, or a copy that "
            "another program has quantized in a way that is not known here. Choose a file in bf16, fp16, fp32, fp8 "
            "or GGUF."
        )


def _scheduler_config(root: Path, transformer: Part, variant: Variant) -> tuple[Mapping, str]:
    """The checkpoint's own noise schedule, or that of the release where it comes without one; and what to say about
    that.

    Raises:
        ValueError: if it is to have one, by its ``model_index.json``, and that is missing.
    """
    file = root / "scheduler" / "scheduler_config.json"
    if os.path.lexists(file):
        config = read_json(file)
        check_config("scheduler", config, file)
        return config, ""
    if transformer.layout != "diffusers":
        return variant.scheduler_config, ""
    if names_scheduler(root):
        raise ValueError(
            f"{short(file, 400)} is missing: it holds the noise schedule the model was trained with, and guessing one "
            "would spoil the picture. Download scheduler/ from the same repository into the checkpoint's folder."
        )
    return variant.scheduler_config, (
        f"{short(transformer.source, 400)} comes without a noise schedule, as fine-tunes do, so that of {variant.name} "
        f"is used. If it was trained with another, put its scheduler/ into {root}."
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
    return next((place for place in places if has_tokenizer(place)), places[0])
