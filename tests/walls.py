"""The walls of ARCHITECTURE.md, read from the imports: ``python -m tests.walls`` prints the floors, and ends with
status 1 where one is crossed.

What is read is the source (``ast``), nothing is imported. ``TYPE_CHECKING`` imports count, as what a file knows is what
its reader has to know.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The floors from the ground up: name -> what is on it, as files or folders of the tree. Imports go down, or along a
#: floor without a circle.
FLOORS: dict[str, tuple[str, ...]] = {
    "ground": tuple(
        f"cogvideox/{name}.py"
        for name in (
            "words",
            "choices",
            "dtypes",
            "events",
            "files",
            "dependencies",
            "variants",
            "geometry",
            "finite",
            "out_of_memory",
            "languages",
            "tensors",
            "combinations",
            "windows",
        )
    ),
    "frames": tuple(
        f"cogvideox/{name}.py"
        for name in (
            "black_frames",
            "contact_sheet",
            "pictures",
            "preview",
            "media",
            "image_files",
            "frame_pixels",
            "clip_files",
            "going_on",
            "pieces",
            "video",
        )
    ),
    "modules": ("cogvideox/modules",),
    "checkpoint": ("cogvideox/checkpoint",),
    "precision": ("cogvideox/precision",),
    "a part in memory": tuple(
        f"cogvideox/{name}.py" for name in ("loading", "weights", "lora", "handles", "memory", "sentinel", "sharing")
    ),
    "a run": tuple(
        f"cogvideox/{name}.py"
        for name in (
            "text",
            "requests",
            "schedulers",
            "skips",
            "conditioning",
            "second",
            "sampling",
            "vae",
            "super_resolution",
            "warped_noise",
        )
    ),
    "interop": ("interop",),
    "nodes/host": ("nodes/host",),
    "surface": ("nodes", "commands", "generate.py", "install.py", "__init__.py"),
}
#: Where ComfyUI may be imported, and its modules.
HOST = "nodes/host/"
COMFYUI = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "server",
    "execution",
    "latent_preview",
    "nodes",
    "app",
    "node_helpers",
)
#: Packages that ComfyUI's start must not pay for.
HEAVY = ("diffusers", "transformers", "accelerate", "peft")
#: The one file that may touch private attributes of other libraries.
INTERNALS = "cogvideox/modules/internals.py"


@cache
def sources() -> dict[str, ast.Module]:
    """Every shipped Python file by its path in the tree, parsed."""
    found = [
        *ROOT.glob("*.py"),
        *(path for top in ("cogvideox", "interop", "nodes", "commands") for path in (ROOT / top).rglob("*.py")),
    ]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(found)}


def floor_of(file: str) -> int | None:
    """The number of a file's floor; None if it stands on none. The longest place that fits counts."""
    fits = [
        (len(place), number)
        for number, places in enumerate(FLOORS.values())
        for place in places
        if file == place or file.startswith(f"{place}/")
    ]
    return max(fits)[1] if fits else None


def imports(file: str) -> Iterator[tuple[str, int, bool]]:
    """What a file imports: (a file of the tree or the name of a module of others, line, whether when it is imported
    itself)."""
    for parts, name, line, inside in _statements(sources()[file], tuple(file.split("/")[:-1])):
        yield _place(parts, name) or ".".join(parts), line, inside


@cache
def _statements(
    tree: ast.Module, package: tuple[str, ...]
) -> tuple[tuple[tuple[str, ...], str | None, int, bool], ...]:
    """The imports of a parsed file, a name each: (module, name, line, whether when it is imported itself)."""

    def walk(node: ast.AST, at_start: bool) -> Iterator[tuple[tuple[str, ...], str | None, int, bool]]:
        for child in ast.iter_child_nodes(node):
            inside = at_start and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and child in node.body:
                inside = False
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield tuple(alias.name.split(".")), None, child.lineno, inside
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                parts = (*base, *(child.module.split(".") if child.module else ()))
                for alias in child.names:
                    yield parts, alias.name, child.lineno, inside
            else:
                yield from walk(child, inside)

    return list(walk(tree, True))


def _place(parts: Sequence[str], name: str | None) -> str | None:
    """The file of the tree that ``from parts import name`` reads."""
    base = "/".join(parts)
    options = [f"{base}/{name}.py", f"{base}/{name}/__init__.py"] if name and base else [f"{name}.py"] if name else []
    options += [f"{base}.py", f"{base}/__init__.py"] if base else []
    return next((option for option in options if option in sources()), None)


def arrows() -> dict[str, dict[str, int]]:
    """file -> the files of the tree that it imports, and in which line first."""
    return {
        file: {
            target: line for target, line, _ in reversed(list(imports(file))) if target in sources() and target != file
        }
        for file in sources()
    }


def broken() -> list[str]:
    """Every wall that is crossed, a line each."""
    return [*_unplaced(), *_upward(), *_circles(), *_comfyui(), *_heavy(), *_private()]


def _unplaced() -> Iterator[str]:
    for file in sources():
        if floor_of(file) is None and not file.endswith("__init__.py"):
            yield f"{file} stands on no floor: give it one in tests/walls.py and in ARCHITECTURE.md"


def _upward() -> Iterator[str]:
    names = list(FLOORS)
    for file, targets in arrows().items():
        for target, line in targets.items():
            here, there = floor_of(file), floor_of(target)
            if here is not None and there is not None and there > here:
                yield f"{file}:{line} ({names[here]}) imports {target} ({names[there]}), which is above"


def _circles() -> Iterator[str]:
    files = arrows()
    yield from _circles_of({file: set(targets) for file, targets in files.items()}, "files")
    folders: dict[str, set[str]] = {}
    for file, targets in files.items():
        here = file.rpartition("/")[0]
        folders.setdefault(here, set()).update(
            target.rpartition("/")[0] for target in targets if not target.startswith(f"{here}/") or here == ""
        )
    # A folder's own files and the folder below it are one house: cogvideox/ holds rooms and files of several floors.
    inner = {
        folder: {target for target in targets if target != folder}
        for folder, targets in folders.items()
        if folder.count("/")
    }
    yield from _circles_of({folder: targets & set(inner) for folder, targets in inner.items()}, "folders")


def _circles_of(graph: dict[str, set[str]], what: str) -> Iterator[str]:
    """Tarjan's strongly connected components with more than one member."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                yield from visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            circle = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(circle) > 1:
                yield circle

    for node in graph:
        if node not in index:
            for circle in visit(node):
                yield f"a circle of {what}: {', '.join(sorted(circle))}"


def _comfyui() -> Iterator[str]:
    for file in sources():
        if not file.startswith(HOST):
            for target, line, _ in imports(file):
                if target not in sources() and target.split(".")[0] in COMFYUI:
                    yield f"{file}:{line} imports ComfyUI's {target}: only {HOST} does"


def _heavy() -> Iterator[str]:
    for file in sources():
        for target, line, at_start in imports(file):
            if at_start and target.split(".")[0] in HEAVY:
                yield f"{file}:{line} imports {target} at import time: import it inside the function that uses it"


def _private() -> Iterator[str]:
    """Attributes with a leading underscore that no file of the tree defines, by access or by name in a text."""
    own = frozenset().union(*map(_defined, sources().values()))
    for file, tree in sources().items():
        for name, line, module in () if file == INTERNALS else _touched(tree):
            if name not in own and (module is None or _place(module, None) is None):
                yield f"{file}:{line} touches {name}, private to another library: give it a name in {INTERNALS}"


@cache
def _touched(tree: ast.Module) -> tuple[tuple[str, int, tuple[str, ...] | None], ...]:
    """The private names that a parsed file touches: (name, line, the module it is imported from)."""
    found = []
    for node in ast.walk(tree):
        name, module = None, None
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            name, module = next((a.name for a in node.names if a.name.startswith("_")), None), node.module.split(".")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            second = node.args[1]
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and isinstance(second, ast.Constant):
                name = second.value if isinstance(second.value, str) else None
        if name and name.startswith("_") and not name.startswith("__"):
            found.append((name, node.lineno, None if module is None else tuple(module)))
    return tuple(found)


@cache
def _defined(tree: ast.Module) -> frozenset[str]:
    return frozenset(_definitions(tree))


def _definitions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            yield node.attr


def floors_text() -> str:
    """The floors from the top down, with the lines of each file."""
    lines = []
    for number, name in reversed(list(enumerate(FLOORS))):
        files = [file for file in sources() if floor_of(file) == number]
        counts = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
        lines.append(f"{number}  {name} ({sum(counts.values()):,} lines)")
        lines += [f"     {file} {count}" for file, count in counts.items() if count > 1]
    total = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in sources())
    return "\n".join([*lines, f"{len(sources())} files, {total:,} lines"])


def main() -> int:
    found = broken()
    print(floors_text())
    print("\n".join(["", *found, f"{len(found)} walls are crossed." if found else "No wall is crossed."]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
