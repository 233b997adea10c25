"""How long a step takes under ComfyUI's KSampler on the MODEL of CogVideoX-1.5 to ComfyUI, against our own sampler:
both in one process of ComfyUI's, taking turns, a small model of random weights in fp32 on the CPU, guided.

Run as ``python -m benchmarks.bridge``, with ``COMFYUI_PATH`` (and ``COMFYUI_PYTHON``).
"""

import os
import subprocess
import sys

from tests.conftest import ROOT


def main() -> int:
    if "COMFYUI_PATH" not in os.environ:
        sys.exit("no ComfyUI: set COMFYUI_PATH to a checkout and COMFYUI_PYTHON to its interpreter")
    script = ROOT / "tests" / "comfyui" / "bridge_script.py"
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(script), str(ROOT), "speed", "--cpu"]
    return subprocess.run(command, cwd=os.environ["COMFYUI_PATH"]).returncode


if __name__ == "__main__":
    sys.exit(main())
