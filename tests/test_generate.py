"""The command line makes a video file, and says in a sentence why it could not."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import generate
from cogvideox.video import write_mp4


def run(capsys, *arguments):
    code = generate.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_a_prompt_becomes_an_mp4_at_16_fps(tiny, tmp_path, capsys):
    output = tmp_path / "out.mp4"
    code, said, _ = run(
        capsys, "--prompt", "a panda", "--model", tiny, "--width", 80, "--height", 48, "--frames", 17, "--steps", 2, "--output", output
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
    arguments = ("--prompt", "x", "--model", tiny, "--width", 80, "--height", 48, "--frames", 17, "--steps", 1, "--output", tmp_path / "out.mp4")
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
        node = {"class_type": "CogVideoXModelLoader", "inputs": {"model": "CogVideoX_1_5.safetensors", "base_precision": "fp16"}}
        workflow.write_text(json.dumps({"7": node}))
        code, said, _ = run(capsys, "--check", workflow, "--json")
        assert code == generate.MISMATCH_STATUS
        assert "CogVideoXModelLoader" in said
        json.loads(said)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [(("--fix",), "rewrites only those"), (("--check", "nowhere"), "There is no nowhere")],
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
    monkeypatch.setattr(module, "download_checkpoint", lambda which, folder, on_progress: asked.append((which, str(folder))) or folder / "x")
    assert run(capsys, "--download", "t2v", tmp_path)[0] == 0
    assert run(capsys, "--download", "i2v")[1] == f"complete: {Path('models/x')}\n"
    assert asked == [("t2v", str(tmp_path)), ("i2v", "models")]
    assert "at most one folder" in run(capsys, "--download", "t2v", "a", "b")[2]
    monkeypatch.undo()
    assert "'t3v'" in run(capsys, "--download", "t3v", tmp_path)[2]


def test_a_checkpoint_is_converted(tiny, tmp_path, capsys):
    code, said, _ = run(capsys, "--convert", tiny, tmp_path / "x.safetensors", "--dtype", "fp32")
    assert code == 0
    assert "x.safetensors" in said
    assert run(capsys, "--check", tmp_path / "x.safetensors", "--dtype", "fp32")[0] == 0
    assert "There is no" in run(capsys, "--convert", tmp_path / "nowhere", tmp_path / "y")[2]


def test_a_mismatch_can_stop_the_run_before_it_starts(tiny, capsys):
    code, _, error = run(capsys, "--prompt", "x", "--model", tiny, "--dtype", "fp16", "--on-mismatch", "stop")
    assert code == 1
    assert "was trained in bf16" in error


def test_the_plan_says_what_each_mode_takes_and_loads_nothing(tiny, tmp_path, capsys):
    code, said, _ = run(capsys, "--plan", "--model", tiny, "--width", 320, "--height", 160, "--frames", 33, "--output", tmp_path / "out.mp4")
    assert code == 0
    assert "memory to sample 320x160, 33 frames: gpu " in said
    assert "offload_layers" in said
    assert not (tmp_path / "out.mp4").exists()


class TestImagesVideosAndLoras:
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
        save_file({f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)}, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    def arguments(self, model, output, *more):
        return ("--prompt", "a panda", "--model", model, "--width", 80, "--height", 48, "--steps", 2, "--output", output, *more)

    def test_an_image_becomes_a_video(self, checkpoints, image, tmp_path, capsys):
        output = tmp_path / "out.mp4"
        code, said, error = run(capsys, *self.arguments(checkpoints("1.5-i2v"), output, "--image", image, "--frames", 17))
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

    def test_a_video_becomes_another_of_its_length(self, tiny, video, tmp_path, capsys):
        code, said, error = run(capsys, *self.arguments(tiny, tmp_path / "out.mp4", "--video", video, "--strength", 0.5))
        assert code == 0, error
        assert "the last 3 were cut: 17 are left" in said
        assert "17 frames of 80x48" in said

    def test_loras_stack_with_their_strengths(self, tiny, lora, tmp_path, capsys):
        more = ("--frames", 17, "--lora", f"{lora}:0.5", "--lora", lora)
        code, said, error = run(capsys, *self.arguments(tiny, tmp_path / "out.mp4", *more))
        assert code == 0, error
        assert "LoRA lora.safetensors: strength 0.5, rank 2, 1 layers" in said
        assert "LoRA lora.safetensors: strength 1, rank 2, 1 layers" in said

    def test_a_cache_and_compiling_are_said_and_used(self, tiny, tmp_path, capsys, caplog, use_backend):
        use_backend("eager")
        more = ("--frames", 17, "--cache", "taylorseer:0.5", "--cache-range", 0, 1, "--compile")
        code, said, error = run(capsys, *self.arguments(tiny, tmp_path / "out.mp4", *more))
        assert code == 0, error
        assert "TaylorSeer: 50% of the block evaluations between 0% and 100% of the steps are to be skipped" in said
        assert "torch.compile (default)" in said
        assert "TaylorSeer skipped 2 of 4 block evaluations (50%)." in caplog.text
        assert "Compiled in" in caplog.text

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--cache", "teacache"), "'teacache' is not one of first_block"),
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

    def test_what_does_not_fit_is_said_before_anything_is_loaded(self, checkpoints, tiny, image, video, lora, tmp_path, capsys):
        output = tmp_path / "out.mp4"
        for model, more, said in (
            (checkpoints("1.5-i2v"), (), "no start image is connected"),
            (tiny, ("--image", image), "text-to-video model and a start image"),
            (tiny, ("--image", video), "cannot be read as an image"),
            (tiny, ("--video", image.with_name("none.mp4")), "cannot be read as a video"),
            (tiny, ("--lora", next((tiny / "transformer").glob("*.safetensors"))), "it is not a LoRA"),
        ):
            code, _, error = run(capsys, *self.arguments(model, output, "--frames", 17, *more))
            assert code == 1
            assert said in error

    @pytest.mark.parametrize("more", [("--strength", "0.5"), ("--end-image", "x.png"), ("--image", "x.png", "--video", "x.mp4")])
    def test_options_that_need_or_exclude_each_other(self, tiny, more):
        with pytest.raises(SystemExit):
            generate.main([str(argument) for argument in self.arguments(tiny, "out.mp4", *more)])
