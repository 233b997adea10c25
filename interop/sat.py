"""The ``inference.yaml`` of SAT, the authors' own training and inference format, whose ``args:`` hold ``bf16: True`` or
``fp16: True``.

How SAT takes the flags: zai-org/CogVideo (Apache-2.0), ``sat/arguments.py``.
"""

import itertools
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvideox.files import read_bytes, written_whole
from cogvideox.precision.verdict import Finding
from cogvideox.variants import Variant, identify
from cogvideox.words import listed, reason, short

from .report import BLACK, SAT, WHERE, ConfigReport

logger = logging.getLogger(__name__)

#: Where an inference.yaml lies below a folder: beside the weights, in SAT's folder, in the official repository.
PLACES = ("inference.yaml", "configs/inference.yaml", "sat/configs/inference.yaml")
_FLAGS = ("bf16", "fp16")
_OTHER = {"bf16": "fp16", "fp16": "bf16"}
#: Latent frames of the clips that CogVideoX-1.5 makes: 81 and 161 frames, and one more for its patches of two. The
#: others make 13.
_FRAMES_1_5 = (22, 42)
#: What a checkpoint's folder is called -> the model, and what that was trained in.
_FOLDERS = (
    (r"cogvideox?[-_ ]?(5b[-_ ]?)?1[._]5", "CogVideoX1.5", "bf16"),
    (r"cogvideox?[-_ ]?5b", "CogVideoX-5b", "bf16"),
    (r"cogvideox?[-_ ]?2b", "CogVideoX-2b", "fp16"),
)
#: Bytes of such a file, and of all beside it, that are read (those of the authors have 2,000), and its parts, those
#: that are repeated (& and *) counted each time.
_MAX_BYTES, _MAX_PARTS = 256 << 10, 100_000
#: Letters from which on a text is long, and levels of nesting that it may have then.
_LONG, _MAX_NESTING = 10_000, 100
_MAP, _SEQ, _MERGE, _TIME = (f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "merge", "timestamp"))


def check_sat(file: Path) -> ConfigReport:
    """Judge the flags of an ``inference.yaml``.

    Raises:
        ValueError: if it is not one.
    """
    config = _open_sat(file, read_bytes(file, _MAX_BYTES))
    return _report(config, *_identify(config))


def _report(config: "_SatConfig", model: "_Model", findings: list[Finding]) -> ConfigReport:
    return ConfigReport(config.file, SAT, model.text, (*_judge_flags(config, model), *findings))


def fix_sat(file: Path) -> tuple[ConfigReport, Path | None]:
    """Rewrite the flags of an ``inference.yaml``: ``check.fix_config`` says how."""
    raw = read_bytes(file, _MAX_BYTES)
    config = _open_sat(file, raw)
    model, findings = _identify(config)
    if all(finding.verdict == "ok" for finding in _judge_flags(config, model)):
        return _report(config, model, findings), None
    if model.trained is None or (model.trained == "fp16" and not model.is_sure):
        # Wrongly set to fp16 a model turns black, so a name alone is not enough for that.
        raise ValueError(
            f"Which model {short(file, 400)} is for is {model.source}, so the right dtype is not known either: fp16 "
            "for CogVideoX-2b, bf16 for every other CogVideoX. Put the model's own config (such as "
            "cogvideox1.5_5b.yaml) beside it or the checkpoint's folder into args.load; or write bf16: True by hand, "
            "which is finite with every CogVideoX."
        )
    fixed = _apply(config, _edits(config, model.trained), model.trained)
    backup = _replace(file, raw, fixed.text.encode("utf-8"))
    logger.info("%s now runs in %s; what it was is in %s", file, model.trained, backup)
    return _report(fixed, model, findings), backup


@dataclass(frozen=True, eq=False)
class _SatConfig:
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


def _compose(file: Path, raw: bytes) -> tuple[str, Any]:
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


def _value(node) -> Any:
    """The value of a node, with plain types only.

    Raises:
        ValueError: for what SAT's reader does not take, or cannot.
    """
    if node.id == "sequence":
        if node.tag != _SEQ:
            raise ValueError(f"it has the tag {short(node.tag)}")
        return [_value(item) for item in node.value]
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
        own[_value(key)] = _value(value)
    return merged | own


def _children(node, name: str) -> list:
    """Every value of the key ``name`` in a mapping."""
    return [value for key, value in node.value if key.value == name] if _is_mapping(node) else []


def _is_mapping(node) -> bool:
    return getattr(node, "id", None) == "mapping" and node.tag == _MAP


def _open_sat(file: Path, raw: bytes) -> _SatConfig:
    text, root = _compose(file, raw)
    found = _children(root, "args")
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
            if _children(root, "model")
            else ""
        )
        raise ValueError(f"{short(file, 400)} has {seen}, and args: is where SAT finds bf16 and fp16.{hint} {WHERE}")
    args = found[0]
    try:
        values = _value(args)
    except ValueError as error:
        raise ValueError(
            f"{short(file, 400)} holds a value in args: that SAT cannot read ({reason(error)}). Correct it there."
        ) from error
    config = _SatConfig(
        file,
        text,
        root,
        args,
        values,
        {flag: [pair for pair in args.value if pair[0].value == flag] for flag in _FLAGS},
    )
    for flag in _FLAGS:
        if not isinstance(values.get(flag, False), bool):
            seen = "empty" if values[flag] is None else short(repr(values[flag]))
            raise ValueError(
                f"{config.place(flag)} of {short(file, 400)} is {seen}, which is not a boolean: SAT would take "
                f"whatever Python counts as true. Write {flag}: True or {flag}: False."
            )
    if values.get("mode", "inference") != "inference" and _children(root, "deepspeed"):
        raise ValueError(
            f"{short(file, 400)} is for training (args.mode is {short(repr(values['mode']))}): there SAT takes the "
            f"dtype from its deepspeed: section and not from args, so the flags checked here decide nothing. {WHERE}"
        )
    return config


@dataclass(frozen=True)
class _Model:
    """Which model a config runs, the dtype it was trained in (``bf16``, ``fp16`` or None for not known), how that is
    known, and whether for sure."""

    name: str
    trained: str | None
    source: str
    is_sure: bool = True

    @property
    def text(self) -> str:
        return (
            f"{self.name}, trained in {self.trained}, {self.source}" if self.trained else f"{self.name}: {self.source}"
        )


def _identify(config: _SatConfig) -> tuple[_Model, list[Finding]]:
    """Which model an ``inference.yaml`` runs, from the surest source that there is: by shapes, by settings, and by a
    folder's name last.

    SAT is given the model's config beside the inference.yaml on its command line, which is not to be seen here; so the
    places where that config, or the weights, usually are are looked at in turn.
    """
    said: list[Finding] = []

    def known(variants: list[Variant], source: str) -> _Model:
        names = dict.fromkeys(variant.name for variant in variants)
        return _Model(" or ".join(names), variants[0].trained, source)

    if variant := _described(config.root):
        return known([variant], "known by its own model: section"), said
    file = _checkpoint(config)
    if file is not None:
        try:
            variant = _stored(file)
        except (
            Exception
        ) as error:  # whatever a damaged pickle makes torch raise: it is told, and the other sources still stand
            refused = "could run code" in str(error)
            why = "holds more than tensors, which could run code" if refused else f"cannot be read ({reason(error)})"
            said.append(
                Finding(
                    f"args.load, {short(file, 400)}",
                    "warning",
                    f"The checkpoint {why}, so it was not opened and says nothing about the model.",
                    "Download it again from the authors if it should be one of theirs.",
                )
            )
        if variant:
            return known([variant], f"known by the shapes in {file}"), said
    beside = _beside(config.file)
    if beside and len({variant.trained for variant in beside.values()}) == 1:
        return known(list(beside.values()), f"known by the model config beside it ({listed(beside, 5)})"), said
    if config.values.get("sampling_fps") == 16:
        return _Model(
            "CogVideoX1.5", "bf16", "known by sampling_fps: 16 (the other models make 8 frames a second)"
        ), said
    frames = config.values.get("sampling_num_frames")
    if type(frames) is int and frames in _FRAMES_1_5:
        return _Model(
            "CogVideoX1.5", "bf16", f"known by sampling_num_frames: {frames} (latent frames; the other models make 13)"
        ), said
    named = _named(config)
    if named:
        folder, name, trained = named
        source = (
            f"going by the name of the checkpoint's folder alone ({short(folder)} in args.load), which can be wrong"
        )
        return _Model(f"{name} (by its folder's name)", trained, source, False), said
    tried = (
        "its own model: section, the checkpoint in args.load and its folder's name, the model configs beside it, "
        "sampling_fps and sampling_num_frames do not say"
    )
    return _Model("an unknown CogVideoX", None, f"not known ({tried})"), said


def _described(root) -> Variant | None:
    """The variant a ``model:`` section describes, or None if it does not say."""
    node = root
    for key in ("model", "network_config", "params"):
        node = (_children(node, key) or [None])[-1]
    if node is None:
        return None
    try:
        params = _value(node)
    except ValueError as error:
        logger.info("A model: section is passed over: %s", reason(error))
        return None
    patch = params.get("patch_size") if isinstance(params, dict) else None
    time_patch = patch[0] if isinstance(patch, list) and len(patch) == 3 and patch[0] != 1 else None
    target = params
    for key in ("modules", "pos_embed_config", "target"):
        target = target.get(key) if isinstance(target, dict) else None
    if time_patch is None and not isinstance(target, str):
        return None
    return _variant(
        params.get("num_layers"),
        params.get("num_attention_heads"),
        params.get("in_channels", 16),
        time_patch,
        "Rotary3D" in str(target),
    )


def _variant(layers, heads, channels, time_patch, rotary) -> Variant:
    """``variants.identify`` on what SAT knows of a model."""
    variant = identify(
        {
            "num_layers": layers,
            "num_attention_heads": heads,
            "in_channels": channels,
            "patch_size_t": time_patch,
            "use_rotary_positional_embeddings": rotary,
        }
    )
    return variant if layers and heads else replace(variant, name=variant.name.split(" (")[0])


def _checkpoint(config: _SatConfig) -> Path | None:
    """The weights ``args.load`` points at, if they are there."""
    load, here = config.values.get("load"), config.file.parent
    if not isinstance(load, str) or not load or "\0" in load:
        return None
    # SAT resolves it against the folder it is started in: the file's own, or the one above configs/.
    try:
        folders = [folder for folder in (here / load, here.parent / load) if folder.is_dir()]
    except OSError as error:  # such as a name that is too long
        logger.info("args.load is passed over: %s", reason(error))
        return None
    if not folders:
        return None
    # Here and not above: it imports torch, which a config without its weights does not need.
    from cogvideox.checkpoint.layout import sat_step

    return next((file for folder in folders if (file := sat_step(folder)) is not None), None)


def _named(config: _SatConfig) -> tuple[str, str, str] | None:
    """What the checkpoint's folder is called, if that is a model's name: the folder, the model, and what that was
    trained in."""
    load = config.values.get("load")
    if (
        not isinstance(load, str) or "{" in load
    ):  # {your_CogVideoX-2b-sat_path}/transformer, as the authors' own file has it, is no name
        return None
    for part in reversed(re.split(r"[\\/]", load)[-3:]):
        for pattern, name, trained in _FOLDERS:
            if re.search(pattern, part, re.IGNORECASE):
                return part, name, trained
    return None


def _stored(file: Path) -> Variant | None:
    """The variant whose weights a SAT checkpoint holds, by names and shapes; None if they do not say. No weight is
    read.

    Raises:
        ValueError: if it cannot be read, or holds anything but tensors and plain containers: opening it would run code.
    """
    from cogvideox.checkpoint.pickles import read_pickle_shapes

    shapes = {name.removeprefix("model.diffusion_model."): shape for name, shape in read_pickle_shapes(file).items()}
    patch = shapes.get("mixins.patch_embed.proj.weight", ())
    if len(patch) not in (2, 4):
        return None
    width, heads = patch[0], patch[0] // 64
    layers = len({name.split(".")[2] for name in shapes if name.startswith("transformer.layers.")})
    if len(patch) == 2:
        # A linear layer over 2 x 2 x 2 patches; the 1.0 models have a convolution over 2 x 2.
        return _variant(layers, heads, patch[1] // 8, 2, True)
    if any(name.endswith(("freqs_sin", "freqs_cos")) for name in shapes):
        rotary = True
    elif "mixins.pos_embed.pos_embedding" in shapes:
        # The sin-cos table is a parameter. So is the learned one that image-to-video models have on top of rotary
        # positions.
        rotary = patch[1] == 32
    elif width in (1920, 3072):
        # Neither leaves a trace where the table was not saved and the rotary angles are no buffers: go by the released
        # widths.
        rotary = width == 3072
    else:
        return None
    return _variant(layers, heads, patch[1], None, rotary)


def _beside(file: Path) -> dict[str, Variant]:
    """The variants that the other YAML files of the folder describe, by file name."""
    found, left = {}, _MAX_BYTES
    for other in sorted(file.parent.glob("*.yaml")):
        if other.name == file.name:
            continue
        try:
            raw = read_bytes(other, left)
            left -= len(raw)
            variant = _described(_compose(other, raw)[1])
        except ValueError as error:
            logger.info("%s is passed over: %s", short(other, 400), error)
            continue
        if variant:
            found[other.name] = variant
    return found


def _judge_flags(config: _SatConfig, model: _Model) -> list[Finding]:
    said = []
    for flag in _FLAGS:
        if len(config.entries[flag]) > 1:
            reason = (
                f"{flag} is set {len(config.entries[flag])} times, and SAT refuses to start with a key that stands "
                "twice."
            )
            said.append(Finding(config.place(flag), "mismatch", reason, "Keep one of these lines."))
    trained = model.trained
    on = [flag for flag in _FLAGS if config.is_on(flag)]
    if len(on) == 2:
        reason = "Both flags are on, and SAT refuses to start with that (cannot specify both fp16 and bf16)."
        remedy = (
            f"Set {_OTHER[trained]}: False; {model.name} was trained in {trained}."
            if trained
            else "Set fp16: False (bf16 is finite with every CogVideoX), or bf16: False if the model is CogVideoX-2b."
        )
        return [*said, Finding(config.place(*_FLAGS), "mismatch", reason, remedy)]
    zero = config.values.get("zero_stage", 0)
    if on:
        run, where, because = on[0], config.place(on[0]), f"{on[0]} is on"
    elif isinstance(zero, int) and zero > 0:
        run, where, because = (
            "fp16",
            config.place("zero_stage"),
            f"Neither flag is on and zero_stage is {zero}, for which SAT switches fp16 on",
        )
    else:
        reason = (
            "Neither flag is on, so SAT runs in fp32: the picture is right, at about 3 to 4 times the time and twice "
            "the memory."
        )
        remedy = (
            "Set fp16: True."
            if trained == "fp16"
            else "Set bf16: True, unless the GPU has no bf16 (V100, T4, RTX 20xx): there fp32 is right."
        )
        return [*said, Finding(config.place(), "warning", reason, remedy)]
    if run == trained:
        return [*said, Finding(where, "ok", f"{because}, and {model.name} was trained in {trained}.")]
    if trained == "bf16":
        remedy = (
            "Set bf16: True instead; on a GPU that has no bf16 (V100, T4, RTX 20xx), switch both off and run in fp32."
        )
        return [*said, Finding(where, "mismatch", f"{because}, but {model.name} was trained in bf16: {BLACK}.", remedy)]
    if trained == "fp16":
        reason = (
            f"{because}, but {model.name} was trained in fp16: it stays finite, with the 8 significant bits of bf16 "
            "instead of the 11 of fp16."
        )
        return [*said, Finding(where, "warning", reason, "Set fp16: True instead.")]
    if run == "bf16":
        return [*said, Finding(where, "ok", f"{because}, which is finite with every CogVideoX.")]
    reason = (
        f"{because}, and which model this runs is not known: fp16 is right only for CogVideoX-2b; every other one "
        "turns black in it."
    )
    return [*said, Finding(where, "warning", reason, "Set bf16: True instead, unless the model is CogVideoX-2b.")]


# --- Changing the flags in the text ---

_Edit = tuple[int, int, str]  # replace text[start:end]
_LINE_END = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # YAML's own
_SPELLINGS = {
    form(yes): form(no)
    for yes, no in (("true", "false"), ("yes", "no"), ("on", "off"))
    for form in (str.lower, str.title, str.upper)
}
_OPPOSITE = _SPELLINGS | {no: yes for yes, no in _SPELLINGS.items()}


def _edits(config: _SatConfig, want: str) -> list[_Edit]:
    """What to replace in the text so that ``want`` is on and the other flag off."""
    other, text = _OTHER[want], config.text
    edits = [_without(config, key, value) for flag in _FLAGS for key, value in config.entries[flag][:-1]]

    def flip(value) -> _Edit:
        start, end = value.start_mark.index, value.end_mark.index
        return start, end, _OPPOSITE.get(text[start:end], str(not config.is_on(key.value)))

    mine, theirs = config.entries[want][-1:], config.entries[other][-1:]
    if not mine and theirs and config.is_on(other):
        key = theirs[0][0]
        start, end = key.start_mark.index, key.end_mark.index
        return [*edits, (start, end, text[start:end].replace(other, want))]
    if not mine:
        return [*edits, _with(config, f"{want}: True")]
    for key, value in mine + theirs:
        if config.is_on(key.value) != (key.value == want):
            edits.append(flip(value))
    return edits


def _without(config: _SatConfig, key, value) -> _Edit:
    """Take out a duplicate: comment its line out, or cut it from ``{...}``."""
    start = key.start_mark.index
    if config.args.flow_style:
        pairs = [pair[0] for pair in config.args.value]
        return start, pairs[pairs.index(key) + 1].start_mark.index, ""
    if key.start_mark.line != value.end_mark.line or key.start_mark.column != config.args.start_mark.column:
        raise _by_hand(config, f"{key.value} of line {key.start_mark.line + 1} stands on more than one line")
    return start, start, "# "


def _with(config: _SatConfig, setting: str) -> _Edit:
    """Add a setting after the last of ``args``."""
    text, pairs = config.text, config.args.value
    if config.args.flow_style:
        if not pairs:
            start = text.index("{", config.args.start_mark.index) + 1
            return start, start, setting
        end = _end(*pairs[-1])
        return end, end, f", {setting}"
    line = " " * config.args.value[0][0].start_mark.column + setting
    end = _end(*pairs[-1])
    if text[end - 1] in "\r\n":  # a block scalar ends at the start of the line after it
        return end, end, line + (_LINE_END.search(text) or ["\n"])[0]
    here = _LINE_END.search(text, end)
    if here:
        return here.end(), here.end(), line + here[0]
    return len(text), len(text), (_LINE_END.search(text) or ["\n"])[0] + line


def _end(key, value) -> int:
    """Where a setting ends in the text. The end mark of a block collection lies past the comments after it, so its last
    leaf is asked."""
    if value.start_mark.index < key.end_mark.index:
        return key.end_mark.index  # an alias: its node is elsewhere, and it stands on the key's line
    if value.id == "mapping" and not value.flow_style:
        return _end(*value.value[-1])
    if value.id == "sequence" and not value.flow_style:
        return _end(key, value.value[-1])
    return value.end_mark.index


def _apply(config: _SatConfig, edits: list[_Edit], want: str) -> _SatConfig:
    """The config with the edited text, checked: the flags are as wanted and no other setting changed.

    Raises:
        ValueError: if the check fails, as it does where anchors, aliases or merge keys set a flag from elsewhere in the
            file.
    """
    text = config.text
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    try:
        fixed = _open_sat(config.file, text.encode("utf-8"))
    except ValueError as error:
        raise _by_hand(config, "its flags are written in an unusual way") from error
    single = all(len(found) < 2 for found in fixed.entries.values())
    if not (single and fixed.is_on(want) and not fixed.is_on(_OTHER[want]) and _rest(fixed.root) == _rest(config.root)):
        raise _by_hand(config, "an anchor or a merge key (&, *, <<) sets a flag from elsewhere in it")
    return fixed


def _by_hand(config: _SatConfig, why: str) -> ValueError:
    return ValueError(
        f"{short(config.file, 400)} was not changed: {why}, so the flags cannot be set without touching other "
        "settings. In args:, set the dtype named by the check to True and the other one to False by hand, and check "
        "it again."
    )


def _rest(node, inside: str = ""):
    """Everything a document says but the flags of ``args``, in its order, for comparing."""
    if node.id == "mapping":
        pairs = [(key, value) for key, value in node.value if not (inside == "args" and key.value in _FLAGS)]
        return [(_rest(key, "key"), _rest(value, str(key.value) if inside == "" else "value")) for key, value in pairs]
    if node.id == "sequence":
        return [_rest(item, "item") for item in node.value]
    return node.tag, node.value


def _replace(file: Path, old: bytes, new: bytes) -> Path:
    """Put ``new`` into the file in one step, after a copy of ``old`` was laid beside it. Returns the copy."""
    file = file.resolve()  # of a link, the file it leads to
    backup = None
    try:
        with written_whole(file, overwrite=True) as partial:
            # For nobody else's eyes, until it has the rights of the file.
            with open(
                os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600), "wb"
            ) as stream:
                stream.write(new)
                stream.flush()
                os.fsync(stream.fileno())
            shutil.copymode(file, partial)
            backup = _keep(file, old)
            shutil.copymode(file, backup)
    except OSError as error:
        if backup is not None:
            backup.unlink(missing_ok=True)
        raise ValueError(
            f"{short(file, 400)} cannot be rewritten ({reason(error)}), so it is as it was. Make it and its folder "
            "writable for you, or change it by hand as the check says."
        ) from error
    return backup


def _keep(file: Path, content: bytes) -> Path:
    """Lay ``content`` beside the file under the first of the backup names that is free."""
    number = 0
    while True:
        backup = file.with_name(f"{file.name}.bak" + (f".{number}" if number else ""))
        try:
            stream = backup.open("xb")
        except FileExistsError:
            number += 1
            continue
        with stream:
            stream.write(content)
        return backup
