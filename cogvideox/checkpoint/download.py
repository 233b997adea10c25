"""Fetch a checkpoint in diffusers layout from huggingface.co: only the files it needs, checked, and going on where an earlier call stopped.

Listing, addresses, tokens and the HTTP session are huggingface_hub's. The bytes are read here and not by its ``hf_hub_download``, for three
reasons: since 1.20 or so that deletes what an interrupted call fetched, and a shard is 5 GB; older versions show their progress only to a second
thread, which a cancel cannot stop; and none of them checks the SHA-256.
"""

import hashlib
import importlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .layout import is_checkpoint

logger = logging.getLogger(__name__)

#: what to call it -> the repository that holds it. Each is about 31 GB.
REPOSITORIES = {"t2v": "zai-org/CogVideoX1.5-5B", "i2v": "zai-org/CogVideoX1.5-5B-I2V"}
_FOLDERS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
#: What is not a plain name directly in one of the five folders is not fetched, so that no listing can write elsewhere.
_NEEDED = re.compile(rf"model_index\.json|(?:{'|'.join(_FOLDERS)})/[\w.-]+\.(?:json|safetensors)|tokenizer/spiece\.model")
#: A second copy of the weights in another dtype, as ``diffusion_pytorch_model.fp16.safetensors``: the layout wants one set.
_SECOND_COPY = re.compile(r"\.(?:fp16|bf16|fp32)\b")
#: ``is_checkpoint`` looks at this file, so it comes last: a checkpoint is listed when it is complete.
_LAST = "transformer/config.json"
#: Bytes that stay free on the disk: a full one stops other programs too.
_SPARE = 10**9
#: Bytes read at a time: small enough that a cancel is noticed at once on a slow line.
_BLOCK = 1 << 16
#: Seconds between two calls of on_progress.
_REPORT_EVERY = 0.1
#: Seconds before each new try when nothing more arrives; the count begins anew when the file got longer.
_RETRY_WAITS = (1, 2, 5, 10, 20)
#: HTTP states that pass: too slow, too many requests, and the server's own troubles.
_PASSING = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        path: within the repository, with ``/``.
        size: in bytes.
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
    if which not in REPOSITORIES:
        choices = ", ".join(f"{key} ({repository})" for key, repository in REPOSITORIES.items())
        raise ValueError(f"There is no checkpoint called {which!r}, so it is not known what to download. Choose one of: {choices}.")
    return Path(folder).expanduser() / REPOSITORIES[which].rpartition("/")[2]


def download_checkpoint(which: str, folder: Path | str, on_progress: Callable[[int, int], None] | None = None, endpoint: str | None = None) -> Path:
    """Download a checkpoint, or what is still missing of it.

    Files that are there in their right size are left alone, an interrupted file goes on where it stopped, and the content of each fetched
    file is checked (SHA-256 for weights, git's SHA-1 for the small files) before it gets its name.

    Args:
        which: a key of ``REPOSITORIES``.
        folder: the folder to make the checkpoint's own folder in, such as ``models/CogVideo``.
        on_progress: called with ``(done, total)`` in bytes of all needed files, ten times a second. What it raises stops the download; what
            was fetched is kept for the next call.
        endpoint: the hub's address; None is huggingface_hub's own, which ``HF_ENDPOINT`` sets.

    Returns:
        The checkpoint's folder, for ``open_checkpoint``.

    Raises:
        ValueError: if ``which`` is unknown or a file is where the folder should be.
        RuntimeError: if the hub cannot be reached or refuses, the disk is too small or cannot be written, or a file arrives damaged.
    """
    target, repository = checkpoint_folder(which, folder), REPOSITORIES[which]
    for place in (target, *target.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file, so no folder for {repository} can be made there. Choose another folder, or move the file away.")

    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    hub = (endpoint or constants.ENDPOINT).rstrip("/")
    revision, files = _list_files(repository, hub)
    missing = [file for file in files if not _is_there(file, target / file.path)]
    if missing:
        _check_space(repository, missing, target)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    total = sum(file.size for file in files)
    report = _Report(on_progress, total, before=total - sum(file.size for file in missing))
    report(0)
    for file in missing:
        logger.info("fetching %s of %s (%s)", file.path, repository, _bytes(file.size))
        url = hf_hub_url(repository, file.path, revision=revision, endpoint=hub)
        _fetch(file, target / file.path, partial(_receive, repository, hub, url, headers, file.size, report), report)
        report.before += file.size
    if not is_checkpoint(target):
        raise RuntimeError(
            f"{target} is complete, but its transformer/config.json describes no CogVideoX model, so it cannot be loaded. "
            f"{hub} may be a mirror that serves something else as {repository}: unset HF_ENDPOINT and download again."
        )
    return target


def _list_files(repository: str, hub: str) -> tuple[str, list[RemoteFile]]:
    """The repository's commit and the files a checkpoint needs, the one that makes it known as a checkpoint last."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(
            f"HF_HUB_OFFLINE is set, so {repository} cannot be downloaded: it forbids huggingface_hub every connection. "
            "Unset it and start again, or copy the checkpoint's folder here from another computer."
        )
    with _hub_errors(repository, hub):
        try:
            info = HfApi(endpoint=hub).model_info(repository, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            files = [
                RemoteFile(entry.rfilename, entry.lfs.size if entry.lfs else entry.size, entry.lfs and entry.lfs.sha256, entry.blob_id)
                for entry in info.siblings or ()
                if _NEEDED.fullmatch(entry.rfilename) and not _SECOND_COPY.search(entry.rfilename)
            ]
        except HfHubHTTPError:
            raise  # some of them are ValueErrors too
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(
                f"{hub} answers with something other than the list of {repository}'s files, so nothing can be downloaded. A network that asks "
                "for a login in the browser does that, and so does a wrong HF_ENDPOINT. Open the address in a browser, then download again."
            ) from error
    names = {file.path for file in files if file.size is not None}
    absent = [name for name in ("model_index.json", _LAST) if name not in names]
    absent += [f"{name}/" for name in _FOLDERS if not any(path.startswith(f"{name}/") for path in names)]
    if absent or len(names) < len(files):
        raise RuntimeError(
            f"{repository} on {hub} lists no {', '.join(absent) or 'sizes'}, so a whole checkpoint cannot be downloaded from it. It may be "
            "changing just now, or be an incomplete mirror: try again later, or unset HF_ENDPOINT."
        )
    return info.sha or "main", sorted(files, key=lambda file: (file.path == _LAST, file.path))


def _is_there(file: RemoteFile, target: Path) -> bool:
    """Whether a file needs no fetching. Weights are judged by their size alone: reading 31 GB at every call would take minutes."""
    if not target.is_file() or target.stat().st_size != file.size:
        return False
    if file.sha256 or not file.blob_id:
        return True
    digest = file.digest()
    digest.update(target.read_bytes())
    return digest.hexdigest() == file.blob_id


def _part(file: RemoteFile, target: Path) -> Path:
    """Where a file lies until it is complete. The name holds its checksum: a file that changed on the hub is begun anew."""
    return target.with_name(f"{target.name}.{(file.checksum or 'unknown')[:12]}.part")


def _check_space(repository: str, missing: list[RemoteFile], target: Path) -> None:
    needed = 0
    for file in missing:
        part = _part(file, target / file.path)
        needed += max(0, file.size - (part.stat().st_size if part.is_file() else 0))
    place = next(path for path in (target.absolute(), *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE:
        raise RuntimeError(
            f"{repository} needs {_bytes(needed)} more in {target} and {_bytes(_SPARE)} to spare, but the disk with {place} has only "
            f"{_bytes(free)} free. A full disk would stop the download halfway, and other programs with it, so nothing was fetched. "
            "Make room, or choose a folder on another disk."
        )


def _fetch(file: RemoteFile, target: Path, blocks: Callable[[int], Iterator[tuple[int, bytes]]], report: Callable[[int], None]) -> None:
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
    with _disk_errors(target):
        if done == file.size and digest.hexdigest() == (file.checksum or digest.hexdigest()):
            os.replace(part, target)
            return
        part.unlink()
    raise RuntimeError(
        f"{file.path} arrived damaged: {done} bytes with the checksum {digest.hexdigest()[:12]}… instead of {file.size} with "
        f"{(file.checksum or 'any')[:12]}…. It would spoil every video, so it has been deleted; the files before it are kept. Download again; "
        "if it happens again, suspect a proxy, the disk or the memory of this computer."
    )


def _receive(
    repository: str, hub: str, url: str, headers: dict[str, str], size: int, on_wait: Callable[[int], None], start: int
) -> Iterator[tuple[int, bytes]]:
    """A file's bytes from ``start`` on, as ``(position, block)``, over as many connections as it takes.

    Position 0 out of turn means that the server sends the whole file though only the rest was asked for. ``on_wait`` is called with the
    position again and again while a new connection is waited for.
    """
    waits, furthest = iter(_RETRY_WAITS), start
    while start < size:
        failure = None
        try:
            with _hub_errors(repository, hub), _stream(url, headers | ({"Range": f"bytes={start}-"} if start else {})) as (partial_content, blocks):
                if not partial_content:
                    start = 0
                for block in blocks:
                    yield start, block
                    start += len(block)
                    if start > size:
                        return
        except _PassingError as error:
            failure = error
        if start == size:
            return
        if start > furthest:
            waits, furthest = iter(_RETRY_WAITS), start
        wait = next(waits, None)
        if wait is None:
            raise failure or _PassingError(_broken(hub, repository, f"{url} ended after {start} of {size} bytes"))
        reason = failure.__cause__ if failure else "no reason given"
        logger.warning("%s broke off at %d of %d bytes; going on in %g s (%s)", url, start, size, wait, reason)
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            on_wait(start)
            time.sleep(min(left, 0.2))


@contextmanager
def _stream(url: str, headers: dict[str, str]) -> Iterator[tuple[bool, Iterator[bytes]]]:
    """GET, with requests (huggingface_hub before 1.0) or httpx (since): whether a part is sent, and an iterator over the bytes."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status

    session, timeout = get_session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    is_httpx = callable(getattr(session, "stream", None))  # requests has a flag of that name
    if is_httpx:
        opened = session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
    else:
        opened = session.get(url, headers=headers, timeout=timeout, stream=True)
    with opened as response:
        hf_raise_for_status(response)
        yield response.status_code == 206, response.iter_bytes(_BLOCK) if is_httpx else response.iter_content(_BLOCK)


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


class _PassingError(RuntimeError):
    """Trouble that may be over at the next try."""


@contextmanager
def _hub_errors(repository: str, hub: str) -> Iterator[None]:
    """Say in a sentence what the hub, or the way to it, answered: a RuntimeError, and a ``_PassingError`` if trying again may help."""
    from huggingface_hub.errors import HfHubHTTPError

    # requests, httpx or httpx2: whichever the installed huggingface_hub uses.
    library = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    connection_error = getattr(library, "RequestError", None) or library.RequestException
    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(error.response.status_code, repository, hub) from error
    except connection_error as error:
        raise _PassingError(_broken(hub, repository, str(error).strip() or type(error).__name__)) from error


def _broken(hub: str, repository: str, reason: str) -> str:
    return (
        f"The connection to {hub} failed ({reason}), so {repository} is not complete yet; what was fetched is kept. Check the network (a proxy, "
        "a firewall, HF_ENDPOINT) and download again: it goes on where it stopped."
    )


def _refusal(status: int, repository: str, hub: str) -> RuntimeError:
    if status in (401, 403):
        return RuntimeError(
            f"{hub} refuses {repository} with status {status}: it wants a login, or your token does not allow this repository. Without access "
            f"nothing more can be downloaded. Open {hub}/{repository} in a browser, accept its terms if it asks, and log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    if status == 404:
        return RuntimeError(
            f"{hub} has no {repository}, or a file of it is gone (status 404), so the checkpoint cannot be completed. If HF_ENDPOINT is set, the "
            "mirror may lack it: unset it. Otherwise download again; the files fetched so far are kept."
        )
    kind = _PassingError if status in _PASSING else RuntimeError
    return kind(
        f"{hub} answers status {status} for {repository}, so it is not complete yet; what was fetched is kept. The hub may be busy or in trouble: "
        "download again later, and it goes on where it stopped."
    )


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Say in a sentence why a file could not be written."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{target} cannot be written: {error.strerror or error}. The checkpoint is not complete yet; what was fetched is kept. Make room on the "
            "disk, allow writing to the folder, or choose another one (FAT32 disks cannot hold its files of 5 GB), and download again."
        ) from error


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
