"""For scripts that ComfyUI's interpreter runs in its checkout: ComfyUI's modules and the pack, side by side.

Arguments of such a script: the folder of the pack, and --cpu for ComfyUI. To be imported first.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(sys.argv.pop(1))
# The checkout and not this folder, which has a server.py too.
sys.path[0] = str(Path.cwd())
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()


def load(name, file, **options):
    """A module from a file: ComfyUI has packages of the same names as ours."""
    spec = importlib.util.spec_from_file_location(name, file, **options)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pack = load("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
tiny = load("tiny_checkpoint", ROOT / "tests" / "tiny_checkpoint.py")
