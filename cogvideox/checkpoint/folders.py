"""What a folder may look like: where in it a checkpoint's parts and their weights lie, told by names and small JSON
files.

Beside the folders that diffusers and SAT write (``layout``), people have::

    my-finetune/                         config.json and the weights in one folder
    run/checkpoint-500/                  transformer/ (or transformer_ema/) alone, or model.safetensors alone
    run/latest, run/500/mp_rank_00_…     SAT's and DeepSpeed's training
    models--zai-org--CogVideoX1.5-5B/    the Hugging Face cache: refs/main names one of snapshots/, whose files are
                                         links into blobs/

and weights as ``weight_sets`` tells them. No weights are opened here, and torch is not needed. One file, as a path that
people type, a cache and a checkpoint's folder lead to each other.
"""

import logging
import os
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json
from ..words import listed, short
from .entries import (
    cached_repository,
    gone,
    holds_something,
    is_cache,
    names_in,
    not_cached,
    one_name,
    subfolders,
    unfinished,
)
from .entries import hub_cache as hub_cache
from .entries import repository_name as repository_name
from .weight_sets import INDEX, PART_NAMES, WEIGHTS, choose_weights, is_shard, is_usual, weight_sets, what_else

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
#: The second of several pieces that weights of SAT's are in, as a training on several cards leaves them.
_SAT_SECOND = "mp_rank_01_model_states.pt"
#: Where SAT's guide puts the other parts.
_SAT_PARTS = {"vae": "vae/3d-vae.pt", "text_encoder": "t5-v1_1-xxl"}
#: What trainers call the folder of a step: ``checkpoint-500``, finetrainers ``000500``.
_STEP = re.compile(r"(?:(?:checkpoint|step|global_step|epoch)[-_]?)?(\d{1,18})")
#: How far above SAT's weights they are looked for: transformer/1000/ is two folders below them, and the folder may be
#: in another.
_SAT_ABOVE = 4
#: Levels of folders below the one that was given in which one checkpoint is looked for, and how many of a level.
_LEVELS, _MOST_FOLDERS = 3, 1000
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
            if not sat and holds_something(root / kind):
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
    # A transformer's folder beside DeepSpeed's states holds the same weights, and a config that says more than shapes.
    if weights is not None and not transformer_folders(path):
        return _sat_place(path, weights)
    if _is_transformer_folder(path) or (path.name in _TRANSFORMER_FOLDERS and os.path.isfile(path / "config.json")):
        # A transformer's own folder: in a checkpoint, or all there is.
        root = path.parent if path.name.startswith("transformer") else path
        return Place(path, path, root, (root,))
    found = [folder for folder in _transformer_subfolders(path) if holds_something(folder)]
    if len(found) > 1:
        names = " and ".join(folder.name for folder in found)
        raise ValueError(
            f"{short(path, 400)} holds {len(found)} checkpoints, {names}, and which is meant is not known. Give the "
            "path of one of them."
        )
    if found:
        return Place(path, found[0], path, (path,))
    return _nested_place(path)


def _sat_place(path: Path, weights: Path) -> Place:
    above = Path(os.path.abspath(weights)).parents
    notes: tuple[str, ...] = ()
    if path not in (weights, weights.parent) and len(steps := sat_steps(weights.parent.parent)) > 1:
        notes = (
            f"{short(weights.parent.parent, 400)} holds {len(steps)} training steps: read is {weights.parent.name}.",
        )
    if os.path.lexists(weights.with_name(_SAT_SECOND)):
        raise ValueError(
            f"{short(weights.parent, 400)} holds a model that was trained in several pieces (mp_rank_00, mp_rank_01, "
            "…), and one of them alone cannot run. Join them with SAT's tools (merge_model of SwissArmyTransformer), "
            "or get the model in diffusers' layout."
        )
    return Place(path, weights, weights.parent, tuple(above)[:_SAT_ABOVE], notes)


def _nested_place(path: Path) -> Place:
    """What a folder without a transformer's holds: weights without a config, or one checkpoint in its folders; of a
    training run, the last step."""
    sets = [(match["stem"], found.label) for match, found in weight_sets(path, "transformer")]
    # What it is can then be told from names and shapes, as of a single file.
    alone = Place(path, path, path, (path,))
    if any(is_usual(stem) for stem, _ in sets):
        return alone
    below, level = list[Path](), [path]
    for _ in range(_LEVELS):
        level = [inner for folder in level for inner in subfolders(folder)][:_MOST_FOLDERS]
        below = below or _checkpoints_among(level)
    steps = {int(number[1]): inner for inner in below if (number := _STEP.fullmatch(inner.name))}
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
            (f"{short(path, 400)}: read is {below[0].name} in it{why}.", *inner.notes),
        )
    if below:
        names = listed((inner.relative_to(path).as_posix() for inner in below), 5)
        raise ValueError(
            f"{short(path, 400)} holds {len(below)} checkpoints ({names}), and which is meant is not known. Give the "
            "path of one of them."
        )
    # Shards without an index may be another model's, beside a file.
    if len([label for _, label in sets if not is_shard(label)] or sets) == 1:
        return alone
    raise _no_checkpoint(path)


def _checkpoints_among(folders: Iterable[Path]) -> list[Path]:
    """Those that are checkpoints; and those of weights without a config, unless they are the states of a training
    beside what came out of it."""
    folders = list(folders)
    whole = [folder for folder in folders if _unless_bad(_is_checkpoint_folder, folder)]
    either = [folder for folder in folders if folder in whole or _unless_bad(_is_weights_folder, folder)]
    return whole if whole and not all(_STEP.fullmatch(folder.name) for folder in either) else either


def _is_checkpoint_folder(folder: Path) -> bool:
    folder = snapshot(folder) or folder
    return bool(transformer_folders(folder) or sat_weights(folder))


def _is_weights_folder(folder: Path) -> bool:
    """Whether a folder holds weights without a config: a training's step may, and zero_to_fp32 makes one that is called
    a file."""
    if not (_STEP.fullmatch(folder.name) or WEIGHTS.fullmatch(folder.name)):
        return False
    return any(is_usual(match["stem"]) for match, _ in weight_sets(folder, "transformer"))


def _unless_bad(look: Callable[[Path], bool], folder: Path) -> bool:
    """Look at a folder among others: one that cannot be read is none of them."""
    try:
        return look(folder)
    except ValueError as error:
        logger.info("%s is passed over: %s", folder, error)
        return False


def _no_checkpoint(path: Path) -> ValueError:
    names = names_in(path)
    if not names:
        return ValueError(
            f"{short(path, 400)} is empty: the download has not begun or went elsewhere. Download the checkpoint into "
            f"it. {WHERE}"
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
    if any(holds_something(inner) for inner in usual) and not others:
        return usual
    more = [
        inner for inner in subfolders(folder) if inner.name.lower().startswith("transformer") and inner not in usual
    ]
    return usual + [inner for inner in more if _is_transformer_folder(inner)]


def holds_shards(folder: Path) -> bool:
    """Whether shards are what would be read from a folder, and no config says what they are.

    Raises:
        ValueError: if they are not whole.
    """
    names = names_in(folder)
    if "config.json" in names or not shows_shards(names):
        return False
    return shows_shards((choose_weights(folder, "transformer").label,))


def shows_shards(names: Iterable[str]) -> bool:
    """Whether there are shards, or an index of them, among the names of files."""
    return any(is_shard(name) or INDEX.fullmatch(name) for name in names)


def may_be_checkpoint(names: Iterable[str]) -> bool:
    """Whether a folder without folders in it may be a checkpoint, by the names of its files."""
    return any(name == _SAT_WEIGHTS or name.endswith(".json") or is_shard(name) for name in names)


def is_sat_piece(name: str, beside: Container[str]) -> bool:
    """Whether a file of SAT's is one of several pieces, by its name and those beside it."""
    return name.startswith("mp_rank_") and _SAT_SECOND in beside


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
    named = one_name(folder / "latest")
    if named and os.path.isfile(folder / named / _SAT_WEIGHTS):
        return folder / named / _SAT_WEIGHTS
    steps = sat_steps(folder)
    return steps[-1] if steps else next((file for file in (folder / _SAT_WEIGHTS,) if os.path.isfile(file)), None)


def sat_steps(folder: Path) -> list[Path]:
    """The weights of all training steps in a folder, in their order."""
    files = [inner / _SAT_WEIGHTS for inner in subfolders(folder) if os.path.isfile(inner / _SAT_WEIGHTS)]
    return sorted(files, key=lambda file: (_last_number(file.parent.name), file.parent.name))


def _last_number(name: str) -> int:
    """Return the number that a name ends in, -1 if in none."""
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
        cached = cached_repository(here)
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


def _nothing(here: Path, kind: str) -> ValueError:
    shown = short(here, 400)
    if os.path.islink(here):
        return ValueError(
            f"{gone(here)}. Nothing can be loaded from it. Download it again, or give the path of the file or folder "
            "itself."
        )
    if kind != "transformer":
        what = PART_NAMES.get(kind, kind)
        return ValueError(f"There is no {shown}, so there is no {what} to load. Check the path.{not_cached(here)}")
    return ValueError(f"There is no {shown}, so there is nothing to load. Check the path.{not_cached(here)} {WHERE}")


def is_checkpoint_json(file: Path) -> bool:
    """Whether a file is, by its name, one that lies in a checkpoint's folder and stands for it."""
    name = file.name.lower()
    return name in ("model_index.json", "config.json", "scheduler_config.json") or INDEX.fullmatch(name) is not None


def _folder_of(file: Path, kind: str) -> Path | None:
    """The folder that a file in it stands for: a checkpoint's or part's own JSON files, ``latest``, a shard, or the
    weights beside a config."""
    name, folder = file.name.lower(), file.parent
    if is_checkpoint_json(file) or name == "latest":
        return folder.parent if name == "scheduler_config.json" else folder
    weights = WEIGHTS.fullmatch(file.name)
    if weights is None:
        return None
    if weights["number"] and os.path.isfile(folder / "config.json"):
        return folder
    # A file beside its config, if it is the one that would be read from there: the config says more than shapes do.
    if (
        _is_transformer_folder(folder) if kind == "transformer" else os.path.isfile(folder / "config.json")
    ) and is_usual(weights["stem"]):
        try:
            return folder if choose_weights(folder, kind).files == (file,) else None
        except ValueError as error:
            logger.info("%s is opened by itself: %s", file, error)
    return None


# --- The Hugging Face cache ---


def snapshot(folder: Path) -> Path | None:
    """The files of a repository's folder in the cache, or of the ``snapshots`` in it: what ``refs/main`` names, else
    the newest that is whole; None for other folders.

    Raises:
        ValueError: if nothing was downloaded into it.
    """
    repository = folder.parent if folder.name == "snapshots" else folder
    if not is_cache(repository):
        return None
    named = one_name(repository / "refs" / "main")
    if named and os.path.isdir(repository / "snapshots" / named):
        return repository / "snapshots" / named
    found = sorted(
        subfolders(repository / "snapshots"), key=lambda inner: (_is_whole(inner), os.stat(inner).st_mtime_ns)
    )
    if not found:
        raise ValueError(
            f"{short(repository, 400)} holds no files of {repository_name(repository)}: its download has not begun, or "
            f"they were removed from the cache.{unfinished(repository)} Download it again."
        )
    return found[-1]


def _is_whole(folder: Path) -> bool:
    try:
        return all(choose_weights(place, "transformer") for place in transformer_folders(folder) or [folder])
    except ValueError as error:
        logger.info("%s is not whole: %s", folder, error)
        return False
