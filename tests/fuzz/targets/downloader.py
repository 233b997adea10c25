"""8. The downloader against a hub on loopback that lies. Oracle: nothing is written outside the folder, and what ends
well is what was listed."""

import gzip
import hashlib
import itertools
import json
import os
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mutate import NAMES, dump, mutate_text, mutate_tree, odd, short

os.environ |= {
    "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    "HF_HUB_ETAG_TIMEOUT": "2",
    "NO_PROXY": "127.0.0.1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
NAME = "downloader"
PWNED = str(Path(tempfile.gettempdir()) / "FUZZ_PWNED")
REPOSITORY = "zai-org/CogVideoX1.5-5B"
API = f"/api/models/{REPOSITORY}"
FILES = {
    "model_index.json": b"{}", "transformer/config.json": json.dumps({"_class_name": "CogVideoXTransformer3DModel", "patch_size_t": 2}).encode(), "transformer/diffusion_pytorch_model.safetensors": b"w" * 40_000,
    "text_encoder/config.json": b"{}", "text_encoder/model.safetensors": b"t" * 3000, "tokenizer/spiece.model": b"s" * 500, "vae/config.json": b"{}", "vae/diffusion_pytorch_model.safetensors": b"v" * 70_000, "scheduler/scheduler_config.json": b"{}",
}  # fmt: skip
plan = {}


def _lfs(path):
    return path.endswith((".safetensors", ".model"))


def _listing():
    siblings = []
    for path, content in FILES.items():
        entry = {
            "rfilename": path,
            "size": len(content),
            "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        }
        if _lfs(path):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        siblings.append(entry)
    return {
        "_id": "0",
        "id": REPOSITORY,
        "modelId": REPOSITORY,
        "private": False,
        "sha": "c0ffee",
        "tags": [],
        "siblings": siblings,
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))}
            | {k.replace("_", "-"): v for k, v in headers.items()}
        ).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def endless(self, block=b" " * (1 << 16), pause=0.0, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        end = time.monotonic() + 15
        while time.monotonic() < end and not plan.get("stop"):
            self.wfile.write(block)
            time.sleep(pause)
        self.close_connection = True

    def do_GET(self):
        address = unquote(urlsplit(self.path).path)
        try:
            if address.startswith(API):
                plan["api"](self)
            else:
                path = next((path for path in FILES if address.endswith("/" + path)), None)
                plan["file"](self, path)
        except (BrokenPipeError, ConnectionResetError, ValueError, OSError):
            self.close_connection = True

    do_HEAD = do_POST = do_GET


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


def prepare(base):
    from huggingface_hub import HfApi, constants, get_session  # noqa: F401

    from cogvideox.checkpoint import download  # noqa: F401

    from . import common  # noqa: F401

    # Another target may have imported the client before the environment was set.
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = 2
    return {"base": base}


def in_child(state):
    from cogvideox.checkpoint import download, transfer

    transfer._RETRY_WAITS = (0, 0)
    download._REPORT_EVERY = 0
    server = _Server(("127.0.0.1", 0), _Handler)
    state["endpoint"] = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


def _good_file(handler, path):
    if path is None:
        return handler.answer(b"{}", 404)
    content, asked = FILES[path], handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
    handler.answer(
        content[start:],
        206 if asked else 200,
        Content_Type="application/octet-stream",
        **({"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}),
    )


STATUSES = (
    100,
    101,
    204,
    205,
    206,
    299,
    300,
    301,
    304,
    400,
    401,
    403,
    404,
    405,
    408,
    410,
    413,
    416,
    418,
    429,
    451,
    500,
    502,
    503,
    504,
    511,
    599,
    600,
    999,
)


def _api(rng, endpoint, said):
    kind = rng.choice(
        ("tree",) * 6
        + ("names",) * 5
        + ("sizes",) * 5
        + (
            "sums",
            "sums",
            "value",
            "text",
            "text",
            "status",
            "status",
            "redirect",
            "endless",
            "drip",
            "gzip bomb",
            "gzip",
            "close",
            "garbage",
            "sha",
        )
    )
    listing = _listing()
    said.append(f"api {kind}")
    if kind == "tree":
        listing, what = mutate_tree(rng, listing)
        said.append(what)
    elif kind == "names":
        for entry in rng.sample(listing["siblings"], rng.choice((1, 2, len(listing["siblings"])))):
            name = entry["rfilename"]
            new = rng.choice(
                (
                    "../" + name,
                    "../../canary/x.json",
                    PWNED,
                    "transformer/../../FUZZ.json",
                    "transformer/..",
                    "transformer/.json",
                    "transformer/...json",
                    "transformer\\..\\x.json",
                    "C:\\x.json",
                    "transformer/x\n.json",
                    "transformer/\x00.json",
                    "transformer/a/b.json",
                    "tokenizer/../../.." + PWNED,
                    "vae/" + "a" * 300 + ".json",
                    "vae/é.json",
                    "vae/\u202egnp.json",
                    "vae/CON.json",
                    "vae/nul.json",
                    "vae/config.json.",
                    "vae/config.json/",
                    "vae//config.json",
                    "vae/config.JSON",
                    name,
                    "model_index.json\n",
                    "vae/%2e%2e%2fx.json",
                    "scheduler/ .json",
                    *NAMES,
                )
            )
            if rng.random() < 0.5:
                listing["siblings"].append({**entry, "rfilename": new})
            else:
                entry["rfilename"] = new
            said.append(short(new))
    elif kind == "sizes":
        for entry in rng.sample(listing["siblings"], rng.choice((1, 2, 9))):
            size = rng.choice(
                (
                    0,
                    1,
                    -1,
                    10,
                    2**31,
                    2**40,
                    2**63,
                    2**70,
                    1.5,
                    "10",
                    None,
                    True,
                    [],
                    float("nan"),
                    float("inf"),
                    -(2**63),
                    10_000_000,
                )
            )
            entry["size"] = size
            if "lfs" in entry and rng.random() < 0.8:
                entry["lfs"]["size"] = size
            said.append(f"{entry['rfilename']} {short(size)}")
    elif kind == "sums":
        for entry in rng.sample(listing["siblings"], rng.choice((1, 2, 9))):
            value = rng.choice(
                (
                    "",
                    None,
                    3,
                    "../../x",
                    "a/b/c/d/e/f/g",
                    "\x00",
                    "é" * 20,
                    "0" * 64,
                    "a" * 1000,
                    [],
                    {},
                    True,
                    "*",
                    "[a]",
                    ".." * 6,
                )
            )
            entry["blobId"] = value
            if "lfs" in entry:
                entry["lfs"]["sha256"] = value
            said.append(f"{entry['rfilename']} sum {short(value)}")
    elif kind == "sha":
        listing["sha"] = rng.choice(
            ("../..", "", None, 3, "a b", "é", "\x00", "?x=1#y", "http://evil.example/", "a" * 5000, "%2e%2e", [], {})
        )
        said.append(short(listing["sha"]))
    elif kind == "value":
        value = odd(rng)
        key = rng.choice(
            (
                *listing,
                "gated",
                "cardData",
                "safetensors",
                "gguf",
                "createdAt",
                "lastModified",
                "inference",
                "transformersInfo",
                "tags",
            )
        )
        listing[key] = value
        said.append(f"{key}={short(value)}")
    body = dump(listing)
    if kind == "text":
        body, what = mutate_text(rng, body)
        said.append(what)
    if kind == "status":
        status = rng.choice(STATUSES)
        said.append(status)
        return lambda handler: handler.answer(
            rng.choice((b"", b"{}", b"<html>", body)),
            status,
            **(
                {
                    "X_Error_Code": "RepoNotFound",
                    "X_Error_Message": "\xe9" * 50,
                    "Retry_After": rng.choice(("0", "x", "-1")),
                }
            ),
        )
    if kind == "redirect":
        to = rng.choice(
            (
                API,
                API + "?x",
                "file:///etc/passwd",
                "http://127.0.0.1:1/",
                "//127.0.0.1:1/",
                "gopher://x",
                "",
                "http://[::1",
                "\xe9",
                "http://" + "a" * 3000,
                "data:text/plain,{}",
            )
        )
        said.append(to[:60])
        return lambda handler: handler.answer(b"", 302, Location=to)
    if kind == "endless":
        return lambda handler: handler.endless()
    if kind == "drip":
        return lambda handler: handler.endless(b" ", 0.3)
    if kind == "gzip bomb":
        bomb = gzip.compress(b" " * 300_000_000, 9)
        return lambda handler: handler.answer(bomb, Content_Encoding="gzip")
    if kind == "gzip":
        return lambda handler: handler.answer(body, Content_Encoding=rng.choice(("gzip", "br", "deflate", "zstd", "x")))
    if kind == "close":

        def close(handler):
            handler.wfile.write(rng.choice((b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")))
            handler.close_connection = True

        return close
    if kind == "garbage":
        junk = rng.choice(
            (
                rng.randbytes(500),
                b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
                b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
                b"HTTP/1.1 200 OK\r\n" + b"A: " + b"b" * 200_000 + b"\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
                b"HTTP/9.9 abc\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\n{}",
            )
        )

        def garbage(handler):
            handler.wfile.write(junk)
            handler.close_connection = True

        return garbage
    return lambda handler: handler.answer(body)


def _file(rng, said):
    kind = rng.choice(
        (
            "html",
            "longer",
            "endless",
            "shorter",
            "length",
            "wrong",
            "gzip",
            "gzip bomb",
            "206",
            "range",
            "status",
            "loop",
            "elsewhere",
            "close",
            "drip",
            "garbage",
            "empty",
        )
    )
    victim = rng.choice([None, *FILES])
    said.append(f"file {kind} of {victim}")

    def answer(handler, path):
        if path is None or (victim is not None and path != victim):
            return _good_file(handler, path)
        content = FILES[path]
        if kind == "html":
            handler.answer(b"<html>Log in</html>", Content_Type="text/html")
        elif kind == "longer":
            handler.answer(content + b"x" * 100_000)
        elif kind == "endless":
            handler.endless(b"x" * 65536, kind="application/octet-stream")
        elif kind == "shorter":
            handler.answer(content[: len(content) // 2])
        elif kind == "length":
            handler.answer(
                content, Content_Length=rng.choice((str(len(content) + 10), "0", "-1", "1", None, str(2**63)))
            )
            handler.close_connection = True
        elif kind == "wrong":
            handler.answer(b"z" * len(content))
        elif kind == "gzip":
            handler.answer(gzip.compress(content), Content_Encoding="gzip")
        elif kind == "gzip bomb":
            handler.answer(gzip.compress(b"\0" * 200_000_000, 1), Content_Encoding="gzip")
        elif kind == "206":
            handler.answer(content, 206)
        elif kind == "range":
            handler.answer(
                content[5:], 206, Content_Range=rng.choice(("bytes 5-9/10", "bytes */3", "x", "bytes 99999999-1/2"))
            )
        elif kind == "status":
            handler.answer(b"", rng.choice(STATUSES))
        elif kind == "loop":
            handler.answer(b"", 302, Location=handler.path)
        elif kind == "elsewhere":
            handler.answer(
                b"",
                302,
                Location=rng.choice(
                    ("file:///etc/passwd", "http://127.0.0.1:1/", "ftp://127.0.0.1/", "http://[", "", "//")
                ),
            )
        elif kind == "drip":
            handler.endless(b"x", 0.2, "application/octet-stream")
        elif kind == "garbage":
            handler.wfile.write(rng.randbytes(300))
            handler.close_connection = True
        elif kind == "empty":
            handler.answer(b"")
        else:
            handler.close_connection = True

    return answer


def case(state, rng, folder):
    said = []
    plan.clear()
    both = rng.random()
    plan["api"] = _api(rng, state["endpoint"], said) if both < 0.7 else lambda handler: handler.answer(dump(_listing()))
    plan["file"] = _file(rng, said) if both > 0.65 else _good_file
    target = folder / "models"
    if rng.random() < 0.15:
        # What is there already.
        said.append("with things in the place")
        here = target / "CogVideoX1.5-5B"
        here.mkdir(parents=True)
        what = rng.choice(("link out", "folder for a file", "loop", "file for a folder", "part is a folder"))
        said.append(what)
        if what == "link out":
            (here / "vae").symlink_to(Path(tempfile.gettempdir()) / "fuzz-elsewhere")
        elif what == "folder for a file":
            (here / "model_index.json").mkdir()
        elif what == "loop":
            (here / "vae").symlink_to("vae")
        elif what == "file for a folder":
            (here / "vae").write_text("x")
        else:
            digest = hashlib.sha256(FILES["vae/diffusion_pytorch_model.safetensors"]).hexdigest()[:12]
            (here / "vae" / f"diffusion_pytorch_model.safetensors.{digest}.part").mkdir(parents=True)

    def act():
        from cogvideox.checkpoint.download import download_checkpoint

        calls = []
        try:
            done = download_checkpoint("t2v", target, lambda got, total: calls.append((got, total)), state["endpoint"])
        finally:
            plan["stop"] = True
        if calls and (calls[-1][0] != calls[-1][1] or any(a[0] > b[0] for a, b in itertools.pairwise(calls))):
            return f"progress: ends at {calls[-1]}"
        left = [path for path in target.rglob("*.part") if path.is_file()]
        if left:
            return f"parts are left: {left[:2]}"
        for path, content in FILES.items():
            if (done / path).is_file() and (done / path).read_bytes() != content:
                return f"a file is not what the hub has: {path} by its listing"
        return None

    return " ".join(map(str, said)), act
