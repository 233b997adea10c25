"""Fetch a checkpoint in diffusers layout from huggingface.co: only the files it needs, checked, and going on where an
earlier call stopped.

Addresses, tokens and the HTTP session are huggingface_hub's. The bytes are read here and not by its
``hf_hub_download``, for three
reasons: since 1.20 or so that deletes what an interrupted call fetched, and a shard is 5 GB; older versions show their
progress only to a second thread, which a cancel cannot stop; and none of them checks the SHA-256. The listing is read
here too, as its own reads an answer without end.

Whatever answers may be no hub: everything is read with bounds on bytes and on time, in a thread of its own, so that a
cancel is heard while a name is looked up, a connection is made or a byte is waited for.
"""

import hashlib
import logging
import os
import queue
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from ..files import MAX_TEXT, parse_json
from ..words import reason, short
from .layout import is_checkpoint

logger = logging.getLogger(__name__)

#: what to call it -> the repository that holds it. Each is about 31 GB.
REPOSITORIES = {"t2v": "zai-org/CogVideoX1.5-5B", "i2v": "zai-org/CogVideoX1.5-5B-I2V"}
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
#: Bytes that stay free on the disk: a full one stops other programs too.
_SPARE = 10**9
#: Bytes read at a time: small enough that a cancel is noticed at once on a slow line.
_BLOCK = 1 << 16
#: Bytes a second below which it is given up, over so many seconds of waiting, where some come; a listing, of a few KB,
#: has to be there by then. Where none come, the client's own timeout ends it (HF_HUB_DOWNLOAD_TIMEOUT, 10 s), or this,
#: in so many of its lengths.
_SLOWEST, _WATCHED, _PATIENCE = 1000, 8.0, 3
#: Seconds between two looks for a cancel while nothing comes.
_LOOK_EVERY = 0.5
#: From one address to another, in a row.
_REDIRECTS = 10
#: Seconds between two calls of on_progress.
_REPORT_EVERY = 0.1
#: Seconds before each new try when nothing more arrives; the count begins anew when the file got longer.
_RETRY_WAITS = (1, 2, 5, 10, 20)
#: Seconds that a hub may ask to wait (Retry-After) and the download does.
_LONGEST_WAIT = 120
#: HTTP states that pass: too slow, too many requests, and the server's own troubles.
_PASSING = {408, 429, 500, 502, 503, 504}


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
        RuntimeError: if the hub cannot be reached or refuses, the disk is too small or cannot be written, or a file
            arrives damaged.
    """
    target, repository = checkpoint_folder(which, folder), REPOSITORIES[which]
    with _disk_errors(target):
        for place in (target, *target.parents):
            if place.exists() and not place.is_dir():
                raise ValueError(
                    f"{short(place, 400)} is a file, so no folder for {repository} can be made there. Choose another "
                    "folder, or move the file away."
                )

    with _client_errors():
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        hub = (endpoint or constants.ENDPOINT).rstrip("/")
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    source = _Hub(repository, hub, headers)
    revision, files = _list_files(source, (lambda: None) if on_progress is None else partial(on_progress, 0, 1))
    with _disk_errors(target):
        missing = [file for file in files if not _is_there(file, target / file.path)]
        if missing:
            _check_space(repository, missing, target)
    total = sum(file.size for file in files)
    report = _Report(on_progress, total, before=total - sum(file.size for file in missing))
    report(0)
    for file in missing:
        logger.info("fetching %s of %s (%s)", file.path, repository, _bytes(file.size))
        url = hf_hub_url(repository, file.path, revision=revision, endpoint=hub)
        _fetch(file, target / file.path, partial(_receive, source, url, file.size, report), report)
        report.before += file.size
    if not is_checkpoint(target):
        raise RuntimeError(
            f"{short(target, 400)} is complete, but its transformer/config.json describes no CogVideoX model, so it "
            f"cannot be loaded. {short(hub, 200)} may be a mirror that serves something else as {repository}: unset "
            "HF_ENDPOINT and download again."
        )
    return target


@dataclass(frozen=True)
class _Hub:
    """Where a repository is, and what it is asked with."""

    repository: str
    address: str
    headers: Mapping[str, str]

    def broken(self, why: str) -> str:
        return (
            f"The connection to {short(self.address, 200)} failed ({why}), so {self.repository} is not complete yet; "
            "what was fetched is kept. Check the network (a proxy, a firewall, HF_ENDPOINT) and download again: it "
            "goes on where it stopped."
        )

    def refusal(self, status: int, wait: float | None) -> RuntimeError:
        hub = short(self.address, 200)
        if status in (401, 403):
            return RuntimeError(
                f"{hub} refuses {self.repository} with status {status}: it wants a login, or your token does not "
                f"allow this repository. Without access nothing more can be downloaded. Open {hub}/{self.repository} "
                "in a browser, accept its terms if it asks, and log in with `hf auth login` or set HF_TOKEN."
            )
        if status == 404:
            return RuntimeError(
                f"{hub} has no {self.repository}, or a file of it is gone (status 404), so the checkpoint cannot be "
                "completed. If HF_ENDPOINT is set, the mirror may lack it: unset it. Otherwise download again; the "
                "files fetched so far are kept."
            )
        later = "later" if wait is None else f"in {wait:.0f} seconds, as it asks,"
        text = (
            f"{hub} answers status {status} for {self.repository}, so it is not complete yet; what was fetched is "
            f"kept. The hub may be busy or in trouble: download again {later} and it goes on where it stopped."
        )
        return (
            _PassingError(text, wait or 0)
            if status in _PASSING and (wait or 0) <= _LONGEST_WAIT
            else RuntimeError(text)
        )

    def slow(self) -> RuntimeError:
        return RuntimeError(
            f"{short(self.address, 200)} sends less than {_SLOWEST} bytes a second, so {self.repository} would take "
            "years; what was fetched is kept. Check the network (a proxy, a firewall, HF_ENDPOINT) and download "
            "again: it goes on where it stopped."
        )


def _list_files(hub: _Hub, on_wait: Callable[[], None]) -> tuple[str, list[RemoteFile]]:
    """The repository's commit and the files a checkpoint needs, the one that makes it known as a checkpoint last."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(
            f"HF_HUB_OFFLINE is set, so {hub.repository} cannot be downloaded: it forbids huggingface_hub every "
            "connection. Unset it and start again, or copy the checkpoint's folder here from another computer."
        )
    body = bytearray()
    with closing(
        _read(hub, f"{hub.address}/api/models/{hub.repository}?blobs=true", on_wait, at_once=True)
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
    place = next((path for path in (target.absolute(), *target.absolute().parents) if path.is_dir()), None)
    if place is None:
        raise RuntimeError(
            f"There is no {short(target.anchor)} for {short(target, 400)}, so nothing can be downloaded there. Choose "
            "another folder."
        )
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE:
        raise RuntimeError(
            f"{repository} needs {_bytes(needed)} more in {short(target, 400)} and {_bytes(_SPARE)} to spare, but the "
            f"disk with {short(place, 400)} has only {_bytes(free)} free. A full disk would stop the download "
            "halfway, and other programs with it, so nothing was fetched. Make room, or choose a folder on another "
            "disk."
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


def _receive(
    hub: _Hub, url: str, size: int, on_wait: Callable[[int], None], start: int
) -> Generator[tuple[int, bytes], None, None]:
    """A file's bytes from ``start`` on, as ``(position, block)``, over as many connections as it takes.

    Position 0 out of turn means that the server sends the whole file though only the rest was asked for. ``on_wait`` is
    called with the position again and again while a connection, or what it brings, is waited for.
    """
    waits, furthest = iter(_RETRY_WAITS), start
    while start < size:
        failure: _PassingError | None = None
        try:
            with closing(_read(hub, url, partial(on_wait, start), start)) as arriving:
                for position, block in arriving:
                    start = position + len(block)
                    yield position, block
                    if start > size:
                        return
        except _PassingError as error:
            failure = error
        if start == size:
            return
        if start - furthest >= _BLOCK:
            waits, furthest = iter(_RETRY_WAITS), start
        next_wait = next(waits, None)
        if next_wait is None:
            raise failure or _PassingError(hub.broken(f"{short(url, 400)} ended after {start} of {size} bytes"))
        wait = max(next_wait, failure.wait if failure else 0)
        cause = "no reason given" if failure is None else reason(failure.__cause__ or failure)
        logger.warning(
            "%s broke off at %d of %d bytes; going on in %g s (%s)", short(url, 400), start, size, wait, cause
        )
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            on_wait(start)
            time.sleep(min(left, 0.2))


def _read(
    hub: _Hub, url: str, on_wait: Callable[[], None], start: int = 0, at_once: bool = False
) -> Generator[tuple[int, bytes], None, None]:
    """What an address answers, from byte ``start`` on or from the first, as ``(position, block)``.

    Args:
        on_wait: called twice a second while nothing comes; what it raises ends the reading.
        at_once: whether all of it has to come in the time in which otherwise some has.

    Raises:
        _PassingError: if the connection fails, or the hub says that it is busy.
        RuntimeError: if it refuses, or is slower than is of use.
    """
    with _client_errors():
        from huggingface_hub import constants, get_session

        session, timeout = get_session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    headers = dict(hub.headers) | ({"Range": f"bytes={start}-"} if start else {})
    patience, waited, came, position, looked = _PATIENCE * timeout, 0.0, 0, -1, time.monotonic()
    with closing(_apart(partial(_transfer, session, url, headers, timeout))) as arriving:
        for item, seconds in arriving:
            waited += seconds
            if isinstance(item, BaseException):
                raise _PassingError(hub.broken(reason(item))) from item
            if isinstance(item, _Answer):
                if item.status not in (200, 206):
                    raise hub.refusal(item.status, item.wait)
                position = 0 if item.status == 200 else item.start(start)
                if position not in (0, start):
                    raise _PassingError(hub.broken(f"asked for the bytes from {start} on, it sends others"))
            elif item:
                yield position, item
                position, came = position + len(item), came + len(item)
            if waited > (min(_WATCHED, patience) if came else patience):
                if at_once or came < _SLOWEST * waited:
                    raise hub.slow()
                waited, came = 0.0, 0
            if (now := time.monotonic()) - looked >= _LOOK_EVERY:
                looked = now
                on_wait()


@dataclass(frozen=True)
class _Answer:
    """The head of an answer."""

    status: int
    headers: Mapping[str, str]

    def start(self, asked: int) -> int:
        """Where a part begins in the whole."""
        found = re.match(r"bytes (\d{1,18})-", self.headers.get("content-range") or "")
        return int(found[1]) if found else asked

    @property
    def wait(self) -> float | None:
        """Seconds after which to ask again; None where it does not say."""
        said = (self.headers.get("retry-after") or "").strip()
        if re.fullmatch(r"\d{1,9}", said, re.ASCII):
            return float(said)
        try:
            return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            return None


def _transfer(
    session: Any, url: str, headers: Mapping[str, str], timeout: float
) -> Generator[_Answer | bytes, None, None]:
    """GET, with requests (huggingface_hub before 1.0) or httpx (since): the head of the answer, then its bytes as they
    come.

    Redirects are followed here, as both libraries read what comes with one to its end, should it have one.
    """
    is_httpx = callable(getattr(session, "stream", None))  # requests has a flag of that name
    for _ in range(_REDIRECTS + 1):
        if is_httpx:
            opened = session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False)
        else:
            opened = session.get(url, headers=headers, timeout=timeout, stream=True, hooks={"response": _hide_redirect})
        with opened as response:
            place = response.headers.get("location") or response.headers.get(_HIDDEN)
            place = place if response.status_code in (301, 302, 303, 307, 308) else None
            if not place:
                yield _Answer(response.status_code, response.headers)
                yield from _decoded(
                    response.iter_raw() if is_httpx else _raw(response.raw), response.headers.get("content-encoding")
                )
                return
        old, url = urlsplit(url), urljoin(url, place)
        new = urlsplit(url)
        if new.scheme not in ("http", "https"):
            raise ValueError(f"it redirects to {short(url, 200)}")
        if (new.scheme, new.netloc) != (old.scheme, old.netloc):
            # A token is for the hub alone.
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    raise ValueError(f"it redirects more than {_REDIRECTS} times")


_HIDDEN = "x-hidden-location"


def _hide_redirect(response: Any, *_, **__) -> None:
    """Keep requests from following a redirect: it would read what comes with it even where it is told not to."""
    if place := response.headers.pop("location", None):
        response.headers[_HIDDEN] = place


def _raw(response: Any) -> Iterator[bytes]:
    """The bytes of an answer of urllib3, as they come where it can tell (since 2.0)."""
    if hasattr(response, "read1"):
        return iter(partial(response.read1, _BLOCK, decode_content=False), b"")
    return response.stream(_BLOCK, decode_content=False)


def _decoded(blocks: Iterable[bytes], encoding: str | None) -> Iterator[bytes]:
    """The content of an answer. Nothing encoded is asked for, but a proxy may do so all the same; it is taken in
    pieces, however long it gets."""
    encoding = (encoding or "identity").strip().lower()
    if encoding == "identity":
        yield from blocks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"it sends {short(encoding)}, which was not asked for")
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)
    for block in blocks:
        while block and not unpacking.eof:
            yield unpacking.decompress(block, _BLOCK)
            block = unpacking.unconsumed_tail
        if unpacking.eof:
            return
    yield unpacking.flush()


_T = TypeVar("_T")


def _apart(
    make: Callable[[], Generator[_T, None, None]],
) -> Generator[tuple[_T | BaseException | None, float], None, None]:
    """What an iterator gives, or raises, made in a thread of its own, each with the seconds it was waited for; None
    while nothing comes.

    Closing it ends the thread at the next that comes, or at the client's timeout; nobody waits for that.
    """
    arrived: queue.Queue = queue.Queue(4)
    left, end = threading.Event(), object()

    def give(item: Any) -> bool:
        while not left.is_set():
            try:
                arrived.put(item, timeout=_LOOK_EVERY)
                return True
            except queue.Full:
                pass
        return False

    def work() -> None:
        try:
            with closing(make()) as items:
                for item in items:
                    if not give(item):
                        return
            give(end)
        except BaseException as error:
            # Only the client runs here, and what it raises is told by who reads: the exceptions of three libraries, and
            # of Python's own beneath.
            give(error)

    threading.Thread(target=work, name="download", daemon=True).start()
    try:
        while True:
            begun = time.monotonic()
            try:
                item = arrived.get(timeout=_LOOK_EVERY)
            except queue.Empty:
                item = None
            if item is end:
                return
            yield item, time.monotonic() - begun
    finally:
        left.set()


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
    """Trouble that may be over at the next try, ``wait`` seconds from now at the earliest."""

    def __init__(self, text: str, wait: float = 0):
        super().__init__(text)
        self.wait = wait


@contextmanager
def _client_errors() -> Iterator[None]:
    """Say in a sentence why huggingface_hub cannot be set up: what its settings may be wrong in is as many
    exceptions."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"huggingface_hub cannot be used ({reason(error)}), so nothing can be downloaded. Look at the settings it "
            "reads: HF_ENDPOINT, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT, HTTP_PROXY and HTTPS_PROXY; or install it anew."
        ) from error


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Say in a sentence why a file could not be written."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{short(target, 400)} cannot be written: {error.strerror or reason(error)}. The checkpoint is not "
            "complete yet; what was fetched is kept. Make room on the disk, allow writing to the folder, or choose "
            "another one (FAT32 disks cannot hold its files of 5 GB), and download again."
        ) from error


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
