"""A hub on loopback: serves one folder as a model repository, in the way huggingface.co does, and can fail in the ways
it does.

Git-LFS files (weights) are answered with a redirect to another address, as the hub answers with one to its CDN.
"""

import hashlib
import json
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
_LFS = {".safetensors", ".model", ".bin", ".pt", ".png"}
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Request:
    """What came in. ``path`` is the file within the repository, or the address for any other request."""

    method: str
    path: str
    range: str | None


class HubServer:
    """``with HubServer(folder, repository) as hub``: ``hub.endpoint`` speaks the hub's API until the block ends.

    Set before a request: ``status[path] = [503, 503]`` answers the next two with that status; ``drop_after[path] =
    [1000]`` closes the next connection after so many bytes; ``corrupt`` holds paths whose first byte is sent wrong;
    ``delay`` is a pause in seconds after each 16 KB; ``ranges = False`` sends whole files whatever is asked for;
    ``api_body`` replaces the list of files; ``instead[path]`` is called with the handler and answers in its own way.
    ``path`` is a file's path, or "api".
    """

    def __init__(self, folder: Path, repository: str, extra: dict[str, bytes] | None = None):
        self.repository = repository
        self.files = {
            str(file.relative_to(folder).as_posix()): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        self.files |= extra or {}
        self.requests: list[Request] = []
        #: bytes of content sent, by path
        self.sent: Counter[str] = Counter()
        self.status: defaultdict[str, list[int]] = defaultdict(list)
        self.drop_after: defaultdict[str, list[int]] = defaultdict(list)
        self.corrupt: set[str] = set()
        self.delay = 0.0
        self.ranges = True
        self.api_body: bytes | None = None
        self.instead: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        #: set when the block ends, for answers that would not
        self.closing = threading.Event()

    def __enter__(self) -> "HubServer":
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fetched(self) -> list[Request]:
        """The requests for content."""
        return [request for request in self.requests if request.method == "GET" and request.path in self.files]

    def sha256(self, path: str) -> str:
        return hashlib.sha256(self.files[path]).hexdigest()

    def blob_id(self, path: str) -> str:
        """What git calls the content: of an LFS file, its pointer."""
        content = self.files[path]
        if is_lfs(path):
            lines = (
                "version https://git-lfs.github.com/spec/v1",
                f"oid sha256:{self.sha256(path)}",
                f"size {len(content)}",
            )
            content = "".join(f"{line}\n" for line in lines).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def model_info(self) -> dict:
        siblings = []
        for path, content in self.files.items():
            entry = {"rfilename": path, "size": len(content), "blobId": self.blob_id(path)}
            if is_lfs(path):
                entry["lfs"] = {"sha256": self.sha256(path), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {
            "_id": "0",
            "id": self.repository,
            "modelId": self.repository,
            "private": False,
            "sha": COMMIT,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self) -> list[dict]:
        entries = []
        for path, content in self.files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": self.blob_id(path)}
            if is_lfs(path):
                entry["lfs"] = {"oid": self.sha256(path), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries


def is_lfs(path: str) -> bool:
    return Path(path).suffix in _LFS


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that hangs up is part of the tests
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and content are two writes: with it each answer would take 40 ms

    def do_GET(self):
        address = unquote(urlsplit(self.path).path)
        address = address.replace("/resolve/main/", f"/resolve/{COMMIT}/")
        resolve, cdn, api = f"/{self.hub.repository}/resolve/{COMMIT}/", "/cdn/", f"/api/models/{self.hub.repository}"
        if address.startswith(resolve) and (path := address.removeprefix(resolve)) in self.hub.files:
            if is_lfs(path):
                self._redirect(path)
            else:
                self._content(path)
        elif address.startswith(cdn) and (path := address.removeprefix(cdn)) in self.hub.files:
            self._content(path)
        elif address in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._note(address)
            if not self._instead("api") and not self._fails("api"):
                self._json(self.hub.model_info() if self.hub.api_body is None else self.hub.api_body)
        elif address.startswith(f"{api}/tree/"):
            self._note(address)
            self._json(self.hub.tree())
        else:
            self._note(address)
            self._refuse(404, "EntryNotFound" if address.startswith(resolve) else "RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass

    def _note(self, path: str) -> None:
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))

    def _instead(self, key: str) -> bool:
        if key not in self.hub.instead:
            return False
        try:
            self.hub.instead[key](self)
        except (BrokenPipeError, ConnectionResetError):  # the client had enough
            pass
        self.close_connection = True
        return True

    def _fails(self, key: str) -> bool:
        if not self.hub.status[key]:
            return False
        self._refuse(self.hub.status[key].pop(0), "GatedRepo")
        return True

    def _refuse(self, status: int, code: str) -> None:
        body = json.dumps({"error": "refused"}).encode()
        self.send_response(status)
        if status < 500:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _json(self, value) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _redirect(self, path: str) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.hub.endpoint}/cdn/{path}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(self.hub.files[path])))
        self.send_header("X-Linked-Etag", f'"{self.hub.sha256(path)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _content(self, path: str) -> None:
        self._note(path)
        if self._instead(path) or self._fails(path):
            return
        content, start = self.hub.files[path], 0
        total = len(content)
        asked = self.headers.get("Range")
        if asked and self.hub.ranges:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        if path in self.hub.corrupt:
            content = bytes([content[0] ^ 0xFF]) + content[1:]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{self.hub.sha256(path) if is_lfs(path) else self.hub.blob_id(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        if self.command == "GET":
            self._send(path, content[start:])

    def _send(self, path: str, content: bytes) -> None:
        drop = self.hub.drop_after[path].pop(0) if self.hub.drop_after[path] else None
        try:
            for begin in range(0, len(content) if drop is None else drop, _BLOCK):
                block = content[begin : min(begin + _BLOCK, len(content) if drop is None else drop)]
                self.wfile.write(block)
                self.hub.sent[path] += len(block)
                time.sleep(self.hub.delay)
            if drop is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
        except (BrokenPipeError, ConnectionResetError):  # the client had enough
            self.close_connection = True
