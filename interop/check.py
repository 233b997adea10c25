"""The config check: one question to ask of a SAT ``inference.yaml`` or a ComfyUI workflow, and the remedy for the
former."""

import os
from pathlib import Path

from cogvideox.checkpoint.folders import is_checkpoint_json
from cogvideox.words import listed, short

from .pictures import PICTURES
from .report import WHERE, WORKFLOW, ConfigReport
from .sat import PLACES, check_sat, fix_sat
from .workflow import check_workflow

_YAML, _WORKFLOWS = (".yaml", ".yml"), (".json", *PICTURES)


def is_config(path: Path | str) -> bool:
    """Whether ``check_config`` is the one to ask about ``path``: a YAML or JSON file, a picture or video, or a folder
    with a SAT ``inference.yaml`` in it.

    A checkpoint in diffusers layout is not a config, whatever else lies in it.
    """
    path = Path(path).expanduser()
    # Not Path's own questions, which raise for a name that is too long.
    if not os.path.isdir(path):
        return os.path.isfile(path) and path.suffix.lower() in (*_YAML, *_WORKFLOWS) and not is_checkpoint_json(path)
    # SAT releases have a transformer/ of their own; only diffusers puts a config.json into it.
    diffusers = (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file()
    return not diffusers and any((path / place).is_file() for place in PLACES)


def check_config(path: Path | str) -> ConfigReport:
    """Read a config and say, flag by flag or node by node, whether the dtype in it fits the model.

    Args:
        path: a SAT ``inference.yaml``, a folder that holds one (in it, in ``configs/`` or in ``sat/configs/``), or a
            workflow's JSON, or a picture or video with the workflow in it.

    Raises:
        ValueError: if there is no such file, or it is neither of the two.
    """
    file = _config_file(path)
    if file.suffix.lower() in _WORKFLOWS:
        return check_workflow(file)
    return check_sat(file)


def fix_config(path: Path | str) -> tuple[ConfigReport, Path | None]:
    """Make a SAT ``inference.yaml`` run in the dtype its model was trained in. Everything but the flags stays, byte for
    byte.

    The file is replaced in one step, after a copy of it was laid beside it as ``inference.yaml.bak`` (or ``.bak.1``,
    ``.bak.2``, ...: an older copy is never overwritten). Where the flags are right already, nothing is written.

    Returns:
        The report on the file as it is now, and the copy of what it was; None if nothing had to change.

    Raises:
        ValueError: as ``check_config`` does; if it is not known which model the file is for; or if the file cannot be
            written.
    """
    file = _config_file(path)
    if file.suffix.lower() in _WORKFLOWS:
        raise ValueError(
            f"{short(file, 400)} is a {WORKFLOW}; only a SAT inference.yaml can be fixed here, because a workflow "
            "that is open in ComfyUI would be saved over the fixed file. Check it, and change the dtype widget of "
            "each node that is named as a mismatch to bf16 in ComfyUI."
        )
    return fix_sat(file)


def _config_file(path: Path | str) -> Path:
    path = Path(path).expanduser()
    if os.path.isdir(path):
        found = [path / place for place in PLACES if (path / place).is_file()]
        if not found:
            raise ValueError(
                f"{short(path, 400)} holds no inference.yaml, nor do configs/ and sat/configs/ in it, so there is no "
                f"config to check. {WHERE}"
            )
        if len(found) > 1:
            names = listed((file.relative_to(path) for file in found), len(found))
            raise ValueError(
                f"{short(path, 400)} holds {len(found)} configs: {names}. Which of them you run is not to be seen. "
                "Give the path of one of them."
            )
        return found[0]
    if not os.path.exists(path):
        raise ValueError(f"There is no {short(path, 400)}, so there is no config to check. Check the path. {WHERE}")
    if path.suffix.lower() not in (*_YAML, *_WORKFLOWS):
        raise ValueError(
            f"{short(path, 400)} is neither YAML nor JSON by its ending ({short(path.suffix) or 'none'}), so it is "
            f"not known how to read it. {WHERE}"
        )
    return path
