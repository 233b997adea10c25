"""Installed as ComfyUI Manager and ``comfy node install`` do it: an archive or a clone, and then pip, into what
ComfyUI's users have."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import pytest

from tests import workflows
from tests.comfyui.server import from_environment
from tests.conftest import ROOT
from tests.test_packaging import IMPORT, archive

CHECKOUT = os.environ.get("COMFYUI_PATH")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()

pytestmark = pytest.mark.skipif(
    CHECKOUT is None, reason="no ComfyUI: set COMFYUI_PATH to a checkout and COMFYUI_PYTHON to its interpreter"
)

#: Prints what ComfyUI's requirements bring, as far as it is installed: name -> [version, what it needs].
BROUGHT = """
import json, sys
from importlib import metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
lines = [line.split("#")[0].strip() for line in open(sys.argv[1], encoding="utf-8")]
todo, found = [line for line in lines if line], {}
while todo:
    need = Requirement(todo.pop())
    name = canonicalize_name(need.name)
    try:
        dist = metadata.distribution(need.name)
    except metadata.PackageNotFoundError:
        continue
    if name not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
        found[name] = [dist.version, dist.requires or []]
        todo += dist.requires or []
print(json.dumps(found))
"""
#: What ComfyUI's users have who installed it earlier and did not renew its packages: transformers, and what it then
#: asked of huggingface-hub.
EARLIER = {
    "transformers 4": {
        "transformers": ["4.51.3", ["huggingface-hub<1.0,>=0.30.0", "safetensors>=0.4.3"]],
        "huggingface-hub": ["0.36.2", []],
    },
    "transformers 5.0": {
        "transformers": ["5.0.0", ["huggingface-hub<2.0,>=1.3.0", "safetensors>=0.4.3"]],
        "huggingface-hub": ["1.33.0", []],
    },
}


def unpack(folder: Path) -> None:
    """The registry's archive, packed as ``comfy node publish`` and unpacked as ComfyUI Manager do."""
    packed = folder.parent / "CNR_temp.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in archive():
            file.write(ROOT / name, name)
    with zipfile.ZipFile(packed) as file:
        file.extractall(folder)
    packed.unlink()


class Environment:
    """A Python environment of which pip sees the packages that ``brought`` names, and that changes in nothing when pip
    installs."""

    def __init__(self, folder: Path, brought: dict):
        self._folder, self._report = folder, folder / "report.json"
        subprocess.run([PYTHON, "-m", "venv", folder / "venv"], check=True)
        self._python = next(
            path
            for path in (folder / "venv" / "bin" / "python", folder / "venv" / "Scripts" / "python.exe")
            if path.exists()
        )
        self.packages = {}
        self.have(brought)

    def have(self, packages: dict) -> None:
        """Have these packages too, or in these versions."""
        for name, (version, needs) in packages.items():
            for old in (self._folder / "packages").glob(f"{name.replace('-', '_')}-*.dist-info/*"):
                old.unlink()
                if not any(old.parent.iterdir()):
                    old.parent.rmdir()
            place = self._folder / "packages" / f"{name.replace('-', '_')}-{version}.dist-info"
            place.mkdir(parents=True)
            lines = [
                "Metadata-Version: 2.1",
                f"Name: {name}",
                f"Version: {version}",
                *(f"Requires-Dist: {need}" for need in needs),
            ]
            (place / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (place / "INSTALLER").write_text("pip", encoding="utf-8")
            (place / "RECORD").touch()
            self.packages[name] = version

    def run(self, *arguments) -> dict:
        """What pip would install, by name: [version, what it needs]."""
        self._report.unlink(missing_ok=True)
        told = {"PIP_DRY_RUN": "1", "PIP_REPORT": str(self._report), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment = os.environ | told | {"PYTHONPATH": str(self._folder / "packages")}
        done = subprocess.run(
            [self._python, *map(str, arguments)], env=environment, capture_output=True, text=True, cwd=ROOT
        )
        if re.search(
            "NewConnectionError|NameResolutionError|ConnectTimeout|from versions: none", done.stdout + done.stderr
        ):
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, done.stderr[-2000:]
        if not self._report.exists():
            return {}
        listed = [item["metadata"] for item in json.loads(self._report.read_text(encoding="utf-8"))["install"]]
        return {
            item["name"].lower().replace("_", "-"): [item["version"], item.get("requires_dist", [])] for item in listed
        }

    def pip(self, *what) -> dict:
        return self.run("-m", "pip", "install", *what)

    def changed(self, installed: dict) -> dict:
        return {
            name: (self.packages[name], version) for name, (version, _) in installed.items() if name in self.packages
        }


@pytest.fixture(scope="module")
def brought():
    done = subprocess.run(
        [PYTHON, "-c", BROUGHT, f"{CHECKOUT}/requirements.txt"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


class TestPip:
    def test_into_a_fresh_comfyui_changes_nothing_that_is_there(self, tmp_path, brought):
        assert {"torch", "transformers", "huggingface-hub", "av", "numpy", "safetensors", "sentencepiece"} <= set(
            brought
        )
        environment = Environment(tmp_path, brought)
        new = environment.pip("-r", ROOT / "requirements.txt")
        assert environment.changed(new) == {}
        assert {"diffusers", "accelerate", "gguf"} <= set(new)
        # ComfyUI Manager asks for one line after the other.
        for line in LINES:
            new = environment.pip(line)
            assert environment.changed(new) == {}
            environment.have(new)
        assert environment.run(ROOT / "install.py") == {}

    @pytest.mark.parametrize("earlier", EARLIER)
    def test_line_by_line_into_an_earlier_comfyui_ends_with_what_it_had(self, tmp_path, brought, earlier):
        """pip alone would leave a diffusers that cannot be imported with the huggingface-hub that transformers gets
        back."""
        environment = Environment(tmp_path, brought | EARLIER[earlier])
        before = dict(environment.packages)
        for line in LINES:
            environment.have(environment.pip(line))
        environment.have(environment.run(ROOT / "install.py"))
        environment.run("-c", "from cogvideox.dependencies import unfit; assert unfit() == []")
        for name in ("transformers", "torch", "numpy", "huggingface-hub", "tokenizers", "av"):
            assert environment.packages[name] == before[name]


def test_the_archive_runs_a_workflow_in_folders_of_any_name(tmp_path):
    base = tmp_path / "我的 ComfyUI" / "папка с пробелами"
    base.mkdir(parents=True)
    comfy = from_environment(base, put=unpack)
    try:
        models = base / "models" / "CogVideo"
        (models / "CogVideoX1.5-5B").rename(models / "модель 一 (1,5)")
        prompt = workflows.to_api(
            workflows.read(next(path for path in workflows.FILES if path.stem == "text_to_video"))
        )
        small = {"width": 80, "height": 48, "length": 1, "steps": 1, "filename_prefix": "видео/我的 video"}
        for node in prompt.values():
            node["inputs"] |= {key: value for key, value in small.items() if key in node["inputs"]}
            if node["class_type"] == "CogVideoX15ModelLoader":
                listed = comfy.get("/object_info/CogVideoX15ModelLoader")["CogVideoX15ModelLoader"]["input"][
                    "required"
                ]["model"][0]
                (node["inputs"]["model"],) = listed
        assert listed[0].startswith("модель 一 (1,5) · ")
        history = comfy.run(prompt)
        assert history["status"]["status_str"] == "success"
        saved = next(output["images"][0] for output in history["outputs"].values() if "images" in output)
        assert saved["subfolder"] == "видео"
        with av.open(str(base / "output" / saved["subfolder"] / saved["filename"])) as container:
            assert sum(1 for _ in container.decode(video=0)) == 1
    finally:
        comfy.close()


def test_a_clone_is_found_by_comfyui(tmp_path):
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "a clone"], check=True, capture_output=True)
    assert {
        path.relative_to(tmp_path / "a clone").as_posix()
        for path in (tmp_path / "a clone").rglob("*")
        if path.is_file()
    } > set(archive())
    subprocess.run([PYTHON, "-c", IMPORT], cwd=tmp_path / "a clone", check=True, capture_output=True)
