"""What every node of the pack shares: its category, and a check of the installed packages before it runs."""

from ..cogvideox.dependencies import require_dependencies
from ..cogvideox.geometry import SIZE_STEP

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


def refusal(*checks: tuple) -> str | bool:
    """What ``VALIDATE_INPUTS`` answers when the graph is queued: True, or the engine's sentences about the widgets that cannot run.

    Args:
        checks: functions of the engine that raise ValueError, each with its arguments. A check with an argument that another node will give,
            and so is None as yet, is left to the run.
    """
    said = []
    for check, *values in checks:
        if not any(value is None for value in values):
            try:
                check(*values)
            except ValueError as error:
                said.append(str(error))
    return "\n".join(said) or True


class Node:
    """A node whose work is ``execute``. Running it first checks the dependencies, so that a missing one is told in a sentence."""

    CATEGORY = "CogVideoX-1.5"
    FUNCTION = "run"

    def run(self, **inputs):
        require_dependencies()
        return self.execute(**inputs)
