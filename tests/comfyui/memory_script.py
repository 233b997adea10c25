"""Run by ComfyUI's interpreter in its checkout: ComfyUI's memory management knows of our parts, unloads them for
others, and forgets those that are gone.
"""

import gc
import importlib
import tempfile

from inside import tiny  # isort: skip # It comes first: it makes the others importable.

import comfy.model_management as management
import torch

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
