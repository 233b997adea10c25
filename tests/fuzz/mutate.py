"""Mutations of bytes, JSON trees, text and places in a file system, all driven by one ``random.Random``."""

import copy
import json
import os
from pathlib import Path

#: In place of these texts ``dump`` writes what ``json`` cannot.
_DEEP, _LONG_NUMBER = "@@DEEP@@", "@@LONGNUMBER@@"
ODD = [
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, -0.5, 1.5, 1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", " ", "abc", "1", "0.7", "true", "None", "\x00", "../../canary/secret.safetensors", "/etc/passwd",
    "\ud800", "\u202e\u0645", "\ufeff", "a" * 20_000, [], {}, [[]], [None], [1, "a", None], {"a": None}, {"": {}}, [[[[[[1]]]]]], [0] * 1000, _DEEP, _LONG_NUMBER,
]  # fmt: skip
NAMES = [
    "",
    " ",
    ".",
    "..",
    "../../etc/passwd",
    "a/b",
    "\x00",
    "\ud800",
    "\u202e",
    "é",
    "ｗｅｉｇｈｔ",
    "a" * 5000,
    "__metadata__",
    "__class__",
    "__proto__",
    "%s%n{0}",
    "\n",
    "self",
]


def odd(rng):
    return copy.deepcopy(rng.choice(ODD))


def places(tree, path=()):
    """Every place in a tree of dicts and lists, as (container, key)."""
    found = []
    todo = [tree]
    while todo:
        here = todo.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, value in items:
            found.append((here, key))
            todo.append(value)
    return found


def mutate_tree(rng, tree, times=None):
    """A tree with one to three places changed, and what was done."""
    tree, said = copy.deepcopy(tree), []
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        there = places(tree)
        if not there or rng.random() < 0.02:
            tree = odd(rng)
            said.append(f"all={short(tree)}")
            continue
        here, key = rng.choice(there)
        what = rng.random()
        if what < 0.5:
            here[key] = odd(rng)
            said.append(f"{key!r}={short(here[key])}")
        elif what < 0.65:
            del here[key]
            said.append(f"del {key!r}")
        elif what < 0.75 and isinstance(here, dict):
            new = rng.choice(NAMES)
            here[new] = here.pop(key)
            said.append(f"{short(key)} called {short(new)}")
        elif what < 0.85:
            other_here, other_key = rng.choice(there)
            try:
                here[key], other_here[other_key] = other_here[other_key], here[key]
                json.dumps(tree)
            except (KeyError, IndexError, TypeError, ValueError, RecursionError):
                here[key] = None
            said.append(f"swapped {short(key)}, {short(other_key)}")
        elif what < 0.93:
            value = here[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                here[key] = [value] if rng.random() < 0.5 else {"0": value}
            else:
                here[key] = rng.choice(
                    (
                        lambda v: -v,
                        lambda v: v + 1,
                        lambda v: v * 2,
                        lambda v: v * 1000,
                        lambda v: v // 3,
                        lambda v: v + 0.5 if abs(v) < 1e300 else v,
                        str,
                        lambda v: [v],
                    )
                )(value)
            said.append(f"{short(key)} near {short(here[key])}")
        else:
            if isinstance(here, list):
                here.append(copy.deepcopy(here[key]))
            else:
                here[rng.choice(NAMES)] = copy.deepcopy(here[key])
            said.append(f"again {short(key)}")
    return tree, "; ".join(said)


def short(value) -> str:
    try:
        text = repr(value)
    except ValueError:
        text = "a long number"
    return text if len(text) < 60 else text[:50] + "…"


def dump(tree, indent=None) -> bytes:
    text = json.dumps(tree, indent=indent)
    text = text.replace(json.dumps(_DEEP), "[" * 50_000 + "]" * 50_000).replace(json.dumps(_LONG_NUMBER), "9" * 6000)
    return text.encode("utf-8", "surrogatepass")


def mutate_text(rng, data: bytes) -> tuple[bytes, str]:
    """Changes of a text as a whole."""
    kind = rng.choice(
        (
            "bom",
            "crlf",
            "utf16",
            "latin",
            "comment",
            "garbage",
            "double",
            "duplicate",
            "cut",
            "null",
            "html",
            "empty",
            "spaces",
        )
    )
    if rng.random() < 0.01:
        kind = "open"
    if kind == "bom":
        return b"\xef\xbb\xbf" + data, kind
    if kind == "crlf":
        return data.replace(b"\n", b"\r\n"), kind
    if kind == "utf16":
        return data.decode("utf-8", "replace").encode("utf-16"), kind
    if kind == "latin":
        place = rng.randrange(len(data) + 1)
        return data[:place] + b"\xe9\xff" + data[place:], kind
    if kind == "comment":
        return b"// a comment\n" + data, kind
    if kind == "garbage":
        return data + b"garbage", kind
    if kind == "double":
        return data + data, kind
    if kind == "duplicate":
        return data.replace(b"{", b'{"a": 1, "a": 2, ', 1), kind
    if kind == "cut":
        return data[: rng.randrange(len(data) + 1)], kind
    if kind == "null":
        return b"\x00" * len(data), kind
    if kind == "html":
        return b"<!doctype html><html><body>Log in</body></html>", kind
    if kind == "spaces":
        return b" " * 100_000 + data, kind
    if kind == "open":
        return b"[" * 200_000, kind
    return b"", kind


def mutate_bytes(rng, data: bytes, head: int | None = None) -> tuple[bytes, str]:
    """Changes of bytes, mostly in the first ``head``."""
    data = bytearray(data)
    reach = min(len(data), head or len(data))
    if rng.random() < 0.1:
        reach = len(data)
    kind = rng.choice(
        ("flip", "flip", "flips", "bits", "cut", "insert", "delete", "repeat", "zero", "ones", "int", "append")
    )
    at = rng.randrange(max(1, reach))
    if kind == "flip" and data:
        data[at % len(data)] = rng.randrange(256)
    elif kind == "flips" and data:
        for _ in range(rng.randrange(2, 40)):
            data[rng.randrange(reach)] = rng.randrange(256)
    elif kind == "bits" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif kind == "delete":
        del data[at : at + rng.randrange(1, 64)]
    elif kind == "repeat":
        data[at:at] = data[at : at + rng.randrange(1, 400)]
    elif kind in ("zero", "ones"):
        size = min(rng.randrange(1, 64), len(data) - at)
        data[at : at + size] = (b"\x00" if kind == "zero" else b"\xff") * size
    elif kind == "int" and len(data) > 8:
        size = rng.choice((4, 8))
        at = rng.randrange(max(1, min(reach, len(data) - 8)))
        value = rng.choice(
            (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 100_000_000, 10**9, 10**12, 2**61)
        ) % 2 ** (8 * size)
        data[at : at + size] = value.to_bytes(size, "little")
    else:
        data += rng.randbytes(rng.randrange(1, 5000))
    return bytes(data), f"{kind} at {at}"


def replace_by(rng, path: Path) -> str:
    """Another thing than a file where one is expected."""
    kind = rng.choice(
        ("gone", "folder", "full folder", "loop", "dangling", "empty", "itself in a folder", "canary", "socket")
    )
    if rng.random() < 0.03:
        kind = rng.choice(("fifo", "zero device"))
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        return "left"
    if kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "zero device":
        path.symlink_to("/dev/zero")
    elif kind == "itself in a folder":
        path.symlink_to(path.parent)
    elif kind == "canary":
        path.symlink_to("/etc/hostname")
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as s:
            try:
                s.bind(str(path)[-100:] if len(str(path)) > 100 else str(path))
            except OSError:
                path.mkdir()
    return f"{path.name} is {kind}"


def mirror(source: Path, target: Path) -> Path:
    """A folder of links to the files of another, any of which may be replaced."""
    for folder, _, files in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        for file in files:
            (here / file).symlink_to(Path(folder) / file)
    return target


def put(path: Path, data: bytes) -> None:
    """Write a file in the place of a link, and not through it."""
    if path.is_dir() and not path.is_symlink():
        return
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(data)
