"""A clip goes on where it ends: the next part's start, the join, and a long video in parts."""

import argparse
import json
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cogvideox.files
import cogvideox.sampling
import generate
from cogvideox.going_on import join_clips, known_frames
from cogvideox.handles import open_handles
from cogvideox.sampling import sample
from cogvideox.text import encode_prompt
from cogvideox.vae import decode, image_latents
from cogvideox.video import latent_bytes, read_image, read_latent, read_video, write_latent
from commands.chain import frames_of, make_video, parts_folder, plan_parts
from tests.conftest import CPU
from tests.helpers import call
from tests.helpers import run_generate as run
from tests.reference import draw_prompts
from tests.test_generate import no_weights

__all__ = ["no_weights"]


def clip(frames=9, height=32, width=48, seed=1):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def image(tmp_path):
    from PIL import Image

    path = tmp_path / "start.png"
    Image.fromarray((clip(1)[0] * 255).round().to(torch.uint8).numpy()).save(path)
    return path


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
            (9, 21, 11, "is 11 frames, but what is known .* Set it to 9 or 13"),
            (9, 17, 15, "is 15 frames, but what is known .* Set it to 13\\."),
            (9, 17, 40, "is 40 frames, but what is known .* Set it to 13\\."),
            (9, 17, 17, "is 17 frames and the next part has 17, so nothing new"),
            (3, 17, 5, "is 5 frames, but the clip has 3"),
            (9, 18, 1, "Set it to 17 or 21"),
        ],
    )
    def test_what_does_not_go_is_refused(self, frames, length, overlap, said):
        with pytest.raises(ValueError, match=said):
            known_frames(clip(frames), length, overlap)

    def test_a_part_that_no_memory_holds_is_refused(self):
        large = torch.zeros(1, 1, 1, 1).expand(9, 1_000_000, 1_000_000, 3)
        with pytest.raises(ValueError, match="A part of 17 frames of 1000000x1000000 would take 272.0 TB of memory"):
            known_frames(large, 17, 1)


class TestChain:
    """``--seconds``: 2 s at 16 frames a second are 33 frames, two parts of 17."""

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

    def test_parts_of_a_lora_or_model_that_was_replaced_since_are_not_gone_on_with(
        self, checkpoints, tmp_path, capsys, image
    ):
        model, lora = tmp_path / "model", tmp_path / "lora.safetensors"
        shutil.copytree(checkpoints("1.5-i2v"), model)
        name = "transformer_blocks.1.attn1.to_v"

        def made():
            arguments = self.arguments(checkpoints, tmp_path, image, "--seconds", 1, "--lora", lora, "--overwrite")
            assert run(capsys, *arguments, "--model", model)[0] == 0
            return len(list(tmp_path.glob("long_parts_*")))

        def write_lora(strength):
            halves = {"A": torch.ones(2, 128), "B": torch.full((128, 2), strength)}
            save_file({f"{name}.lora_{half}.weight": weights for half, weights in halves.items()}, lora)

        write_lora(1.0)
        assert [made(), made()] == [1, 1]
        write_lora(2.0)
        assert [made(), made()] == [2, 2]
        weights = next((model / "transformer").glob("*.safetensors"))
        os.utime(weights, ns=(1, 1))
        assert [made(), made()] == [3, 3]

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
            (("--image", "x.png", "--end-image", "y.png"), "--seconds makes many parts and --end-image"),
            (("--video", "x.mp4", "--strength", "0.5"), "goes on from --video and --strength changes what is there"),
            (("--video", "x.mp4", "--mask", "y.png"), "goes on from --video and --mask changes what is there"),
        ],
    )
    def test_what_does_not_go_with_it_is_told(self, capsys, arguments, said):
        with pytest.raises(SystemExit):
            run(capsys, "--prompt", "x", "--model", "y", "--seconds", "20", *arguments)
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("variant", ["1.5", "void"])
    def test_a_checkpoint_that_reads_no_frames_cannot_go_on(self, checkpoints, tmp_path, capsys, image, variant):
        more = () if variant == "1.5" else ("--frames", "13")
        code, _, error = run(capsys, *self.arguments(lambda _: checkpoints(variant), tmp_path, image, *more))
        assert code == 1
        assert "--seconds goes on from the frames of the part before" in error
        assert "reads none" in error

    def test_an_image_to_video_checkpoint_needs_an_image_or_a_clip(self, checkpoints, tmp_path, capsys):
        arguments = self.arguments(checkpoints, tmp_path, None)
        code, _, error = run(capsys, *arguments[:4], *arguments[6:])
        assert code == 1
        assert "needs --image" in error

    def test_thirty_seconds_are_six_parts_of_the_model_cards_length(self):
        parts = plan_parts(frames_of(30, Fraction(16)), 81)
        assert (parts.wanted, parts.count, parts.total) == (481, 6, 481)
        assert [plan_parts(frames_of(seconds, Fraction(16)), 81).count for seconds in (5, 5.1)] == [1, 2]
        # CogVideoX-Fun's at 8 frames a second, and after a clip of 2 s.
        parts = plan_parts(frames_of(30, Fraction(8)), 85, 5)
        assert (parts.wanted, parts.count, parts.total) == (241, 3, 245)
        parts = plan_parts(frames_of(30, Fraction(8)), 85, 5, 17)
        assert (parts.wanted, parts.count, parts.total) == (241, 3, 257)

    def test_a_part_that_another_process_made_meanwhile_is_that_part(self, tmp_path):
        """Two processes with the same command."""
        parts, said, seeds = plan_parts(9, 5), [], []
        folder = tmp_path / "parts"

        def make(known, seed):
            seeds.append(seed)
            if seed == 0:
                write_latent(torch.full((1, 16, 2, 2, 2), 0.5), folder, "part")
            return torch.full((1, 16, 2, 2, 2), float(seed))

        shown = make_video(
            parts,
            folder,
            {},
            (16, 16),
            torch.Size((1, 16, 2, 2, 2)),
            None,
            0,
            make,
            lambda latents: latents.mean().repeat(5, 16, 16, 3),
            said.append,
        )
        assert seeds == [0, 1]
        assert [int(frame.float().mean()) for frame in shown] == [128] * 5 + [255] * 4
        assert sum("Part 1 of 2 is there already" in text for text in said) == 1
        assert sorted(path.name for path in folder.iterdir()) == [
            "part_00001.latent",
            "part_00002.latent",
            "settings.json",
        ]

    def test_the_settings_are_written_whole(self, tmp_path, monkeypatch):
        write = cogvideox.files.write_synced

        def full(path, pieces):
            if path.suffix != ".json":
                return write(path, pieces)
            path.write_bytes(b"{")
            raise OSError(28, "No space left on device")

        (tmp_path / "settings.json").write_text("{}")
        monkeypatch.setattr(cogvideox.files, "write_synced", full)
        with pytest.raises(ValueError, match="cannot be written to .*the parts of the video cannot be kept there"):
            make_video(
                plan_parts(5, 5),
                tmp_path,
                {},
                (16, 16),
                torch.Size((1, 16, 2, 2, 2)),
                None,
                0,
                lambda *_: pytest.fail("a part is made that could not be kept"),
                lambda latents: torch.zeros(5, 16, 16, 3),
                lambda _: None,
            )
        assert (tmp_path / "settings.json").read_text() == "{}"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json"]

    def test_a_part_that_cannot_be_written_is_kept_beside_the_output(
        self, checkpoints, tmp_path, capsys, monkeypatch, image
    ):
        write = cogvideox.files.write_synced

        def full(path, pieces):
            if "_parts_" in path.parent.name and path.suffix != ".json":
                raise OSError(28, "No space left on device")
            return write(path, pieces)

        monkeypatch.setattr(cogvideox.files, "write_synced", full)
        code, _, error = run(capsys, *self.arguments(checkpoints, tmp_path, image))
        assert code == 1
        assert "No space left" in error
        assert "The latents are not lost" in error
        (kept,) = tmp_path.glob("*.latent")
        assert read_latent(kept).shape == (1, 16, 5, 4, 6)

    @pytest.mark.parametrize(
        "other",
        [
            lambda good: good[: len(good) // 2],
            lambda good: b"",
            lambda good: latent_bytes(torch.ones(1, 16, 3, 4, 6)),
            lambda good: latent_bytes(torch.full((1, 16, 5, 4, 6), torch.nan)),
            lambda good: good[: len(good) // 2] + bytes(len(good) - len(good) // 2),
        ],
        ids=["cut off", "empty", "shorter", "NaN", "half written"],
    )
    def test_what_is_no_such_part_is_not_taken_for_one(self, checkpoints, tmp_path, capsys, image, other):
        arguments = self.arguments(checkpoints, tmp_path, image, "--overwrite", "--steps", "1")
        assert run(capsys, *arguments)[0] == 0
        (part,) = tmp_path.glob("long_parts_*/part_00001.latent")
        good = part.read_bytes()
        part.write_bytes(other(good))
        code, _, error = run(capsys, *arguments)
        assert code == 1
        assert "part_00001.latent is not the part of the video that was written there" in error
        assert "Delete it, and the part is made anew" in error
        part.unlink()
        assert run(capsys, *arguments)[0] == 0
        assert part.read_bytes() == good

    def test_a_folder_belongs_to_its_settings(self):
        first, second = (parts_folder(Path("a.mp4"), {"seed": seed}) for seed in (1, 2))
        assert first != second
        assert first == parts_folder(Path("a.mp4"), {"seed": 1})
        # What a disk takes as a name.
        assert len(parts_folder(Path(f"{'猫' * 83}.mp4"), {}).name.encode()) <= 255


def write_lossless(path, frames, fps=8):
    """Write a clip of which every value is read again: uint8 ``[F, H, W, 3]``."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps, options={"slices": "4"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


class TestKnownFrames:
    """``--seconds`` with CogVideoX-Fun InP: parts of 13 frames, of which 5 are there. 2.5 s at 8 frames a second are 21
    frames: two parts after a clip of 9, and two without it."""

    def arguments(self, checkpoints, tmp_path, *more, seconds=2.5, variant="fun-inp"):
        return (
            *("--model", checkpoints(variant), "--prompt", "a panda", "--frames", "13", "--width", "48"),
            *("--height", "32", "--steps", "2", "--dtype", "fp32", "--seed", "7", "--on-black", "pass", "--overwrite"),
            *(() if seconds is None else ("--seconds", seconds)),
            *("--output", tmp_path / "long.mp4", *more),
        )

    @pytest.fixture
    def written(self, monkeypatch):
        import cogvideox.video

        written = []
        monkeypatch.setattr(cogvideox.video, "write_mp4", lambda images, *_, **__: written.append(images))
        return written

    def by_nodes(self, pack, folder, frames, overlap, start=None, count=2):
        """Go on from a clip, or begin with an image, as the nodes do: all parts as a clip, and the latents of each."""
        model, encoder, vae, *_ = call(pack, "CogVideoX15ModelLoader", model=str(folder), dtype="fp32", memory="cpu")
        prompts = [
            call(pack, "CogVideoX15TextEncode", text_encoder=encoder, prompt=text)[0] for text in ("a panda", "")
        ]
        latents = []
        for number in range(count):
            given = {} if start is None or number else {"start_image": start}
            if frames is not None:
                *_, given["video"], given["mask"] = call(
                    pack,
                    "CogVideoX15Extend",
                    **dict(zip(("positive", "negative"), prompts, strict=True)),
                    **dict(vae=vae, images=frames, length=13, overlap=overlap),
                )
            positive, negative, latent = call(
                pack,
                "CogVideoX15Inpaint",
                **dict(zip(("positive", "negative"), prompts, strict=True)),
                **dict(vae=vae, width=48, height=32, length=13, **given),
            )
            how = dict(positive=positive, negative=negative, latent_image=latent, seed=7 + number, steps=2)
            (made,) = call(pack, "CogVideoX15Sampler", model=model, cfg=6.0, scheduler="ddim", denoise=1.0, **how)
            latents.append(made["samples"])
            (part,) = call(pack, "CogVideoX15VAEDecode", vae=vae, samples=made)
            if frames is not None:
                (part,) = call(pack, "CogVideoX15JoinClips", first=frames, second=part, overlap=overlap)
            frames = part
        return frames, latents

    def test_parts_begin_with_known_frames_as_the_nodes_have_them_and_a_stopped_run_goes_on(
        self, pack, checkpoints, tmp_path, capsys, monkeypatch, written
    ):
        # What is faded in at the end of a part of 13 frames is faded over again.
        overlap, seconds = 9, 2
        before = (clip(9) * 255).round().to(torch.uint8)
        video = write_lossless(tmp_path / "before.mkv", before)
        arguments = self.arguments(checkpoints, tmp_path, "--video", video, "--overlap", overlap, seconds=seconds)
        calls, real = [], cogvideox.sampling.sample

        def stopping(*given, **how):
            calls.append(how["seed"])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*given, **how)

        monkeypatch.setattr(cogvideox.sampling, "sample", stopping)
        assert run(capsys, *arguments)[0] == 130
        code, said, error = run(capsys, *arguments)
        assert (code, calls) == (0, [7, 8, 8]), error
        wanted = round(seconds * 8) + 1
        assert f"The clip's 9 frames and 2 parts of 13 frames make the video of {wanted} frames." in said
        assert f"with the last {overlap} frames of what is there" in said
        expected, latents = self.by_nodes(pack, checkpoints("fun-inp"), before / 255, overlap)
        assert torch.equal(written[0], (expected[:wanted] * 255).round().to(torch.uint8))
        (folder,) = tmp_path.glob("long_parts_*")
        for number, made in enumerate(latents, 1):
            assert torch.equal(read_latent(folder / f"part_{number:05}.latent"), made)
        # Another clip with the same end is another beginning of the same parts.
        calls.clear()
        write_lossless(video, torch.cat([before.flip(0)[: 9 - overlap], before[-overlap:]]))
        assert run(capsys, *arguments)[0] == 0
        assert calls == []
        assert torch.equal(written[1][9:], written[0][9:])

    def test_a_part_is_that_which_mask_makes(self, checkpoints, tmp_path, capsys, monkeypatch, written):
        before = (clip(9) * 255).round().to(torch.uint8)
        known, mask = known_frames(before, 13, 5)
        video, start, marked = (
            write_lossless(tmp_path / f"{name}.mkv", frames)
            for name, frames in (
                ("before", before),
                ("start", known),
                ("mask", (mask[..., None] * 255).to(torch.uint8).expand(-1, -1, -1, 3).contiguous()),
            )
        )
        made, real = [], cogvideox.sampling.sample

        def kept(*given, **how):
            made.append(real(*given, **how))
            return made[-1]

        monkeypatch.setattr(cogvideox.sampling, "sample", kept)
        for more, seconds in ((("--video", video), 1.5), (("--video", start, "--mask", marked), None)):
            code, _, error = run(capsys, *self.arguments(checkpoints, tmp_path, *more, seconds=seconds))
            assert code == 0, error
        assert torch.equal(*made)

    def test_it_begins_with_an_image_or_the_text_alone(self, pack, checkpoints, tmp_path, capsys, written, image):
        assert run(capsys, *self.arguments(checkpoints, tmp_path, "--image", image))[0] == 0
        expected, _ = self.by_nodes(pack, checkpoints("fun-inp"), None, 5, read_image(image))
        assert torch.equal(written[0], (expected * 255).round().to(torch.uint8))
        code, said, _ = run(capsys, *self.arguments(checkpoints, tmp_path, "--plan"))
        assert code == 0
        assert "2 parts of 13 frames make the video of 21 frames." in said

    def test_a_clip_gives_the_size_and_its_sound(self, checkpoints, tmp_path, capsys, monkeypatch):
        import cogvideox.video

        video, sounds = write_lossless(tmp_path / "x.mkv", torch.zeros(9, 48, 24, 3, dtype=torch.uint8)), []
        monkeypatch.setattr(cogvideox.video, "read_sound", lambda path, seconds, _: (path, seconds))
        monkeypatch.setattr(cogvideox.video, "write_mp4", lambda *_, **how: sounds.append(how["sound"]))
        assert run(capsys, *self.arguments(checkpoints, tmp_path, "--video", video, "--keep-audio"))[0] == 0
        assert sounds == [(video, 9 / 8)]
        arguments = self.arguments(checkpoints, tmp_path, "--video", video, "--plan")
        code, said, _ = run(capsys, *arguments[:6], *arguments[10:])
        assert code == 0
        assert "memory to sample 544x1072, 13 frames" in said

    def test_an_image_to_video_checkpoint_goes_on_from_a_clips_last_frame(self, checkpoints, tmp_path, capsys, written):
        from PIL import Image

        before = (clip(9) * 255).round().to(torch.uint8)
        video, image = write_lossless(tmp_path / "before.mkv", before, 16), tmp_path / "last.png"
        Image.fromarray(before[-1].numpy()).save(image)
        for more, seconds in ((("--video", video), 1.5), (("--image", image), 1)):
            arguments = self.arguments(checkpoints, tmp_path, *more, "--frames", 17, seconds=seconds, variant="1.5-i2v")
            assert run(capsys, *arguments)[0] == 0
        assert torch.equal(written[0], torch.cat([before, written[1][1:]]))

    @pytest.mark.parametrize(
        ("more", "variant", "said"),
        [
            (("--seconds", "1"), "fun-inp", "The clip has 9 frames, and with --seconds the video is to have 9"),
            (("--overlap", "4"), "fun-inp", "The overlap is 4 frames, .* Set it to 1 or 5"),
            (("--overlap", "13"), "fun-inp", "The overlap is 13 frames and the next part has 13"),
            (("--overlap", "13", "--frames", "21"), "fun-inp", "--overlap is 13 frames, but the clip has 9"),
            (("--overlap", "5", "--frames", "17"), "1.5-i2v", "--overlap is 5, but .* goes on from one image"),
        ],
    )
    def test_what_does_not_go_is_told_before_weights_are_read(
        self, checkpoints, tmp_path, capsys, no_weights, more, variant, said
    ):
        video = write_lossless(tmp_path / "before.mkv", torch.zeros(9, 32, 48, 3, dtype=torch.uint8))
        code, _, error = run(capsys, *self.arguments(checkpoints, tmp_path, "--video", video, *more, variant=variant))
        assert code == 1
        assert re.search(said, error), error


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
