"""The pack installs, imports in milliseconds, and tells a missing package in a sentence."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

import install
from cogvideox import dependencies, loading
from cogvideox.handles import open_handles
from tests.conftest import CPU, ROOT
from tests.helpers import generate_beside, write_package

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}

IMPORT = """
import sys, importlib.util
import torch, einops, safetensors  # ComfyUI has imported these before it looks at a pack
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("pack", "__init__.py", submodule_search_locations=["."])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"].INPUT_TYPES()
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""


def archive() -> list[str]:
    """The files of the registry's archive: what git tracks, less what .comfyignore names."""
    listed = [
        subprocess.run(
            ["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for options in ([], ["--cached", "--ignored", "--exclude-from=.comfyignore"])
    ]
    return sorted(set(listed[0]) - set(listed[1]))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder of an unpacked archive."""
    folder = tmp_path_factory.mktemp("archive") / "pack"
    for name in archive():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_importing_the_pack_imports_itself_and_the_standard_library(unpacked):
    """Milliseconds, then: what takes long to import is imported by the nodes that use it, when they run. And it is all
    in the archive."""
    new = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=unpacked
    ).stdout.split()
    assert set(new) - set(sys.stdlib_module_names) == {"pack"}


def test_requirements_and_pyproject_name_the_same_packages_and_not_torch():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    assert PROJECT["project"]["dependencies"] == lines
    assert not any(line.startswith("torch") for line in lines)
    assert all(re.fullmatch(r"[a-z0-9-]+>=\d+(\.\d+)+", line) for line in lines)
    # ComfyUI Manager installs line by line, and the last line's needs win: those of ComfyUI's own package, without
    # which nothing starts.
    assert lines.index(next(line for line in lines if line.startswith("transformers"))) > 0
    assert lines[0].startswith("diffusers")


def test_the_registry_accepts_the_metadata():
    """https://docs.comfy.org/registry/specifications"""
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9_.-]{0,99}", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    # A square of at most 400 pixels, and 21:9.
    icon, banner = (Image.open(ROOT / comfy[key].partition("/main/")[2]).size for key in ("Icon", "Banner"))
    assert icon[0] == icon[1] <= 400
    assert banner[0] * 9 == banner[1] * 21
    assert {"Documentation", "Bug Tracker"} <= set(project["urls"])
    assert all(comfy.values()), "an empty field is none"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    cards = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend", "GPU :: Apple Metal"}
    assert {line.partition(" :: ")[2] for line in project["classifiers"] if line.startswith("Environment")} < cards
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


class TestTheWorkflows:
    def test_every_python_that_is_named_is_tested_and_no_other(self):
        named = {
            line.rpartition(" :: ")[2]
            for line in PROJECT["project"]["classifiers"]
            if line.startswith("Programming Language :: Python :: 3.")
        }
        matrix = WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]
        assert set(matrix["python"]) == named
        assert min(named, key=lambda version: int(version[2:])) == PROJECT["project"]["requires-python"].removeprefix(
            ">="
        )
        assert {job["os"] for job in matrix["include"]} == {"windows-latest", "macos-latest"}
        rows = [*matrix["include"], *WORKFLOWS["test"]["jobs"]["versions"]["strategy"]["matrix"]["include"]]
        assert {row["python"] for row in rows} <= named

    @pytest.mark.parametrize("name", sorted(WORKFLOWS))
    def test_they_may_only_read_and_use_actions_of_a_known_major(self, name):
        assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
        for job in WORKFLOWS[name]["jobs"].values():
            assert not job.get("permissions")
            for step in job.get("steps", []):
                assert re.fullmatch(r"[\w./-]+@v\d+", step.get("uses", "a/b@v1"))

    def test_only_the_owners_repository_publishes_and_only_after_the_tests(self):
        jobs = WORKFLOWS["publish"]["jobs"]
        owner = PROJECT["project"]["urls"]["Repository"].split("/")[-2]
        assert jobs["version"]["if"] == f"github.repository_owner == '{owner}'"
        assert (jobs["test"]["needs"], jobs["publish"]["needs"]) == ("version", "test")
        assert "secrets" not in str(WORKFLOWS["test"]) + str(jobs["version"]) + str(jobs["test"])

    @pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="the workflow runs on Linux")
    def test_only_a_new_version_is_published(self, tmp_path):
        def git(*arguments):
            who = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
            return subprocess.run(
                ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
            ).stdout.strip()

        def commit(text):
            (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
            git("add", ".")
            git("commit", "-m", "x")
            return git("rev-parse", "HEAD")

        def is_new(before):
            step = next(step for step in WORKFLOWS["publish"]["jobs"]["version"]["steps"] if "run" in step)
            output = tmp_path.with_name("output")
            environment = os.environ | {"BEFORE": before, "GITHUB_OUTPUT": str(output)}
            subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", step["run"]], cwd=tmp_path, env=environment, check=True
            )
            told = output.read_text(encoding="utf-8")
            output.unlink()
            return told == "is_new=true\n"

        git("init")
        first = commit((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert is_new("0" * 40)
        second = commit((ROOT / "pyproject.toml").read_text(encoding="utf-8") + "\n# more\n")
        assert not is_new(first)
        commit('[project]\nversion = "99.0.0"\n')
        assert is_new(second)
        assert is_new("")


def test_the_archive_holds_all_that_runs_and_nothing_for_developers(unpacked):
    tops = {name.split("/")[0] for name in archive()}
    assert not tops & {"tests", "benchmarks", ".github", ".ci", "Makefile"}
    assert tops >= {
        "__init__.py",
        "cogvideox",
        "commands",
        "docs",
        "example_workflows",
        "generate.py",
        "install.py",
        "nodes",
        "requirements.txt",
        "web",
        "pyproject.toml",
    }
    assert sum((unpacked / name).stat().st_size for name in archive()) < 4.3e6
    done = subprocess.run(
        [sys.executable, "generate.py", "--help"], cwd=unpacked, capture_output=True, text=True, check=True
    )
    assert "--prompt" in done.stdout


class TestDependencies:
    @pytest.fixture(autouse=True)
    def _ask_again(self):
        dependencies.require_dependencies.cache_clear()

    @pytest.mark.parametrize("found", [None, "0.1.0"])
    def test_a_missing_or_old_package_is_told_with_the_command_that_helps(self, pack, monkeypatch, found):
        inside = sys.modules[f"{pack.__name__}.cogvideox.dependencies"]
        real = dependencies.installed
        inside.require_dependencies.cache_clear()
        monkeypatch.setattr(inside, "installed", lambda name: found if name == "diffusers" else real(name))
        lowest = dependencies.requirements()["diffusers"]
        node = pack.NODE_CLASS_MAPPINGS["CogVideoX15EmptyLatent"]()
        with pytest.raises(RuntimeError) as caught:
            node.run(width=160, height=96, length=17, batch_size=1)
        said = str(caught.value)
        assert f"needs diffusers {lowest} or newer" in said
        assert (found or "not installed") in said
        assert f'python "{ROOT / "install.py"}"' in said

    def test_everything_needed_is_installed_here(self):
        assert dependencies.unfit() == []
        dependencies.require_dependencies()

    def test_a_package_that_cannot_be_imported_beside_another_says_beside_which(self, monkeypatch):
        """diffusers 0.42 and the huggingface-hub of transformers 4, as ComfyUI Manager leaves them."""
        monkeypatch.setattr(
            metadata, "requires", lambda name: ["huggingface-hub<9.0,>=8.1"] if name == "diffusers" else []
        )

        def import_module(name):
            raise ImportError("cannot import name 'resolve_revision'")

        monkeypatch.setattr(dependencies, "import_module", import_module)
        hub = metadata.version("huggingface-hub")
        with pytest.raises(
            dependencies.DependencyError,
            match=rf"needs huggingface-hub<9.0,>=8.1, but {hub} is installed \(cannot import .*install\.py",
        ):
            dependencies.require_dependencies()

    def test_a_package_that_runs_though_it_asks_for_more_is_left_alone(self, monkeypatch):
        monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=99"])
        dependencies.require_dependencies()

    @pytest.mark.parametrize(
        ("name", "does", "said"),
        [
            # Compiled code for another PyTorch.
            ("xformers", "raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
            # Fails within torch, which is not to blame.
            (
                "torchvision",
                "import torch\ntorch.library.register_fake('x::nms')(len)",
                "operator x::nms does not exist",
            ),
        ],
    )
    def test_a_package_that_takes_diffusers_or_transformers_away_is_named(self, tiny, tmp_path, name, does, said):
        write_package(tmp_path, name, "0.26.0", does)
        done = generate_beside(tmp_path, tiny)
        assert done.returncode == 1
        assert f"error: The package {name} 0.26.0 does not work here ({said})" in done.stderr
        assert f'"{sys.executable}" -m pip uninstall {name}' in done.stderr

    @pytest.mark.parametrize(
        ("name", "does", "said"),
        [
            (
                "einops",
                "raise ImportError('DLL load failed')",
                r"The package einops [\d.]+ cannot .*\(DLL load failed\)",
            ),
            # Not required, but by what is; and not called as its package is.
            (
                "PIL",
                "raise ImportError('no _imaging')",
                r"The package (?i:pillow) [\d.]+ cannot be imported \(no _imag",
            ),
            # Whatever a package raises while it is imported.
            ("einops", "raise OSError('invalid ELF header')", r"The package einops [\d.]+ .*\(invalid ELF header\)"),
            # transformers says of these that the tokenizer's file is no good, or that tiktoken is missing.
            ("sentencepiece", "raise ImportError('DLL load failed')", r"The package sentencepiece [\d.]+ cannot .*DLL"),
            ("tokenizers", "raise ImportError('undefined symbol')", r"The package tokenizers [\d.]+ cannot .*symbol"),
            ("google.protobuf", "raise TypeError('Descriptors')", r"The package protobuf [\d.]+ cannot .*\(Descript"),
        ],
    )
    def test_a_package_that_is_needed_and_cannot_be_imported_is_named(self, tiny, tmp_path, name, does, said):
        if name == "google.protobuf" and not dependencies.is_at_least("transformers", "5"):
            pytest.skip("transformers before 5 reads the tokenizer without")
        folder = tmp_path.joinpath("path", *name.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(does, encoding="utf-8")
        command = "--prompt x --width 96 --height 64 --frames 17 --steps 1".split()
        done = subprocess.run(
            [sys.executable, "generate.py", "--model", tiny, *command, "--output", tmp_path / "video.mp4"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "path")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert re.search(rf"error: {said}.* -m pip install --force-reinstall --no-deps", done.stderr)

    def test_a_node_says_it_whatever_the_import_raised(self, pack, monkeypatch):
        def fail(*_, **__):
            exec("raise AttributeError('_ARRAY_API not found')", {"__name__": "PIL.none_such"})

        node = pack.NODE_CLASS_MAPPINGS["CogVideoX15EmptyLatent"]
        monkeypatch.setattr(node, "execute", fail)
        with pytest.raises(RuntimeError, match=r"(?i)The package pillow .* imported \(_ARRAY_API not found\)"):
            node().run(width=160, height=96, length=17, batch_size=1)
        # What fails otherwise is as it was.
        monkeypatch.setattr(node, "execute", lambda *_, **__: {}["a"])
        with pytest.raises(KeyError):
            node().run(width=160, height=96, length=17, batch_size=1)

    def test_an_old_torch_is_a_sentence(self, monkeypatch):
        assert f"torch>={dependencies.TORCH}" in PROJECT["project"]["optional-dependencies"]["standalone"]
        monkeypatch.setattr("torch.__version__", "2.5.1+cu121")
        with pytest.raises(
            dependencies.DependencyError, match=r"PyTorch is 2\.5\.1\+cu121, which is too old; .* needs 2\.6 or newer"
        ):
            dependencies.require_dependencies()
        # Of what is not imported yet, what is installed.
        monkeypatch.delitem(sys.modules, "torch")
        dependencies.require_dependencies()
        monkeypatch.setattr(dependencies, "installed", lambda name: None)
        monkeypatch.setattr(dependencies, "importable", lambda name: False)
        dependencies.require_dependencies.cache_clear()
        with pytest.raises(dependencies.DependencyError, match="PyTorch is not installed; "):
            dependencies.require_dependencies()

    def test_a_library_that_lacks_what_it_needs_itself_is_sent_to_the_installer(self):
        for outermost in (RuntimeError("Failed to import diffusers.models: no luck"), ImportError("no luck")):
            try:
                exec("raise ImportError('cannot import name x')", {"__name__": "diffusers.models"})
            except ImportError as error:
                outermost.__cause__ = error
            said = str(dependencies.import_failure(outermost))
            assert "A library that CogVideoX-1.5 needs cannot be imported (cannot import name x)" in said
            assert "install.py" in said

    def test_other_errors_are_not_taken_for_it(self):
        error = ValueError("Install gguf.")
        error.__cause__ = ImportError("no gguf")
        assert dependencies.import_failure(error) is None

    def test_a_module_that_cannot_be_built_for_it_is_not_the_files_fault(self, tiny, monkeypatch):
        """Nobody is to download 20 GB again for that."""

        def fail(*_):
            raise RuntimeError("Failed to import diffusers.loaders.peft") from ImportError("undefined symbol")

        monkeypatch.setattr(loading, "build_module", fail)
        with pytest.raises(RuntimeError, match="Failed to import"):
            loading.empty_module(open_handles(tiny, "fp32", CPU).model.weights.part)

    def test_a_node_says_it_too(self, pack, monkeypatch):
        inside = sys.modules[f"{pack.__name__}.cogvideox.dependencies"]
        real = inside.installed
        monkeypatch.setattr(inside, "installed", lambda name: "2.8.3" if name == "flash_attn" else real(name))

        def fail(*_, **__):
            try:
                exec("raise ImportError('undefined symbol')", {"__name__": "flash_attn.interface"})
            except ImportError as error:
                raise RuntimeError("Failed to import diffusers.loaders.peft because of …") from error

        node = pack.NODE_CLASS_MAPPINGS["CogVideoX15EmptyLatent"]
        monkeypatch.setattr(node, "execute", fail)
        with pytest.raises(RuntimeError, match=r"The package flash_attn 2\.8\.3 does not work .*\(undefined symbol\)"):
            node().run(width=160, height=96, length=17, batch_size=1)

    @pytest.mark.parametrize(
        ("place", "raised"),
        [
            ("/home/u/ComfyUI/custom_nodes/KJNodes", "ImportError('No module named sage')"),
            ("comfy.ldm", "ImportError('No module named sage')"),
            ("__main__", "RuntimeError('Failed to import image')"),
            (None, "ImportError('x')"),
        ],
    )
    def test_what_others_import_for_themselves_is_theirs(self, place, raised):
        with pytest.raises((ImportError, RuntimeError)) as caught:
            exec(f"raise {raised}", {"__name__": place})
        assert dependencies.import_failure(caught.value) is None

    def test_an_error_that_was_only_handled_beside_is_not_the_cause(self):
        with pytest.raises(ImportError) as caught:
            exec(
                "try:\n raise RuntimeError('CUDA out of memory')\nexcept RuntimeError:\n raise ImportError('needs y')",
                {"__name__": "transformers.models"},
            )
        assert "(needs y)" in str(dependencies.import_failure(caught.value))
        # One that is said to come of itself ends, too.
        caught.value.__cause__ = caught.value
        assert "(needs y)" in str(dependencies.import_failure(caught.value))

    def test_what_is_installed_again_is_the_version_that_fits(self, monkeypatch):
        error = ImportError("DLL load failed")
        with pytest.raises(ImportError) as caught:
            exec("raise error", {"__name__": "sentencepiece", "error": error})
        version = metadata.version("sentencepiece")
        assert f"sentencepiece=={version}. Then restart" in str(dependencies.import_failure(caught.value))

    def test_extras_and_other_systems_are_not_asked_for(self, monkeypatch):
        monkeypatch.setattr(
            metadata,
            "requires",
            lambda name: ["none-such; extra == 'test'", "none-such; sys_platform == 'amiga'", "numpy"],
        )
        assert dependencies.unmet_needs("diffusers") == []

    @pytest.mark.parametrize(
        ("older", "newer"), [("4.9.1", "4.50.3"), ("0.41", "0.41.1"), ("1.0.0rc1", "1.0.1"), ("5.24.0.dev0", "5.24.1")]
    )
    def test_versions_are_compared_by_number(self, older, newer):
        assert dependencies.is_older(older, newer)
        assert not dependencies.is_older(newer, older)


class TestInstalling:
    """install.py; that pip then finds what fits is tested in tests/comfyui, with pip."""

    @pytest.fixture
    def ran(self, monkeypatch):
        """What was run, with the constraints of the time; every run fails."""
        ran = []

        def run(command):
            constraints = command[command.index("--constraint") + 1] if "--constraint" in command else None
            ran.append((command, constraints and open(constraints, encoding="utf-8").read().splitlines()))
            return SimpleNamespace(returncode=1)

        monkeypatch.setattr(install.subprocess, "run", run)
        return ran

    def test_does_nothing_where_all_fits(self, ran):
        assert install.main() == 0
        assert ran == []

    def test_holds_all_but_what_does_not_fit_and_lets_go_only_if_that_fails(self, ran, monkeypatch):
        monkeypatch.setattr(install, "unfit", lambda: ["diffusers"])
        monkeypatch.setattr(install.util, "find_spec", lambda name: name)
        assert install.main() == 1
        (first, held), (second, free) = ran
        assert first[:4] == [sys.executable, "-m", "pip", "install"]
        assert first[first.index("-r") + 1] == str(ROOT / "requirements.txt")
        assert f"torch=={metadata.version('torch')}" in held
        assert f"huggingface-hub=={metadata.version('huggingface-hub')}" in held
        assert not any(line.startswith("diffusers==") for line in held)
        assert free is None
        assert "--constraint" not in second

    def test_uses_uv_where_there_is_no_pip(self, ran, monkeypatch):
        monkeypatch.setattr(install, "unfit", lambda: ["diffusers"])
        monkeypatch.setattr(install.util, "find_spec", lambda name: None)
        install.main()
        assert ran[0][0][:5] == [sys.executable, "-m", "uv", "pip", "install"]
