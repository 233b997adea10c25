"""Run by ComfyUI's interpreter in its checkout: ComfyUI's memory management knows of our parts, unloads them for others, and
forgets those that are gone.

Arguments: the folder of the pack, and --cpu for ComfyUI.
"""

import gc
import importlib.util
import sys
import tempfile
from pathlib import Path

ROOT = Path(sys.argv.pop(1))
# The checkout and not this folder, which has a server.py too.
sys.path[0] = str(Path.cwd())
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management as management  # noqa: E402
import torch  # noqa: E402


def load(name, file, **options):
    """A module from a file: ComfyUI has packages of the same names as ours."""
    spec = importlib.util.spec_from_file_location(name, file, **options)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pack = load("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
tiny = load("tiny_checkpoint", ROOT / "tests" / "tiny_checkpoint.py")
handles_module, host = importlib.import_module("pack.cogvideox.handles"), importlib.import_module("pack.nodes.host")


def listed():
    return [loaded.model.model for loaded in management.current_loaded_models if loaded.model is not None]


with tempfile.TemporaryDirectory() as folder:
    opened = handles_module.open_handles(tiny.build_checkpoint(folder), "fp32", host.hardware())
    parts = [opened.text_encoder.weights, opened.model.weights]
    parked = []
    for part in parts:
        part.park = lambda part=part: parked.append(part)
    host.make_room(parts[0], 1 << 20)
    with parts[0].running():
        pass
    assert listed() == [parts[0]]
    assert management.current_loaded_models[0].model_loaded_memory() == parts[0].nbytes
    # Again and with another: each is there once, and nothing is moved.
    for part in (*parts, parts[1]):
        host.make_room(part, 1 << 20)
        with part.running():
            pass
    assert sorted(map(id, listed())) == sorted(map(id, parts))
    assert parked == []
    # Another model needs all the room: ours make way, the rest of the list is as ComfyUI wants it.
    management.free_memory(1e30, torch.device("cpu"))
    assert sorted(map(id, parked)) == sorted(map(id, parts))
    assert listed() == []
    # And come back when needed.
    host.make_room(parts[1])
    assert listed() == [parts[1]]
    # The button that frees everything drops the nodes' outputs: what was ours is gone, and ComfyUI's list knows.
    parked.clear()
    del opened, parts, part
    gc.collect()
    management.cleanup_models_gc()
    management.cleanup_models()
    assert management.current_loaded_models == []
print("memory is one")
