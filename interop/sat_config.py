"""An ``inference.yaml`` of SAT read without running anything: bounded, with the place of every setting in the text."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox.words import reason, short

from .report import WHERE

FLAGS = ("bf16", "fp16")
#: Bytes of such a file, and of all beside it, that are read (those of the authors have 2,000), and its parts, those
#: that are repeated (& and *) counted each time.
MAX_BYTES, _MAX_PARTS = 256 << 10, 100_000
#: Letters from which on a text is long, and levels of nesting that it may have then.
_LONG, _MAX_NESTING = 10_000, 100
_MAP, _SEQ, _MERGE, _TIME = (f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "merge", "timestamp"))


@dataclass(frozen=True, eq=False)
class SatConfig:
    """An ``inference.yaml``: its text, the YAML nodes with their places in the text, and the values of ``args``.

    Attributes:
        args: the node of ``args:``; it keeps duplicate keys, comments' places and spelling, which the values do not.
        values: ``args`` as SAT gets it.
        entries: per flag every ``(key, value)`` pair of nodes that sets it; SAT refuses more than one.
    """

    file: Path
    text: str
    root: Any
    args: Any
    values: Mapping
    entries: Mapping[str, list]

    def is_on(self, flag: str) -> bool:
        return self.values.get(flag, False)

    def place(self, *keys: str) -> str:
        """``args.fp16 (line 14)``; of a key that stands nowhere, the line of ``args``."""
        named = [key for key, _ in self.args.value if key.value in keys] or [
            key for key, value in self.root.value if value is self.args
        ]
        lines = [key.start_mark.line + 1 for key in named]
        name = " and ".join(f"args.{key}" for key in keys) or "args"
        return f"{name} ({'line' if len(lines) == 1 else 'lines'} {' and '.join(map(str, lines))})"


def _yaml():
    try:
        import yaml
    except ImportError as error:
        raise RuntimeError(
            "PyYAML is not installed, so YAML configs cannot be read. huggingface_hub and accelerate bring it along. "
            "Install it with: python -m pip install pyyaml"
        ) from error
    return yaml


def compose_yaml(file: Path, raw: bytes) -> tuple[str, Any]:
    """The text and its YAML nodes, which know their places in it. Nothing is constructed, so no tag can run code.

    Raises:
        ValueError: if it is not one YAML document in UTF-8, or one whose parts multiply beyond bounds.
    """
    yaml = _yaml()
    try:
        # A byte order mark and every kind of line end stay in the text, so that it can be written back as it was.
        text = raw.decode("utf-8")
        root = yaml.compose(text, Loader=_loader(file, text))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{short(file, 400)} is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}), the only encoding SAT "
            "reads. Save it as UTF-8 in a text editor."
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"{short(file, 400)} is not YAML ({reason(error)}), so SAT cannot read it either. Correct it there. {WHERE}"
        ) from error
    if root is not None and _parts(root, {}) > _MAX_PARTS:
        raise ValueError(
            f"{short(file, 400)} repeats its parts (& and *) within each other or in themselves, into more than "
            f"{_MAX_PARTS:,}: no config is so large, and reading it would not end. {WHERE}"
        )
    return text, root


def _loader(file: Path, text: str) -> type:
    """What reads a text: SAT's own loader, and for texts that it would take seconds for, libyaml's, ten times as fast.

    That one takes tabs where SAT's does not, and its places do not count a byte order mark.

    Raises:
        ValueError: if the text is nested deeper than the loaders can bear.
    """
    yaml = _yaml()
    # SAT's own takes the square of the number of open brackets.
    opened = [1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text)]
    if max(itertools.accumulate(opened), default=0) > 10 * _MAX_NESTING:
        raise _nested(file)
    if len(text) < _LONG or "\t" in text or text.startswith("\ufeff") or not hasattr(yaml, "CSafeLoader"):
        return yaml.SafeLoader
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_NESTING:
            raise _nested(file)
    return yaml.CSafeLoader


def _nested(file: Path) -> ValueError:
    return ValueError(
        f"{short(file, 400)} is nested deeper than {_MAX_NESTING} levels, so it is no config that SAT reads. {WHERE}"
    )


def _parts(node, known: dict[int, int]) -> int:
    """How many parts a node has if everything that it repeats is written out; more than are allowed for one that holds
    itself."""
    if id(node) not in known:
        known[id(node)] = _MAX_PARTS + 1  # until it is counted: whoever meets it now is in it
        inner = (
            (part for pair in node.value for part in pair)
            if node.id == "mapping"
            else node.value
            if node.id == "sequence"
            else ()
        )
        total = 1
        for part in inner:
            total = min(total + _parts(part, known), _MAX_PARTS + 1)
        known[id(node)] = total
    return known[id(node)]


def plain_value(node) -> Any:
    """The value of a node, with plain types only.

    Raises:
        ValueError: for what SAT's reader does not take, or cannot.
    """
    if node.id == "sequence":
        if node.tag != _SEQ:
            raise ValueError(f"it has the tag {short(node.tag)}")
        return [plain_value(item) for item in node.value]
    if node.id == "mapping":
        return _mapping(node)
    # To SAT's reader (OmegaConf) a date is text.
    if node.tag == _TIME:
        return node.value
    yaml = _yaml()
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        # What PyYAML raises for a value that its tag, or its looks, promise otherwise.
        raise ValueError(f"{short(node.value)} is no {short(node.tag.rpartition(':')[2])}: {reason(error)}") from error


def _mapping(node) -> dict:
    if node.tag != _MAP:
        raise ValueError(f"it has the tag {short(node.tag)}")
    merged: dict = {}
    own: dict = {}
    for key, value in node.value:
        if key.tag == _MERGE:
            sources = value.value if value.id == "sequence" else [value]
            if any(source.id != "mapping" for source in sources):
                raise ValueError("<< merges what is no mapping")
            for source in reversed(sources):
                merged |= _mapping(source)
            continue
        if key.id != "scalar":
            raise ValueError(f"a {key.id} cannot be the name of a setting")
        own[plain_value(key)] = plain_value(value)
    return merged | own


def children(node, name: str) -> list:
    """Every value of the key ``name`` in a mapping."""
    return [value for key, value in node.value if key.value == name] if _is_mapping(node) else []


def _is_mapping(node) -> bool:
    return getattr(node, "id", None) == "mapping" and node.tag == _MAP


def open_sat(file: Path, raw: bytes) -> SatConfig:
    """Read a SAT config of which only ``args:`` counts.

    Args:
        raw: the file's bytes.

    Raises:
        ValueError: if it is no YAML, or has not one ``args:`` of settings.
    """
    text, root = compose_yaml(file, raw)
    found = children(root, "args")
    if len(found) != 1 or not _is_mapping(found[0]):
        seen = (
            "no args: at all"
            if not found
            else "args: more than once"
            if len(found) > 1
            else "an args: that is not a mapping of settings"
        )
        hint = (
            " It describes a model; the dtype is in the inference.yaml it is run with."
            if children(root, "model")
            else ""
        )
        raise ValueError(f"{short(file, 400)} has {seen}, and args: is where SAT finds bf16 and fp16.{hint} {WHERE}")
    args = found[0]
    try:
        values = plain_value(args)
    except ValueError as error:
        raise ValueError(
            f"{short(file, 400)} holds a value in args: that SAT cannot read ({reason(error)}). Correct it there."
        ) from error
    config = SatConfig(
        file,
        text,
        root,
        args,
        values,
        {flag: [pair for pair in args.value if pair[0].value == flag] for flag in FLAGS},
    )
    for flag in FLAGS:
        if not isinstance(values.get(flag, False), bool):
            seen = "empty" if values[flag] is None else short(repr(values[flag]))
            raise ValueError(
                f"{config.place(flag)} of {short(file, 400)} is {seen}, which is not a boolean: SAT would take "
                f"whatever Python counts as true. Write {flag}: True or {flag}: False."
            )
    if values.get("mode", "inference") != "inference" and children(root, "deepspeed"):
        raise ValueError(
            f"{short(file, 400)} is for training (args.mode is {short(repr(values['mode']))}): there SAT takes the "
            f"dtype from its deepspeed: section and not from args, so the flags checked here decide nothing. {WHERE}"
        )
    return config
