"""Which files of a folder a part's weights are read from, told by their names and the indices of shards.

Weights are safetensors or torch's .bin, in one file or in shards, in several dtypes side by side.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json
from ..words import listed, short
from .entries import dangles, gone, is_plain, names_in, subfolders, unfinished

PART_NAMES = {"text_encoder": "text encoder", "vae": "VAE"}
#: Variants that files are named after, the most exact first; the plain file comes before all of them.
_VARIANTS = (
    "",
    "fp32",
    "float32",
    "bf16",
    "bfloat16",
    "fp16",
    "float16",
    "half",
    "fp8",
    "fp8_e4m3fn",
    "fp8_e5m2",
    "non_ema",
    "ema",
)
_VARIANT = "|".join(_VARIANTS[1:])
#: Formats, by their endings: safetensors is read first where both are there.
_ENDINGS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")
_ENDING = "|".join(map(re.escape, _ENDINGS))
#: ``diffusion_pytorch_model.fp16-00001-of-00002.safetensors``, and older
#: ``diffusion_pytorch_model-00001-of-00002.fp16.safetensors``.
WEIGHTS = re.compile(
    rf"(?P<stem>.+?)(?:\.(?P<variant>{_VARIANT}))?(?:-(?P<number>\d{{1,6}})-of-(?P<count>\d{{1,6}}))?(?:\.(?P<late>{_VARIANT}))?(?P<ending>{_ENDING})",
    re.IGNORECASE,
)
#: ``diffusion_pytorch_model.safetensors.index.fp16.json``: diffusers puts the variant there.
INDEX = re.compile(
    rf"(?P<stem>.+?)(?:\.(?P<variant>{_VARIANT}))?(?P<ending>{_ENDING})\.index(?:\.(?P<late>[\w-]+))?(?:\.json)",
    re.IGNORECASE,
)
#: What diffusers, transformers, accelerate and zero_to_fp32 call a model's weights.
_USUAL = ("diffusion_pytorch_model", "model", "pytorch_model", "pytorch_model_fsdp")
#: What peft, diffusers and VideoX-Fun's trainer call a LoRA in a folder of its own.
LORAS = ("adapter_model", "pytorch_lora_weights", "lora_diffusion_pytorch_model")
#: Files of a training's state that end as weights do, and LoRAs.
_NO_WEIGHTS = re.compile(
    r"(optimizer|scheduler|lr_scheduler|scaler|sampler|dataloader|training_args|random_states|rng_state|custom_checkpoint|zero_pp_rank"
    rf"|{'|'.join(LORAS)}).*|.*optim_states\.pt",
    re.IGNORECASE,
)


def piece_of(file: Path) -> tuple[int, int] | None:
    """Which of how many pieces a file is by its name, ``…-00001-of-00003.gguf``, whatever its format; None for one that
    is alone."""
    found = re.search(r"-(\d{5})-of-(\d{5})$", file.stem)
    return (int(found[1]), int(found[2])) if found and int(found[2]) > 1 else None


@dataclass(frozen=True)
class WeightSet:
    """One set of a part's weights.

    Attributes:
        label: the file, or the index of the shards.
        wrong: why it cannot be read, or nothing.
        note: what else lay beside it, in a sentence, or nothing.
    """

    label: str
    files: tuple[Path, ...]
    wrong: str = ""
    note: str = ""


def choose_weights(here: Path, kind: str, name: str = "", exact: Sequence[str] = ()) -> WeightSet:
    """The files that a part's weights are read from.

    Of several sets the first counts that is whole, is called as usual, is plain or the most exact, and is safetensors.

    Args:
        name: what to call the part.
        exact: variants that come before all others but the plain one, such as the dtype the model was trained in.

    Raises:
        ValueError: if there is no set, none is whole, or it is not known which is meant.
    """
    name = name or PART_NAMES.get(kind, kind)
    usual = _USUAL if kind != "text_encoder" else (*_USUAL[1:], _USUAL[0])
    order = ("", *exact, *_VARIANTS)
    ranked: dict[tuple, list[WeightSet]] = {}
    for match, found in weight_sets(here, name):
        stem, variant = match["stem"].lower(), (match["variant"] or match["late"] or "").lower()
        rank = (
            bool(found.wrong),
            # Shards of any name and without an index may be another model's.
            0 if is_usual(stem) else 2 if is_shard(found.label) else 1,
            order.index(variant) if variant in order else len(order),
            _ENDINGS.index(match["ending"].lower()),
            usual.index(stem) if stem in usual else len(usual),
            # An index and a file of the same name: what was saved last is not known, and diffusers reads the shards; of
            # shards without an index it knows nothing.
            len(found.files) if found.files and found.label == found.files[0].name else 0,
        )
        ranked.setdefault(rank, []).append(found)
    if not ranked:
        raise _no_weights(here, name)
    best, *rivals = ranked[min(ranked)]
    if rivals:
        labels = listed((one.label for one in (best, *rivals)), 5)
        raise ValueError(
            f"{short(here, 400)} should hold the {name}'s weights in one file or in shards, and it is "
            f"not known which of these is meant: {labels}. Keep exactly one set, or give the path of the file."
        )
    if best.wrong:
        raise ValueError(best.wrong)
    others = [one for rank in sorted(ranked) for one in ranked[rank] if one is not best]
    if not others:
        return best
    broken = f" ({others[-1].wrong})" if others[-1].wrong else ""
    rest = f"{listed(one.label for one in others)}{broken}"
    return WeightSet(
        best.label,
        best.files,
        note=(
            f"{short(here, 400)} holds {len(others) + 1} sets of the {name}'s weights: read is {short(best.label)}, "
            f"not {rest}."
        ),
    )


def shards_of(file: Path, name: str) -> tuple[Path, ...]:
    """All shards of the set that a file is one of, or the file alone.

    Args:
        name: what to call the part.

    Raises:
        ValueError: if some are missing.
    """
    if not is_shard(file.name):
        return (file,)
    fitting = [found for _, found in weight_sets(file.parent, name) if file in found.files]
    best = min(fitting, key=lambda found: bool(found.wrong), default=WeightSet(file.name, (file,)))
    if best.wrong:
        raise ValueError(best.wrong)
    return best.files


def is_shard(name: str) -> bool:
    """Whether a file of weights is one of several, by its name."""
    match = WEIGHTS.fullmatch(name) if "-of-" in name else None
    return match is not None and bool(match["number"]) and int(match["count"]) > 1


def weight_sets(here: Path, name: str) -> Iterator[tuple[re.Match, WeightSet]]:
    """Yield the sets of weights that a folder has for a part called ``name``, each with the match of its file's name:
    an index of shards, or a single file, the first by name first; then shards without an index."""
    indexed, counted = set[tuple](), dict[tuple, list[re.Match]]()
    for label in names_in(here):
        index = INDEX.fullmatch(label)
        match = index or WEIGHTS.fullmatch(label)
        if match:
            saved = (match["stem"], match["variant"] or match["late"], match["ending"])
        if index:
            indexed.add(saved)
            yield index, _indexed(here, label, name)
        elif match and match["number"] and not _NO_WEIGHTS.fullmatch(label):
            counted.setdefault((saved, int(match["count"])), []).append(match)
        elif match and not match["number"] and not _NO_WEIGHTS.fullmatch(label) and not os.path.isdir(here / label):
            wrong = ""
            if dangles(here / label):
                wrong = (
                    f"{gone(here / label)}, so weights of the {name} are missing.{unfinished(here)} Download the "
                    "file again."
                )
            yield match, WeightSet(label, (here / label,), wrong)
    for (saved, count), found in counted.items():
        if saved not in indexed:
            yield found[0], _counted(here, found, count, name)


def _counted(here: Path, found: list[re.Match], count: int, name: str) -> WeightSet:
    """The shards of one saving, told by their numbers alone; that no tensor is missing is seen when they are read."""
    first, there = found[0], {int(match["number"]) for match in found if os.path.isfile(here / match[0])}
    missing = [number for number in range(1, count + 1) if number not in there]
    start, end = first.span("number")
    labels = [f"{first[0][:start]}{number:0{end - start}d}{first[0][end:]}" for number in missing[:9]]
    files = tuple(here / match[0] for match in found)
    return WeightSet(first[0], files, _lacking(here, labels, len(missing), count, name) if missing else "")


def _lacking(here: Path, labels: Sequence[str], missing: int, count: int, name: str) -> str:
    """Why a set of shards cannot be read of which some are missing, the first of them by their ``labels``."""
    link = f" {gone(here / labels[0])}." if dangles(here / labels[0]) else ""
    return (
        f"{short(here, 400)} lacks {missing} of {count} shards of the {name}: {listed(labels, 8)}. Without them "
        f"weights are missing.{link}{unfinished(here)} Download them from the same repository into this folder."
    )


def _indexed(here: Path, label: str, name: str) -> WeightSet:
    """The shards that an index names."""
    index = here / label
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError as error:
        return WeightSet(label, (), str(error))
    if not isinstance(weight_map, dict) or not weight_map:
        return WeightSet(
            label,
            (),
            f"{short(index, 400)} lists no weights, so the shards cannot be put together. Download this file again.",
        )
    # Thousands of tensors lie in a few files.
    shards = list({file if isinstance(file, str) else repr(file): file for file in weight_map.values()}.values())
    odd = [file for file in shards if not is_plain(file) or not str(file).lower().endswith(_ENDINGS)]
    if odd:
        what = (
            f"{short(index, 400)} names {short(repr(odd[0]))} as a file of weights, and shards are files beside their "
            f"index, with names such as {_SHARD}"
        )
        return WeightSet(label, (), f"{what}: nothing else is opened. Download this file again.")
    files = tuple(here / file for file in sorted(shards))
    missing = [file for file in files if not os.path.isfile(file)]
    labels = [file.name for file in missing]
    return WeightSet(label, files, _lacking(here, labels, len(missing), len(files), name) if missing else "")


_SHARD = "model-00001-of-00003.safetensors"


def _no_weights(here: Path, name: str) -> ValueError:
    return ValueError(
        f"{short(here, 400)} should hold the {name}'s weights in one safetensors or .bin file, or in shards, and holds "
        f"none.{unfinished(here)} {what_else(here)}Download the part again."
    )


def what_else(folder: Path) -> str:
    """What a folder holds in the place of weights, if that is known, and what to do with it: a sentence and a space, or
    nothing."""
    names = [*names_in(folder), *(label for inner in subfolders(folder) for label in names_in(inner))]
    if any(label.endswith(".distcp") for label in names):
        return (
            "Its weights are in the pieces of a training on several cards (FSDP); join them with: accelerate "
            "merge-weights FOLDER OUTPUT. "
        )
    if any("zero_pp_rank" in label for label in names):
        return (
            "Its weights are in the pieces of a training on several cards (DeepSpeed ZeRO); join them with the "
            "zero_to_fp32.py beside them. "
        )
    if any(label.startswith((*LORAS, "adapter_config")) for label in names):
        return (
            "It holds a LoRA, which changes a model and is none: give it in the LoRA's place (--lora, CogVideoX-1.5 "
            "LoRA Loader). "
        )
    files = [
        label
        for label in names_in(folder)
        if label.lower().endswith((*_ENDINGS, ".gguf"))
        and not _NO_WEIGHTS.fullmatch(label)
        and (piece_of(folder / label) or (1,))[0] == 1
    ]
    return f"It holds {listed(files, 5)}: give the path of that file itself, if it is meant. " if files else ""


def is_usual(stem: str) -> bool:
    """Say whether a file of weights is called as a library calls it, its ending left out."""
    return stem.lower() in _USUAL
