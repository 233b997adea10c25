"""The second pass of VOID starts from noise that moves as the first's video does: as its reference's, and Gaussian.

With the environment variables VOID_PATH and COMMON_SOURCE_PATH at checkouts of
https://github.com/Netflix/void-model and https://github.com/RyannDaGreat/CommonSource the reference's own code is run
too (``warp_reference.py`` says what it needs); without, its numbers are those that it printed.
"""

import ast
import os
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from cogvideox import warped_noise as engine
from cogvideox.events import Events
from cogvideox.video import read_video, write_mp4
from commands.void import plan_warp
from tests import warp_reference
from tests.conftest import CPU
from tests.helpers import run_generate

RECORDED = {
    "a little": (
        [-2.73047, -0.63477, 2.04492, -0.47729, 1.12012, 1.11035, -0.34814, -1.40332],
        [1.14771, 0.28696, 0.57382, 0.57382, 1.14737, 2.29439, 1.14737, 0.00018],
    ),
    "far": (
        [-0.98633, 0.14856, -0.34961, -0.06143, 0.84424, 1.05566, 0.61426, 2.54102],
        [0.00057, 0.00057, 0.00057, 0.0007, 6e-05, 0.0007, 0.00121, 0.00057],
    ),
    "made": [0.93079, 0.37909, 0.50781, 0.08581, -0.09578, 0.18152, 0.22662, -0.34443],
}


def draws(seed=warp_reference.SEED):
    generator = torch.Generator().manual_seed(seed)
    return lambda height, width: torch.randn(height, width, generator=generator)


def moved(name):
    channels, height, width, _, _ = warp_reference.MOVES[name]
    moving, found = engine.MovingNoise(channels, height, width, draws()), []
    for flow in warp_reference.flows(name):
        moving.move(flow)
        found.append(moving.shrunk(8))
    return torch.stack(found), moving._weights


@pytest.fixture
def small(monkeypatch):
    for name, value in warp_reference.SMALL.items():
        monkeypatch.setattr(engine, name, value)


def made(seed=warp_reference.SEED, events=None, flow=warp_reference.flow_between, video=None):
    video = warp_reference.clip() if video is None else video
    return engine.warped_noise(video, warp_reference.SHAPE, flow, seed, CPU.device, events or Events())


def reference():
    """Paths of the reference's checkouts."""
    paths = [os.environ.get(name) for name in ("COMMON_SOURCE_PATH", "VOID_PATH")]
    if None in paths:
        pytest.skip("COMMON_SOURCE_PATH and VOID_PATH name no checkouts of CommonSource and void-model")
    pytest.importorskip("rp")
    return paths


class TestItIsTheReferences:
    @pytest.mark.parametrize("name", warp_reference.MOVES)
    def test_recorded_noise_that_flows_move(self, name):
        for ours, expected in zip(moved(name), RECORDED[name], strict=True):
            assert torch.allclose(warp_reference.kept(ours), torch.tensor(expected), atol=2e-3)

    @pytest.mark.parametrize("name", warp_reference.MOVES)
    def test_noise_that_flows_move_bit_for_bit(self, name):
        for ours, expected in zip(moved(name), warp_reference.moved(reference()[0], name), strict=True):
            assert torch.equal(ours, expected)

    def test_recorded_noise_of_a_video(self, small):
        assert torch.allclose(warp_reference.kept(made()), torch.tensor(RECORDED["made"]), atol=2e-3)

    def test_noise_of_a_video(self, small):
        assert torch.allclose(made(), warp_reference.made(*reference()), atol=1e-6)

    def test_its_sizes(self):
        if "VOID_PATH" not in os.environ:
            pytest.skip("VOID_PATH names no checkout of void-model")
        script = Path(os.environ["VOID_PATH"]) / "inference" / "cogvideox_fun" / "make_warped_noise.py"
        calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
        given = {word.arg: word.value.value for call in calls for word in call.keywords if hasattr(word.value, "value")}
        expected = engine.FRAMES, engine.HEIGHT, engine.WIDTH, 16
        assert tuple(given[name] for name in ("length", "height", "width", "noise_channels")) == expected

    @pytest.mark.parametrize(
        ("height", "width"), [(384, 672), (480, 720), (768, 1360), (672, 384), (300, 1000), (481, 720), (100, 100)]
    )
    def test_frames_of_any_size_hold_the_same_middle(self, height, width):
        """A gradient across and down, cropped to 3:2: what is left of it can be said."""
        down, across = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        seen = engine._seen((255 * torch.stack([down, across, across], dim=-1)).byte())
        assert seen.shape == (3, 240, 360)
        shares = min(1, width / height / 1.5), min(1, height / width * 1.5)
        for channel, share in zip((seen[0].mean(1), seen[1].mean(0)), shares, strict=True):
            assert channel[0] == pytest.approx((1 - share) / 2, abs=0.01)
            assert channel[-1] == pytest.approx((1 + share) / 2, abs=0.01)


class TestTheNoise:
    def test_it_is_gaussian_and_goes_where_the_flow_does(self):
        moving = engine.MovingNoise(4, 48, 64, draws())
        before = moving._noise.clone()
        moving.move(torch.stack([torch.full((6, 8), 2 / 8), torch.full((6, 8), -1 / 8)]))
        # What left the picture stays behind as next to nothing.
        assert torch.allclose(moving._noise[:, :-1, 2:], before[:, 1:, :-2], atol=2e-3)
        for number in range(5):
            moving.move(0.4 * torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(number)))
        assert moving._noise.mean().abs() < 0.05
        assert moving._noise.std() == pytest.approx(1, abs=0.05)
        assert moving.shrunk(4).std() == pytest.approx(1, abs=0.05)

    def test_a_still_video_has_still_noise(self, small):
        noise = made(flow=lambda before, after: torch.zeros(2, *before.shape[1:]))
        # But for cells that have the same number by chance, which count as one that was spread: two in a thousand.
        assert all((one - other).abs().mean() < 0.05 for one, other in pairwise(noise[0].unbind(1)))

    def test_a_seed_gives_the_same_noise(self, small):
        noise = made()
        assert torch.equal(made(), noise)
        assert not torch.equal(made(seed=1), noise)

    def test_it_is_told_and_can_be_stopped_before_each_frame(self, small):
        class Stopping(Events):
            told = ()

            def progress(self, what, done, total, unit):
                self.told = (*self.told, (what, done, total, unit))

            def check_cancelled(self):
                if len(self.told) == 2:
                    raise KeyboardInterrupt

        events = Stopping()
        with pytest.raises(KeyboardInterrupt):
            made(events=events)
        assert events.told == (("warping noise", 1, 3, "frame"), ("warping noise", 2, 3, "frame"))


class FakeRaft(nn.Module):
    """In the place of torchvision's: a flow that depends on a weight and on the frames."""

    def __init__(self):
        super().__init__()
        self.speed = nn.Parameter(torch.empty(2, 3, 1, 1))

    def forward(self, before, after):
        return [None, torch.nn.functional.conv2d((after - before) / 2, self.speed)]


@pytest.fixture
def raft(monkeypatch, tmp_path):
    """A file of weights of a network that stands in the place of torchvision's."""
    module = types.SimpleNamespace(raft_large=lambda weights, progress: FakeRaft())
    monkeypatch.setattr(engine, "require_raft", lambda: module)
    torch.save({"speed": torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(2))}, tmp_path / "raft.pth")
    return tmp_path / "raft.pth"


def test_the_flow_is_torchvisions(tmp_path):
    optical_flow = pytest.importorskip("torchvision.models.optical_flow")
    torch.manual_seed(0)
    module = optical_flow.raft_large(weights=None).eval()
    torch.save(module.state_dict(), tmp_path / "raft.pth")
    frames = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        expected = module(*(2 * frames[:, None] - 1))[-1][0]
    assert torch.equal(engine.RaftFlow(tmp_path / "raft.pth").to(torch.device("cpu"))(*frames), expected)


def test_other_weights_are_refused_by_name(raft):
    for changed in ({"speed": torch.zeros(2, 3, 1, 2)}, {}, {"speed": torch.zeros(2, 3, 1, 1), "more": torch.zeros(1)}):
        torch.save(changed, raft)
        with pytest.raises(ValueError, match=r"other weights than RAFT's \((speed|more)\)"):
            engine.RaftFlow(raft)


def test_without_torchvision_a_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"Install the torchvision that belongs to torch .* or give --noise"):
        engine.require_raft()


class TestTheCommandLine:
    @pytest.fixture
    def void(self, checkpoints):
        return checkpoints("void")

    @pytest.fixture
    def arguments(self, void, tmp_path, small, monkeypatch):
        monkeypatch.setattr(engine, "LATENT_CHANNELS", 16)
        pictures = torch.rand(5, 48, 80, 3, generator=torch.Generator().manual_seed(3))
        write_mp4(pictures, tmp_path / "clip.mp4", 12)
        # What the object affects, which the first pass tells apart and the second not.
        write_mp4(torch.full_like(pictures, 0.5), tmp_path / "mask.mp4", 12)
        clip = "--video", tmp_path / "clip.mp4", "--void", tmp_path / "mask.mp4", "--fps", 12
        size = "--width", 80, "--height", 48, "--frames", 5, "--steps", 2, "--scheduler", "ddim_origin"
        return "--model", void, "--prompt", "a wall", *clip, *size, "--on-black", "pass"

    @pytest.fixture
    def given(self, monkeypatch):
        import cogvideox.sampling

        told, sample = [], cogvideox.sampling.sample

        def listen(*given, **more):
            told.append(more)
            return sample(*given, **more | {"steps": 1})

        monkeypatch.setattr(cogvideox.sampling, "sample", listen)
        return told

    def test_a_first_pass_gives_the_second_its_noise(self, arguments, raft, given, capsys, tmp_path):
        first = "--first-pass", tmp_path / "clip.mp4", "--flow-model", raft
        code, _, errors = run_generate(capsys, *arguments, *first, "--seed", 4, "--output", tmp_path / "x.mp4")
        assert code == 0, errors
        assert "warping noise" in errors
        video = read_video(tmp_path / "clip.mp4", size=(80, 48), dtype=torch.uint8)
        flow = engine.RaftFlow(raft).to(CPU.device)
        expected = engine.warped_noise(video, (1, 16, 2, 6, 10), flow, 4, CPU.device, Events())
        assert torch.equal(given[0]["noise"], expected)

    def test_both_passes_are_the_first_and_then_the_second(self, arguments, void, raft, given, capsys, tmp_path):
        flow = "--flow-model", raft
        both = "--stage", "both", "--second-model", void, *flow
        code, said, errors = run_generate(capsys, *arguments, *both, "--output", tmp_path / "x.mp4")
        assert code == 0, errors
        assert said.index("First pass:") < said.index("x_first_pass.mp4: 5 frames") < said.index("x.mp4: 5 frames")
        assert [(told["cfg"], told["steps"], told["scheduler"]) for told in given] == [
            (1.0, 30, "ddim_origin"),
            (6.0, 2, "ddim_origin"),
        ]
        alone = *arguments, "--first-pass", tmp_path / "x_first_pass.mp4", *flow
        assert run_generate(capsys, *alone, "--output", tmp_path / "y.mp4")[0] == 0
        for name in ("noise", "image_latents"):
            assert torch.equal(given[1][name], given[2][name])
        assert given[0]["noise"] is None
        assert not torch.equal(given[0]["image_latents"], given[1]["image_latents"])
        assert torch.equal(read_video(tmp_path / "x.mp4"), read_video(tmp_path / "y.mp4"))

    def test_a_plan_of_both_makes_nothing(self, arguments, void, raft, given, capsys, tmp_path):
        both = "--stage", "both", "--second-model", void, "--flow-model", "download", "--plan"
        torch.hub.set_dir(tmp_path / "hub")
        code, said, errors = run_generate(capsys, *arguments, *both)
        assert code == 0, errors
        assert said.count("memory to sample 80x48, 5 frames") == 2
        assert (given, list(tmp_path.glob("*pass*")), list(tmp_path.glob("hub/*"))) == ([], [], [])

    def test_weights_are_fetched_where_that_is_asked_for(self, raft, tmp_path, monkeypatch):
        fetched = []

        def fetch(url, path, digest, progress):
            fetched.append((url, digest))
            Path(path).write_bytes(raft.read_bytes())

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

        def planned(weights, plan=False):
            options = types.SimpleNamespace(first_pass=None, stage="both", flow_model=weights, plan=plan)
            return plan_warp(options, 5, (80, 48), Events()).flow

        with pytest.raises(ValueError, match="or --flow-model download"):
            planned(None)
        assert planned(Path("download"), plan=True) is None
        assert all(isinstance(planned(weights), engine.RaftFlow) for weights in (Path("download"), None))
        assert fetched == [(engine.WEIGHTS_URL, "ff5fadd5")]
        assert engine.WEIGHTS_URL.endswith("raft_large_C_T_SKHT_V2-ff5fadd5.pth")

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--stage", "second"), "give that video as --first-pass, or the noise as --noise"),
            (("--stage", "first", "--first-pass", "x.mp4"), "leave one of them away"),
            (("--noise", "x.latent", "--first-pass", "x.mp4"), "two noises to start from"),
            (("--stage", "both"), "a checkpoint for each pass"),
            (("--second-model", "x"), "a checkpoint for each pass"),
            (
                ("--stage", "both", "--second-model", "x", "--first-pass", "x.mp4"),
                "leave --first-pass and --noise away",
            ),
            (("--flow-model", "download"), "goes with --first-pass"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, arguments, capsys, more, said):
        with pytest.raises(SystemExit):
            run_generate(capsys, *arguments, *more)
        assert said in capsys.readouterr().err

    def test_they_go_with_a_quadmask(self, void, capsys):
        with pytest.raises(SystemExit):
            run_generate(capsys, "--model", void, "--prompt", "x", "--stage", "second")
        assert "--stage goes with --void" in capsys.readouterr().err

    def test_a_video_of_another_length_is_refused(self, arguments, raft, given, capsys, tmp_path):
        write_mp4(torch.rand(4, 48, 80, 3), tmp_path / "short.mp4", 12)
        first = "--first-pass", tmp_path / "short.mp4", "--flow-model", raft
        code, _, errors = run_generate(capsys, *arguments, *first, "--plan")
        assert code == 1
        assert "has 4 frames and the second pass makes 5" in errors

    def test_many_videos_make_one_pass_a_line(self, arguments, void, raft, given, capsys, tmp_path):
        lines = tmp_path / "lines.txt"
        lines.write_text("a wall\n")
        common = [word for word in arguments if word not in ("--prompt", "a wall")]
        first = "--first-pass", tmp_path / "clip.mp4", "--flow-model", raft
        both = "--stage", "both", "--second-model", void, "--flow-model", raft
        for more, found, part in ((first, 0, "1"), (both, 1, "--prompts one of each line")):
            code, said, errors = run_generate(capsys, *common, "--prompts", lines, *more, "--dry-run")
            assert (code, part in said + errors) == (found, True), errors
