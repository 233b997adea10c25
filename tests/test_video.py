"""What a run leaves behind goes where it was asked to, whole or not at all, over nothing that was there, and no
finished step is lost."""

import errno
import os
import sys
from collections import namedtuple
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cogvideox.clip_files import read_sound, read_video
from cogvideox.video import check_output, check_room, free_name, read_latent, write_latent, write_mp4
from tests.helpers import generate_beside, write_package
from tests.told import Told

NOISE = torch.rand(5, 48, 80, 3, generator=torch.Generator().manual_seed(1))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestThePlace:
    def test_trying_it_leaves_nothing(self, tmp_path):
        assert check_output(tmp_path / "x.mp4") == tmp_path / "x.mp4"
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("x.avi", "ends in .mp4"),
            ("x", "ends in .mp4"),
            ("", "which is a folder"),
            ("folder.mp4", "which is a folder"),
            ("none/x.mp4", "does not exist"),
            ("file/x.mp4", "is not a folder"),
            ("there.mp4", "exists already and is not replaced"),
            ("link.mp4", "exists already and is not replaced"),
            ("device.mp4", "pipe or device"),
            ("x" * 252 + ".mp4", "cannot be written .*too long"),
            ("x" * 5000 + "/x.mp4", "does not exist"),
            ("a\0b.mp4", "cannot be written"),
        ],
    )
    def test_where_nothing_can_be_written_is_a_sentence(self, tmp_path, name, said):
        (tmp_path / "folder.mp4").mkdir()
        for file in ("file", "there.mp4"):
            (tmp_path / file).write_text("mine")
        (tmp_path / "link.mp4").symlink_to("nowhere")
        (tmp_path / "device.mp4").symlink_to(os.devnull)
        before = names(tmp_path)
        with pytest.raises(ValueError, match=said):
            check_output(tmp_path / name)
        assert names(tmp_path) == before
        assert (tmp_path / "there.mp4").read_text() == "mine"

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
    def test_a_folder_without_the_right_to_write_is_told_before(self, tmp_path):
        tmp_path.chmod(0o555)
        with pytest.raises(ValueError, match="cannot be written .*Permission denied"):
            check_output(tmp_path / "x.mp4")

    def test_what_the_system_refuses_is_told_before(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.open", refuse)
        with pytest.raises(ValueError, match="cannot be written .*Permission denied"):
            check_output(tmp_path / "x.mp4")

    def test_an_encoder_that_is_not_there_is_told_before(self, tmp_path, monkeypatch):
        """As in a PyAV of conda's that has no code under the GPL."""

        def lacks(name, mode):
            raise av.codec.codec.UnknownCodecError(name)

        monkeypatch.setattr(av.codec, "Codec", lacks)
        with pytest.raises(
            RuntimeError, match=r"The package av .* without libx264.* pip install --force-reinstall .* av\."
        ):
            check_output(tmp_path / "a.mp4")
        assert names(tmp_path) == []

    def test_so_is_a_pyav_that_cannot_be_imported(self, tiny, tmp_path):
        write_package(tmp_path, "av", does="raise ImportError('DLL load failed while importing _core')")
        done = generate_beside(tmp_path, tiny, "--plan")
        assert done.returncode == 1
        assert "error: The package av " in done.stderr
        assert "cannot be imported (DLL load failed while importing _core)" in done.stderr

    def test_what_a_video_is_made_from_is_never_replaced(self, tmp_path):
        (tmp_path / "x.mp4").write_text("mine")
        (tmp_path / "link.mp4").symlink_to("x.mp4")
        for path in ("x.mp4", "link.mp4"):
            with pytest.raises(ValueError, match="which the video is made from"):
                check_output(tmp_path / path, overwrite=True, made_from=[tmp_path / "none", tmp_path / "x.mp4"])
        assert check_output(tmp_path / "x.mp4", overwrite=True, made_from=[tmp_path]) == tmp_path / "x.mp4"

    def test_a_disk_that_is_too_full_is_told_before(self, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**9, 10**9, 20_000_000))
        check_room(tmp_path / "x.mp4", 17, 240, 160)
        with pytest.raises(ValueError, match="has 20 MB free, and 81 frames of 1360x768 may take 38 MB"):
            check_room(tmp_path / "x.mp4", 81, 1360, 768)

    def test_a_name_counts_up(self, tmp_path):
        for expected in ("out.mp4", "out_00002.mp4", "out_00003.mp4"):
            path = free_name(tmp_path / "out.mp4")
            assert path.name == expected
            path.touch()


class TestWriting:
    def test_a_video_is_replaced_only_when_that_is_asked_for(self, tmp_path):
        path = tmp_path / "x.mp4"
        path.write_text("mine")
        with pytest.raises(ValueError, match="not replaced unasked"):
            write_mp4(NOISE, path, 16)
        assert path.read_text() == "mine"
        write_mp4(NOISE, path, 16, overwrite=True)
        assert len(read_video(path)) == 5
        assert names(tmp_path) == ["x.mp4"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
    def test_what_is_interrupted_leaves_nothing(self, tmp_path, error):
        def stop(done, total):
            if done == 3:
                raise error

        with pytest.raises(error):
            write_mp4(NOISE, tmp_path / "x.mp4", 16, Told(progress=stop))
        assert names(tmp_path) == []

    def test_it_is_on_the_disk_before_it_has_its_name(self, tmp_path, monkeypatch):
        """``--prompts`` takes what is there for made, after a loss of power too."""
        seen = []
        monkeypatch.setattr(os, "fsync", lambda file: seen.append((os.fstat(file).st_size, names(tmp_path))))
        write_mp4(NOISE, tmp_path / "x.mp4", 16)
        ((size, there),) = seen
        assert size == (tmp_path / "x.mp4").stat().st_size
        assert "x.mp4" not in there

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process")
    def test_a_disk_that_becomes_full_is_a_sentence_and_leaves_nothing(self, tmp_path):
        import resource

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        try:
            with pytest.raises(RuntimeError, match=r"x.mp4 could not be written .*nothing of it was left"):
                write_mp4(NOISE, tmp_path / "x.mp4", 16)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path) == []

    def test_sound_is_written_and_cut_to_the_video(self, tmp_path):
        rate = 48_000
        wave = (0.5 * np.sin(np.arange(3 * rate) * 2 * np.pi * 440 / rate)).astype(np.float32)
        write_mp4(NOISE.repeat(5, 1, 1, 1), tmp_path / "x.mp4", 16, sound=(np.stack([wave, wave]), rate))
        with av.open(str(tmp_path / "x.mp4")) as container:
            seconds = {stream.type: float(stream.duration * stream.time_base) for stream in container.streams}
        assert seconds["video"] == pytest.approx(25 / 16)
        assert seconds["audio"] == pytest.approx(25 / 16, abs=0.03)
        sound, _ = read_sound(tmp_path / "x.mp4", 1.5)
        assert np.abs(sound[0, 4800:67_200] - wave[4800:67_200]).mean() < 0.02

    @pytest.mark.parametrize(
        "folder", ["plain", "with: colon", "übung 日本", os.fsdecode(b"\xe9") if sys.platform == "linux" else "x"]
    )
    def test_names_of_every_kind(self, tmp_path, folder, monkeypatch):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path)
        write_mp4(NOISE, Path(folder) / "x.mp4", 16)
        assert len(read_video(Path(folder) / "x.mp4")) == 5


class TestLatents:
    def test_what_is_written_is_read_back(self, tmp_path):
        latents = torch.randn(1, 16, 3, 4, 4)
        path = write_latent(latents, tmp_path / "new", "panda")
        assert path == tmp_path / "new" / "panda_00001.latent"
        assert torch.equal(read_latent(path), latents)
        assert names(tmp_path / "new") == ["panda_00001.latent"]

    @pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
    def test_so_it_is_in_any_floats(self, tmp_path, dtype):
        latents = torch.randn(1, 16, 3, 4, 4).to(getattr(torch, dtype))
        save_file({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])}, tmp_path / "a.latent")
        assert torch.equal(read_latent(tmp_path / "a.latent"), latents.float())

    @pytest.mark.skipif(sys.platform != "linux", reason="names that are no text are Linux's")
    def test_so_it_is_from_a_folder_whose_name_is_no_text(self, tmp_path):
        latents = torch.randn(1, 16, 3, 4, 4)
        path = write_latent(latents, tmp_path / "a\udcff", "panda")
        assert torch.equal(read_latent(path), latents)

    def test_latents_that_a_disk_does_not_take_are_not_said_to_be_kept(self, tmp_path, monkeypatch):
        """Some disks say only when all is to be on them that they are full."""

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\), so the latents are not"):
            write_latent(torch.zeros(1, 16, 1, 2, 2), tmp_path)
        assert names(tmp_path) == []

    def test_one_that_comes_meanwhile_is_not_replaced(self, tmp_path, monkeypatch):
        real = os.link

        def late(source, target):
            if not (tmp_path / "x_00001.latent").exists():
                (tmp_path / "x_00001.latent").write_text("another's")
            real(source, target)

        monkeypatch.setattr(os, "link", late)
        assert write_latent(torch.zeros(1, 16, 1, 2, 2), tmp_path, "x").name == "x_00002.latent"
        assert (tmp_path / "x_00001.latent").read_text() == "another's"

    def test_one_that_is_interrupted_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupted(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_latent(torch.zeros(1, 16, 1, 2, 2), tmp_path)
        assert names(tmp_path) == []

    def test_what_is_no_latent_is_a_sentence(self, tmp_path):
        (tmp_path / "a.latent").write_bytes(b"nonsense")
        save_file({"weight": torch.zeros(2)}, tmp_path / "b.latent")
        # Those of the first Save Latent are scaled for Stable Diffusion.
        save_file({"latent_tensor": torch.zeros(1, 4, 8, 8)}, tmp_path / "c.latent")
        for name, said in (
            ("a", "cannot be read as a latent"),
            ("b", "no latent of a video .weight."),
            ("c", "no latent of a video"),
            ("d", "No such"),
        ):
            with pytest.raises(ValueError, match=said):
                read_latent(tmp_path / f"{name}.latent")
