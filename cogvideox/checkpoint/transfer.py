"""Ask a hub over HTTP: what an address answers, in blocks, over as many connections as it takes.

Addresses, tokens and the HTTP session are huggingface_hub's. Whatever answers may be no hub: everything is read with
bounds on bytes and on time, in a thread of its own, so that a cancel is heard while a name is looked up, a connection
is made or a byte is waited for.
"""

import logging
import queue
import re
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from ..words import reason, short

logger = logging.getLogger(__name__)

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
#: Seconds before each new try when nothing more arrives; the count begins anew when the file got longer.
_RETRY_WAITS = (1, 2, 5, 10, 20)
#: Seconds that a hub may ask to wait (Retry-After) and the download does.
_LONGEST_WAIT = 120
#: HTTP states that pass: too slow, too many requests, and the server's own troubles.
_PASSING = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Hub:
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


def receive(
    hub: Hub, url: str, size: int, on_wait: Callable[[int], None], start: int
) -> Generator[tuple[int, bytes], None, None]:
    """A file's bytes from ``start`` on, as ``(position, block)``, over as many connections as it takes.

    Position 0 out of turn means that the server sends the whole file though only the rest was asked for. ``on_wait`` is
    called with the position again and again while a connection, or what it brings, is waited for.
    """
    waits, furthest = iter(_RETRY_WAITS), start
    while start < size:
        failure: _PassingError | None = None
        try:
            with closing(read_answer(hub, url, partial(on_wait, start), start)) as arriving:
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


def read_answer(
    hub: Hub, url: str, on_wait: Callable[[], None], start: int = 0, at_once: bool = False
) -> Generator[tuple[int, bytes], None, None]:
    """What an address answers, from byte ``start`` on or from the first, as ``(position, block)``.

    Args:
        on_wait: called twice a second while nothing comes; what it raises ends the reading.
        at_once: whether all of it has to come in the time in which otherwise some has.

    Raises:
        _PassingError: if the connection fails, or the hub says that it is busy.
        RuntimeError: if it refuses, or is slower than is of use.
    """
    with client_errors():
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
            if waited > (min(_WATCHED, patience) if came or at_once else patience):
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


class _PassingError(RuntimeError):
    """Trouble that may be over at the next try, ``wait`` seconds from now at the earliest."""

    def __init__(self, text: str, wait: float = 0):
        super().__init__(text)
        self.wait = wait


@contextmanager
def client_errors() -> Iterator[None]:
    """Say in a sentence why huggingface_hub cannot be set up: what its settings may be wrong in is as many
    exceptions."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"huggingface_hub cannot be used ({reason(error)}), so nothing can be downloaded. Look at the settings it "
            "reads: HF_ENDPOINT, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT, HTTP_PROXY and HTTPS_PROXY; or install it anew."
        ) from error
