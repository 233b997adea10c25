"""ComfyUI's page in a headless Chromium, for the tests and for the pictures: a node process that drives it, one JSON
line a command."""

import json
import os
import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).with_name("page.mjs")
HOW = (
    "set PLAYWRIGHT_CORE to the folder of the npm package playwright-core and CHROMIUM to a Chromium (default "
    "/usr/bin/chromium)"
)


def available() -> bool:
    """Whether there are node, playwright-core and a Chromium."""
    if shutil.which("node") is None or not Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists():
        return False
    find = "require.resolve(process.env.PLAYWRIGHT_CORE || 'playwright-core')"
    return subprocess.run(["node", "-e", find], cwd=SCRIPT.parent, capture_output=True).returncode == 0


class Page:
    """A tab with ComfyUI in it. Every command of page.mjs is a method: ``page.drop(path=...)``.

    Args:
        comfy: the server, from ``server.py``.
        scale: pixels of a screenshot for one of the page.
        settings: ComfyUI's settings by their ids, ``Comfy.Locale`` for one.
    """

    def __init__(self, comfy, width: int = 1600, height: int = 1000, scale: float = 1, **settings):
        self._comfy = comfy
        self._view = {"width": width, "height": height, "scale": scale}
        self._process = subprocess.Popen(
            ["node", str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.reload(**settings)

    def reload(self, **settings) -> None:
        """Open the page anew, in the language and look that the settings say."""
        # A person who has been here before, and whose mouse rests only for a moment before it gets a tooltip.
        known = {"Comfy.TutorialCompleted": True, "LiteGraph.Node.TooltipDelay": 20, "Comfy.Locale": "en"}
        known |= {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
        self._comfy.post("/settings", known | settings)
        self.open(url=self._comfy.url, **self._view)

    def __getattr__(self, command: str):
        if command.startswith("_"):
            raise AttributeError(command)
        return lambda **options: self._call(command, options)

    def _call(self, command: str, options: dict):
        self._process.stdin.write(json.dumps({"command": command, **options}, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the browser ended during {command}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
