"""What every node of the pack shares: its category, and a check of the installed packages and of its inputs before it
runs."""

import math
from collections.abc import Callable
from typing import Any

from ..cogvideox.dependencies import require_dependencies
from ..cogvideox.geometry import SIZE_STEP
from .inputs import checked, objections

#: The widgets of a clip's size and length, less what the model of the node was trained for.
SIZE = {"min": SIZE_STEP, "max": 16384, "step": SIZE_STEP}
LENGTH = (
    "INT",
    {
        "default": 81,
        "min": 1,
        "max": 16001,
        "step": 16,
        "tooltip": "Frames to make, 16N+1: 81 is 5 seconds and 161 is 10 seconds at 16 fps. Longer than 161 was not trained.",
    },
)


class Node:
    """A node whose work is ``execute``. Running it first checks the dependencies and the inputs, so that what is wrong
    is told in a sentence."""

    CATEGORY = "CogVideoX-1.5"
    FUNCTION = "run"

    def run(self, **inputs):
        require_dependencies()
        return self.execute(**checked(type(self), inputs))

    @classmethod
    def refusal(cls, given: dict, *checks: tuple) -> str | bool:
        """What ``VALIDATE_INPUTS`` answers when the graph is queued: True, or the sentences about the widgets that
        cannot run.

        Args:
            given: the widgets by name; those that another node will give are None as yet, and left to the run.
            checks: functions of the engine that raise ValueError, each with its arguments. A check with an argument
                that is None, or is no value for its widget, is left out.
        """
        odd = objections(cls, given, limits=False)
        unusable, said = [given[name] for name in odd], list(odd.values())
        for check, *values in checks:
            if not any(value is None or any(value is other for other in unusable) for value in values):
                try:
                    check(*values)
                except ValueError as error:
                    said.append(str(error))
        return "\n".join(said or objections(cls, given).values()) or True

    @classmethod
    def fingerprint(cls, given: dict, look: Callable[[], Any]) -> Any:
        """What ``IS_CHANGED`` answers: what ``look`` says of the files that were chosen, or why there are none; NaN,
        which is never the same, where another node will choose."""
        if any(value is None for value in given.values()):
            return math.nan
        odd = objections(cls, given)
        if odd:
            return "\n".join(odd.values())
        try:
            return look()
        except (ValueError, OSError) as error:
            return str(error)
