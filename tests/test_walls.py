"""The walls of ARCHITECTURE.md stand, and the private names of other libraries that are relied on are there."""

import ast
import importlib
from functools import reduce
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cogvideox.modules import internals
from tests import walls


def test_no_wall_is_crossed():
    assert walls.broken() == []


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("cogvideox/choices.py", "from .sampling import sample", "which is above"),
        (
            "cogvideox/choices.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .handles import Model",
            "which is above",
        ),
        ("cogvideox/words.py", "from .choices import DTYPES", "a circle of files"),
        ("cogvideox/text.py", "import folder_paths", "imports ComfyUI's folder_paths"),
        ("nodes/cache.py", "import comfy.utils", "imports ComfyUI's comfy.utils"),
        ("cogvideox/text.py", "import transformers", "imports transformers at import time"),
        ("cogvideox/text.py", "def run(module):\n    return module._diffusers_hook", "touches _diffusers_hook"),
        (
            "cogvideox/text.py",
            "def run(module):\n    return getattr(module, '_forward_hooks')",
            "touches _forward_hooks",
        ),
        ("cogvideox/text.py", "from torch import _dynamo", "touches _dynamo"),
        ("cogvideox/somewhere.py", "import math", "stands on no floor"),
    ],
)
def test_each_wall_falls_when_it_is_crossed(file, source, said, monkeypatch):
    changed = dict(walls.sources()) | {file: ast.parse(source)}
    if file == "cogvideox/words.py":
        changed["cogvideox/choices.py"] = ast.parse("from .words import short")
    monkeypatch.setattr(walls, "sources", lambda: changed)
    assert any(said in line for line in walls.broken())


@pytest.mark.parametrize(
    "text",
    [
        "def run():\n    import transformers",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
    ],
)
def test_a_heavy_import_inside_a_function_costs_nothing_at_the_start(text, monkeypatch):
    changed = dict(walls.sources()) | {"cogvideox/text.py": ast.parse(text)}
    monkeypatch.setattr(walls, "sources", lambda: changed)
    assert not [line for line in walls.broken() if "transformers" in line]


@pytest.mark.parametrize(("module", "path"), internals.NAMES)
def test_each_private_name_of_other_libraries_is_there(module, path):
    reduce(getattr, path.split("."), importlib.import_module(module))


def test_diffusers_keeps_its_hooks_where_they_are_looked_for():
    from diffusers.hooks import HookRegistry, ModelHook

    module = nn.Linear(2, 2)
    assert internals.hook_registry(module) is None
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(ModelHook(), "ours")
    assert internals.hook_registry(module) is registry
    assert internals.is_hooked(module)
    assert registry.get_hook("ours") in registry.hooks.values()
    undo = internals.replace_forward(module, lambda x: x + 1)
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 2.0))
    undo()
    assert torch.equal(module(torch.ones(2)), module.weight.sum(1) + module.bias)


def test_a_field_that_no_hook_has_is_an_error():
    hooks = [SimpleNamespace(threshold=0.1), SimpleNamespace()]
    internals.steer(hooks, "threshold", 0.5)
    assert hooks[0].threshold == 0.5
    assert not hasattr(hooks[1], "threshold")
    with pytest.raises(AttributeError, match="has the field limit"):
        internals.steer(hooks, "limit", 0.5)
