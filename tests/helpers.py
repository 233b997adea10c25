"""What several test modules call."""

import ctypes
import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

import generate
from cogvideox import weights
from cogvideox.video import read_video
from tests.conftest import ROOT

_C = None if sys.platform == "win32" else ctypes.CDLL(None)
#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

CLASSES = {
    "transformer": ("diffusers", "CogVideoXTransformer3DModel"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLCogVideoX"),
}


def run_generate(capsys, *arguments):
    code = generate.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def inputs(node):
    types = node.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


def call(pack, node_id, **values):
    node = pack.NODE_CLASS_MAPPINGS[node_id]()
    return getattr(node, node.FUNCTION)(**values)


def inside(module):
    """All that hooks of torch and diffusers can change on a module, and its weights."""
    kept = {}
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            kept[name, key] = (
                list(value) if key.startswith("_") and "hook" in key and hasattr(value, "__iter__") else id(value)
            )
    return kept


def forked(act: Callable[[], object], *arguments) -> subprocess.CompletedProcess:
    """Call ``act`` as the program of a process of its own: a fork of this one, which has imported torch, diffusers and
    more already. What is freed and kept for later is given back first: the fork would take from it unseen."""
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("stdout", "stderr")]
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                _become(act, list(map(str, arguments)), files)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return subprocess.CompletedProcess(arguments, code, *(file.read_text("utf-8", "replace") for file in files))


def _become(act: Callable[[], object], arguments: list[str], files: list[Path]) -> None:
    """Do in a fork what ``forked`` is asked for, to its end."""
    with ExitStack() as stack:
        for number, (name, path) in enumerate(zip(("stdout", "stderr"), files, strict=True), 1):
            file = stack.enter_context(open(path, "w", encoding="utf-8", errors="replace"))
            os.dup2(file.fileno(), number)
            setattr(sys, name, file)
        # pytest's own would tell of a crash that is meant.
        faulthandler.disable()
        # Threads of OpenMP do not come with a fork.
        torch.set_num_threads(1)
        if hasattr(_C, "mallopt"):
            # What is freed goes back at once, as in a process that has freed nothing large before.
            _C.mallopt(_M_MMAP_THRESHOLD, 1 << 17)
            _C.mallopt(_M_TRIM_THRESHOLD, 1 << 17)
        sys.argv, code = arguments, 0
        os.chdir(ROOT)
        try:
            act()
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)


def run_apart(script: str, *arguments) -> str:
    """What a script prints that measures the memory of its process: on Linux a fork of this one, elsewhere a new
    one."""
    if sys.platform == "linux":
        done = forked(lambda: exec(script, {}), "-c", *arguments)
    else:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_package(folder: Path, name: str, version: str | None = None, does: str = "") -> None:
    """Write a package of a name and a version, or one of which no installer knows, and what it does when it is
    imported."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "__init__.py").write_text(does, encoding="utf-8")
    for old in folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    if version is not None:
        (folder / f"{name}-{version}.dist-info").mkdir()
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )


def is_same_video(one: Path, other: Path) -> bool:
    """Return whether two files were written of the same frames. Their bytes are mostly equal; x264 under load writes
    one of some hundred otherwise, of the same frames, less than a hundredth away in the mean."""
    if one.read_bytes() == other.read_bytes():
        return True
    first, second = read_video(one), read_video(other)
    return first.shape == second.shape and (first - second).abs().mean().item() < 0.02


def generate_beside(packages: Path, model: Path, *more: str) -> subprocess.CompletedProcess:
    """Run ``generate.py`` in a process that finds the packages of a folder before all others; its video goes there."""
    short = "--prompt x --width 96 --height 64 --frames 17 --steps 1".split()
    return subprocess.run(
        [sys.executable, "generate.py", "--model", model, *short, *more, "--output", packages / "video.mp4"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
    )


def offload_what_is_loaded(monkeypatch: pytest.MonkeyPatch, mode: str, then: Callable = lambda module: None) -> None:
    """Have what is loaded from now on brought to the device as on a card, and ``then`` called with it."""
    real = weights.load_module

    def load(*given):
        module = real(*given)
        try:
            weights._offload(module, mode, torch.device("cpu"))
        except AttributeError as error:
            pytest.skip(f"this diffusers cannot offload without an accelerator ({error})")
        then(module)
        return module

    monkeypatch.setattr(weights, "load_module", load)


def lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder that may not be read, by root neither."""
    folder.mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
