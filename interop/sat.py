"""The ``inference.yaml`` of SAT, the authors' own training and inference format, whose ``args:`` hold ``bf16: True`` or
``fp16: True``: are these right for the model, and what to change if not.

How SAT takes the flags: zai-org/CogVideo (Apache-2.0), ``sat/arguments.py``.
"""

import itertools
import logging
import os
import re
from pathlib import Path
from typing import Any

from cogvideox.files import read_bytes, write_whole
from cogvideox.precision.verdict import MISMATCH, OK, WARNING, Finding
from cogvideox.words import reason, short

from .report import BLACK, SAT, ConfigReport
from .sat_config import FLAGS, MAX_BYTES, SatConfig, open_sat
from .sat_model import Model, identify_model

logger = logging.getLogger(__name__)

#: Where an inference.yaml lies below a folder: beside the weights, in SAT's folder, in the official repository.
PLACES = ("inference.yaml", "configs/inference.yaml", "sat/configs/inference.yaml")
_OTHER = {"bf16": "fp16", "fp16": "bf16"}


def check_sat(file: Path) -> ConfigReport:
    """Judge the flags of an ``inference.yaml``.

    Raises:
        ValueError: if it is not one.
    """
    config = open_sat(file, read_bytes(file, MAX_BYTES))
    return _report(config, *identify_model(config))


def _report(config: "SatConfig", model: "Model", findings: list[Finding]) -> ConfigReport:
    return ConfigReport(config.file, SAT, model.text, (*_judge_flags(config, model), *findings))


def fix_sat(file: Path) -> tuple[ConfigReport, Path | None]:
    """Rewrite the flags of an ``inference.yaml``: ``check.fix_config`` says how."""
    raw = read_bytes(file, MAX_BYTES)
    config = open_sat(file, raw)
    model, findings = identify_model(config)
    if all(finding.verdict == OK for finding in _judge_flags(config, model)):
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


def _judge_flags(config: SatConfig, model: Model) -> list[Finding]:
    said = []
    for flag in FLAGS:
        if len(config.entries[flag]) > 1:
            reason = (
                f"{flag} is set {len(config.entries[flag])} times, and SAT refuses to start with a key that stands "
                "twice."
            )
            said.append(Finding(config.place(flag), MISMATCH, reason, "Keep one of these lines."))
    trained = model.trained
    on = [flag for flag in FLAGS if config.is_on(flag)]
    if len(on) == 2:
        reason = "Both flags are on, and SAT refuses to start with that (cannot specify both fp16 and bf16)."
        remedy = (
            f"Set {_OTHER[trained]}: False; {model.name} was trained in {trained}."
            if trained
            else "Set fp16: False (bf16 is finite with every CogVideoX), or bf16: False if the model is CogVideoX-2b."
        )
        return [*said, Finding(config.place(*FLAGS), MISMATCH, reason, remedy)]
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
        return [*said, Finding(config.place(), WARNING, reason, remedy)]
    if run == trained:
        return [*said, Finding(where, OK, f"{because}, and {model.name} was trained in {trained}.")]
    if trained == "bf16":
        remedy = (
            "Set bf16: True instead; on a GPU that has no bf16 (V100, T4, RTX 20xx), switch both off and run in fp32."
        )
        return [*said, Finding(where, MISMATCH, f"{because}, but {model.name} was trained in bf16: {BLACK}.", remedy)]
    if trained == "fp16":
        reason = (
            f"{because}, but {model.name} was trained in fp16: it stays finite, with the 8 significant bits of bf16 "
            "instead of the 11 of fp16."
        )
        return [*said, Finding(where, WARNING, reason, "Set fp16: True instead.")]
    if run == "bf16":
        return [*said, Finding(where, OK, f"{because}, which is finite with every CogVideoX.")]
    reason = (
        f"{because}, and which model this runs is not known: fp16 is right only for CogVideoX-2b; every other one "
        "turns black in it."
    )
    return [*said, Finding(where, WARNING, reason, "Set bf16: True instead, unless the model is CogVideoX-2b.")]


# --- Changing the flags in the text ---

_Edit = tuple[int, int, str]  # replace text[start:end]
_LINE_END = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # YAML's own
#: A flag as everybody writes it. For every other form a sentence says what to write.
_PLAIN = re.compile(r"""(["']?)(?:bf16|fp16)\1[ \t]*:[ \t]+[A-Za-z]+""")
_OPPOSITE = {"true": "false", "yes": "no", "on": "off", "false": "true", "no": "yes", "off": "on"}


def _edits(config: SatConfig, want: str) -> list[_Edit]:
    """What to replace in the text so that ``want`` is on and the other flag off, where each has a line of its own.

    Raises:
        ValueError: saying what to change by hand, if the flags are written otherwise.
    """
    other, text = _OTHER[want], config.text
    if config.args.flow_style:
        raise _by_hand(config, want, "args: is written in braces")
    for flag in FLAGS:
        if len(config.entries[flag]) > 1:
            raise _by_hand(config, want, f"{flag} is set more than once")
        for key, value in config.entries[flag]:
            if not _PLAIN.fullmatch(text, key.start_mark.index, value.end_mark.index):
                raise _by_hand(config, want, f"{config.place(flag)} is not one line with {flag}: and True or False")
    if config.entries[want]:
        pairs = (*config.entries[want], *config.entries[other])
        return [_flipped(text, value) for key, value in pairs if config.is_on(key.value) != (key.value == want)]
    if config.entries[other] and config.is_on(other):
        key = config.entries[other][0][0]
        start, end = key.start_mark.index, key.end_mark.index
        return [(start, end, text[start:end].replace(other, want))]
    for key, value in reversed(config.args.value):
        # An alias has the place of what it stands for, which is before its key.
        if key.start_mark.line == value.end_mark.line and value.start_mark.index >= key.end_mark.index:
            line, here = " " * key.start_mark.column + f"{want}: True", _LINE_END.search(text, value.end_mark.index)
            if here:
                return [(here.end(), here.end(), line + here[0])]
            return [(len(text), len(text), (_LINE_END.search(text) or ["\n"])[0] + line)]
    raise _by_hand(config, want, "no setting in args: is one line with a name and a value")


def _flipped(text: str, value: Any) -> _Edit:
    """Turn a boolean into its opposite, in its spelling."""
    start, end = value.start_mark.index, value.end_mark.index
    said = text[start:end]
    new = _OPPOSITE[said.lower()]
    return start, end, new.upper() if said.isupper() else new.title() if said.istitle() else new


def _apply(config: SatConfig, edits: list[_Edit], want: str) -> SatConfig:
    """Edit the config's text and check it: the flags are as wanted and no other setting changed.

    Raises:
        ValueError: if the check fails, as it does where anchors, aliases or merge keys set a flag from elsewhere in the
            file.
    """
    text = config.text
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    try:
        fixed = open_sat(config.file, text.encode("utf-8"))
    except ValueError as error:
        raise _by_hand(config, want, "its flags are written in an unusual way") from error
    if not (fixed.is_on(want) and not fixed.is_on(_OTHER[want]) and _rest(fixed.root) == _rest(config.root)):
        raise _by_hand(config, want, "an anchor or a merge key (&, *, <<) sets a flag from elsewhere in it")
    return fixed


def _by_hand(config: SatConfig, want: str, why: str) -> ValueError:
    """Make the error for a form that is not edited: which line is to say what."""
    steps = []
    for flag in (want, _OTHER[want]):
        # The place of an alias is elsewhere.
        keys = [key for key, _ in config.entries[flag] if key.start_mark.index >= config.args.start_mark.index]
        *spare, last = [key.start_mark.line + 1 for key in keys] or [0]
        steps += [f"delete {flag} in line {number}" for number in spare]
        if last:
            steps.append(f"have line {last} say {flag}: {flag == want}")
        elif flag == want or config.is_on(flag):
            steps.append(f"have {config.place()} say {flag}: {flag == want}")
    return ValueError(
        f"{short(config.file, 400)} was not changed: {why}, and that is changed by hand: {' and '.join(steps)}. Then "
        "check it again."
    )


def _rest(node, inside: str = ""):
    """Everything a document says but the flags of ``args``, in its order, for comparing."""
    if node.id == "mapping":
        pairs = [(key, value) for key, value in node.value if not (inside == "args" and key.value in FLAGS)]
        return [(_rest(key, "key"), _rest(value, str(key.value) if inside == "" else "value")) for key, value in pairs]
    if node.id == "sequence":
        return [_rest(item, "item") for item in node.value]
    return node.tag, node.value


def _replace(file: Path, old: bytes, new: bytes) -> Path:
    """Put ``new`` into the file in one step, after a copy of ``old`` was laid beside it, under the first of the backup
    names that is free. Returns the copy."""
    file = file.resolve()  # of a link, the file it leads to
    names = (file.with_name(f"{file.name}.bak{f'.{number}' if number else ''}") for number in itertools.count())
    backup = next(name for name in names if not os.path.lexists(name))
    try:
        write_whole(backup, old, like=file)
        try:
            write_whole(file, new, overwrite=True, like=file)
        except BaseException:
            backup.unlink()
            raise
    except OSError as error:
        raise ValueError(
            f"{short(file, 400)} cannot be rewritten ({reason(error)}), so it is as it was. Make it and its folder "
            "writable for you, or change it by hand as the check says."
        ) from error
    return backup
