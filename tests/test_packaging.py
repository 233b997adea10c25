"""The pack installs, imports in milliseconds, and tells a missing package in a sentence."""

import re
import subprocess
import sys

import pytest

from cogvideox import dependencies
from tests.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

IMPORT = """
import sys, time, importlib.util
import torch, einops, safetensors  # ComfyUI has imported these before it looks at a pack
start = time.perf_counter()
spec = importlib.util.spec_from_file_location("pack", "__init__.py", submodule_search_locations=["."])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"].INPUT_TYPES()
seconds = time.perf_counter() - start
heavy = [name for name in ("diffusers", "transformers", "accelerate", "peft", "av") if name in sys.modules]
print(seconds, heavy)
"""


def test_importing_the_pack_is_quick_and_imports_nothing_heavy():
    runs = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=ROOT).stdout for _ in range(3)]
    assert all("[]" in run for run in runs)
    assert min(float(run.split()[0]) for run in runs) < 0.05


def test_requirements_and_pyproject_name_the_same_packages_and_not_torch():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    assert PROJECT["project"]["dependencies"] == lines
    assert not any(line.startswith("torch") for line in lines)
    assert all(re.fullmatch(r"[a-z0-9-]+>=\d+(\.\d+)+", line) for line in lines)


def test_the_registry_accepts_the_metadata():
    """https://docs.comfy.org/registry/specifications"""
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9_.-]{0,99}", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("found", [None, "0.1.0"])
def test_a_missing_or_old_package_is_told_with_the_command_to_install_it(pack, monkeypatch, found):
    inside = sys.modules[f"{pack.__name__}.cogvideox.dependencies"]
    real = dependencies._installed
    monkeypatch.setattr(inside, "_installed", lambda name: found if name == "diffusers" else real(name))
    lowest = dependencies.requirements()["diffusers"]
    node = pack.NODE_CLASS_MAPPINGS["CogVideoX15EmptyLatent"]()
    with pytest.raises(RuntimeError) as caught:
        node.run(width=160, height=96, length=17, batch_size=1)
    said = str(caught.value)
    assert f'python -m pip install "diffusers>={lowest}"' in said
    assert (found or "not installed") in said


def test_everything_needed_is_installed_here():
    dependencies.require_dependencies()


@pytest.mark.parametrize(("older", "newer"), [("4.9.1", "4.50.3"), ("0.41", "0.41.1"), ("1.0.0rc1", "1.0.1"), ("5.24.0.dev0", "5.24.1")])
def test_versions_are_compared_by_number(older, newer):
    assert dependencies._numbers(older) < dependencies._numbers(newer)
