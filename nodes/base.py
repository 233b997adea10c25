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


class Node:
    """A node whose work is ``execute``. Running it first checks the dependencies, so that a missing one is told in a sentence."""

    CATEGORY = "CogVideoX-1.5"
    FUNCTION = "run"

    def run(self, **inputs):
        require_dependencies()
        return self.execute(**inputs)
