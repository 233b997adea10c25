"""The sentences that people are shown, in other languages: ``python -m tests.sentences`` reads them from the code and
brings the catalogues, ``locales/<language>/sentences.po``, into step with it.

New sentences are added without a translation, and printed; those that the code no longer says are taken out. A
sentence is a string with words in the shipped code, as a template: ``There is no {what} at {path}.``. The names of the
places are those of the code. What is shown by the page in its own way (``locales/*/nodeDefs.json``), what only a log
has and what is compared rather than said is left out.
"""

import ast
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from cogvideox.languages import places, read_catalogue
from tests import locales
from tests.conftest import ROOT
from tests.walls import sources

LANGUAGES = ("zh",)
#: Attributes of the nodes' classes whose words are in ``nodeDefs.json``, or are names.
_PAGE_WORDS = {
    "DESCRIPTION",
    "SEARCH_ALIASES",
    "OUTPUT_TOOLTIPS",
    "RETURN_TYPES",
    "RETURN_NAMES",
    "CATEGORY",
}
#: Functions whose arguments are looked for rather than said.
_LOOKED_FOR = {
    "compile",
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "startswith",
    "endswith",
    "replace",
    "fullmatch",
    "match",
    "search",
    "sub",
    "findall",
    "finditer",
    "strip",
    "lstrip",
    "rstrip",
    "removeprefix",
    "removesuffix",
    "find",
    "index",
    "rearrange",
    "repeat",
    "reduce",
    "import_module",
    "find_spec",
    "getattr",
    "hasattr",
    "TypeVar",
    "einsum",
    "strftime",
    "filterwarnings",
}
#: Strings of several words that are names, of ComfyUI's or ours in saved workflows.
_NAMES = {
    "Node name for S&R",
    "fill / crop",
    "easy int",
    "easy setNode",
    "easy getNode",
    "Reroute (rgthree)",
    "Any Switch (rgthree)",
    "CogVideoX1.5-5B (text to video, 31 GB)",
    "CogVideoX1.5-5B-I2V (image to video, 31 GB)",
    "CogVideoX-Fun-V1.5-5b-InP (inpainting, about 31 GB)",
}
#: Functions of which nobody is shown what their strings say: the page's own words, and what a debugger shows.
_UNSHOWN = {"INPUT_TYPES", "extra_repr", "__repr__"}
_LOGGING = {"debug", "info", "warning", "error", "exception", "log"}
#: Words that stand alone in a sentence's places: verdicts, parts, what there is none of. Each is a string of the code.
WORDS = (
    "ok",
    "warning",
    "mismatch",
    "absent",
    "black",
    "transformer",
    "VAE",
    "checkpoint",
    "weights",
    "sizes",
    "none",
    "nothing",
    "overlap",
    "later",
    "It",
    "empty",
    "width",
    "height",
    "images",
    "positive",
    "negative",
    "prompt",
    "native",
    "emulated",
    "activations",
    "cache",
    "LoRAs",
    "sampling",
    "decoding",
    "encoding",
    "upscaling",
    "checking",
    "writing",
    "loading",
    "downloading",
    "converting",
)
#: What Python's argparse and operating system say themselves.
LIBRARIES = (
    "usage:",
    "options",
    "positional arguments",
    "show this help message and exit",
    "argument {name}: {message}",
    "expected one argument",
    "expected at least one argument",
    "expected {count} arguments",
    "invalid choice: {value} (choose from {choices})",
    "invalid {type} value: {value}",
    "unrecognized arguments: {names}",
    "ambiguous option: {option} could match {options}",
    "ignored explicit argument {value}",
    "No such file or directory",
    "Permission denied",
    "No space left on device",
    "Is a directory",
    "Not a directory",
    "File exists",
    "File name too long",
    "Read-only file system",
    "Input/output error",
)


@cache
def templates() -> dict[str, list[str]]:
    """Read every template, and the files that say it."""
    found: dict[str, list[str]] = {}
    for file, tree in sources().items():
        # The translating module says nothing itself.
        if file == "cogvideox/languages.py":
            continue
        if file.startswith(("cogvideox/", "interop/", "nodes/", "commands/")) or file == "generate.py":
            for template in _Reader(tree).templates():
                found.setdefault(template, [])
                if file not in found[template]:
                    found[template].append(file)
    for path in sorted([*ROOT.glob("example_workflows/*.json"), *ROOT.glob("subgraphs/*.json")]):
        for text in workflow_texts(json.loads(path.read_text(encoding="utf-8"))):
            for line in _lines(text):
                found.setdefault(line, []).append(path.relative_to(ROOT).as_posix())
        # What a template is called in the page's list.
        found.setdefault(path.stem.replace("_", " "), []).append(path.relative_to(ROOT).as_posix())
    found.setdefault(ast.get_docstring(sources()["generate.py"], clean=False).strip(), []).append("generate.py")
    for word in WORDS:
        found.setdefault(word, []).append("tests/sentences.py")
    for text in LIBRARIES:
        found.setdefault(text, []).append("tests/sentences.py")
    return found


def workflow_texts(workflow: dict) -> Iterator[str]:
    """List what a workflow says: titles of nodes and groups, notes, names and descriptions of subgraphs."""
    for graph in (workflow, *workflow.get("definitions", {}).get("subgraphs", [])):
        yield from (text for text in (graph.get("name"), graph.get("description")) if text)
        yield from (group["title"] for group in graph.get("groups", []))
        for node in graph["nodes"]:
            if node.get("title"):
                yield node["title"]
            if node["type"] in ("Note", "MarkdownNote"):
                yield from node["widgets_values"]


def _lines(text: str) -> list[str]:
    stripped = (
        re.sub(r"^\s*(?:[-*•] )?", "", line).rstrip() for line in text.replace("{", "{{").replace("}", "}}").split("\n")
    )
    return [line for line in stripped if re.search("[A-Za-z]{2}", line)]


class _Reader:
    """Reads the templates of one file."""

    def __init__(self, tree: ast.Module):
        self._tree = tree
        self._left_out: set[ast.AST] = set()

    def templates(self) -> Iterator[str]:
        for node in ast.walk(self._tree):
            self._leave_out(node)
        said = [
            node
            for node in ast.walk(self._tree)
            if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp) and node not in self._left_out
        ]
        for node in sorted(said, key=lambda node: (node.lineno, node.col_offset)):
            yield from self._said(node)

    def _leave_out(self, node: ast.AST) -> None:
        """Note what below a node is not said to anybody, or is part of a larger text."""
        for part in self._unsaid(node):
            self._left_out.update(ast.walk(part))
        if isinstance(node, ast.JoinedStr):
            for value in node.values:
                if isinstance(value, ast.Constant):
                    self._left_out.add(value)
                elif isinstance(value, ast.FormattedValue) and value.format_spec is not None:
                    self._left_out.update(ast.walk(value.format_spec))
        elif _is_text(node) and isinstance(node, ast.BinOp):
            for side in (node.left, node.right):
                if isinstance(side, ast.JoinedStr | ast.BinOp | ast.Constant):
                    self._left_out.add(side)

    @staticmethod
    def _unsaid(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value
        elif isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id in _PAGE_WORDS for t in node.targets
        ):
            yield node.value
        elif isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None and not _worded(key))
            yield from (
                value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and key.value == "tooltip"
            )
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Compare):
            yield from (side for side in (node.left, *node.comparators) if isinstance(side, ast.Constant | ast.Tuple))
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef):
            if node.name in _UNSHOWN:
                yield node
            elif node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.Call):
            yield from _unsaid_arguments(node)

    def _said(self, node: ast.expr) -> Iterator[str]:
        for template in _expanded(node):
            lines = [template] if not places(template) else template.split("\n")
            for line in lines:
                line = line.strip()
                if _worded_text(line) and line not in _NAMES:
                    yield line


def _unsaid_arguments(node: ast.Call) -> Iterator[ast.AST]:
    """List what of a call is looked for, or goes to the log only."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    receiver = node.func.value if isinstance(node.func, ast.Attribute) else None
    if name in ("join", "split") and isinstance(receiver, ast.Constant):
        yield receiver
    if name in _LOOKED_FOR:
        yield from node.args
    elif name in ("get", "cast"):
        yield from node.args[:1]
    elif name in _LOGGING and receiver is not None and "logg" in ast.unparse(receiver):
        # A message that is shown too is a variable here.
        yield from (argument for argument in node.args if isinstance(argument, ast.Constant))


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        or (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Add)
            and (_is_text(node.left) or _is_text(node.right))
        )
    )


def _worded(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and _worded_text(node.value)


def _worded_text(template: str) -> bool:
    """Say whether a template has words of its own: letters beside a space, outside its places."""
    literal = re.sub(r"\{[a-z][a-z0-9_]*\}", "0", template)
    return re.search(r"[A-Za-z]{2,}[\]),.:;]* | [\[(]*[A-Za-z]{2,}", literal) is not None


def _expanded(node: ast.expr) -> Iterator[str]:
    """Write a text's templates: one for each way that its words of one letter or word (``s``, ``is``, ``are``) can
    come out."""
    options = [list(part) for part in _parts(node)]
    names: dict[str, str] = {}
    for choice in itertools.product(*options):
        said, taken = "", []
        for piece in choice:
            if isinstance(piece, str):
                said += piece.replace("{", "{{").replace("}", "}}")
            elif not said.endswith("}") or said.endswith("}}"):
                name = _name(piece)
                while name in taken:
                    name = _next(name)
                taken.append(name)
                said += "{" + name + "}"
        yield said
    del names


def _next(name: str) -> str:
    base, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
    return f"{base}{int(number or 1) + 1}"


def _parts(node: ast.expr) -> Iterator[Iterable[str | ast.expr]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _is_text(node):
        yield from _parts(node.left)
        yield from _parts(node.right)
    elif isinstance(node, ast.Constant):
        yield [node.value if isinstance(node.value, str) else node]
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                inner = value.value
                small = isinstance(inner, ast.IfExp) and all(
                    isinstance(branch, ast.Constant)
                    and isinstance(branch.value, str)
                    and " " not in branch.value.strip()
                    for branch in (inner.body, inner.orelse)
                )
                yield [inner.body.value, inner.orelse.value] if small else [inner]
            else:
                yield from _parts(value)
    else:
        yield [node]


#: Functions that quote what they are given.
_QUOTES = {
    "short",
    "listed",
    "reason",
    "repr",
    "str",
    "size_text",
    "sorted",
    "list",
    "type",
    "len",
    "float",
    "seen",
    "join",
}


def _name(node: ast.expr) -> str:
    """Name a place after what the code puts there."""
    name = "value"
    if isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.Attribute):
        name = node.attr if node.attr not in ("name", "value", "text") else f"{_name(node.value)}_{node.attr}"
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "value")
        if called in _QUOTES and node.args:
            return _name(node.args[0])
        name = called
    elif isinstance(node, ast.Subscript | ast.Starred):
        return _name(node.value)
    elif isinstance(node, ast.IfExp):
        return _name(node.body)
    elif isinstance(node, ast.BinOp):
        return _name(node.left)
    elif isinstance(node, ast.BoolOp):
        return _name(node.values[0])
    elif isinstance(node, ast.GeneratorExp | ast.ListComp):
        return _name(node.elt)
    return re.sub(r"[^a-z0-9_]", "", name.lower()).strip("_") or "value"


def catalogue_file(language: str) -> Path:
    return ROOT / "locales" / language / "sentences.po"


def read(language: str) -> dict[str, str]:
    """Read a catalogue as it lies there; empty if there is none."""
    path = catalogue_file(language)
    return read_catalogue(path.read_text(encoding="utf-8")) if path.exists() else {}


def written(language: str, translations: dict[str, str], found: dict[str, list[str]]) -> str:
    """Write a catalogue: the templates by the file that says them first."""
    lines = [
        "# What the engine, the nodes and generate.py say: written by python -m tests.sentences, translated by hand.",
        "# A translation keeps every {place}, in any order.",
        'msgid ""',
        'msgstr ""',
        f'"Language: {language}\\n"',
        '"MIME-Version: 1.0\\n"',
        '"Content-Type: text/plain; charset=UTF-8\\n"',
        '"Content-Transfer-Encoding: 8bit\\n"',
    ]
    for template, files in found.items():
        lines += ["", f"#: {' '.join(dict.fromkeys(files))}", f"msgid {_quoted(template)}"]
        lines.append(f"msgstr {_quoted(translations.get(template, ''))}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\t", "\\t")
    lines = [f'"{line}"' for line in escaped.replace("\n", "\\n\n").split("\n") if line]
    return "\n".join(['""', *lines] if len(lines) > 1 else lines or ['""'])


def _display_names(language: str) -> dict[str, str]:
    """Read what the nodes are called, as their page's words have it."""
    english, theirs = locales.read("en"), locales.read(language)
    return {words["display_name"]: theirs[node]["display_name"] for node, words in english.items() if node in theirs}


def main() -> int:
    found, missing = templates(), 0
    for language in LANGUAGES:
        translations = _display_names(language) | {key: said for key, said in read(language).items() if said}
        catalogue_file(language).write_text(written(language, translations, found), encoding="utf-8")
        for template in found:
            if not translations.get(template):
                missing += 1
                print(f"{language}: no translation: {template!r} ({', '.join(dict.fromkeys(found[template]))})")
        for template in set(read(language)) - set(found):
            print(f"{language}: no longer said, taken out: {template!r} = {translations[template]!r}")
    print(f"{len(found)} sentences, {missing} without a translation")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
