"""Folders may be called anything, consoles may know few signs, and Windows has its own rules."""

import ast
import json
import mmap
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import PureWindowsPath

import av
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import generate
from cogvideox import loading
from cogvideox.checkpoint.catalogue import list_checkpoints, list_parts
from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.dtypes import Precision
from cogvideox.handles import open_handles
from cogvideox.text import encode_prompt
from interop.check import fix_config
from tests import layouts
from tests.conftest import CPU, ROOT
from tests.helpers import forked

#: Signs of many alphabets, one outside the 16-bit ones, spaces, and what shells, URLs, globs and ffmpeg's own names
#: give a meaning to.
STRANGE = "été 我的 модели 🎬 & $(x) %41 #1; [a]"
SMALL = ("--width", "80", "--height", "48", "--frames", "1", "--steps", "1")
SHIPPED = sorted([*ROOT.glob("*.py"), *(ROOT / "nodes").rglob("*.py"), *(ROOT / "cogvideox").rglob("*.py")])
PYTHON = [*SHIPPED, *sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])]


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths") / STRANGE
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def source(strange):
    return layouts.build_modules(strange / f"model {STRANGE}")


class TestAFolderOfAnyName:
    def test_makes_videos_from_text_image_and_video_with_a_lora(self, strange, checkpoints, capsys):
        text_model, image_model = (
            shutil.copytree(checkpoints(variant), strange / name)
            for variant, name in (("1.5", "文"), ("1.5-i2v", "от картинки"))
        )
        width, layer = 128, "transformer_blocks.0.attn1.to_q"
        lora = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
        layouts.write_file(strange / "стиль.safetensors", lora)
        Image.new("RGB", (80, 48), "teal").save(strange / "画像.png")
        video, again, moved = (strange / f"{name}.mp4" for name in ("видео", "もう一度", "動"))
        for model, *options in (
            (text_model, "--output", video, "--lora", f"{strange / 'стиль.safetensors'}:0.5"),
            (text_model, "--output", again, "--video", video, "--strength", 1),
            (image_model, "--output", moved, "--image", strange / "画像.png"),
        ):
            assert (
                generate.main(
                    list(map(str, ("--prompt", "a panda", "--on-black", "pass", "--model", model, *SMALL, *options)))
                )
                == 0
            )
        assert str(video) in capsys.readouterr().out
        for path in (video, again, moved):
            with av.open(str(path)) as container:
                assert sum(1 for _ in container.decode(video=0)) == 1

    def test_holds_checkpoints_of_every_layout_which_are_listed_and_load_the_same_weights(self, strange, source):
        state = source[1]["transformer"].state_dict()
        places = strange / "alle"
        places.mkdir()
        layouts.write_file(places / "文件.safetensors", layouts.comfy_names(state))
        layouts.write_gguf(places / "文件.gguf", state, "F32")
        layouts.write_sat(places / "САТ", source[1])
        listed = {entry.name: entry.path for entry in list_checkpoints([places], [places])}
        assert set(listed) == {"文件.safetensors", "文件.gguf", "САТ"}
        for path in listed.values():
            weights = loading.load_module(
                open_checkpoint(path).part("transformer"), Precision(torch.float32), torch.device("cpu")
            ).state_dict()
            close = (
                dict(rtol=1e-3, atol=1e-3) if path.suffix == ".gguf" else dict(rtol=0, atol=0)
            )  # There convolutions are in fp16.
            for name, weight in weights.items():
                torch.testing.assert_close(weight, state[name].float(), **close)

    def test_is_read_by_the_tokenizer(self, tmp_path, source):
        plain = shutil.copytree(source[0], tmp_path / "plain")
        encoded = [
            encode_prompt(open_handles(path, "fp32", CPU).text_encoder, "a panda").embeddings
            for path in (source[0], plain)
        ]
        assert torch.equal(*encoded)

    def test_is_converted_into_and_its_config_is_fixed(self, strange, source):
        assert generate.main(["--convert", str(source[0]), str(strange / "変換.safetensors")]) == 0
        assert "変換.safetensors" in [entry.name for entry in list_parts("transformer", [strange])]
        config = strange / "inference.yaml"
        config.write_bytes("args: # 注\n  sampling_fps: 16\n  fp16: True\n".encode())
        assert fix_config(config)[1] is not None
        assert "注" in config.read_text(encoding="utf-8")


class TestAConsoleOfFewSigns:
    @pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
    def test_shows_what_it_can(self, source, encoding):
        """The check, which needs torch, in a fork with the streams of such a console, where there are forks."""
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}

        def check():
            sys.stdout.reconfigure(encoding=encoding, errors="strict")
            sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
            runpy.run_path("generate.py", run_name="__main__")

        for arguments in (["--help"], ["--check", str(source[0]), "--dtype", "fp16"]):
            if os.name == "posix" and arguments[0] == "--check":
                done = forked(check, "generate.py", *arguments)
            else:
                command = [sys.executable, "generate.py", *arguments]
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding=encoding)
            assert "Traceback" not in done.stderr
            assert done.returncode in (0, 1, generate.MISMATCH_STATUS)
            assert len(done.stdout + done.stderr) > 100

    def test_and_no_locale_at_all_reads_every_file_as_utf_8(self, source):
        environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [
            sys.executable,
            "-X",
            "warn_default_encoding",
            "-W",
            "error::EncodingWarning:cogvideox",
            "generate.py",
            "--json",
            "--check",
        ]
        done = subprocess.run([*command, str(source[0])], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["verdict"]


def calls(file):
    """The calls in a file, by the name of what is called."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_text_file_is_opened_as_utf_8(file):
    for name, call in calls(file):
        texts = [node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        binary = any(re.fullmatch("[rwaxbt+]{2,3}", text) and "b" in text for text in texts)
        # The engine's own `files.read_text` is UTF-8 always.
        method = name in ("read_text", "write_text") and ast.unparse(call.func) != "read_text"
        if method or (name in ("open", "fdopen") and not binary and ast.unparse(call.func) in ("open", "os.fdopen")):
            assert any(keyword.arg == "encoding" for keyword in call.keywords), ast.unparse(call)


def _run_from_maps(arguments):
    loading._ACCESS = mmap.ACCESS_READ
    # PyTorch warns of memory that it may not write to.
    warnings.simplefilter("error", UserWarning)
    for dtype, memory in ("bf16", "gpu"), ("fp16", "offload_blocks"), ("fp32", "offload_layers"):
        if generate.main([*arguments, "--overwrite", "--dtype", dtype, "--memory", memory]):
            sys.exit(1)


class TestWindows:
    @pytest.mark.parametrize("file", PYTHON, ids=lambda file: file.relative_to(ROOT).as_posix())
    def test_no_file_imports_what_it_lacks(self, file):
        if "fuzz" in file.parts:
            pytest.skip("runs where processes can be forked and limited; tests/test_fuzz.py skips it elsewhere")
        modules = {
            alias.name
            for node in ast.parse(file.read_bytes()).body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not modules & {"resource", "fcntl", "pwd", "grp", "termios", "pty"}

    def test_a_clone_can_be_checked_out(self):
        listed = (
            subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
            .stdout.decode()
            .rstrip("\0")
            .split("\0")
        )
        assert max(map(len, listed)) < 100  # of 260, with the path of a portable ComfyUI before it
        assert Counter(path.lower() for path in listed).most_common(1)[0][1] == 1
        for part in {part for path in listed for part in path.split("/")}:
            assert not re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', part)
            assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part, re.IGNORECASE)

    @given(
        st.from_regex(r"[A-Za-z]:(\\[A-Za-z0-9 _.éя我-]{1,8}){1,3}", fullmatch=True),
        st.floats(-2, 2).map(lambda value: f"{value:.3f}"),
    )
    def test_a_path_with_a_drive_is_told_from_a_loras_strength(self, path, strength):
        assert PureWindowsPath(str(generate._lora(path)[0])) == PureWindowsPath(path)
        found, strong = generate._lora(f"{path}:{strength}")
        assert (PureWindowsPath(str(found)), strong) == (PureWindowsPath(path), float(strength))

    def test_the_script_runs_in_the_portables_python(self, source, tmp_path):
        """Its ``._pth`` file keeps the script's folder off ``sys.path``, as ``-I`` does."""
        command = [sys.executable, "-I", ROOT / "generate.py", "--json", "--check", source[0]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["verdict"]

    def test_so_does_what_the_manager_runs(self, tmp_path):
        """Loaded, not run: where a package does not fit, it would call pip."""
        command = [
            sys.executable,
            "-I",
            "-c",
            "import runpy, sys; runpy.run_path(sys.argv[1], run_name='install')",
            ROOT / "install.py",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_weights_run_from_maps_that_nothing_may_write_to(self, tiny, tmp_path):
        """As files are mapped there. A write would end the process, so it runs in one of its own."""
        assert (loading._ACCESS == mmap.ACCESS_READ) == (os.name == "nt")
        arguments = [
            "--model",
            tiny,
            "--prompt",
            "a panda",
            "--output",
            tmp_path / "out.mp4",
            "--on-black",
            "pass",
            *SMALL,
        ]
        context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
        process = context.Process(target=_run_from_maps, args=([str(argument) for argument in arguments],))
        process.start()
        process.join()
        assert process.exitcode == 0
