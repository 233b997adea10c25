"""For scripts that ComfyUI's interpreter runs in its checkout: ComfyUI's modules and the pack, side by side.

Arguments of such a script: the folder of the pack, others of its own, and ComfyUI's options, which start with a dash.
To be imported first.
"""

import importlib.util
import sys
from pathlib import Path

ROOT, *arguments = (Path(argument) for argument in sys.argv[1:] if not argument.startswith("-"))
sys.argv[1:] = [argument for argument in sys.argv[1:] if argument.startswith("-")]
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
