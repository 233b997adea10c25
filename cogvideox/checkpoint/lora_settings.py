"""What a LoRA's maker wrote beside its weights: alpha and rank, of all layers or by patterns of their names.

What a file says about itself (peft's ``adapter_config.json``, metadata, what lies beside the weights in a pickle) is
data: numbers are checked, and its patterns are matched here, as they would be regular expressions of a stranger.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import parse_json, read_json, read_text
from ..words import reason, short
from .headers import read_metadata
from .lora_names import article
from .lora_places import PICKLES, weights_in

_SETTINGS_FILE = "adapter_config.json"
#: Bytes of a file with settings, and entries of a table of patterns: more than a transformer has layers.
_MOST_SETTINGS, _MOST_PATTERNS = 4 << 20, 400
#: Patterns in a file that are more than a name; each is tried on every layer.
_MOST_CHOICES = 60


def finite_number(value: Any, what: str, where: str, least: int = 0) -> float:
    """A finite number that is at least ``least``: 0 for alphas, as peft has them, and 1 for ranks.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1e30:
        shown = f"the text '{short(value)}'" if isinstance(value, str) else short(value)
        raise ValueError(
            f"{where} is refused: {what} is {shown}, and it must be a finite number of at least {least}, or how "
            "strongly the LoRA was trained is not known. Download it again, or ask its maker."
        )
    return float(value)


def more_than_lora(where: str, what: str) -> ValueError:
    """The error for settings that say that a file is ``what`` and no LoRA."""
    return ValueError(
        f"{where} cannot be applied: its settings say that it is {article(what)}, and only LoRAs are known here. "
        "Ask its maker for a LoRA, or for the whole model."
    )


#: What settings of peft mean a change that two halves do not show -> what to call it.
_MORE_THAN_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "LoRA with biases",
    "modules_to_save": "LoRA and whole layers (modules_to_save)",
    "layer_replication": "LoRA of replicated layers",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "LoRA and trained tokens",
    "use_bdlora": "LoRA of blocks (BD-LoRA)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "router of LoRAs (Arrow)",
}
#: peft's ways to begin that leave the base weights as they are.
_BEGUN = ("gaussian", "eva", "orthogonal", "mica", "default", "true", "false", "")
_BASES = (
    "base_model_name_or_path",
    "base_model",
    "ss_base_model_version",
    "ss_sd_model_name",
    "modelspec.architecture",
)


@dataclass(frozen=True)
class Settings:
    """What a LoRA's maker wrote beside its weights.

    Attributes:
        alpha, rank: of every layer that the patterns do not name.
        alphas, ranks: patterns of layers' names, and numbers; the first that fits counts.
        by_root: divided is by the root of the rank (``use_rslora``).
        base: the model that it was trained on.
        biases: whether biases of the model were trained too (``bias``), if that is said.
    """

    alpha: float | None = None
    rank: float | None = None
    alphas: tuple[tuple["_Pattern", float], ...] = ()
    ranks: tuple[tuple["_Pattern", float], ...] = ()
    by_root: bool = False
    base: str | None = None
    biases: bool | None = None

    def scale(self, module: str, rank: int, alpha: float | None, sat: bool, where: str) -> float:
        """alpha / rank of a layer whose alpha the weights may tell; 1 where nothing tells one, as diffusers has it, and
        1 / rank for SAT's.

        Raises:
            ValueError: if these are the settings of another LoRA.
        """
        said = next((value for pattern, value in self.ranks if pattern.matches(module)), self.rank)
        if said is not None and said != rank:
            raise ValueError(
                f"{where} does not fit its settings: they say rank {said:g} for {module}, and it has {rank}, so its "
                "alpha is another's too. Download both again, from one place."
            )
        if alpha is None:
            alpha = next((value for pattern, value in self.alphas if pattern.matches(module)), self.alpha)
        if alpha is None:
            alpha = 1.0 if sat else float(rank)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read_settings(path: Path, beside: Mapping[str, Any]) -> Settings:
    """The settings of a LoRA's file: peft's, diffusers' or finetrainers', or what lies beside the weights in a pickle.

    Raises:
        ValueError: if they cannot be read, are none, or say that it is more than a LoRA.
    """
    where = short(path, 400)
    file = path.with_name(_SETTINGS_FILE)
    if os.path.lexists(file) and (path.stem == "adapter_model" or weights_in(path.parent) == [path]):
        return _checked(read_json(file, _MOST_SETTINGS), where)
    if path.suffix.lower() in PICKLES:
        found = next(
            (
                value
                for key in ("lora_config", "peft_config", "adapter_config", "config")
                if isinstance(value := beside.get(key), dict)
            ),
            {},
        )
        # peft keeps the settings of its adapters by their names.
        found = found["default"] if isinstance(found.get("default"), dict) else found
        numbers = {
            "lora_alpha": ("lora_alpha", "alpha", "network_alpha"),
            "r": ("lora_r", "lora_rank", "rank", "r", "network_dim"),
        }
        flat = {
            name: value
            for name, keys in numbers.items()
            for key in reversed(keys)
            if (value := found.get(key, beside.get(key))) is not None
        }
        if "lora_alpha" not in flat:
            # Where no alpha is said, a rank may be that of a process among several.
            flat.pop("r", None)
        flat |= {key: value for key, value in found.items() if isinstance(key, str) and key not in flat}
        alpha = _sat_alpha(path)
        return _checked(flat if alpha is None else flat | {"lora_alpha": alpha}, where)
    if path.suffix.lower() == ".gguf":
        return Settings()
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        raise ValueError(
            f"The settings of the LoRA {where} cannot be read ({reason(error)}), so its strength is not known. "
            "Download it again."
        ) from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"The settings of the LoRA {where} are a {type(metadata).__name__} and no table, so its strength is not "
            "known. Download it again."
        )
    written: dict = {}
    for key in ("lora_adapter_metadata", "lora_config"):
        if key in metadata:
            written = _table(metadata[key], key, where)
            break
    written = {name.removeprefix("transformer."): value for name, value in written.items()}
    return _checked({key: metadata[key] for key in _BASES if key in metadata} | written, where)


def _table(text: Any, key: str, where: str) -> dict:
    try:
        found = parse_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise ValueError(
            f"The settings of the LoRA {where} ({key} in its metadata) cannot be read ({reason(error)}), so its "
            "strength is not known. Download it again."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"The settings of the LoRA {where} ({key} in its metadata) are a {type(found).__name__} and no table, so "
            "its strength is not known. Download it again."
        )
    return found


def _sat_alpha(path: Path) -> int | float | str | None:
    """``lora_alpha`` of the configuration that SAT's trainer writes into the folder of a run, if it is said there."""
    file = path.parent.parent / "training_config.yaml"
    if not path.name.endswith("_model_states.pt") or not file.is_file():
        return None
    said = re.search(r"^[ \t]*lora_alpha[ \t]*:[ \t]*([^\s#]+)", read_text(file, _MOST_SETTINGS), re.MULTILINE)
    if said is None:
        return None
    try:
        return float(said[1])
    except ValueError:
        return said[1]


def _checked(given: Mapping, where: str) -> Settings:
    """Settings as they are to be used.

    Raises:
        ValueError: if a number is none, a pattern cannot be matched safely, or they say that it is more than a LoRA.
    """
    kind = given.get("peft_type")
    more = next((what for key, what in _MORE_THAN_LORA.items() if given.get(key)), None)
    if kind is not None and str(kind).split(".")[-1].upper() != "LORA":
        more = short(kind)
    if more is not None:
        raise more_than_lora(where, more)
    begun = given.get("init_lora_weights")
    if begun is not None and str(begun).lower() not in _BEGUN:
        raise ValueError(
            f"{where} cannot be applied: its training began with {short(begun)} (init_lora_weights), which changes the "
            "model's own weights too, and they are not in the file. Ask its maker for a LoRA that was converted "
            "(peft's path_initial_model_for_weight_conversion)."
        )
    by_root = given.get("use_rslora")
    if by_root not in (None, True, False) or isinstance(by_root, float):
        raise ValueError(
            f"{where} is refused: use_rslora in its settings is {short(by_root)} and must be true or false. Download "
            "it again."
        )

    def number(key: str, least: int = 0) -> float | None:
        return None if given.get(key) is None else finite_number(given[key], f"{key} in its settings", where, least)

    biases = given.get("bias")

    base = next((given[key] for key in _BASES if isinstance(given.get(key), str) and given[key]), None)
    alphas = tuple(_patterns(given.get("alpha_pattern"), "alpha_pattern", where))
    ranks = tuple(_patterns(given.get("rank_pattern"), "rank_pattern", where, least=1))
    # As peft writes it; a model's own settings may have a bias, too, which is a switch.
    trained = {"none": False, "all": True, "lora_only": True}.get(biases) if isinstance(biases, str) else None
    return Settings(number("lora_alpha"), number("r", least=1), alphas, ranks, bool(by_root), base, trained)


def _patterns(given: Any, key: str, where: str, least: int = 0) -> Iterator[tuple["_Pattern", float]]:
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{where} is refused: {key} in its settings is {short(given)} and must be a table of layers and numbers. "
            "Download it again."
        )
    if len(given) > _MOST_PATTERNS:
        raise ValueError(
            f"{where} is refused: {key} in its settings has {len(given):,} entries, more than a transformer has "
            "layers. Download it again."
        )
    choices = 0
    for pattern, value in given.items():
        found = _Pattern.parse(pattern)
        choices += 0 if found is None else len(found.choices)
        if found is None or choices > _MOST_CHOICES:
            raise ValueError(
                f"{where} is refused: {key} in its settings names layers by {short(pattern)}, a regular expression "
                "that is not run here, as it could run for ever. Names, and those with . .* .+ \\d+ ^ $ and (a|b) in "
                "them, are known: write it so, or name the layers."
            )
        yield found, finite_number(value, f"{short(pattern)} of {key} in its settings", where, least)


@dataclass(frozen=True)
class _Pattern:
    """A name of layers as peft has them: the end of their names, from a dot on, or all of it (``^``); matched in time
    that its length bounds.

    Attributes:
        name: all of it, where it is a name and nothing else.
        choices: else sequences of what must follow: letters (None: any), whether there may be none of them, and whether
            many.
        whole: whether it must begin where the name does.
    """

    name: str | None
    choices: tuple[tuple[tuple[str | None, bool, bool], ...], ...] = ()
    whole: bool = False

    @classmethod
    def parse(cls, pattern: Any) -> "_Pattern | None":
        """The pattern of a text in the simple forms, or None. ``(a|b)`` may stand in it once."""
        if not isinstance(pattern, str) or not 1 <= len(pattern) <= 300:
            return None
        whole = pattern.startswith("^")
        text = pattern[whole:].removesuffix("$")
        if re.fullmatch(r"[\w.-]+", text):
            return cls(text, whole=whole)
        group = re.fullmatch(r"([^()|]*)\((?:\?:)?([^()]*)\)([^()|]*)", text)
        if group is not None:
            texts = [group[1] + choice + group[3] for choice in group[2].split("|")]
        else:
            texts = [text] if whole else text.split("|")
        choices = [steps for choice in texts if (steps := _steps(choice)) is not None]
        if (
            len(texts) > 30
            or len(choices) < len(texts)
            or any(sum(many for *_, many in steps) > 5 for steps in choices)
        ):
            return None
        return cls(None, tuple(choices), whole)

    def matches(self, name: str) -> bool:
        if self.name is not None:
            return name == self.name or (not self.whole and name.endswith(f".{self.name}"))
        starts = {0} if self.whole else {0, *(place + 1 for place, letter in enumerate(name) if letter == ".")}
        return any(self._fits(name, starts, steps) for steps in self.choices)

    @staticmethod
    def _fits(name: str, places: set[int], steps: tuple) -> bool:
        for letters, none, many in steps:
            reached = set(places) if none else set()
            for place in places:
                while place < len(name) and (letters is None or name[place] in letters):
                    place += 1
                    if not many or place in reached:
                        reached.add(place)
                        break
                    reached.add(place)
            places = reached
            if not places:
                return False
        return len(name) in places


def _steps(text: str) -> tuple[tuple[str | None, bool, bool], ...] | None:
    """What a text in the simple forms demands, letter by letter; None if it has others."""
    steps, place = [], 0
    while place < len(text):
        if text.startswith("[0-9]", place):
            letters, place = "0123456789", place + 5
        elif text[place] == "\\" and text[place + 1 : place + 2] in ("d", ".", "-", "_"):
            letters, place = ("0123456789" if text[place + 1] == "d" else text[place + 1]), place + 2
        elif text[place] == ".":
            letters, place = None, place + 1
        elif text[place] in "\\[](){}*+?|^$":
            return None
        else:
            letters, place = text[place], place + 1
        sign = text[place] if text[place : place + 1] in ("*", "+") else ""
        place += len(sign)
        steps.append((letters, sign == "*", bool(sign)))
    return tuple(steps)
