"""A checkpoint is downloaded when asked, and then only what is needed, once, checked, and going on where it stopped.

The hub is a server on loopback; the client is huggingface_hub as it is installed.
"""

import email.utils
import errno
import gzip
import importlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from cogvideox.checkpoint import download, transfer
from cogvideox.checkpoint.download import REPOSITORIES, checkpoint_folder, download_checkpoint
from cogvideox.checkpoint.layout import is_checkpoint, open_checkpoint
from cogvideox.files import SPARE
from tests.conftest import ROOT
from tests.hub_server import HubServer
from tests.told import Told

VAE = "vae/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"
#: What repositories hold besides, and two names that no honest one holds.
NOT_NEEDED = {
    "README.md": b"# CogVideoX",
    "assets/banner.png": b"png",
    "vae/diffusion_pytorch_model.bin": b"pickle",
    "transformer/model.pt": b"pickle",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"a second copy",
    "image_encoder/config.json": b"{}",
    "transformer/old/config.json": b"{}",
    "old/transformer/config.json": b"{}",
    "transformer/config.json.orig": b"{}",
    "transformer/../../escaped.json": b"{}",
    "/escaped.json": b"{}",
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(transfer, "_RETRY_WAITS", (0, 0))
    monkeypatch.setattr(download, "_REPORT_EVERY", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(tiny):
    with HubServer(tiny, REPOSITORIES["t2v"], NOT_NEEDED) as server:
        yield server


@pytest.fixture
def target(tmp_path):
    """Where the checkpoint comes to lie."""
    return tmp_path / "CogVideoX1.5-5B"


def needed(hub):
    return sorted(set(hub.files) - set(NOT_NEEDED))


def files_in(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def parts_in(folder):
    return list(folder.rglob("*.part"))


class Stop(Exception):
    """A cancel, as a progress callback raises it."""


def stop_at(reached):
    """A progress callback that cancels as soon as so many bytes are done."""

    def on_progress(done, total):
        if done >= reached:
            raise Stop

    return on_progress


def bytes_before(hub, path):
    """What is done when the download comes to ``path``: files come in the order of their names, transformer/config.json
    last."""
    return sum(len(hub.files[name]) for name in needed(hub) if name < path and name != CONFIG)


def test_a_downloaded_checkpoint_opens_and_holds_only_what_it_needs(hub, tiny, tmp_path, target):
    assert download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint) == target
    assert files_in(tmp_path) == [f"CogVideoX1.5-5B/{path}" for path in needed(hub)]
    assert all((target / path).read_bytes() == (tiny / path).read_bytes() for path in needed(hub))
    assert is_checkpoint(target)
    assert set(open_checkpoint(target).parts) == {"transformer", "text_encoder", "vae"}
    assert sorted(request.path for request in hub.fetched()) == needed(hub)


def test_image_to_video_is_another_repository(checkpoints, tmp_path):
    with HubServer(checkpoints("1.5-i2v"), "zai-org/CogVideoX1.5-5B-I2V") as hub:
        folder = download_checkpoint("i2v", tmp_path, endpoint=hub.endpoint)
    assert folder == checkpoint_folder("i2v", tmp_path) == tmp_path / "CogVideoX1.5-5B-I2V"
    assert open_checkpoint(folder).variant.image_to_video


def test_a_second_call_fetches_nothing(hub, tmp_path):
    download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
    hub.requests.clear()
    seen = []
    download_checkpoint("t2v", tmp_path, lambda *progress: seen.append(progress), hub.endpoint)
    assert hub.fetched() == []
    assert len(seen) == 1
    assert seen[0][0] == seen[0][1]


def test_only_what_is_missing_or_other_than_on_the_hub_is_fetched(hub, tmp_path, target):
    download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
    hub.requests.clear()
    (target / VAE).unlink()
    shard = target / "text_encoder" / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    index = target / "model_index.json"
    index.write_bytes(index.read_bytes().swapcase())
    download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
    assert [request.path for request in hub.fetched()] == [
        "model_index.json",
        "text_encoder/model-00001-of-00003.safetensors",
        VAE,
    ]
    assert index.read_bytes() == hub.files["model_index.json"]


def test_progress_counts_bytes_within_files_never_goes_back_and_ends_at_the_total(hub, tmp_path):
    seen = []
    hub.drop_after[VAE] = [300_000]
    download_checkpoint("t2v", tmp_path, lambda *progress: seen.append(progress), hub.endpoint)
    done, totals = zip(*seen, strict=True)
    total = sum(len(hub.files[path]) for path in needed(hub))
    assert set(totals) == {total}
    assert done[0] == 0
    assert all(a <= b for a, b in itertools.pairwise(done))
    assert done[-1] == total
    assert done.count(total) == 1
    assert max(b - a for a, b in itertools.pairwise(done)) < len(hub.files[VAE]) / 5


def test_progress_is_not_reported_more_often_than_a_page_can_show(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_REPORT_EVERY", 3600)
    seen = []
    download_checkpoint("t2v", tmp_path, lambda *progress: seen.append(progress), hub.endpoint)
    assert len(seen) == 2
    assert seen[-1][0] == seen[-1][1]


class TestResuming:
    def test_a_broken_connection_goes_on_within_the_call(self, hub, tmp_path, target):
        hub.drop_after[VAE] = [200_000, 100_000]
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        ranges = [request.range for request in hub.fetched() if request.path == VAE]
        starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in ranges[1:]]
        assert ranges[0] is None
        assert 100_000 < starts[0] <= 200_000 < starts[1] <= 300_000
        assert (target / VAE).read_bytes() == hub.files[VAE]

    def test_a_download_that_broke_off_goes_on_in_the_next_call(self, hub, tmp_path, target):
        hub.drop_after[VAE] = [200_000, 0, 0, 0]
        with pytest.raises(
            RuntimeError, match=r"The connection to .* failed .* what was fetched is kept\. Check the network"
        ):
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        (part,) = parts_in(target)
        size = part.stat().st_size
        assert size > 100_000
        assert not (target / VAE).exists()
        hub.requests.clear()
        hub.sent.clear()
        hub.drop_after.clear()
        seen = []
        download_checkpoint("t2v", tmp_path, lambda *progress: seen.append(progress), hub.endpoint)
        assert [(request.path, request.range) for request in hub.fetched()] == [(VAE, f"bytes={size}-"), (CONFIG, None)]
        assert hub.sent[VAE] == len(hub.files[VAE]) - size
        assert (target / VAE).read_bytes() == hub.files[VAE]
        assert parts_in(target) == []
        assert seen[0][0] == bytes_before(hub, VAE)

    def test_busy_answers_are_tried_again(self, hub, tmp_path, target):
        hub.status[VAE] = [503, 429]
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert (target / VAE).read_bytes() == hub.files[VAE]

    def test_a_server_that_ignores_ranges_is_read_from_the_start(self, hub, tmp_path, target):
        hub.ranges = False
        hub.drop_after[VAE] = [200_000]
        seen = []
        download_checkpoint("t2v", tmp_path, lambda *progress: seen.append(progress), hub.endpoint)
        assert (target / VAE).read_bytes() == hub.files[VAE]
        assert all(a[0] <= b[0] for a, b in itertools.pairwise(seen))

    def test_a_server_that_ignores_ranges_and_always_breaks_off_is_given_up(self, hub, tmp_path):
        hub.ranges = False
        hub.drop_after[VAE] = [200_000] * 10
        with pytest.raises(RuntimeError, match="failed"):
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert len(hub.drop_after[VAE]) == 7

    def test_a_file_that_changed_on_the_hub_is_begun_anew(self, hub, tmp_path, target):
        with pytest.raises(Stop):
            download_checkpoint("t2v", tmp_path, stop_at(bytes_before(hub, VAE) + 200_000), hub.endpoint)
        hub.files[VAE] = hub.files[VAE][::-1]
        hub.requests.clear()
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert (target / VAE).read_bytes() == hub.files[VAE]
        assert hub.fetched()[0].range is None
        assert parts_in(target) == []

    def test_until_it_is_complete_it_is_not_taken_for_a_checkpoint(self, hub, tmp_path, target):
        hub.status[CONFIG] = [503] * 3
        with pytest.raises(RuntimeError):
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert (target / VAE).exists()
        assert not is_checkpoint(target)


class TestCancelling:
    def test_what_the_callback_raises_stops_it_and_the_next_call_goes_on(self, hub, tmp_path, target):
        hub.delay = 0.005
        with pytest.raises(Stop):
            download_checkpoint("t2v", tmp_path, stop_at(bytes_before(hub, VAE) + 100_000), hub.endpoint)
        (part,) = parts_in(target)
        size = part.stat().st_size
        assert 100_000 <= size < 200_000
        assert hub.fetched()[-1].path == VAE
        assert hub.sent[VAE] < len(hub.files[VAE])
        hub.requests.clear()
        hub.delay = 0
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert hub.fetched()[0].range == f"bytes={size}-"
        assert (target / VAE).read_bytes() == hub.files[VAE]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("mine"), TimeoutError("mine"), ValueError("mine")])
    def test_whatever_is_raised_arrives_unchanged(self, hub, tmp_path, error):
        def on_progress(done, total):
            if done > total / 2:
                raise error

        with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
            download_checkpoint("t2v", tmp_path, on_progress, hub.endpoint)
        assert str(caught.value) in ("", "mine")

    def test_a_cancel_is_heard_while_a_new_connection_is_waited_for(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(transfer, "_RETRY_WAITS", (60,))
        hub.status["model_index.json"] = [503]
        calls = itertools.count()

        def on_progress(done, total):
            if next(calls) == 2:
                raise Stop

        start = time.monotonic()
        with pytest.raises(Stop):
            download_checkpoint("t2v", tmp_path, on_progress, hub.endpoint)
        assert time.monotonic() - start < 5


class TestTwoAtOnce:
    @pytest.mark.skipif(sys.platform == "win32", reason="locks otherwise")
    @pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
    def test_a_disk_without_locks_is_written_to_all_the_same(self, hub, tmp_path, target, monkeypatch, code):
        import fcntl

        def flock(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert files_in(target) == needed(hub)

    def test_a_second_download_into_the_folder_is_refused_and_the_first_is_whole(self, hub, tmp_path, target):
        refused = []

        def second():
            with pytest.raises(RuntimeError, match="Another program is downloading into .* it goes on where") as caught:
                download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
            refused.append(caught)

        def on_progress(done, total):
            if parts_in(target) and not refused:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

        download_checkpoint("t2v", tmp_path, on_progress, hub.endpoint)
        assert len(refused) == 1
        assert all((target / path).read_bytes() == hub.files[path] for path in needed(hub))
        assert files_in(target) == needed(hub)
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)

    @pytest.mark.parametrize("ending", ["kill", "terminate"])
    def test_after_one_that_was_killed_the_next_goes_on(self, hub, tmp_path, target, ending):
        hub.delay = 0.05
        run = subprocess.Popen(
            [sys.executable, "generate.py", "--download", "t2v", str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"HF_ENDPOINT": hub.endpoint},
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (begun := parts_in(target)) and run.poll() is None:
            time.sleep(0.02)
        getattr(run, ending)()
        _, said = run.communicate(timeout=60)
        assert begun
        if ending == "terminate" and os.name == "posix":
            assert run.returncode == 130
            assert "stopped." in said
        hub.delay = 0
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert files_in(target) == needed(hub)


class TestDisk:
    def test_no_file_has_its_name_before_it_is_on_the_disk(self, hub, tmp_path, target, monkeypatch):
        happened, sync, rename = [], os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda file: (happened.append("synced"), sync(file)))
        monkeypatch.setattr(os, "replace", lambda *paths: (happened.append("named"), rename(*paths)))
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert happened == ["synced", "named"] * len(needed(hub))

    def free(self, monkeypatch, count):
        asked = []
        usage = type(shutil.disk_usage("."))

        def disk_usage(place):
            asked.append(place)
            return usage(count, 0, count)

        monkeypatch.setattr("shutil.disk_usage", disk_usage)
        return asked

    def test_too_little_room_is_told_before_anything_is_fetched(self, hub, tmp_path, monkeypatch):
        size = sum(len(hub.files[path]) for path in needed(hub))
        asked = self.free(monkeypatch, SPARE + size - 1)
        with pytest.raises(
            RuntimeError, match=r"needs 2\.\d\d MB more .* 1\.00 GB to spare, but the disk .* 1\.00 GB free.*Make room"
        ):
            download_checkpoint("t2v", tmp_path / "not" / "there" / "yet", endpoint=hub.endpoint)
        assert asked == [tmp_path]
        assert hub.fetched() == []
        assert list(tmp_path.iterdir()) == []

    def test_room_for_what_is_missing_is_enough(self, hub, tmp_path, monkeypatch):
        with pytest.raises(Stop):
            download_checkpoint("t2v", tmp_path, stop_at(bytes_before(hub, VAE) + 200_000), hub.endpoint)
        self.free(monkeypatch, SPARE + len(hub.files[VAE]) + len(hub.files[CONFIG]) - 200_000)
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        self.free(monkeypatch, 0)
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)

    def test_a_disk_that_stops_taking_bytes_is_told_and_the_next_call_goes_on(self, hub, tmp_path, target):
        """With the operating system's own limit on the size of a file."""
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_001, hard))
        try:
            with pytest.raises(RuntimeError, match=r"cannot be written: .* what was fetched is kept\. Make room"):
                download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (part,) = parts_in(target)
        assert part.stat().st_size == 500_001
        hub.requests.clear()
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert hub.fetched()[0].range == "bytes=500001-"
        assert (target / VAE).read_bytes() == hub.files[VAE]


class TestRefusals:
    """Each error says what is wrong, why it matters and what to do."""

    def refused(self, hub, folder, *said, kind=RuntimeError, which="t2v"):
        with pytest.raises(kind) as caught:
            download_checkpoint(which, folder, endpoint=hub if isinstance(hub, str) else hub.endpoint)
        for words in said:
            assert words in str(caught.value)

    @pytest.mark.parametrize("path", [VAE, "model_index.json"])
    def test_a_damaged_file_is_deleted(self, hub, tmp_path, target, path):
        hub.corrupt.add(path)
        self.refused(hub, tmp_path, f"{path} arrived damaged", "has been deleted", "Download again")
        assert not (target / path).exists()
        assert parts_in(target) == []
        hub.corrupt.clear()
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert (target / path).read_bytes() == hub.files[path]

    def test_a_damaged_part_is_deleted_too(self, hub, tmp_path, target):
        with pytest.raises(Stop):
            download_checkpoint("t2v", tmp_path, stop_at(bytes_before(hub, VAE) + 200_000), hub.endpoint)
        (part,) = parts_in(target)
        part.write_bytes(bytes(part.stat().st_size))
        self.refused(hub, tmp_path, f"{VAE} arrived damaged")
        assert parts_in(target) == []

    def test_an_unknown_checkpoint(self, hub, tmp_path):
        self.refused(
            hub, tmp_path, "'t3v'", "t2v (zai-org/CogVideoX1.5-5B)", "Choose one of", kind=ValueError, which="t3v"
        )
        assert hub.requests == []

    def test_a_file_where_the_folder_should_be(self, hub, tmp_path, target):
        target.write_text("x")
        self.refused(hub, tmp_path, f"{target} is a file", "Choose another folder", kind=ValueError)
        self.refused(hub, target, f"{target} is a file", "Choose another folder", kind=ValueError)
        assert hub.requests == []

    def test_no_network(self, tmp_path):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        self.refused(
            endpoint, tmp_path, f"The connection to {endpoint} failed", "is not complete yet", "Check the network"
        )

    def test_an_address_without_http(self, tmp_path):
        self.refused("hub.example", tmp_path, "hub.example", "HF_ENDPOINT", "download again")

    def test_offline_mode(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        self.refused(hub, tmp_path, "HF_HUB_OFFLINE is set", "forbids", "Unset it")
        assert hub.requests == []

    @pytest.mark.parametrize("path", ["api", VAE])
    @pytest.mark.parametrize("status", [401, 403])
    def test_a_login_is_wanted(self, hub, tmp_path, path, status):
        hub.status[path] = [status]
        self.refused(
            hub, tmp_path, f"refuses zai-org/CogVideoX1.5-5B with status {status}", "HF_TOKEN", "accept its terms"
        )

    def test_no_such_repository(self, tiny, tmp_path):
        with HubServer(tiny, "someone/else") as hub:
            self.refused(hub, tmp_path, "has no zai-org/CogVideoX1.5-5B", "404", "HF_ENDPOINT")

    def test_a_file_that_is_gone(self, hub, tmp_path):
        hub.status[VAE] = [404]
        self.refused(hub, tmp_path, "a file of it is gone", "fetched so far are kept")

    @pytest.mark.parametrize("path", ["api", VAE])
    def test_a_hub_in_trouble(self, hub, tmp_path, path):
        hub.status[path] = [500] * 3
        self.refused(hub, tmp_path, "answers status 500", "what was fetched is kept", "download again later")

    @pytest.mark.parametrize("body", [b"<html>Log in to this hotel's network</html>", b"[]", b"{}"])
    def test_an_answer_that_is_not_the_hubs(self, hub, tmp_path, body):
        hub.api_body = body
        self.refused(hub, tmp_path, "something other than the list", "login in the browser", "download again")

    @pytest.mark.parametrize("path", [CONFIG, "tokenizer/spiece.model", "model_index.json"])
    def test_a_repository_that_is_incomplete(self, hub, tmp_path, path):
        del hub.files[path]
        self.refused(hub, tmp_path, "lists no", path.split("/")[0], "cannot be downloaded")
        assert hub.fetched() == []

    def test_a_repository_of_another_model(self, hub, tmp_path):
        hub.files[CONFIG] = b'{"_class_name": "FluxTransformer2DModel"}'
        self.refused(hub, tmp_path, "describes no CogVideoX model", "HF_ENDPOINT")


def send(handler, body=b"", status=200, **headers):
    handler.send_response(status)
    handler.send_header("Connection", "close")
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def drip(hub, pause=0.02, block=b" ", **headers):
    """An answer that goes on until the hub closes, ``block`` by ``block``."""

    def answer(handler):
        send(handler, **headers)
        while not hub.closing.wait(pause):
            handler.wfile.write(block)

    return answer


def silence(hub):
    """An answer that never begins."""
    return lambda _: hub.closing.wait(20)


def downloads():
    """Threads that still wait for an answer."""
    return [thread for thread in threading.enumerate() if thread.name == "download"]


class TestAnswersThatDoNotEnd:
    """Each ends in a sentence, or at once where a person cancels; what was fetched is kept."""

    @pytest.fixture(autouse=True, params=["as installed", "requests"])
    def _client(self, request, monkeypatch):
        if request.param == "requests":
            requests = pytest.importorskip("requests")
            monkeypatch.setattr("huggingface_hub.get_session", requests.Session)

    @pytest.fixture(params=["_PATIENCE", "_WATCHED"])
    def impatient(self, request, monkeypatch):
        """Gives up after 0.4 seconds; patience counts in the client's timeouts, of ten seconds."""
        monkeypatch.setattr(transfer, request.param, {"_PATIENCE": 0.04, "_WATCHED": 0.4}[request.param])

    def refused(self, hub, folder, *said):
        start = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            download_checkpoint("t2v", folder, endpoint=hub.endpoint)
        for words in said:
            assert words in str(caught.value)
        assert time.monotonic() - start < 5
        assert hub.endpoint in str(caught.value)

    def test_with_either_client_a_broken_file_goes_on(self, hub, tmp_path, target):
        hub.drop_after[VAE] = [200_000]
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert (target / VAE).read_bytes() == hub.files[VAE]
        assert [request.range is None for request in hub.fetched() if request.path == VAE] == [True, False]

    def test_a_list_that_comes_byte_by_byte(self, hub, tmp_path, impatient):
        hub.instead["api"] = drip(hub)
        self.refused(hub, tmp_path, "sends less than 1000 bytes a second", "download again")

    def test_a_file_that_comes_byte_by_byte(self, hub, tmp_path, target, impatient):
        hub.instead[VAE] = drip(hub)
        self.refused(hub, tmp_path, "sends less than 1000 bytes a second", "what was fetched is kept")
        assert parts_in(target)

    def test_a_slow_line_is_no_such(self, hub, tmp_path, target, impatient):
        """Nor where one file takes longer than the time after which what came is looked at."""
        begun = []

        def on_progress(done, total):
            if done >= bytes_before(hub, VAE):
                begun.append(time.monotonic())
                hub.delay = 0.015

        download_checkpoint("t2v", tmp_path, on_progress, hub.endpoint)
        assert time.monotonic() - begun[0] > 0.5
        assert (target / VAE).read_bytes() == hub.files[VAE]

    def test_a_list_without_end(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "MAX_TEXT", 1 << 20)
        hub.instead["api"] = drip(hub, 0, b" " * 65536)
        self.refused(hub, tmp_path, "more than 1,048,576 bytes", "something other than the list")

    def test_a_file_without_end(self, hub, tmp_path):
        hub.instead[VAE] = drip(hub, 0, b" " * 65536)
        self_size = len(hub.files[VAE])
        with pytest.raises(RuntimeError, match=f"{VAE} arrived damaged"):
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert max(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < self_size + (1 << 20)

    @pytest.mark.parametrize("path", ["api", VAE])
    def test_content_that_grows_when_it_is_unpacked(self, hub, tmp_path, monkeypatch, path):
        monkeypatch.setattr(download, "MAX_TEXT", 1 << 20)
        bomb = gzip.compress(bytes(50_000_000), 9)
        hub.instead[path] = lambda handler: send(handler, bomb, Content_Encoding="gzip", Content_Length=str(len(bomb)))
        taken = []
        decoded = transfer._decoded
        monkeypatch.setattr(
            transfer, "_decoded", lambda *given: (taken.append(len(block)) or block for block in decoded(*given))
        )
        with pytest.raises(
            RuntimeError, match="something other than the list" if path == "api" else f"{path} arrived damaged"
        ):
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert max(taken) <= 1 << 16
        assert sum(taken) < 5_000_000

    def test_content_that_a_proxy_packed_is_unpacked(self, hub, tmp_path, target):
        packed = gzip.compress(hub.files[VAE])
        hub.instead[VAE] = lambda handler: send(
            handler, packed, Content_Encoding="gzip", Content_Length=str(len(packed))
        )
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert (target / VAE).read_bytes() == hub.files[VAE]

    def test_redirects_without_end(self, hub, tmp_path):
        hub.instead["api"] = lambda handler: send(handler, status=302, Location=handler.path, Content_Length="0")
        self.refused(hub, tmp_path, "redirects more than 10 times", "HF_ENDPOINT")
        assert len(hub.requests) == 11

    def test_a_redirect_with_content_without_end(self, hub, tmp_path, impatient):
        hub.instead["api"] = drip(hub, 0, b" " * 65536, status=302, Location="file:///etc/passwd")
        self.refused(hub, tmp_path, "redirects to file:///etc/passwd")

    def test_an_error_with_content_without_end(self, hub, tmp_path):
        hub.instead["api"] = drip(hub, 0, b" " * 65536, status=403)
        self.refused(hub, tmp_path, "with status 403", "HF_TOKEN")

    @pytest.mark.parametrize("answer", [silence, drip])
    @pytest.mark.parametrize("path", ["api", VAE])
    def test_a_cancel_is_heard_while_nothing_comes(self, hub, tmp_path, path, answer):
        hub.instead[path] = answer(hub)
        silent_since = threading.Event()
        hub.instead[path] = lambda handler, answer=hub.instead[path]: (silent_since.set(), answer(handler))
        cancelled = None

        def on_progress(done, total):
            nonlocal cancelled
            if silent_since.is_set():
                cancelled = cancelled or time.monotonic()
                raise Stop

        start = time.monotonic()
        with pytest.raises(Stop):
            download_checkpoint("t2v", tmp_path, on_progress, hub.endpoint)
        assert cancelled - start < 2
        assert time.monotonic() - cancelled < 0.2

    def test_who_cancels_leaves_no_thread_behind_for_long(self, hub, tmp_path, monkeypatch):
        hub.delay = 0.001
        with pytest.raises(Stop):
            download_checkpoint("t2v", tmp_path, stop_at(bytes_before(hub, VAE) + 100_000), hub.endpoint)
        end = time.monotonic() + 5
        while downloads() and time.monotonic() < end:
            time.sleep(0.05)
        assert downloads() == []


class TestListings:
    """What a listing may say: what is not a hub's is told as such, and nothing is fetched."""

    def listing(self, hub, change):
        info = hub.model_info()
        change({entry["rfilename"]: entry for entry in info["siblings"]}, info)
        hub.api_body = json.dumps(info).encode()

    @pytest.mark.parametrize(
        ("what", "said"),
        [
            (lambda files, _: files[VAE]["lfs"].update(size="10"), f"it gives {VAE} 10 bytes"),
            (lambda files, _: files[VAE]["lfs"].update(size=-1), f"it gives {VAE} -1 bytes"),
            (lambda files, _: files[VAE]["lfs"].update(size=True), f"it gives {VAE} True bytes"),
            (lambda files, _: files[CONFIG].update(size=float("nan")), f"it gives {CONFIG} nan bytes"),
            (lambda files, _: files[CONFIG].update(size=[]), f"it gives {CONFIG} [] bytes"),
            (lambda files, _: files[VAE].update(lfs=7), f"it has 7 for where {VAE} is kept"),
            (lambda files, _: files[VAE]["lfs"].update(sha256="../../x"), f"it gives {VAE} the checksum ../../x"),
            (lambda files, _: files[CONFIG].update(blobId=["a"]), f"it gives {CONFIG} the checksum"),
            (lambda files, _: files[CONFIG].update(rfilename=None), "for a file"),
            (lambda files, info: info["siblings"].append("a"), "it has a for a file"),
            (
                lambda files, info: info["siblings"].append({**files[VAE], "rfilename": VAE, "lfs": None}),
                f"it has {VAE} twice",
            ),
            (lambda files, info: info["siblings"].append({"rfilename": "vae/Config.json", "size": 1}), "twice"),
            (lambda files, info: info.update(siblings={}), "it holds no list of files"),
            (
                lambda files, info: info["siblings"].extend(
                    {"rfilename": f"vae/{n}.json", "size": 1} for n in range(1001)
                ),
                "more than 1000 files",
            ),
        ],
    )
    def test_odd_values(self, hub, tmp_path, what, said):
        self.listing(hub, what)
        with pytest.raises(RuntimeError, match="something other than the list") as caught:
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert said in str(caught.value)
        assert hub.fetched() == []
        assert list(tmp_path.iterdir()) == []

    def test_an_impossible_size_is_compared_with_the_disk(self, hub, tmp_path):
        self.listing(hub, lambda files, _: files[VAE]["lfs"].update(size=2**70))
        with pytest.raises(RuntimeError, match=r"needs 1,180\.59 EB more"):
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)

    def test_what_is_there_twice_in_the_same_words_is_fetched_once(self, hub, tmp_path):
        self.listing(hub, lambda files, info: info["siblings"].append(files[VAE]))
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert [request.path for request in hub.fetched()].count(VAE) == 1

    @pytest.mark.parametrize(
        "name", ["CON.json", "nul.x.json", ".hidden.json", "a" * 300 + ".json", "é.json", "x\n.json", "..json"]
    )
    def test_names_that_no_checkpoint_has_are_not_fetched(self, hub, tmp_path, target, name):
        self.listing(hub, lambda files, info: info["siblings"].append({"rfilename": f"vae/{name}", "size": 1}))
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert files_in(target) == needed(hub)

    @pytest.mark.parametrize("sha", ["../..", None, 3, "main?x=1#y", "é"])
    def test_a_commit_that_is_none_is_not_put_into_addresses(self, hub, tmp_path, target, sha):
        self.listing(hub, lambda files, info: info.update(sha=sha))
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert files_in(target) == needed(hub)

    def test_a_list_of_100_000_other_files_is_read(self, hub, tmp_path, target):
        self.listing(
            hub,
            lambda files, info: info["siblings"].extend(
                {"rfilename": f"samples/{n}.mp4", "size": 1} for n in range(100_000)
            ),
        )
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
        assert files_in(target) == needed(hub)


class TestBusyHubs:
    def busy(self, hub, path, after, status=429):
        """The next answer for ``path`` asks to come again after so long, or after what is called for it."""
        asked = []

        def answer(handler):
            asked.append(time.monotonic())
            del hub.instead[path]
            send(handler, status=status, Retry_After=after() if callable(after) else after, Content_Length="0")

        hub.instead[path] = answer
        return asked

    @pytest.mark.parametrize("form", ["seconds", "date"])
    def test_the_time_that_it_asks_for_is_waited(self, hub, tmp_path, target, form):
        after = "1" if form == "seconds" else lambda: email.utils.formatdate(time.time() + 2, usegmt=True)
        asked = self.busy(hub, VAE, after)
        came = []
        hub_files = hub.files[VAE]
        download_checkpoint("t2v", tmp_path, lambda done, total: came.append(time.monotonic()), hub.endpoint)
        assert came[-1] - asked[0] > 0.9
        assert (target / VAE).read_bytes() == hub_files

    @pytest.mark.parametrize("after", ["x", "-1", "", "1e99", "\xe9"])
    def test_a_time_that_is_none_is_passed_over(self, hub, tmp_path, after):
        self.busy(hub, VAE, after)
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)

    def test_a_long_time_is_told_instead(self, hub, tmp_path):
        self.busy(hub, VAE, "3600", 503)
        with pytest.raises(RuntimeError, match=r"status 503 .* download again in 3600 seconds, as it asks,"):
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)

    @pytest.mark.parametrize("where", ["bytes 5-9/10", "bytes 0-9/10"])
    def test_another_part_than_asked_for_spoils_no_file(self, hub, tmp_path, target, where):
        with pytest.raises(Stop):
            download_checkpoint("t2v", tmp_path, stop_at(bytes_before(hub, VAE) + 200_000), hub.endpoint)
        content = hub.files[VAE]
        begin = int(where.split()[1].split("-")[0])
        hub.instead[VAE] = lambda handler: send(
            handler, content[begin:], 206, Content_Range=where, Content_Length=str(len(content) - begin)
        )
        if begin:
            with pytest.raises(RuntimeError, match=r"on, it sends others.*what was fetched is kept"):
                download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
            assert parts_in(target)[0].stat().st_size > 100_000
        else:
            download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
            assert (target / VAE).read_bytes() == content


def test_a_token_is_sent_to_the_hub_alone(hub, tiny, tmp_path, monkeypatch):
    seen = []
    with HubServer(tiny, REPOSITORIES["t2v"]) as other:
        for server, path in ((hub, VAE), (other, VAE)):
            server.instead[path] = lambda handler, server=server: (
                seen.append((server is hub, handler.headers.get("Authorization"))),
                send(handler, status=302, Location=f"{other.endpoint}/cdn/{VAE}", Content_Length="0")
                if server is hub
                else send(handler, hub.files[VAE], Content_Length=str(len(hub.files[VAE]))),
            )
        monkeypatch.setattr("huggingface_hub.utils.build_hf_headers", lambda: {"authorization": "Bearer secret"})
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)
    assert seen == [(True, "Bearer secret"), (False, None)]


def test_settings_that_the_client_cannot_read_are_a_sentence(hub, tmp_path, monkeypatch):
    def refuse():
        raise ValueError("Unknown scheme for proxy URL")

    monkeypatch.setattr("huggingface_hub.get_session", refuse)
    with pytest.raises(
        RuntimeError, match=r"huggingface_hub cannot be used \(Unknown scheme for proxy URL\).*HTTP_PROXY"
    ):
        download_checkpoint("t2v", tmp_path, endpoint=hub.endpoint)


@pytest.mark.parametrize(
    "endpoint", ["http://[::1", "ftp://127.0.0.1", "http://127.0.0.1:99999", "http://\x00", "\ud800"]
)
def test_an_address_that_is_none_is_a_sentence(tmp_path, endpoint):
    with pytest.raises(RuntimeError, match=r"The connection to .* failed .*HF_ENDPOINT") as caught:
        download_checkpoint("t2v", tmp_path, endpoint=endpoint)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("folder", ["~no-such-person/models", "a\0b"])
def test_a_folder_that_cannot_be_is_a_sentence(hub, folder):
    with pytest.raises(ValueError, match="nothing can be downloaded there"):
        download_checkpoint("t2v", folder, endpoint=hub.endpoint)


@pytest.mark.parametrize("which", ["t3v", None, 3, ["t2v"], "a" * 5000])
def test_a_checkpoint_that_is_not_known_is_a_short_sentence(which, tmp_path):
    with pytest.raises(ValueError, match="Choose one of: t2v") as caught:
        download_checkpoint(which, tmp_path)
    assert len(str(caught.value)) < 300


def test_hf_endpoint_is_respected_and_huggingface_hub_is_not_imported_before_it_is_needed(hub, tmp_path):
    script = """
import sys
from cogvideox.checkpoint.download import download_checkpoint
assert "huggingface_hub" not in sys.modules
print(download_checkpoint("t2v", sys.argv[1]))
"""
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert is_checkpoint(tmp_path / "CogVideoX1.5-5B")


def test_the_server_speaks_the_hubs_language(hub, tmp_path):
    """huggingface_hub's own download, unmodified, gets the same files from it."""
    from huggingface_hub import hf_hub_download

    for path in ("model_index.json", VAE):
        file = hf_hub_download(hub.repository, path, local_dir=tmp_path, endpoint=hub.endpoint)
        assert open(file, "rb").read() == hub.files[path]


class TestNode:
    T2V = "CogVideoX1.5-5B (text to video, 31 GB)"

    @pytest.fixture
    def node(self, pack, hub, tmp_path, monkeypatch):
        module = importlib.import_module(f"{pack.__name__}.nodes.downloader")
        monkeypatch.setattr(module.host, "download_folder", lambda: tmp_path, raising=False)
        engine = importlib.import_module(f"{pack.__name__}.cogvideox.checkpoint.download")
        monkeypatch.setattr(engine, "download_checkpoint", partial(engine.download_checkpoint, endpoint=hub.endpoint))
        return module.Downloader

    def run(self, node, **inputs):
        return getattr(node(), node.FUNCTION)(**inputs)

    def test_it_offers_what_the_engine_knows_and_is_off(self, pack, node):
        module = importlib.import_module(node.__module__)
        assert list(module.CHECKPOINTS.values()) == list(REPOSITORIES)
        inputs = node.INPUT_TYPES()["required"]
        assert inputs["checkpoint"][0][0] == self.T2V
        assert all(
            choice.split()[0] == REPOSITORIES[which].split("/")[1] for choice, which in module.CHECKPOINTS.items()
        )
        assert inputs["download"][1]["default"] is False
        assert node.OUTPUT_NODE

    @pytest.mark.parametrize("inputs", [{}, {"download": False}])
    def test_without_being_asked_it_does_nothing_and_says_so(self, node, hub, tmp_path, monkeypatch, inputs):
        def connect(*_):
            raise AssertionError("the network was touched")

        monkeypatch.setattr(socket.socket, "connect", connect)
        name, report = self.run(node, checkpoint=self.T2V, **inputs)
        assert name == "CogVideoX1.5-5B"
        assert "Nothing was downloaded" in report
        assert "zai-org/CogVideoX1.5-5B (about 31 GB" in report
        assert str(tmp_path / name) in report
        assert hub.requests == []
        assert list(tmp_path.iterdir()) == []

    def test_asked_it_downloads_with_the_nodes_progress_and_names_the_checkpoint(
        self, node, hub, tmp_path, monkeypatch
    ):
        module, seen, shown = importlib.import_module(node.__module__), [], []
        told = Told(progress=lambda done, total: seen.append((done, total)))
        monkeypatch.setattr(module.host, "NodeEvents", lambda: told)
        for host in (module.host, module.host.page):
            monkeypatch.setattr(host, "show", shown.append)
        before = node.IS_CHANGED(checkpoint=self.T2V, download=True)
        name, report = self.run(node, checkpoint=self.T2V, download=True)
        assert is_checkpoint(tmp_path / name)
        assert seen[-1][0] == seen[-1][1] > 0
        assert "is complete in" in report
        assert shown == [f"Downloading {REPOSITORIES['t2v']} into {tmp_path / name} …", report]
        assert node.IS_CHANGED(checkpoint=self.T2V, download=True) != before

    def test_a_download_that_failed_is_told_on_the_node(self, node, hub, monkeypatch):
        module, shown = importlib.import_module(node.__module__), []
        monkeypatch.setattr(module.host, "show", shown.append)
        hub.files.clear()
        with pytest.raises((ValueError, RuntimeError)) as caught:
            self.run(node, checkpoint=self.T2V, download=True)
        assert shown[-1] == f"Not downloaded: {caught.value}"
