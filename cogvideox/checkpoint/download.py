"""Fetch a checkpoint in diffusers layout from huggingface.co: only the files it needs, checked, and going on where an
earlier call stopped.

Addresses, tokens and the HTTP session are huggingface_hub's. The bytes are read by ``transfer`` and not by its
``hf_hub_download``, for three reasons: since 1.20 or so that deletes what an interrupted call fetched, and a shard is
5 GB; older versions show their progress only to a second thread, which a cancel cannot stop; and none of them checks
the SHA-256. The listing is read so too, as its own reads an answer without end.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..files import MAX_TEXT, check_space, disk_errors, parse_json
from ..words import reason, short, size_text
from .layout import is_checkpoint
from .transfer import Hub, client_errors, read_answer, receive

logger = logging.getLogger(__name__)

#: what to call it -> the repository that holds it. Each is about 31 GB.
REPOSITORIES = {
    "t2v": "zai-org/CogVideoX1.5-5B",
    "i2v": "zai-org/CogVideoX1.5-5B-I2V",
    "fun-inp": "alibaba-pai/CogVideoX-Fun-V1.5-5b-InP",
}
_FOLDERS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
#: What is not a plain name directly in one of the five folders is not fetched, so that no listing can write elsewhere,
#: or to one of the devices that Windows has in every folder.
_NEEDED = re.compile(
    rf"model_index\.json|(?:{'|'.join(_FOLDERS)})/(?!(?i:con|nul|prn|aux|com\d|lpt\d)\.)\w[\w.-]{{0,100}}\.(?:json|safetensors)|tokenizer/spiece\.model",
    re.ASCII,
)
#: Files of a checkpoint at most; the released ones have 20.
_MOST_FILES = 1000
_SHA256, _SHA1, _COMMIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{6,64}")
#: A second copy of the weights in another dtype, as ``diffusion_pytorch_model.fp16.safetensors``: the layout wants one
#: set.
_SECOND_COPY = re.compile(r"\.(?:fp16|bf16|fp32)\b")
#: ``is_checkpoint`` looks at this file, so it comes last: a checkpoint is listed when it is complete.
_LAST = "transformer/config.json"
#: What a process holds while it downloads into a folder. The system lets go of it when the process ends, however.
_LOCK = ".download.lock"
#: Seconds between two calls of on_progress.
_REPORT_EVERY = 0.1


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        path: within the repository, with ``/``.
        size: in bytes; -1 if the hub does not say it.
        sha256: of its content, for a file in Git LFS (all weights are).
        blob_id: git's SHA-1 of it, for any other file.
    """

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    def digest(self):
        """A hash object that, fed with the content, gives ``checksum``."""
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    @property
    def checksum(self) -> str | None:
        return self.sha256 or self.blob_id


def checkpoint_folder(which: str, folder: Path | str) -> Path:
    """Where ``download_checkpoint(which, folder)`` puts the checkpoint: ``folder`` / the repository's name.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if not isinstance(which, str) or which not in REPOSITORIES:
        choices = ", ".join(f"{key} ({repository})" for key, repository in REPOSITORIES.items())
        raise ValueError(
            f"There is no checkpoint called {short(repr(which))}, so it is not known what to download. Choose one of: "
            f"{choices}."
        )
    try:
        place = Path(folder).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{short(folder, 400)} is in no home folder that is known here, so nothing can be downloaded there. Write "
            "it out."
        ) from error
    if "\0" in str(place):
        raise ValueError(
            f"{short(folder, 400)} holds a character that no file name can, so nothing can be downloaded there. "
            "Choose another folder."
        )
    return place / REPOSITORIES[which].rpartition("/")[2]


def download_checkpoint(
    which: str, folder: Path | str, on_progress: Callable[[int, int], None] | None = None, endpoint: str | None = None
) -> Path:
    """Download a checkpoint, or what is still missing of it.

    Files that are there in their right size are left alone, an interrupted file goes on where it stopped, and the
    content of each fetched file is checked (SHA-256 for weights, git's SHA-1 for the small files) before it gets its
    name.

    Args:
        which: a key of ``REPOSITORIES``.
        folder: the folder to make the checkpoint's own folder in, such as ``models/CogVideo``.
        on_progress: called with ``(done, total)`` in bytes of all needed files, ten times a second, and with ``(0, 1)``
            while the list of them is waited for. What it raises stops the download within a second; what was fetched is
            kept for the next call.
        endpoint: the hub's address; None is huggingface_hub's own, which ``HF_ENDPOINT`` sets.

    Returns:
        The checkpoint's folder, for ``open_checkpoint``.

    Raises:
        ValueError: if ``which`` is unknown or a file is where the folder should be.
        RuntimeError: if the hub cannot be reached or refuses, the disk is too small or cannot be written, a file
            arrives damaged, or another process downloads into the same folder.
    """
    target, repository = checkpoint_folder(which, folder), REPOSITORIES[which]
    with _disk_errors(target):
        for place in (target, *target.parents):
            if place.exists() and not place.is_dir():
                raise ValueError(
                    f"{short(place, 400)} is a file, so no folder for {repository} can be made there. Choose another "
                    "folder, or move the file away."
                )

    with client_errors():
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        hub = (endpoint or constants.ENDPOINT).rstrip("/")
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    source = Hub(repository, hub, headers)
    revision, files = _list_files(source, (lambda: None) if on_progress is None else partial(on_progress, 0, 1))
    with _disk_errors(target):
        missing = [file for file in files if not _is_there(file, target / file.path)]
        if missing:
            _check_space(repository, missing, target)
    total = sum(file.size for file in files)
    report = _Report(on_progress, total, before=total - sum(file.size for file in missing))
    report(0)
    with _alone(target) if missing else nullcontext():
        for file in missing:
            logger.info("fetching %s of %s (%s)", file.path, repository, size_text(file.size))
            url = hf_hub_url(repository, file.path, revision=revision, endpoint=hub)
            _fetch(file, target / file.path, partial(receive, source, url, file.size, report), report)
            report.before += file.size
    if not is_checkpoint(target):
        raise RuntimeError(
            f"{short(target, 400)} is complete, but its transformer/config.json describes no CogVideoX model, so it "
            f"cannot be loaded. {short(hub, 200)} may be a mirror that serves something else as {repository}: unset "
            "HF_ENDPOINT and download again."
        )
    return target


def _list_files(hub: Hub, on_wait: Callable[[], None]) -> tuple[str, list[RemoteFile]]:
    """The repository's commit and the files a checkpoint needs, the one that makes it known as a checkpoint last."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(
            f"HF_HUB_OFFLINE is set, so {hub.repository} cannot be downloaded: it forbids huggingface_hub every "
            "connection. Unset it and start again, or copy the checkpoint's folder here from another computer."
        )
    body = bytearray()
    with closing(
        read_answer(hub, f"{hub.address}/api/models/{hub.repository}?blobs=true", on_wait, at_once=True)
    ) as arriving:
        for _, block in arriving:
            body += block
            if len(body) > MAX_TEXT:
                break
    try:
        if len(body) > MAX_TEXT:
            raise ValueError(f"it has more than {MAX_TEXT:,} bytes")
        listing = parse_json(bytes(body))
        files = _needed_files(listing)
    except ValueError as error:
        raise RuntimeError(
            f"{short(hub.address, 200)} answers with something other than the list of {hub.repository}'s files "
            f"({reason(error)}), so nothing can be downloaded. A network that asks for a login in the browser does "
            "that, and so does a wrong HF_ENDPOINT. Open the address in a browser, then download again."
        ) from error
    names = {file.path for file in files if file.size >= 0}
    absent = [name for name in ("model_index.json", _LAST) if name not in names]
    absent += [f"{name}/" for name in _FOLDERS if not any(path.startswith(f"{name}/") for path in names)]
    if absent or len(names) < len(files):
        raise RuntimeError(
            f"{hub.repository} on {short(hub.address, 200)} lists no {', '.join(absent) or 'sizes'}, so a whole "
            "checkpoint cannot be downloaded from it. It may be changing just now, or be an incomplete mirror: try "
            "again later, or unset HF_ENDPOINT."
        )
    commit = listing.get("sha")
    known = isinstance(commit, str) and _COMMIT.fullmatch(commit)
    return commit if known else "main", sorted(files, key=lambda file: (file.path == _LAST, file.path))


def _needed_files(listing: Any) -> list[RemoteFile]:
    """The files that a checkpoint needs of what the hub says of a repository.

    Raises:
        ValueError: saying what is wrong with it, if it is not what a hub says.
    """
    siblings = listing.get("siblings") if isinstance(listing, dict) else None
    if not isinstance(siblings, list):
        raise ValueError("it holds no list of files")
    files: dict[str, RemoteFile] = {}
    for entry in siblings:
        path = entry.get("rfilename") if isinstance(entry, dict) else None
        if not isinstance(path, str):
            raise ValueError(f"it has {short(entry)} for a file")
        if not _NEEDED.fullmatch(path) or _SECOND_COPY.search(path):
            continue
        large = entry.get("lfs")
        if not isinstance(large, dict | None):
            raise ValueError(f"it has {short(large)} for where {short(path)} is kept")
        size = (large or entry).get("size")
        if size is not None and (type(size) is not int or size < 0):
            raise ValueError(f"it gives {short(path)} {short(size)} bytes")
        sha256: Any = large.get("sha256") if large else large
        blob_id: Any = entry.get("blobId")
        for checksum, form in ((sha256, _SHA256), (blob_id, _SHA1)):
            if checksum is not None and not (isinstance(checksum, str) and form.fullmatch(checksum)):
                raise ValueError(f"it gives {short(path)} the checksum {short(checksum)}")
        file = RemoteFile(path, -1 if size is None else size, sha256, None if large else blob_id)
        # Windows and macOS take names that differ in case for one.
        if files.setdefault(path.casefold(), file) != file:
            raise ValueError(f"it has {short(path)} twice")
        if len(files) > _MOST_FILES:
            raise ValueError(f"it has more than {_MOST_FILES} files for one checkpoint")
    return list(files.values())


def _is_there(file: RemoteFile, target: Path) -> bool:
    """Whether a file needs no fetching. Weights are judged by their size alone: reading 31 GB at every call would take
    minutes."""
    if not target.is_file() or target.stat().st_size != file.size:
        return False
    if file.sha256 or not file.blob_id:
        return True
    digest = file.digest()
    digest.update(target.read_bytes())
    return digest.hexdigest() == file.blob_id


def _part(file: RemoteFile, target: Path) -> Path:
    """Where a file lies until it is complete. The name holds its checksum: a file that changed on the hub is begun
    anew."""
    return target.with_name(f"{target.name}.{(file.checksum or 'unknown')[:12]}.part")


def _check_space(repository: str, missing: list[RemoteFile], target: Path) -> None:
    needed = 0
    for file in missing:
        part = _part(file, target / file.path)
        needed += max(0, file.size - (part.stat().st_size if part.is_file() else 0))
    check_space(
        target,
        needed,
        f"{repository} needs {size_text(needed)} more in {short(target, 400)}",
        "the download halfway, and other programs with it, so nothing was fetched",
        "Make room, or choose a folder on another disk.",
    )


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Be the only process that downloads into a folder: two would write into each other's files.

    Raises:
        RuntimeError: if another is, or the folder cannot be made.
    """
    # huggingface_hub's own, which needs it.
    from filelock import FileLock, Timeout

    path = target / _LOCK
    lock = FileLock(path)
    with _disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(
            f"Another program is downloading into {short(target, 400)} just now, and two would spoil each other's "
            "files. Wait until it is done, or stop it and download again: it goes on where that stopped."
        ) from None
    except (NotImplementedError, OSError):
        # No locks on this disk, as on some network drives; where nothing can be written, the first file tells.
        pass
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            path.unlink()


def _disk_errors(target: Path) -> AbstractContextManager[None]:
    return disk_errors(
        target,
        "The checkpoint is not complete yet; what was fetched is kept. Make room on the disk, allow writing to the "
        "folder, or choose another one (FAT32 disks cannot hold its files of 5 GB), and download again.",
    )


def _fetch(
    file: RemoteFile,
    target: Path,
    blocks: Callable[[int], Generator[tuple[int, bytes], None, None]],
    report: Callable[[int], None],
) -> None:
    """Bring one file into its ``.part``, going on from what that holds; check it; give it its name.

    ``blocks(start)`` gives the file's bytes from ``start`` on, each block with its position.
    """
    part = _part(file, target)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{target.name}.*.part"):
            if old != part:
                old.unlink()
        out = part.open("a+b", buffering=0)
    with out:
        out.seek(0)
        digest, done = file.digest(), 0
        while block := out.read(1 << 20):
            digest.update(block)
            done += len(block)
            report(done)
        with closing(blocks(done)) as arriving:
            for position, block in arriving:
                with _disk_errors(target):
                    if position != done:  # the server began anew
                        out.truncate(position)
                        digest, done = file.digest(), position
                    left = memoryview(block)
                    while left:
                        left = left[out.write(left) :]
                digest.update(block)
                done += len(block)
                report(done)
        # Weights are known by their size later: a loss of power is not to leave one without its bytes.
        with _disk_errors(target):
            os.fsync(out.fileno())
    with _disk_errors(target):
        if done == file.size and digest.hexdigest() == (file.checksum or digest.hexdigest()):
            os.replace(part, target)
            return
        part.unlink()
    raise RuntimeError(
        f"{file.path} arrived damaged: {done} bytes with the checksum {digest.hexdigest()[:12]}… instead of "
        f"{file.size} with {(file.checksum or 'any')[:12]}…. It would spoil every video, so it has been deleted; the "
        "files before it are kept. Download again; if it happens again, suspect a proxy, the disk or the memory of "
        "this computer."
    )


class _Report:
    """``on_progress`` as it is promised: not too often, never going back, and in the end ``done == total``.

    It is called with the bytes of one file; ``before`` counts those of the files before it.
    """

    def __init__(self, on_progress: Callable[[int, int], None] | None, total: int, before: int):
        self.on_progress, self.total, self.before = on_progress, total, before
        self.shown, self.last = -1, float("-inf")

    def __call__(self, got: int) -> None:
        done, now = min(self.before + got, self.total), time.monotonic()
        if self.on_progress is None or (done < self.total and now - self.last < _REPORT_EVERY):
            return
        self.shown, self.last = max(done, self.shown), now
        self.on_progress(self.shown, self.total)
