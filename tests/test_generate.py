"""The command line makes a video file, and says in a sentence why it could not."""

import av
import numpy as np
import pytest
import torch

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
    for option in ("--prompt", "--model", "--width", "--height", "--frames", "--steps", "--cfg", "--seed", "--scheduler", "--dtype", "--output"):
        assert option in said
    assert "example:" in said
