"""The command line makes a video file, and says in a sentence why it could not."""

import io
import json
import os
import re
import shutil
import signal
import sys
import unicodedata
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import generate
from cogvideox.video import read_video, write_mp4
from tests.helpers import is_same_video
from tests.helpers import run_generate as run


def test_a_prompt_becomes_an_mp4_at_16_fps(tiny, tmp_path, capsys):
    output = tmp_path / "out.mp4"
    code, said, _ = run(
        capsys,
        "--prompt",
        "a panda",
        "--model",
        tiny,
        "--width",
        80,
        "--height",
        48,
        "--frames",
        17,
        "--steps",
        2,
        "--output",
        output,
    )
    assert code == 0
    assert said.index("transformer: stored bf16") < said.index("verdict: ok")
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (80, 48, 16)
        assert sum(1 for _ in container.decode(video=0)) == 17


def test_the_file_holds_the_frames(tmp_path):
    frames = torch.linspace(0, 1, 5).view(-1, 1, 1, 1).expand(5, 48, 80, 3)
    write_mp4(frames, tmp_path / "x.mp4", 16)
    with av.open(str(tmp_path / "x.mp4")) as container:
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert np.allclose(levels, np.linspace(0, 255, 5), atol=3)


def test_a_black_video_is_not_written(tiny, tmp_path, capsys, monkeypatch):
    import cogvideox.vae

    monkeypatch.setattr(cogvideox.vae, "decode", lambda *_, **__: torch.full((17, 48, 80, 3), float("nan")))
    arguments = (
        "--prompt",
        "x",
        "--model",
        tiny,
        "--width",
        80,
        "--height",
        48,
        "--frames",
        17,
        "--steps",
        1,
        "--output",
        tmp_path / "out.mp4",
    )
    code, said, error = run(capsys, *arguments)
    assert code == 1
    assert "verdict: black" in said
    assert "bf16" in error
    assert not (tmp_path / "out.mp4").exists()
    assert run(capsys, *arguments, "--on-black", "pass")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--frames", 80), "Set it to 65 or 81"),
        (("--width", 100), "multiple of 16"),
        (("--width", 0), "multiple of 16"),
        (("--steps", 0), "steps is 0"),
        (("--model", "nowhere"), "There is no nowhere"),
        (("--output", "video.avi"), "ends in .mp4"),
        (("--output", "no/such/folder/video.mp4"), "does not exist"),
    ],
)
def test_errors_are_sentences(tiny, capsys, arguments, said):
    base = {"--prompt": "x", "--model": tiny, "--width": 80, "--height": 48, "--frames": 17, "--steps": 1}
    base |= dict([arguments])
    code, _, error = run(capsys, *[word for pair in base.items() for word in pair])
    assert code == 1
    assert error.startswith("error: ")
    assert said in error


@pytest.mark.parametrize("language", ["C.UTF-8", "zh_CN.UTF-8"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--video", "clip.mp4", "--strength", 0.5), "--strength 0.5"),
        (("--cfg-range", 0.5, 0.5), "--cfg-range START"),
        (("--cfg-range", 0, 1.5), "--cfg-range END"),
        (("--video", "clip.mp4", "--strength", 0.01, "--steps", 5), "--strength 0.01"),
        (("--on-mismatch", "stop", "--dtype", "fp16"), "--on-mismatch"),
        (("--prompts", "my denoise.txt"), "my denoise.txt"),
        (("--video", "my denoise 0.5 take.mp4", "--steps", 9), "my denoise 0.5 take.mp4"),
        ((), "--on-black"),
    ],
)
def test_errors_name_options_and_no_widgets(tiny, tmp_path, capsys, monkeypatch, language, arguments, named):
    import cogvideox.vae

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LC_ALL", language)
    monkeypatch.setattr(cogvideox.vae, "decode", lambda *_, **__: torch.full((1, 32, 32, 3), 0.001))
    prompt = () if "--prompts" in arguments else ("--prompt", "x")
    size = ("--width", 32, "--height", 32, "--frames", 1, "--steps", 1)
    code, _, error = run(capsys, "--model", tiny, *prompt, *size, *arguments)
    assert code == 1
    assert named in error
    assert not re.search(r"(?<!my )denoise\b|cfg_start|cfg_end|on_mismatch|\baction\b", error)


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    said = capsys.readouterr().out
    for option in (
        "--prompt",
        "--model",
        "--width",
        "--height",
        "--frames",
        "--steps",
        "--cfg",
        "--seed",
        "--scheduler",
        "--dtype",
        "--output",
        "--check",
        "--scan",
    ):
        assert option in said
    assert "examples:" in said


@pytest.mark.parametrize("language", ["C.UTF-8", "zh_CN.UTF-8"])
def test_help_is_as_wide_as_the_terminal(capsys, monkeypatch, language):
    monkeypatch.setenv("LC_ALL", language)
    monkeypatch.setenv("COLUMNS", "64")
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  python generate.py --check my_workflow.json") for line in lines)
    for line in lines:
        # Examples are to be copied, and choices are one word.
        if not re.match(r"usage|  python | +\[?-|    --", line):
            assert sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in line) <= 64, line
        assert not line.endswith("（")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--convert", "a", "b.safetensors", "--quantize", "fp8_weight_only"),
        ("--download", "t2v", "--output", "models"),
        ("--migrate", "a.json", "b.json", "--overwrite"),
        ("--check", "a", "--cfg-range", 0, 0.5),
    ],
)
def test_what_is_no_video_is_not_done_without_an_option_that_was_given(capsys, arguments):
    with pytest.raises(SystemExit):
        run(capsys, *arguments)
    assert f"goes with what makes a video, and not with {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "options", "named"),
    [
        ("vae", (), "--vae"),
        ("text_encoder", (), "--text-encoder"),
        (None, ("--compile", "--cache", "pab"), "--compile"),
    ],
)
def test_what_to_do_is_said_with_the_option_that_does_it(tiny, tmp_path, capsys, missing, options, named):
    model = tmp_path / "model"
    shutil.copytree(tiny, model, ignore=shutil.ignore_patterns(missing or ""))
    size = ("--width", 80, "--height", 48, "--frames", 17, "--steps", 2)
    code, _, said = run(capsys, "--prompt", "x", "--model", model, *size, "--output", tmp_path / "x.mp4", *options)
    assert code == 1
    assert re.search(rf"{named}\b", said.split("error: ")[-1])


@pytest.mark.parametrize("option", [("--lora", "x"), ("--dtype", "fp16"), ("--device", "cpu"), ("--vae", "x")])
def test_a_config_is_not_checked_without_an_option_that_was_given(tmp_path, capsys, option):
    workflow = tmp_path / "workflow.json"
    workflow.write_text('{"nodes": [], "links": []}')
    assert run(capsys, "--check", workflow, "--dtype", "auto")[0] == 0
    with pytest.raises(SystemExit):
        run(capsys, "--check", workflow, *option)
    assert f"{option[0]} goes with a checkpoint" in capsys.readouterr().err


class TestCheck:
    def test_a_checkpoint_that_runs_well_ends_with_status_0(self, tiny, capsys):
        code, said, _ = run(capsys, "--check", tiny, "--device", "cpu")
        assert code == 0
        assert "transformer: stored bf16" in said

    def test_a_mismatch_is_told_by_the_status(self, tiny, capsys):
        code, said, _ = run(capsys, "--check", tiny, "--dtype", "fp16")
        assert code == generate.MISMATCH_STATUS
        assert "[mismatch, fixed] transformer" in said

    def test_json_is_only_json(self, tiny, capsys):
        code, said, _ = run(capsys, "--check", tiny, "--dtype", "fp32", "--json", "--scan")
        report = json.loads(said)
        assert (code, report["verdict"]) == (0, "ok")
        assert report["weights"]

    def test_loras_are_checked_with_it(self, tiny, tmp_path, capsys):
        lora = tmp_path / "style.safetensors"
        halves = {"lora_A": torch.ones(4, 128), "lora_B": torch.ones(128, 4)}
        save_file({f"transformer.proj_out.{half}.weight": value for half, value in halves.items()}, lora)
        code, said, _ = run(capsys, "--check", tiny, "--device", "cpu", "--lora", f"{lora}:0.5")
        assert code == 0
        assert "LoRA style.safetensors: strength 0.5, rank 4, 1 layers" in said
        save_file({"transformer.proj_out.lora_A.weight": halves["lora_A"]}, lora)
        assert run(capsys, "--check", tiny, "--device", "cpu", "--lora", lora)[0] == 1

    def test_a_sat_config_is_checked_and_fixed(self, tmp_path, capsys):
        config = tmp_path / "inference.yaml"
        config.write_text("args:\n  # the frames a second\n  sampling_fps: 16\n  fp16: True # why not\n")
        code, said, _ = run(capsys, "--check", config)
        assert code == generate.MISMATCH_STATUS
        assert "bf16: True" in said
        code, said, _ = run(capsys, "--check", tmp_path, "--fix")
        assert code == 0
        assert "inference.yaml.bak" in said
        assert config.read_text() == "args:\n  # the frames a second\n  sampling_fps: 16\n  bf16: True # why not\n"
        assert run(capsys, "--check", config)[0] == 0

    def test_a_workflow_is_checked(self, tmp_path, capsys):
        workflow = tmp_path / "workflow.json"
        node = {
            "class_type": "CogVideoXModelLoader",
            "inputs": {"model": "CogVideoX_1_5.safetensors", "base_precision": "fp16"},
        }
        workflow.write_text(json.dumps({"7": node}))
        code, said, _ = run(capsys, "--check", workflow, "--json")
        assert code == generate.MISMATCH_STATUS
        assert "CogVideoXModelLoader" in said
        json.loads(said)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--fix",), "rewrites only those"),
            (("--check", "nowhere"), "There is no nowhere"),
            (("--check", "nowhere", "--fix"), "There is no nowhere"),
        ],
    )
    def test_errors_are_sentences(self, tiny, capsys, arguments, said):
        code, _, error = run(capsys, "--check", tiny, *arguments)
        assert code == 1
        assert said in error

    @pytest.mark.parametrize("arguments", [(), ("--prompt", "x"), ("--model", "x", "--prompt", "x", "--scan")])
    def test_options_that_do_not_go_together_are_refused(self, capsys, arguments):
        with pytest.raises(SystemExit):
            run(capsys, *arguments)
        assert "--check PATH" in capsys.readouterr().err


def test_a_checkpoint_is_downloaded_when_asked_for(tmp_path, capsys, monkeypatch):
    import cogvideox.checkpoint.download as module

    asked = []
    monkeypatch.setattr(
        module,
        "download_checkpoint",
        lambda which, folder, on_progress: asked.append((which, str(folder))) or folder / "x",
    )
    assert run(capsys, "--download", "t2v", tmp_path)[0] == 0
    assert run(capsys, "--download", "i2v")[1] == f"complete: {Path('models/x')}\n"
    # cmd leaves single quotes around what it is given.
    assert run(capsys, "--download", "fun-inp", f"'{tmp_path}'")[0] == 0
    assert asked == [("t2v", str(tmp_path)), ("i2v", "models"), ("fun-inp", str(tmp_path))]
    assert run(capsys, "--download", "t2v", "''")[2].startswith("error: '' is no path")
    assert "at most one folder" in run(capsys, "--download", "t2v", "a", "b")[2]
    monkeypatch.undo()
    assert "'t3v'" in run(capsys, "--download", "t3v", tmp_path)[2]


def test_a_checkpoint_is_converted(tiny, tmp_path, capsys):
    code, said, _ = run(capsys, "--convert", tiny, tmp_path / "x.safetensors", "--dtype", "fp32")
    assert code == 0
    assert "x.safetensors" in said
    assert run(capsys, "--check", tmp_path / "x.safetensors", "--dtype", "fp32")[0] == 0
    assert "There is no" in run(capsys, "--convert", tmp_path / "nowhere", tmp_path / "y")[2]
    said = run(capsys, "--convert", tiny, tmp_path / "y", "--lora", tmp_path / "style.safetensors")[2]
    assert "no LoRA is merged" in said


def test_a_mismatch_can_stop_the_run_before_it_starts(tiny, capsys):
    code, _, error = run(capsys, "--prompt", "x", "--model", tiny, "--dtype", "fp16", "--on-mismatch", "stop")
    assert code == 1
    assert "was trained in bf16" in error


def test_the_plan_says_what_each_mode_takes_and_loads_nothing(tiny, tmp_path, capsys):
    code, said, _ = run(
        capsys,
        "--plan",
        "--model",
        tiny,
        "--width",
        320,
        "--height",
        160,
        "--frames",
        33,
        "--output",
        tmp_path / "out.mp4",
    )
    assert code == 0
    assert "memory to sample 320x160, 33 frames: gpu " in said
    assert "offload_layers" in said
    assert not (tmp_path / "out.mp4").exists()


class TestImagesVideosAndLoras:
    @pytest.mark.parametrize(
        ("variant", "size"), [("1.5-i2v", "1360x768, 81"), ("fun-inp", "1008x576, 85"), ("void", "672x384, 85")]
    )
    def test_a_plan_needs_nothing_but_the_model(self, checkpoints, capsys, variant, size):
        code, said, _ = run(capsys, "--plan", "--model", checkpoints(variant))
        assert code == 0
        assert f"memory to sample {size} frames" in said

    @pytest.fixture
    def image(self, tmp_path):
        path = tmp_path / "start.png"
        Image.fromarray((np.random.default_rng(1).random((60, 90, 4)) * 255).astype("uint8"), "RGBA").save(path)
        return path

    @pytest.fixture
    def video(self, tmp_path):
        path = tmp_path / "clip.mp4"
        write_mp4(torch.rand(20, 64, 96, 3, generator=torch.Generator().manual_seed(1)), path, 16)
        return path

    @pytest.fixture
    def lora(self, tmp_path):
        name = "transformer.transformer_blocks.0.attn1.to_out.0"
        save_file(
            {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)},
            tmp_path / "lora.safetensors",
        )
        return tmp_path / "lora.safetensors"

    def arguments(self, model, output, *more):
        return (
            "--prompt",
            "a panda",
            "--model",
            model,
            "--width",
            80,
            "--height",
            48,
            "--steps",
            2,
            "--output",
            output,
            *more,
        )

    def test_an_image_becomes_a_video(self, checkpoints, image, tmp_path, capsys):
        output = tmp_path / "out.mp4"
        code, said, error = run(
            capsys, *self.arguments(checkpoints("1.5-i2v"), output, "--image", image, "--frames", 17)
        )
        assert (code, output.exists()) == (0, True), error
        assert "17 frames of 80x48" in said

    def test_an_image_keeps_its_shape_where_no_size_is_given(self):
        from cogvideox.variants import identify

        i2v = identify({"in_channels": 32, "patch_size_t": 2})
        assert i2v.size_for(1920, 1080) == (1360, 768)
        assert i2v.size_for(1080, 1920) == (768, 1360)
        assert i2v.size_for(500, 500) == (768, 768)
        assert i2v.size_for(4000, 100) == (1360, 768)
        assert identify({"in_channels": 32, "use_rotary_positional_embeddings": True}).size_for(500, 500) == (720, 480)

    def test_a_clip_of_another_rate_keeps_its_seconds_and_its_sound(self, tiny, tmp_path, capsys):
        clip, output = tmp_path / "phone.mp4", tmp_path / "out.mp4"
        wave = (0.5 * np.sin(np.arange(3 * 48_000) * 2 * np.pi * 440 / 48_000)).astype(np.float32)
        write_mp4(
            torch.rand(32, 48, 64, 3, generator=torch.Generator().manual_seed(1)),
            clip,
            30,
            sound=(np.stack([wave, wave]), 48_000),
        )
        arguments = (
            "--prompt",
            "x",
            "--model",
            tiny,
            "--width",
            32,
            "--height",
            32,
            "--steps",
            2,
            "--video",
            clip,
            "--output",
            output,
        )
        code, said, error = run(capsys, *arguments, "--keep-audio")
        assert code == 0, error
        assert "has 30 frames a second and 16 are made of them" in said
        with av.open(str(output)) as container:
            picture, sound = container.streams.video[0], container.streams.audio[0]
            assert (picture.average_rate, picture.frames) == (16, 17)
            assert float(sound.duration * sound.time_base) == pytest.approx(17 / 16, abs=0.03)
        code, said, _ = run(capsys, "--plan", *arguments, "--overwrite", "--fps", "24", "--frames", 17)
        assert code == 0
        assert "has 30 frames a second and 24 are made of them" in said
        assert "Only the first 17 frames (0.7 s) of 1.1 s" in said
        assert "the model was trained at 16" in said

    def test_of_a_long_clip_the_models_longest_is_used(self, tiny, tmp_path, capsys):
        clip = tmp_path / "long.mp4"
        write_mp4(torch.zeros(400, 16, 16, 3), clip, 16)
        code, said, _ = run(capsys, "--plan", *self.arguments(tiny, tmp_path / "out.mp4", "--video", clip))
        assert code == 0
        assert "Only the first 161 frames (10.1 s) of 25.0 s" in said
        assert "161 frames" in said.splitlines()[-1]

    def test_a_picture_with_transparency_is_said(self, checkpoints, image, tmp_path, capsys):
        code, said, _ = run(
            capsys, "--plan", *self.arguments(checkpoints("1.5-i2v"), tmp_path / "out.mp4", "--image", image)
        )
        assert code == 0
        assert "joined with a white background" in said

    def test_a_video_becomes_another_of_its_length(self, tiny, video, tmp_path, capsys):
        code, said, error = run(
            capsys, *self.arguments(tiny, tmp_path / "out.mp4", "--video", video, "--strength", 0.5)
        )
        assert code == 0, error
        assert "the last 3 were cut: 17 are left" in said
        assert "17 frames of 80x48" in said

    def test_loras_stack_with_their_strengths(self, tiny, lora, tmp_path, capsys):
        more = ("--frames", 17, "--lora", f"{lora}:0.5", "--lora", lora)
        code, said, error = run(capsys, *self.arguments(tiny, tmp_path / "out.mp4", *more))
        assert code == 0, error
        assert "LoRA lora.safetensors: strength 0.5, rank 2, 1 layers" in said
        assert "LoRA lora.safetensors: strength 1, rank 2, 1 layers" in said

    def test_a_cache_and_compiling_are_said_and_used(self, tiny, tmp_path, capsys, use_backend):
        use_backend("eager")
        more = ("--frames", 17, "--cache", "taylorseer:0.5", "--cache-range", 0, 1, "--compile")
        code, said, error = run(capsys, *self.arguments(tiny, tmp_path / "out.mp4", *more))
        assert code == 0, error
        assert "TaylorSeer: 50% of the block evaluations between 0% and 100% of the steps are to be skipped" in said
        assert "torch.compile (default)" in said
        assert "TaylorSeer skipped 2 of 4 block evaluations (50%)." in said
        assert "Compiled in" in said

    def test_a_plan_says_that_nothing_can_be_compiled(self, tiny, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("cogvideox.modules.internals.lacks_cpp_compiler", lambda: True)
        code, said, _ = run(capsys, "--plan", *self.arguments(tiny, tmp_path / "out.mp4", "--compile"))
        assert code == 0
        assert "The model will run without compiling: no C++ compiler is installed" in said
        assert "torch.compile (default)" not in said

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--cache", "magcache"), "'magcache' is not one of teacache"),
            (("--cache", "pab:much"), "the strength 'much' is not a number"),
            (("--cache-range", "0", "1"), "--cache-range goes with --cache"),
            (("--compile", "fastest"), "invalid choice: 'fastest'"),
        ],
    )
    def test_a_cache_that_is_none_is_an_error_of_usage(self, tiny, tmp_path, capsys, more, message):
        with pytest.raises(SystemExit):
            run(capsys, *self.arguments(tiny, tmp_path / "out.mp4", *more))
        assert message in capsys.readouterr().err

    def test_choices_that_do_not_work_together_are_refused_before_anything_is_loaded(self, tiny, tmp_path, capsys):
        code, _, error = run(capsys, *self.arguments(tiny, tmp_path / "out.mp4", "--cache", "pab", "--compile"))
        assert code == 1
        assert "cache pab and compiling do not work together" in error

    def test_a_colon_of_windows_is_no_strength(self):
        assert generate._lora(r"C:\style.safetensors") == (Path(r"C:\style.safetensors"), 1.0)
        assert generate._lora(r"C:\style.safetensors:-0.5") == (Path(r"C:\style.safetensors"), -0.5)

    def test_what_does_not_fit_is_said_before_anything_is_loaded(
        self, checkpoints, tiny, image, video, lora, tmp_path, capsys
    ):
        output = tmp_path / "out.mp4"
        for model, more, said in (
            (checkpoints("1.5-i2v"), (), "needs --image, and makes noise of a prompt alone"),
            (checkpoints("1.5-i2v"), ("--video", video), "needs --image"),
            (checkpoints("void"), ("--frames", 13), "needs --void"),
            (tiny, ("--image", image), "--image is given, which CogVideoX1.5 "),
            (tiny, ("--video", video, "--mask", image), "--mask is given, which CogVideoX1.5 "),
            (checkpoints("fun-inp"), ("--frames", 13, "--video", video, "--void", video), "--void is given"),
            (tiny, ("--image", video), "cannot be read as an image"),
            (tiny, ("--video", image.with_name("none.mp4")), "cannot be read as a video"),
            (tiny, ("--lora", next((tiny / "transformer").glob("*.safetensors"))), "it is not a LoRA"),
        ):
            code, _, error = run(capsys, *self.arguments(model, output, "--frames", 17, *more))
            assert code == 1
            assert said in error

    @pytest.mark.parametrize(
        "more",
        [
            ("--strength", "0.5"),
            ("--strength", "0"),
            ("--overlap", "0"),
            ("--keep-audio",),
            ("--end-image", "x.png", "--video", "x.mp4"),
            ("--image", "x.png", "--video", "x.mp4"),
            ("--check", "x", "--decode", "y"),
            ("--plan", "--check", "x"),
            ("--prompt", "-", "--negative", "-"),
        ],
    )
    def test_options_that_need_or_exclude_each_other(self, tiny, more):
        with pytest.raises(SystemExit):
            generate.main([str(argument) for argument in self.arguments(tiny, "out.mp4", *more)])


def short_run(model, output, *more):
    return (
        "--prompt",
        "a panda",
        "--model",
        model,
        "--width",
        32,
        "--height",
        32,
        "--frames",
        1,
        "--steps",
        2,
        "--output",
        output,
        *more,
    )


@pytest.fixture
def no_weights(monkeypatch):
    """A run that reads weights fails with an AssertionError."""

    def load(*_, **__):
        raise AssertionError("weights were read")

    for module in ("cogvideox.weights", "cogvideox.handles", "cogvideox.loading"):
        if module in sys.modules and hasattr(sys.modules[module], "load_module"):
            monkeypatch.setattr(f"{module}.load_module", load)


@pytest.mark.parametrize("variant", ["fun-inp", "1.5-i2v"])
def test_two_images_of_one_frame_are_refused_before_weights_are_read(
    checkpoints, tmp_path, capsys, no_weights, variant
):
    Image.new("RGB", (80, 48)).save(tmp_path / "a.png")
    images = ("--image", tmp_path / "a.png", "--end-image", tmp_path / "a.png")
    options = ("--prompt", "x", "--width", 80, "--height", 48, "--frames", 1, "--output", tmp_path / "a.mp4")
    code, _, error = run(capsys, "--model", checkpoints(variant), *options, *images)
    assert code == 1
    assert "it would end where it starts" in error


def test_without_guidance_no_negative_prompt_is_encoded(tiny, tmp_path, capsys, monkeypatch):
    import cogvideox.text as module

    seen, encode = [], module.encode_prompt
    monkeypatch.setattr(
        module, "encode_prompt", lambda encoder, text, **how: seen.append(text) or encode(encoder, text, **how)
    )
    for name, more in (("a", ()), ("b", ("--negative", "a cat"))):
        code, _, error = run(capsys, *short_run(tiny, tmp_path / f"{name}.mp4", "--cfg", 1, *more))
        assert code == 0, error
    assert seen == ["a panda", "a panda"]
    assert is_same_video(tmp_path / "a.mp4", tmp_path / "b.mp4")


class TestTheOutput:
    def test_one_that_exists_is_refused_before_the_run_and_replaced_on_demand(self, tiny, tmp_path, capsys, no_weights):
        output = tmp_path / "out.mp4"
        output.write_text("mine")
        code, _, error = run(capsys, *short_run(tiny, output))
        assert code == 1
        assert "not replaced unasked" in error
        assert output.read_text() == "mine"
        assert run(capsys, "--plan", *short_run(tiny, output, "--overwrite"))[0] == 0
        assert output.read_text() == "mine"

    def test_the_name_that_nobody_gave_counts_up(self, tiny, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        arguments = short_run(tiny, "")[:-2]
        for name in ("out.mp4", "out_00002.mp4"):
            code, said, _ = run(capsys, *arguments)
            assert code == 0
            assert said.splitlines()[-1].startswith(f"{name}: 1 frames")
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize("name", ["panda", "猫" * 83])
    def test_what_could_not_be_written_is_kept_and_made_of_its_latents(self, tiny, tmp_path, capsys, monkeypatch, name):
        import cogvideox.video as module

        def full(*_):
            raise OSError(28, "No space left on device")

        (tmp_path / "a").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(module, "_encode", full)
            code, _, error = run(capsys, *short_run(tiny, tmp_path / "a" / f"{name}.mp4"))
        assert code == 1
        assert "No space left on device" in error
        # A name has 255 bytes, of which a Chinese letter takes three.
        latent = tmp_path / "a" / f"{name[:80]}_00001.latent"
        assert f"{latent} has them, and --decode" in error
        assert list((tmp_path / "a").iterdir()) == [latent]
        assert run(capsys, "--decode", latent, "--model", tiny, "--output", tmp_path / "decoded.mp4")[0] == 0
        assert run(capsys, *short_run(tiny, tmp_path / "whole.mp4"))[0] == 0
        assert torch.equal(*(read_video(tmp_path / f"{name}.mp4") for name in ("decoded", "whole")))

    def test_a_clips_sound_is_not_lost_with_the_video_that_could_not_be_written(
        self, tiny, tmp_path, capsys, monkeypatch
    ):
        import cogvideox.video as module

        clip, sound = tmp_path / "clip.mp4", np.full((2, 96_000), 0.5, np.float32)
        write_mp4(torch.rand(17, 32, 32, 3), clip, 16, sound=(sound, 48_000))
        more = ("--video", clip, "--keep-audio", "--fps", 20)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_encode", lambda *_: 1 / 0)
            code, _, error = run(capsys, *short_run(tiny, tmp_path / "a.mp4"), "--strength", 1, *more)
        assert code == 1
        assert "--fps, and --video with --keep-audio, are given again" in error
        latent = tmp_path / "a_00001.latent"
        code, _, error = run(capsys, "--decode", latent, "--model", tiny, *more, "--output", tmp_path / "b.mp4")
        assert code == 0, error
        with av.open(str(tmp_path / "b.mp4")) as video:
            assert video.streams.video[0].average_rate == 20
            assert [stream.type for stream in video.streams] == ["video", "audio"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_run_that_the_system_stops_leaves_nothing_half_written(self, tiny, tmp_path, capsys, monkeypatch, number):
        import cogvideox.video as module

        stopped, real = [], module._encode

        def stop(_, path, *__):
            path.write_bytes(b"half")
            os.kill(os.getpid(), number)

        monkeypatch.setattr(module, "_encode", stop)
        before = signal.signal(number, lambda *_: stopped.append("not by the program"))
        try:
            code, _, error = run(capsys, *short_run(tiny, tmp_path / "a.mp4"))
            assert (code, error.splitlines()[-1]) == (130, "stopped.")
            assert list(tmp_path.iterdir()) == []
            # Afterwards it is as it was.
            os.kill(os.getpid(), number)
            assert stopped
            # As nohup has it.
            signal.signal(number, signal.SIG_IGN)
            monkeypatch.setattr(module, "_encode", lambda *_: os.kill(os.getpid(), number) or real(*_))
            assert run(capsys, *short_run(tiny, tmp_path / "a.mp4"))[0] == 0
        finally:
            signal.signal(number, before)

    def test_latents_go_elsewhere_where_their_folder_is_gone(self, tiny, tmp_path, capsys, monkeypatch):
        import cogvideox.video as module

        real = module.write_latent

        def write(samples, folder, name):
            if folder == tmp_path / "a":
                raise ValueError("No space left on device")
            return real(samples, folder, name)

        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        monkeypatch.chdir(tmp_path / "b")
        monkeypatch.setattr(module, "write_latent", write)
        monkeypatch.setattr(module, "_encode", lambda *_: 1 / 0)
        code, _, error = run(capsys, *short_run(tiny, tmp_path / "a" / "panda.mp4"))
        assert code == 1
        assert "ZeroDivisionError" in error
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["panda_00001.latent"]

    def test_ctrl_c_ends_with_one_line_and_leaves_nothing(self, tiny, tmp_path, capsys, monkeypatch):
        import cogvideox.sampling as sampling
        import cogvideox.video as video

        def stop(*_, **__):
            raise KeyboardInterrupt

        for module, name in ((sampling, "advance"), (video, "_encode")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, stop)
                code, _, error = run(capsys, *short_run(tiny, tmp_path / "x.mp4"))
            assert code == 130
            assert error.splitlines()[-1] == "stopped."
            assert "Traceback" not in error
        assert list(tmp_path.iterdir()) == []

    def test_latents_of_another_model_are_refused(self, tiny, tmp_path, capsys, no_weights):
        save_file(
            {"latent_tensor": torch.zeros(1, 4, 8, 8), "latent_format_version_0": torch.tensor([])},
            tmp_path / "x.latent",
        )
        code, _, error = run(capsys, "--decode", tmp_path / "x.latent", "--model", tiny, "--output", tmp_path / "x.mp4")
        assert code == 1
        assert "4 dimensions" in error


class TestPrompts:
    @pytest.fixture
    def encoded(self, tiny, tmp_path, capsys, monkeypatch):
        """``encoded(prompt)``: what of it reached the text encoder, or the sentence that refused it."""
        import cogvideox.text as module

        class Reached(Exception):
            pass

        def get(*arguments):
            got = []

            def encode(encoder, prompt, **_):
                got.append(prompt)
                raise Reached

            monkeypatch.setattr(module, "encode_prompt", encode)
            code, said, error = run(capsys, *short_run(tiny, tmp_path / "x.mp4"), *arguments)
            assert code == 1
            return got[0] if got else error, said

        return get

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_a_prompt_comes_from_a_file(self, encoded, tmp_path, encoding):
        (tmp_path / "my prompt.txt").write_text("A panda – 熊猫 –\nplays.\n", encoding=encoding)
        assert encoded("--prompt", f"@{tmp_path / 'my prompt.txt'}")[0] == "A panda – 熊猫 –\nplays."

    def test_a_prompt_comes_from_the_standard_input(self, encoded, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ein Bär\n".encode())))
        assert encoded("--prompt", "-")[0] == "ein Bär"

    def test_one_that_begins_with_an_at_is_written_with_two(self, encoded):
        assert encoded("--prompt", "@@home, a panda")[0] == "@home, a panda"

    def test_an_empty_one_is_said_and_no_error(self, encoded):
        prompt, said = encoded("--prompt", "")
        assert prompt == ""
        assert "prompt: it is empty" in said

    @pytest.mark.parametrize("name", ["--prompt", "--negative"])
    @pytest.mark.parametrize(
        ("given", "content", "said"),
        [
            ("@none.txt", None, "begins with @.*No such file.*given with @@"),
            ("@x.txt", b"\xd0\xdc\xc3\xa8", "is not text in UTF-8"),
            ("@x.txt", "panda".encode("utf-16-le"), "bytes that are no text in UTF-8"),
            ("@x.txt", b"x" * (1 << 21), "bytes"),
            ("@.", None, "folder"),
            ("@", None, "is no path"),
            (os.fsdecode(b"\xd0\xdc\xc3\xa8"), None, "no text in UTF-8"),
        ],
    )
    def test_what_is_no_text_is_a_sentence(self, encoded, tmp_path, monkeypatch, name, given, content, said):
        import re

        monkeypatch.chdir(tmp_path)
        if content is not None:
            (tmp_path / "x.txt").write_bytes(content)
        error, _ = encoded(name, given)
        assert error.startswith(f"error: The {name[2:]} ")
        assert re.search(said, error, re.DOTALL)
        error.encode()


class TestTheCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--seed", "-1"), "outside 0 to 2**64-1"),
            (("--seed", str(2**64)), "outside 0 to 2**64-1"),
            (("--seed", "1.5"), "'1.5' is not a whole number"),
            (("--seed", "9" * 9000), "is not a whole number"),
            (("--width", "wide"), "'wide' is not a whole number"),
            (("--frames", "1e9"), "is not a whole number"),
            (("--frames", "99999999"), "more than any machine can make"),
            (("--fps", "0"), "'0' is no frame rate"),
            (("--fps", "1/0"), "'1/0' is no frame rate"),
            (("--fps", "nan"), "'nan' is no frame rate"),
            (("--lora", "x.safetensors:nan"), "would make every frame black"),
            (("--image", ""), "is no path"),
            (("--image", "https://example.com/panda.png"), "download it first"),
            (("--memory", "much"), "invalid choice: 'much'"),
            (("--no-such-option",), "unrecognized arguments"),
        ],
    )
    def test_a_wrong_option_is_told_in_a_line_and_not_with_all_of_them(self, capsys, arguments, said):
        with pytest.raises(SystemExit) as stopped:
            run(capsys, "--prompt", "x", "--model", "y", *arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert said in error
        assert len(error.splitlines()) == 2
        assert len(error) < 1200

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--device", "xpu:7"), "Here are cpu"),
            (("--device", "meta"), "Here are cpu"),
            (("--device", "foo"), "torch does not know"),
            (("--cfg", "0"), "cfg is 0.0"),
            (("--cfg", "nan"), "cfg is nan"),
            (("--cfg-range", "0.5", "0.5"), "no step would be guided"),
            (("--cfg-range", "0", "1.5"), "--cfg-range END is 1.5"),
            (("--cfg-range", "0.51", "0.7", "--steps", "4"), "none of 4 steps lies between"),
            (("--steps", "1001"), "steps is 1001"),
            (("--width", "999984", "--height", "999984"), "of memory, and this computer has"),
            (("--frames", "18"), "Set it to 17 or 33"),
            (("--video", "x.mp4", "--strength", "0"), "--strength is 0.0"),
            (("--video", "x.mp4", "--strength", "nan"), "--strength is nan"),
            (("--video", "x.mp4", "--frames", "18"), "Set it to 17 or 33"),
            (("--video", "~no_such_user_here/x.mp4"), "cannot be read as a video"),
        ],
    )
    def test_what_cannot_run_is_told_before_weights_are_read(self, tiny, tmp_path, capsys, no_weights, arguments, said):
        code, _, error = run(capsys, *short_run(tiny, tmp_path / "x.mp4"), *arguments)
        assert code == 1
        assert error.startswith("error: ")
        assert said in error

    def test_paths_are_taken_as_people_give_them(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME" if os.name != "nt" else "USERPROFILE", str(tmp_path))
        assert generate.path_of("~/x.mp4") == tmp_path / "x.mp4"
        assert generate.path_of("'a b.png'") == Path("a b.png")
        assert generate.path_of('"a b.png"') == Path("a b.png")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "'x'").touch()
        assert generate.path_of("'x'") == Path("'x'")

    def test_frame_rates_are_exact(self):
        assert generate._rate("30000/1001") == generate._rate("29.97003") == Fraction(30000, 1001)

    @pytest.mark.parametrize(
        "error",
        [
            KeyError("x"),
            ZeroDivisionError("by zero"),
            FileNotFoundError(2, "gone", "/a"),
            MemoryError(),
            RuntimeError(),
        ],
    )
    def test_whatever_happens_ends_in_a_sentence(self, capsys, monkeypatch, error):
        def fail(options):
            raise error

        monkeypatch.setitem(generate._WORK, "check", fail)
        code, _, said = run(capsys, "--check", "x")
        assert code == 1
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1
        assert "Traceback" in run(capsys, "--check", "x", "--debug")[2]

    def test_a_pipe_that_nobody_reads_does_not_stop_a_run(self, tiny, tmp_path, capsys, monkeypatch):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", closed)
            assert generate.main([str(argument) for argument in short_run(tiny, tmp_path / "x.mp4")]) == 0
        assert len(read_video(tmp_path / "x.mp4")) == 1

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk without one")
    def test_a_log_whose_disk_is_full_does_not_stop_a_run(self, tiny, tmp_path, capsys, monkeypatch):
        with open("/dev/full", "w") as out, open("/dev/full", "w") as err, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert generate.main([str(argument) for argument in short_run(tiny, tmp_path / "x.mp4")]) == 0
            assert generate.main(["--model", str(tiny), "--prompt", "x", "--steps", "0"]) == 1
        assert len(read_video(tmp_path / "x.mp4")) == 1
        # But a program does not take half of a report for all of it.
        with open("/dev/full", "w") as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert generate.main(["--check", str(tiny), "--json"]) == 1
        assert "No space left on device" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["nowhere", "folder", "noise", "empty.json", "noise.safetensors", "noise.yaml"])
    def test_anything_can_be_checked(self, tmp_path, capsys, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        if name == "folder":
            Path(name).mkdir()
        elif name != "nowhere":
            Path(name).write_bytes(b"" if name.startswith("empty") else bytes(range(256)) * 20)
        code, _, error = run(capsys, "--check", name)
        assert code == 1
        assert error.startswith("error: ")
        assert "does not know (" not in error
        assert name in error
