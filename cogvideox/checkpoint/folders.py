"""What a folder may look like: where in it a checkpoint's parts and their weights lie, told by names and small JSON
files.

Beside the folders that diffusers and SAT write (``layout``), people have::

    my-finetune/                         config.json and the weights in one folder
    run/checkpoint-500/                  transformer/ (or transformer_ema/) alone, or model.safetensors alone
    run/latest, run/500/mp_rank_00_…     SAT's and DeepSpeed's training
    models--zai-org--CogVideoX1.5-5B/    the Hugging Face cache: refs/main names one of snapshots/, whose files are
                                         links into blobs/

and weights as safetensors or torch's .bin, in one file or in shards with an index, in several dtypes side by side. No
weights are opened here, and torch is not needed.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import read_bytes, read_json, unreadable
from ..words import listed, short

logger = logging.getLogger(__name__)

WHERE = (
    "A CogVideoX checkpoint is a folder with transformer/, text_encoder/, tokenizer/, vae/ and scheduler/ in it, such "
    "as zai-org/CogVideoX1.5-5B on huggingface.co, or a single safetensors file of its transformer."
)
#: ``variants.TRANSFORMER_CLASS``, which is not imported because it brings torch.
_TRANSFORMER_CLASS = "CogVideoXTransformer3DModel"
#: What a transformer's folder is called; another name that begins so counts where none of these is there
#: (``transformer_ema``).
_TRANSFORMER_FOLDERS = ("transformer", "transformer_T2V", "transformer_I2V")
#: What SAT's trainer and DeepSpeed call the weights of one training step.
_SAT_WEIGHTS = "mp_rank_00_model_states.pt"
#: Where SAT's guide puts the other parts.
_SAT_PARTS = {"vae": "vae/3d-vae.pt", "text_encoder": "t5-v1_1-xxl"}
#: How far above SAT's weights they are looked for: transformer/1000/ is two folders below them, and the folder may be
#: in another.
_SAT_ABOVE = 4
#: Bytes of a config that are read to see what it is; the largest known has 1,000.
_CONFIG_BYTES = 1 << 20


# --- Checkpoints ---


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies.

    Attributes:
        path: the folder or file that is meant.
        transformer: the transformer's folder or file.
        root: the folder of the tokenizer and the noise schedule.
        roots: the folders in which its other parts may be, the nearest first; none for a file that is by itself.
        notes: what was decided where the path left it open, in sentences.
    """

    path: Path
    transformer: Path
    root: Path
    roots: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def own(self, kind: str) -> Path | None:
        """The folder or file of the checkpoint's own ``text_encoder`` or ``vae``, whole or not; an empty folder is
        none."""
        sat = os.path.basename(self.transformer) == _SAT_WEIGHTS
        for root in self.roots:
            if not sat and _holds_something(root / kind):
                return root / kind
            part = root / _SAT_PARTS[kind]
            if sat and os.path.isfile(part / "config.json" if kind == "text_encoder" else part):
                return part
        return None


def find_place(path: Path | str) -> Place:
    """Where the checkpoint lies that a path stands for: its folder, a file in it, one of its parts' folders, a training
    run, a cache.

    Raises:
        ValueError: if there is none, or it is not known which is meant.
    """
    path = meant_path(path)
    if not os.path.isdir(path):
        if path.name == _SAT_WEIGHTS:
            return _sat_place(path, path)
        return Place(path, path, path.parent)
    return _folder_place(path)


def _folder_place(path: Path) -> Place:
    weights = sat_weights(path)
    if weights is not None:
        return _sat_place(path, weights)
    if _is_transformer_folder(path) or (path.name in _TRANSFORMER_FOLDERS and os.path.isfile(path / "config.json")):
        # A transformer's own folder: in a checkpoint, or all there is.
        root = path.parent if path.name.startswith("transformer") else path
        return Place(path, path, root, (root,))
    found = [folder for folder in _transformer_subfolders(path) if _holds_something(folder)]
    if len(found) > 1:
        names = " and ".join(folder.name for folder in found)
        raise ValueError(
            f"{path} holds {len(found)} checkpoints, {names}, and which is meant is not known. Give the path of one "
            "of them."
        )
    if found:
        return Place(path, found[0], path, (path,))
    return _nested_place(path)


def _sat_place(path: Path, weights: Path) -> Place:
    above = Path(os.path.abspath(weights)).parents
    notes: tuple[str, ...] = ()
    if path not in (weights, weights.parent) and len(steps := sat_steps(weights.parent.parent)) > 1:
        notes = (f"{weights.parent.parent} holds {len(steps)} training steps: read is {weights.parent.name}.",)
    if os.path.lexists(weights.with_name("mp_rank_01_model_states.pt")):
        raise ValueError(
            f"{weights.parent} holds a model that was trained in several pieces (mp_rank_00, mp_rank_01, …), and one "
            "of them alone cannot run. Join them with SAT's tools (merge_model of SwissArmyTransformer), or get the "
            "model in diffusers' layout."
        )
    return Place(path, weights, weights.parent, tuple(above)[:_SAT_ABOVE], notes)


def _nested_place(path: Path) -> Place:
    """What a folder without a transformer's holds: weights without a config, or one checkpoint in its folders; of a
    training run, the last step."""
    sets = [match["stem"] for match, _ in _weight_sets(path, "transformer")]
    # What it is can then be told from names and shapes, as of a single file.
    alone = Place(path, path, path, (path,))
    if any(map(_is_usual, sets)):
        return alone
    below = [inner for inner in _subfolders(path) if _is_checkpoint_folder(inner)]
    if not below:
        below = [inner for folder in _subfolders(path) for inner in _subfolders(folder) if _is_checkpoint_folder(inner)]
    steps = {
        int(number[1]): inner
        for inner in below
        if (number := re.fullmatch(r"(?:checkpoint|step|global_step)[-_]?(\d+)", inner.name))
    }
    if steps and len(steps) == len(below):
        below = [steps[max(steps)]]
    if len(below) == 1:
        inner = _folder_place(snapshot(below[0]) or below[0])
        why = f", the last of {len(steps)} training steps" if len(steps) > 1 else ""
        return Place(
            inner.path,
            inner.transformer,
            inner.root,
            inner.roots,
            (f"{path}: read is {below[0].name} in it{why}.", *inner.notes),
        )
    if below:
        names = listed((inner.relative_to(path).as_posix() for inner in below), 5)
        raise ValueError(
            f"{path} holds {len(below)} checkpoints ({names}), and which is meant is not known. Give the path of one "
            "of them."
        )
    if len(sets) == 1:
        return alone
    raise _no_checkpoint(path)


def _is_checkpoint_folder(folder: Path) -> bool:
    try:
        folder = snapshot(folder) or folder
        return bool(transformer_folders(folder) or sat_weights(folder))
    except ValueError as error:
        logger.info("%s is passed over: %s", folder, error)
        return False


def _no_checkpoint(path: Path) -> ValueError:
    names = _names(path)
    if not names:
        return ValueError(
            f"{path} is empty: the download has not begun or went elsewhere. Download the checkpoint into it. {WHERE}"
        )
    return ValueError(
        f"{path} is not a CogVideoX checkpoint: it has no folder transformer/{_pipeline_name(path)}. "
        f"{what_else(path)}{WHERE}"
    )


def _pipeline_name(folder: Path) -> str:
    try:
        name = (
            read_json(folder / "model_index.json").get("_class_name")
            if os.path.isfile(folder / "model_index.json")
            else None
        )
    except ValueError as error:
        return f" ({error})"
    return f" (its model_index.json says {short(name)})" if name else ""


def names_scheduler(root: Path) -> bool:
    """Whether a folder's ``model_index.json`` says that the checkpoint has a noise schedule of its own."""
    return os.path.isfile(root / "model_index.json") and bool(read_json(root / "model_index.json").get("scheduler"))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a CogVideoX checkpoint in diffusers layout, by its transformer's config (one small file is
    read)."""
    return any(os.path.basename(found) in _TRANSFORMER_FOLDERS for found in transformer_folders(folder))


def transformer_folders(folder: Path) -> list[Path]:
    """The folders of CogVideoX transformers in a checkpoint's folder, or the folder itself if it is one, by their
    configs."""
    if _is_transformer_folder(Path(folder)):
        return [Path(folder)]
    return [inner for inner in _transformer_subfolders(Path(folder), others=True) if _is_transformer_folder(inner)]


def _transformer_subfolders(folder: Path, others: bool = False) -> list[Path]:
    """The folders that are named as a transformer's; with ``others``, also those that do not count beside the usual
    ones."""
    usual = [folder / name for name in _TRANSFORMER_FOLDERS if os.path.isdir(folder / name)]
    if any(_holds_something(inner) for inner in usual) and not others:
        return usual
    more = [
        inner for inner in _subfolders(folder) if inner.name.lower().startswith("transformer") and inner not in usual
    ]
    return usual + [inner for inner in more if _is_transformer_folder(inner)]


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds an index of shards, and no config that says what they are."""
    names = _names(folder)
    return "config.json" not in names and any(map(_INDEX.fullmatch, names))


def may_be_checkpoint(names: Iterable[str]) -> bool:
    """Whether a folder without folders in it may be a checkpoint, by the names of its files."""
    return any(name == _SAT_WEIGHTS or name.endswith(".json") for name in names)


def is_shard(name: str) -> bool:
    """Whether a file of weights is one of several, by its name."""
    match = _WEIGHTS.fullmatch(name) if "-of-" in name else None
    return match is not None and bool(match["number"]) and int(match["count"]) > 1


def _is_transformer_folder(folder: Path) -> bool:
    try:
        return (
            os.path.isfile(folder / "config.json")
            and read_json(folder / "config.json", _CONFIG_BYTES).get("_class_name") == _TRANSFORMER_CLASS
        )
    except ValueError as error:
        logger.info("%s is not known as a transformer's folder: %s", folder, error)
        return False


def sat_weights(folder: Path) -> Path | None:
    """The file of a SAT transformer in its folder, or in ``transformer/`` of it, or None."""
    return sat_step(folder) or sat_step(folder / "transformer")


def sat_step(folder: Path) -> Path | None:
    """The file of a SAT transformer in its own folder: of the training step that ``latest`` names, else of the last
    one."""
    named = _one_name(folder / "latest")
    if named and os.path.isfile(folder / named / _SAT_WEIGHTS):
        return folder / named / _SAT_WEIGHTS
    steps = sat_steps(folder)
    return steps[-1] if steps else next((file for file in (folder / _SAT_WEIGHTS,) if os.path.isfile(file)), None)


def sat_steps(folder: Path) -> list[Path]:
    """The weights of all training steps in a folder, in their order."""
    files = [inner / _SAT_WEIGHTS for inner in _subfolders(folder) if os.path.isfile(inner / _SAT_WEIGHTS)]
    return sorted(files, key=lambda file: (_last_number(file.parent.name), file.parent.name))


def _last_number(name: str) -> int:
    """The number that a name ends in, -1 if in none."""
    found = re.search(r"\d{1,18}$", name)
    return int(found[0]) if found else -1


# --- Paths ---


def meant_path(path: Path | str, kind: str = "transformer") -> Path:
    """The folder or file that a path stands for: ``~``, quotes around it, a file that stands for its folder, and the
    Hugging Face cache are seen through.

    Raises:
        ValueError: if nothing is there.
    """
    here = _typed_path(path)
    if not os.path.exists(here):
        cached = _cached_repository(here)
        if cached is None:
            raise _nothing(here, kind)
        here = cached
    if os.path.isdir(here):
        return snapshot(here) or here
    return _folder_of(here, kind) or here


def part_path(path: Path | str, kind: str) -> Path:
    """The folder or file of a part that a path stands for; of a whole checkpoint, its part.

    Raises:
        ValueError: if nothing is there.
    """
    here = meant_path(path, kind)
    if os.path.isdir(here) and not os.path.isfile(here / "config.json"):
        inside = [here / name for name in (kind, _SAT_PARTS.get(kind)) if name]
        return next((place for place in inside if os.path.isfile(place) or os.path.isfile(place / "config.json")), here)
    return here


def _typed_path(path: Path | str) -> Path:
    """A path as people paste it: Windows copies paths in quotes, and its shell makes a quote of ``\\"`` at the end."""
    text = os.path.expanduser(str(path))
    if not os.path.lexists(text):
        bare = text.strip()
        while bare[:1] in ('"', "'") and bare[:1] == bare[-1:] and len(bare) > 2:
            bare = bare[1:-1].strip()
        text = os.path.expanduser(bare.removesuffix('"'))
    return Path(text)


_NAMES = {"text_encoder": "text encoder", "vae": "VAE"}


def _nothing(here: Path, kind: str) -> ValueError:
    shown = short(here, 400)
    if os.path.islink(here):
        return ValueError(
            f"{_gone(here)}. Nothing can be loaded from it. Download it again, or give the path of the file or folder "
            "itself."
        )
    if kind != "transformer":
        return ValueError(f"There is no {shown}, so there is no {_NAMES.get(kind, kind)} to load. Check the path.")
    return ValueError(f"There is no {shown}, so there is nothing to load. Check the path. {WHERE}")


def _gone(file: Path) -> str:
    """What a link that leads nowhere is."""
    target = short(os.readlink(file), 200)
    return f"{short(file, 400)} is a link to {target}, which is gone" + (
        " (removed from the cache)" if "blobs" in target else ""
    )


def is_checkpoint_json(file: Path) -> bool:
    """Whether a file is, by its name, one that lies in a checkpoint's folder and stands for it."""
    name = file.name.lower()
    return name in ("model_index.json", "config.json", "scheduler_config.json") or _INDEX.fullmatch(name) is not None


def _folder_of(file: Path, kind: str) -> Path | None:
    """The folder that a file in it stands for: a checkpoint's or part's own JSON files, ``latest``, a shard, or the
    weights beside a config."""
    name, folder = file.name.lower(), file.parent
    if is_checkpoint_json(file) or name == "latest":
        return folder.parent if name == "scheduler_config.json" else folder
    weights = _WEIGHTS.fullmatch(file.name)
    if weights is None:
        return None
    if weights["number"] and (os.path.isfile(folder / "config.json") or any(map(_INDEX.fullmatch, _names(folder)))):
        return folder
    # A file beside its config, if it is the one that would be read from there: the config says more than shapes do.
    if (
        _is_transformer_folder(folder) if kind == "transformer" else os.path.isfile(folder / "config.json")
    ) and _is_usual(weights["stem"]):
        try:
            return folder if choose_weights(folder, kind).files == (file,) else None
        except ValueError as error:
            logger.info("%s is opened by itself: %s", file, error)
    return None


# --- The Hugging Face cache ---


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads (https://huggingface.co/docs/huggingface_hub/guides/manage-cache),
    without importing it."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(os.path.expanduser(named))
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(home)) / "hub"


def _cached_repository(name: Path) -> Path | None:
    """The folder in the cache of a repository that is given by its name on the hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name.as_posix()):
        return None
    folder = hub_cache() / f"models--{name.as_posix().replace('/', '--')}"
    return folder if os.path.isdir(folder) else None


def repository_name(folder: Path) -> str:
    """``models--zai-org--CogVideoX1.5-5B`` -> ``zai-org/CogVideoX1.5-5B``"""
    return folder.name.removeprefix("models--").replace("--", "/")


def _is_cache(folder: Path) -> bool:
    """Whether a folder is a repository's in the cache."""
    return os.path.isdir(folder / "snapshots") and (
        folder.name.startswith("models--") or os.path.isdir(folder / "blobs")
    )


def snapshot(folder: Path) -> Path | None:
    """The files of a repository's folder in the cache, or of the ``snapshots`` in it: what ``refs/main`` names, else
    the newest that is whole; None for other folders.

    Raises:
        ValueError: if nothing was downloaded into it.
    """
    repository = folder.parent if folder.name == "snapshots" else folder
    if not _is_cache(repository):
        return None
    named = _one_name(repository / "refs" / "main")
    if named and os.path.isdir(repository / "snapshots" / named):
        return repository / "snapshots" / named
    found = sorted(
        _subfolders(repository / "snapshots"), key=lambda inner: (_is_whole(inner), os.stat(inner).st_mtime_ns)
    )
    if not found:
        raise ValueError(
            f"{repository} holds no files of {repository_name(repository)}: its download has not begun, or they were "
            f"removed from the cache.{_unfinished(repository)} Download it again."
        )
    return found[-1]


def _is_whole(folder: Path) -> bool:
    try:
        return all(choose_weights(place, "transformer") for place in transformer_folders(folder) or [folder])
    except ValueError as error:
        logger.info("%s is not whole: %s", folder, error)
        return False


# --- Weights ---

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
_WEIGHTS = re.compile(
    rf"(?P<stem>.+?)(?:\.(?P<variant>{_VARIANT}))?(?:-(?P<number>\d{{1,6}})-of-(?P<count>\d{{1,6}}))?(?:\.(?P<late>{_VARIANT}))?(?P<ending>{_ENDING})",
    re.IGNORECASE,
)
#: ``diffusion_pytorch_model.safetensors.index.fp16.json``: diffusers puts the variant there.
_INDEX = re.compile(
    rf"(?P<stem>.+?)(?:\.(?P<variant>{_VARIANT}))?(?P<ending>{_ENDING})\.index(?:\.(?P<late>[\w-]+))?(?:\.json)",
    re.IGNORECASE,
)
#: What diffusers, transformers, accelerate and zero_to_fp32 call a model's weights.
_USUAL = ("diffusion_pytorch_model", "model", "pytorch_model", "pytorch_model_fsdp")
#: Files of a training's state that end as weights do, and LoRAs.
_NO_WEIGHTS = re.compile(
    r"(optimizer|scheduler|lr_scheduler|scaler|sampler|dataloader|training_args|random_states|rng_state|custom_checkpoint|zero_pp_rank"
    r"|pytorch_lora_weights|adapter_model).*|.*optim_states\.pt",
    re.IGNORECASE,
)
_LORAS = ("pytorch_lora_weights", "adapter_model", "adapter_config")
#: Endings of what downloaders write to until a file is complete.
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download", ".partial")


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
    name = name or _NAMES.get(kind, kind)
    usual = _USUAL if kind != "text_encoder" else (*_USUAL[1:], _USUAL[0])
    order = ("", *exact, *_VARIANTS)
    ranked: dict[tuple, list[WeightSet]] = {}
    for match, found in _weight_sets(here, name):
        stem, variant = match["stem"].lower(), (match["variant"] or match["late"] or "").lower()
        rank = (
            bool(found.wrong),
            not _is_usual(stem),
            order.index(variant) if variant in order else len(order),
            _ENDINGS.index(match["ending"].lower()),
            usual.index(stem) if stem in usual else len(usual),
            # An index and a file of the same name: what was saved last is not known, and diffusers reads the shards.
            len(found.files) == 1 and found.label == found.files[0].name,
        )
        ranked.setdefault(rank, []).append(found)
    if not ranked:
        raise _no_weights(here, name)
    best, *rivals = ranked[min(ranked)]
    if rivals:
        labels = listed((one.label for one in (best, *rivals)), 5)
        raise ValueError(
            f"{here} should hold the {name}'s weights in one file or in shards with an index, and it is not known "
            f"which of these is meant: {labels}. Keep exactly one set, or give the path of the file."
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
        note=f"{here} holds {len(others) + 1} sets of the {name}'s weights: read is {best.label}, not {rest}.",
    )


def _weight_sets(here: Path, name: str) -> Iterator[tuple[re.Match, WeightSet]]:
    names = _names(here)
    for label in names:
        index = _INDEX.fullmatch(label)
        match = index or _WEIGHTS.fullmatch(label)
        if index:
            yield index, _indexed(here, label, name)
        elif match and not match["number"] and not _NO_WEIGHTS.fullmatch(label) and not os.path.isdir(here / label):
            wrong = ""
            if _dangles(here / label):
                wrong = (
                    f"{_gone(here / label)}, so weights of the {name} are missing.{_unfinished(here)} Download the "
                    "file again."
                )
            yield match, WeightSet(label, (here / label,), wrong)


def _indexed(here: Path, label: str, name: str) -> WeightSet:
    """The shards that an index names."""
    index = here / label
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError as error:
        return WeightSet(label, (), str(error))
    if not isinstance(weight_map, dict) or not weight_map:
        return WeightSet(
            label, (), f"{index} lists no weights, so the shards cannot be put together. Download this file again."
        )
    # Thousands of tensors lie in a few files.
    shards = list({file if isinstance(file, str) else repr(file): file for file in weight_map.values()}.values())
    odd = [file for file in shards if not _is_plain(file) or not str(file).lower().endswith(_ENDINGS)]
    if odd:
        what = (
            f"{index} names {short(repr(odd[0]))} as a file of weights, and shards are files beside their index, with "
            f"names such as {_SHARD}"
        )
        return WeightSet(label, (), f"{what}: nothing else is opened. Download this file again.")
    files = tuple(here / file for file in sorted(shards))
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        gone = f" {_gone(missing[0])}." if _dangles(missing[0]) else ""
        wrong = (
            f"{here} lacks {len(missing)} of {len(files)} shards of the {name}: "
            f"{listed((file.name for file in missing), 8)}. Without them weights are "
            f"missing.{gone}{_unfinished(here)} Download them from the same repository into this folder."
        )
        return WeightSet(label, files, wrong)
    return WeightSet(label, files)


_SHARD = "model-00001-of-00003.safetensors"


def _no_weights(here: Path, name: str) -> ValueError:
    shards = [label for label in _names(here) if (match := _WEIGHTS.fullmatch(label)) and match["number"]]
    if shards:
        return ValueError(
            f"{here} holds {len(shards)} shards of the {name} but no index (*.safetensors.index.json), so it is not "
            "known whether they are all there. Download the index from the same repository into this folder."
        )
    return ValueError(
        f"{here} should hold the {name}'s weights in one safetensors or .bin file, or in shards with an index, and "
        f"holds none.{_unfinished(here)} {what_else(here)}Download the part again."
    )


def what_else(folder: Path) -> str:
    """What a folder holds in the place of weights, if that is known, and what to do with it: a sentence and a space, or
    nothing."""
    names = [*_names(folder), *(label for inner in _subfolders(folder) for label in _names(inner))]
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
    if any(label.startswith(_LORAS) for label in names):
        return (
            "It holds a LoRA, which changes a model and is none: give it in the LoRA's place (--lora, CogVideoX-1.5 "
            "LoRA Loader). "
        )
    files = [
        label
        for label in _names(folder)
        if label.lower().endswith((*_ENDINGS, ".gguf")) and not _NO_WEIGHTS.fullmatch(label)
    ]
    return f"It holds {listed(files, 5)}: give the path of that file itself, if it is meant. " if files else ""


def _is_usual(stem: str) -> bool:
    return stem.lower() in _USUAL


# --- Small things ---


def _names(folder: Path) -> list[str]:
    """The names in a folder, less those that are hidden or put there by a desktop.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return sorted(
            name
            for name in os.listdir(folder)
            if not name.startswith(".") and name.lower() not in ("desktop.ini", "thumbs.db")
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ValueError(unreadable(folder, error)) from error


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            inside = {entry.name for entry in found if entry.is_dir()}
    except (OSError, ValueError):
        # Told, if it is anything but missing, by whoever reads its names.
        inside = set()
    return [folder / name for name in _names(folder) if name in inside] if inside else []


def _holds_something(folder: Path) -> bool:
    return os.path.isdir(folder) and bool(_names(folder))


def _dangles(file: Path) -> bool:
    return os.path.islink(file) and not os.path.exists(file)


def _unfinished(folder: Path) -> str:
    """A sentence about downloads that were broken off, in a folder or in the cache that it belongs to."""
    places: Iterable[Path] = (folder, folder / "blobs", *(parent / "blobs" for parent in tuple(folder.parents)[:4]))
    found = [
        label for place in places if os.path.isdir(place) for label in _names(place) if label.endswith(_UNFINISHED)
    ]
    return f" A download was broken off ({listed(found, 2)})." if found else ""


def _is_plain(name: object) -> bool:
    """Whether a name that stands in a file is that of something beside it: no path, and nothing a file system would not
    take."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name) < 256
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _one_name(file: Path) -> str | None:
    """The name that a small file holds (``latest``, ``refs/main``), if it is one."""
    if not os.path.lexists(file):
        return None
    try:
        name = read_bytes(file, 4096).decode("utf-8", "replace").strip()
    except ValueError as error:
        logger.info("%s", error)
        return None
    if not _is_plain(name):
        logger.info("%s names %s, which is no folder beside it", file, short(repr(name)))
        return None
    return name
