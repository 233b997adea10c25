"""What every node of the pack shares: its category, and a check of the installed packages before it runs."""

from ..cogvideox.dependencies import require_dependencies


class Node:
    """A node whose work is ``execute``. Running it first checks the dependencies, so that a missing one is told in a sentence."""

    CATEGORY = "CogVideoX-1.5"
    FUNCTION = "run"

    def run(self, **inputs):
        require_dependencies()
        return self.execute(**inputs)
