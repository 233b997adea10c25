"""A clip goes on where it ends: the next part's start, the join, and a long video in parts."""

import argparse
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import generate
from cogvideox.going_on import join_clips, known_frames
from cogvideox.handles import open_handles
from cogvideox.sampling import sample
from cogvideox.text import encode_prompt
from cogvideox.vae import decode, image_latents
from cogvideox.video import read_image, read_video
from commands.chain import parts_folder, plan_parts
from tests.conftest import CPU
from tests.helpers import call
from tests.helpers import run_generate as run
from tests.reference import draw_prompts


def clip(frames=9, height=32, width=48, seed=1):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


class TestJoin:
    @pytest.mark.parametrize("overlap", [1, 4, 9])
    def test_it_is_the_cross_fade_of_videox_funs_script(self, overlap):
        first, second = clip(9), clip(13, seed=2)
        # As there, on channels first.
        joined, more = (part.permute(3, 0, 1, 2).clone() for part in (first, second))
        share = torch.tensor([index / overlap for index in range(overlap)]).view(1, -1, 1, 1)
        joined[:, -overlap:] = joined[:, -overlap:] * (1 - share) + more[:, :overlap] * share
        joined = torch.cat([joined, more[:, overlap:]], dim=1)
        assert torch.equal(join_clips(first, second, overlap), joined.permute(1, 2, 3, 0))

    def test_nothing_shared_is_one_behind_the_other(self):
        assert torch.equal(join_clips(clip(2), clip(3), 0), torch.cat([clip(2), clip(3)]))

    def test_the_node_joins(self, pack):
        (joined,) = call(pack, "CogVideoX15JoinClips", first=clip(9), second=clip(5, seed=2), overlap=1)
        assert torch.equal(joined, torch.cat([clip(9), clip(5, seed=2)[1:]]))

    @pytest.mark.parametrize(
        ("second", "overlap", "said"),
        [
            (clip(5, 48, 32), 1, "frames of 48x32 and the second of 32x48, so they cannot be joined"),
            (clip(5), 6, "is 6 frames, but the clips have 9 and 5. Set it from 0 to 5"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, second, overlap, said):
        with pytest.raises(ValueError, match=said):
            join_clips(clip(9), second, overlap)


class TestExtend:
    def prompt(self):
        return [[draw_prompts()[0], {"keep": 1}]]

    @pytest.mark.parametrize(("overlap", "length"), [(1, 17), (5, 21)])
    def test_the_next_part_begins_with_the_end_of_the_clip(self, pack, checkpoints, overlap, length):
        vae = open_handles(checkpoints("1.5-i2v"), "fp32", CPU).vae
        loaded = call(pack, "CogVideoX15ModelLoader", model=str(checkpoints("1.5-i2v")), dtype="fp32", memory="cpu")
        positive, negative, latent, video, mask = call(
            pack,
            "CogVideoX15Extend",
            positive=self.prompt(),
            negative=self.prompt(),
            vae=loaded[2],
            images=clip(),
            length=length,
            overlap=overlap,
        )
        assert latent["samples"].shape == (1, 16, (length + 3) // 4, 4, 6)
        assert not latent["samples"].any()
        expected = image_latents(vae, clip()[-overlap:][:1], length)
        for conditioning in (positive, negative):
            assert conditioning[0][1]["keep"] == 1
            assert torch.equal(conditioning[0][1]["concat_latent_image"], expected)
        assert torch.equal(video[:overlap], clip()[-overlap:])
        assert torch.equal(video[overlap:], clip()[-1:].expand(length - overlap, -1, -1, -1))
        assert mask.shape == (length, 32, 48)
        assert not mask[:overlap].any()
        assert (mask[overlap:] == 1).all()

    @pytest.mark.parametrize(
        ("frames", "length", "overlap", "said"),
        [
            (9, 17, 4, "is 4 frames, but what is known .* Set it to 1 or 5"),
            (9, 17, 0, "is 0 frames, but what is known .* Set it to 1 or 5"),
            (9, 17, 17, "is 17 frames and the next part has 17, so nothing new"),
            (3, 17, 5, "is 5 frames, but the clip has 3"),
            (9, 18, 1, "Set it to 17 or 21"),
        ],
    )
    def test_what_does_not_go_is_refused(self, frames, length, overlap, said):
        with pytest.raises(ValueError, match=said):
            known_frames(clip(frames), length, overlap)


class TestChain:
    """``--seconds``: 2 s at 16 frames a second are 33 frames, two parts of 17."""

    @pytest.fixture
    def image(self, tmp_path):
        from PIL import Image

        path = tmp_path / "start.png"
        Image.fromarray((clip(1)[0] * 255).round().to(torch.uint8).numpy()).save(path)
        return path

    def arguments(self, checkpoints, tmp_path, image, *more):
        return (
            *("--model", checkpoints("1.5-i2v"), "--prompt", "a panda", "--image", image, "--seconds", "2"),
            *("--frames", "17", "--width", "48", "--height", "32", "--steps", "2", "--seed", "7", "--dtype", "fp32"),
            *("--on-black", "pass", "--output", tmp_path / "long.mp4", *more),
        )

    def expected(self, folder, image):
        """The same made of the engine's own functions: uint8 frames."""
        handles = open_handles(folder, "fp32", CPU)
        prompts = [encode_prompt(handles.text_encoder, text).embeddings for text in ("a panda", "")]
        start, made = read_image(image), []
        for number in range(2):
            latents = sample(
                handles.model,
                *prompts,
                torch.zeros(1, 16, 5, 4, 6),
                image_latents=image_latents(handles.vae, start, 17),
                seed=7 + number,
                steps=2,
            )
            frames = decode(handles.vae, latents)
            made.append(frames if number == 0 else frames[1:])
            start = frames[-1:]
        return (torch.cat(made) * 255).round().to(torch.uint8)

    def test_parts_start_from_the_last_frame_and_a_stopped_run_goes_on(
        self, checkpoints, tmp_path, capsys, monkeypatch, image
    ):
        import cogvideox.sampling
        import cogvideox.video

        written, calls, real = [], [], cogvideox.sampling.sample
        monkeypatch.setattr(cogvideox.video, "write_mp4", lambda images, *_, **__: written.append(images))

        def stop_at(number):
            def stopping(*arguments, **how):
                calls.append(how["seed"])
                if len(calls) == number:
                    raise KeyboardInterrupt
                return real(*arguments, **how)

            monkeypatch.setattr(cogvideox.sampling, "sample", stopping)

        stop_at(2)
        arguments = self.arguments(checkpoints, tmp_path, image)
        assert run(capsys, *arguments)[0] == 130
        assert calls == [7, 8]
        (folder,) = tmp_path.glob("long_parts_*")
        assert sorted(path.name for path in folder.iterdir()) == ["part_00001.latent", "settings.json"]
        assert json.loads((folder / "settings.json").read_text())["prompt"] == "a panda"
        calls.clear()
        stop_at(0)
        code, said, _ = run(capsys, *arguments)
        assert code == 0
        assert calls == [8]
        assert "Part 1 of 2 is there already" in said
        assert "2 parts of 17 frames make the video of 33 frames" in said
        assert "drift" in said
        assert torch.equal(written[0], self.expected(checkpoints("1.5-i2v"), image))
        # Others than these are made with other settings.
        run(capsys, *self.arguments(checkpoints, tmp_path, image, "--cfg", "5"))
        assert len(list(tmp_path.glob("long_parts_*"))) == 2
        assert calls == [8, 7, 8]

    def test_the_video_is_written(self, checkpoints, tmp_path, capsys, image):
        code, _, error = run(capsys, *self.arguments(checkpoints, tmp_path, image, "--seconds", "0.5"))
        assert (code, error.count("error")) == (0, 0)
        assert len(read_video(tmp_path / "long.mp4")) == 9

    def test_a_plan_says_the_parts_and_makes_none(self, checkpoints, tmp_path, capsys, image):
        code, said, _ = run(capsys, *self.arguments(checkpoints, tmp_path, image, "--plan"))
        assert code == 0
        assert "2 parts of 17 frames" in said
        assert not list(tmp_path.glob("long*"))

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--seconds", "0"), "--seconds is 0.0"),
            (("--seconds", "nan"), "--seconds is nan"),
            (("--seconds", "4000"), "up to 3600"),
            (("--frames", "1"), "none would get any further"),
        ],
    )
    def test_a_length_that_cannot_be_is_told_first(self, checkpoints, tmp_path, capsys, image, more, said):
        code, _, error = run(capsys, *self.arguments(checkpoints, tmp_path, image, *more))
        assert code == 1
        assert said in error

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "--seconds goes with --image"),
            (("--image", "x.png", "--end-image", "y.png"), "--seconds makes many parts and --end-image"),
        ],
    )
    def test_what_does_not_go_with_it_is_told(self, capsys, arguments, said):
        with pytest.raises(SystemExit):
            run(capsys, "--prompt", "x", "--model", "y", "--seconds", "20", *arguments)
        assert said in capsys.readouterr().err

    def test_a_text_to_video_checkpoint_cannot_go_on(self, tiny, tmp_path, capsys, image):
        arguments = ["--model", tiny, *self.arguments(lambda _: tiny, tmp_path, image)[2:]]
        code, _, error = run(capsys, *arguments)
        assert code == 1
        assert "is a text-to-video model and a start image is connected" in error

    def test_thirty_seconds_are_six_parts_of_the_model_cards_length(self):
        parts = plan_parts(30, Fraction(16), 81)
        assert (parts.wanted, parts.count) == (481, 6)
        assert (plan_parts(5, Fraction(16), 81).count, plan_parts(5.1, Fraction(16), 81).count) == (1, 2)

    def test_a_folder_belongs_to_its_settings(self):
        first, second = (parts_folder(Path("a.mp4"), {"seed": seed}) for seed in (1, 2))
        assert first != second
        assert first == parts_folder(Path("a.mp4"), {"seed": 1})


class TestContextWindowsOption:
    def test_it_runs_a_clip_in_windows(self, tiny, tmp_path, capsys):
        code, said, _ = run(
            capsys,
            *("--model", tiny, "--prompt", "a panda", "--frames", "33", "--width", "48", "--height", "32"),
            *("--steps", "2", "--context-windows", "21:2", "--output", tmp_path / "x.mp4", "--on-black", "pass"),
        )
        assert code == 0
        assert "The clip of 33 frames is made in 2 windows of 21 frames that share 8" in said

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--context-windows", "20"), "Set it to 17 or 21"),
            (("--context-windows", "21:3"), "Set it to 2 or 4"),
            (("--context-windows", "21:2", "--scheduler", "dpm"), "Set scheduler to ddim"),
        ],
    )
    def test_what_cannot_run_is_told_before_weights_are_read(self, tiny, tmp_path, capsys, more, said):
        code, _, error = run(
            capsys, "--model", tiny, "--prompt", "x", "--frames", "33", "--output", tmp_path / "x.mp4", *more
        )
        assert code == 1
        assert said in error

    def test_what_it_is_given_is_read(self):
        assert generate._windows("161") == (161, None)
        assert generate._windows("161:8") == (161, 8)
        with pytest.raises(argparse.ArgumentTypeError, match="'x' is not a whole number"):
            generate._windows("161:x")
