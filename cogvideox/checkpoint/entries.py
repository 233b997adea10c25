"""What lies in a folder, by its names alone; what is broken off or leads nowhere in it; and the Hugging Face cache."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..files import read_bytes, unreadable
from ..words import listed, short

logger = logging.getLogger(__name__)

#: What aria2 adds to a file's name, for what it notes beside it until the file is complete: the file itself has its
#: full length from the beginning on (https://aria2.github.io/manual/en/html/aria2c.html#control-file).
CONTROL = ".aria2"
#: Endings of what downloaders write to until a file is complete.
_UNFINISHED = (".incomplete", ".part", ".crdownload", CONTROL, ".download", ".partial")


def names_in(folder: Path) -> list[str]:
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


def subfolders(folder: Path) -> list[Path]:
    """List the folders in a folder, by name; none where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            inside = {entry.name for entry in found if is_folder(entry)}
    except (OSError, ValueError):
        # Told, if it is anything but missing, by whoever reads its names.
        inside = set()
    return [folder / name for name in names_in(folder) if name in inside] if inside else []


def is_folder(entry: os.DirEntry) -> bool:
    """Say whether an entry is a folder, or a link to one; of a link to itself the system only says that it fails."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def holds_something(folder: Path) -> bool:
    """Say whether there is such a folder, with anything in it."""
    return os.path.isdir(folder) and bool(names_in(folder))


def dangles(file: Path) -> bool:
    """Say whether a file is a link to what is gone."""
    return os.path.islink(file) and not os.path.exists(file)


def unfinished(folder: Path) -> str:
    """A sentence about downloads that were broken off, in a folder, in the cache that it belongs to, or where ``hf
    download --local-dir`` keeps them."""
    folder = Path(os.path.abspath(folder))
    above = (folder, *tuple(folder.parents)[:4])
    kept = (parent / ".cache" / "huggingface" / "download" / folder.relative_to(parent) for parent in above)
    places: Iterable[Path] = (folder, *(parent / "blobs" for parent in above), *kept)
    found = [
        label for place in places if os.path.isdir(place) for label in names_in(place) if label.endswith(_UNFINISHED)
    ]
    return f" A download was broken off ({listed(found, 2)})." if found else ""


def is_plain(name: object) -> bool:
    """Whether a name that stands in a file is that of something beside it: no path, and nothing a file system would not
    take."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name) < 256
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def one_name(file: Path) -> str | None:
    """The name that a small file holds (``latest``, ``refs/main``), if it is one."""
    if not os.path.lexists(file):
        return None
    try:
        name = read_bytes(file, 4096).decode("utf-8", "replace").strip()
    except ValueError as error:
        logger.info("%s", error)
        return None
    if not is_plain(name):
        logger.info("%s names %s, which is no folder beside it", file, short(repr(name)))
        return None
    return name


def gone(file: Path) -> str:
    """What a link that leads nowhere is."""
    target = short(os.readlink(file), 200)
    return f"{short(file, 400)} is a link to {target}, which is gone" + (
        " (removed from the cache)" if "blobs" in target else ""
    )


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads (https://huggingface.co/docs/huggingface_hub/guides/manage-cache),
    without importing it."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(os.path.expanduser(named))
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(home)) / "hub"


#: How a repository on the hub is named, and how files are that no repository is called like.
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = (".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".json")


def cached_repository(name: Path) -> Path | None:
    """The folder in the cache of a repository that is given by its name on the hub."""
    if not _REPOSITORY.fullmatch(name.as_posix()):
        return None
    folder = hub_cache() / f"models--{name.as_posix().replace('/', '--')}"
    return folder if os.path.isdir(folder) else None


def not_cached(name: Path) -> str:
    """A sentence about a path that leads nowhere and may name a repository on the hub, or nothing."""
    is_file = name.suffix.lower() in _FILES or os.path.isdir(name.parent)
    if is_file or not _REPOSITORY.fullmatch(name.as_posix()):
        return ""
    shown = short(name.as_posix(), 200)
    return f" If it is a repository on huggingface.co, download it first: hf download {shown} --local-dir FOLDER."


def repository_name(folder: Path) -> str:
    """``models--zai-org--CogVideoX1.5-5B`` -> ``zai-org/CogVideoX1.5-5B``"""
    return folder.name.removeprefix("models--").replace("--", "/")


def is_cache(folder: Path) -> bool:
    """Whether a folder is a repository's in the cache."""
    return os.path.isdir(folder / "snapshots") and (
        folder.name.startswith("models--") or os.path.isdir(folder / "blobs")
    )
