"""The black-frame check says what ffmpeg's blackdetect says, and sees the NaN that ffmpeg cannot."""

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox.black_frames import BlackFrameReport, BlackVideoError, check_black_frames, enforce, frame_ranges
from tests.helpers import run_apart
from tests.told import Told

WIDTH, HEIGHT = 32, 24


def ffmpeg_black_frames(clip: np.ndarray, pixel: float, picture: float) -> tuple[int, ...]:
    """The frames that ffmpeg's blackdetect calls black: uint8 [F, H, W, 3] as full-range luma, at 1 frame a second."""
    size = f"{clip.shape[2]}x{clip.shape[1]}"
    # Where a clip ends black, ffmpeg ends the span at the last frame and not after it: end on white.
    ended = np.concatenate([clip, np.full_like(clip[:1], 255)])
    video_filter = f"format=gray,blackdetect=d=0:pix_th={pixel}:pic_th={picture}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", "1", "-i", "-"]
    done = subprocess.run(
        [*command, "-vf", video_filter, "-f", "null", "-"], input=ended.tobytes(), capture_output=True, check=True
    )
    spans = re.findall(r"black_start:([\d.]+) black_end:([\d.]+)", done.stderr.decode())
    return tuple(
        frame for start, end in spans for frame in range(round(float(start)), round(float(end))) if frame < len(clip)
    )


def clips() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (24, HEIGHT, WIDTH, 3)
    noise = random.integers(0, 256, shape)
    ramp = np.arange(24).reshape(-1, 1, 1, 1)
    white_pixels = (
        random.permuted(np.arange(HEIGHT * WIDTH) < ramp.reshape(-1, 1), axis=1).reshape(24, HEIGHT, WIDTH, 1) * 255
    )
    hue = np.zeros((256, HEIGHT, WIDTH, 3))
    for channel in range(3):
        hue[channel * 85 : channel * 85 + 85, ..., channel] = np.arange(85).reshape(-1, 1, 1) * 3
    made = {
        "random": noise,
        "dark": noise // 8,
        "fading": noise * (23 - ramp) // 23,
        "black": np.zeros(shape),
        "almost black": noise // 9,
        "grey levels around the threshold": np.broadcast_to(ramp + 14, shape),
        "dots on black": np.broadcast_to(white_pixels, shape),
        "pure colours": hue,
        "random dark colours": np.broadcast_to(random.integers(0, 90, (400, 1, 1, 3)), (400, HEIGHT, WIDTH, 3)),
        "black and bright in turn": np.where(ramp % 3 == 0, 0, noise),
    }
    return {name: np.ascontiguousarray(clip, dtype=np.uint8) for name, clip in made.items()}


@pytest.mark.parametrize(("pixel", "picture"), [(0.10, 0.98), (0.0, 1.0), (0.2, 0.5), (0.5, 0.9)])
@pytest.mark.parametrize("name", clips())
def test_each_frames_verdict_equals_ffmpegs(name, pixel, picture):
    clip = clips()[name]
    ours = check_black_frames(torch.from_numpy(clip).float() / 255, pixel, picture).black_frames
    assert ours == ffmpeg_black_frames(clip, pixel, picture)


@given(st.integers(0, 2**32 - 1), st.integers(1, 255))
@settings(max_examples=15, deadline=None)
def test_random_clips_too(seed, brightest):
    clip = np.random.default_rng(seed).integers(0, brightest + 1, (6, 16, 16, 3), dtype=np.uint8)
    assert check_black_frames(torch.from_numpy(clip).float() / 255).black_frames == ffmpeg_black_frames(
        clip, 0.10, 0.98
    )


def test_a_bright_clip_is_ok():
    report = check_black_frames(torch.rand(5, HEIGHT, WIDTH, 3))
    assert report.verdict == "ok"
    assert "none of 5 frames is black" in report.text
    assert report.advice == ""


class TestACauseIsNamed:
    """NaN becomes 0 where a video is saved with 8 bits, so that such a video is finite all over."""

    @pytest.mark.parametrize("level", [0, 16, 25])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_black_that_was_8_bit_once_is_likely_an_overflow(self, level, dtype):
        images = torch.full((4, HEIGHT, WIDTH, 3), level / 255).to(dtype)
        report = check_black_frames(images)
        assert report.verdict == "black"
        assert report.eight_bit == (0, 1, 2, 3)
        assert "ran in a dtype too small for its activations, as fp16 is for weights trained in bf16" in report.advice
        assert "not an overflow" not in report.advice
        assert "directly behind the decoder" in report.advice

    def test_so_is_noise_of_8_bits_and_a_black_frame_with_a_bright_logo(self):
        noise = torch.randint(0, 20, (2, HEIGHT, WIDTH, 3)) / 255
        noise[:, :2, :2] = 0.98765
        assert check_black_frames(noise).eight_bit == (0, 1)

    def test_a_saved_and_loaded_video_of_nan_is_one(self, tmp_path):
        frames = torch.full((5, 64, 64, 3), float("nan"))
        with np.errstate(invalid="ignore"):
            saved = (frames.numpy() * 255).astype(np.uint8)
        report = check_black_frames(torch.from_numpy(saved).float() / 255)
        assert (report.verdict, report.nonfinite, len(report.eight_bit)) == ("black", (), 5)
        assert "fp16" in report.advice

    def test_darkness_finer_than_8_bits_is_not(self):
        report = check_black_frames(torch.rand(3, HEIGHT, WIDTH, 3) * 0.05)
        assert report.eight_bit == ()
        assert "finer than 8 bits, so this is not an overflow" in report.advice

    def test_of_a_video_that_is_half_black_the_black_frames_decide(self):
        images = torch.rand(6, HEIGHT, WIDTH, 3)
        images[:3] = 0
        report = check_black_frames(images, video_black_ratio=0.5)
        assert (report.verdict, report.eight_bit) == ("black", (0, 1, 2))
        assert "fp16" in report.advice
        assert check_black_frames(images).advice == ""
        images[:, : HEIGHT // 2] = 0.5
        assert check_black_frames(images).verdict == "ok"

    def test_values_that_are_nan_are_named_first(self):
        images = torch.zeros(2, HEIGHT, WIDTH, 3)
        images[1, 0, 0, 0] = float("nan")
        report = check_black_frames(images)
        assert report.eight_bit == (0,)
        assert "pass 65504, become Inf and then NaN" in report.advice


def test_black_frames_are_told_as_ranges():
    images = torch.rand(20, HEIGHT, WIDTH, 3) * 0.5 + 0.5
    images[[0, 1, 2, 7, 18, 19]] = 0
    report = check_black_frames(images)
    assert report.verdict == "partly black"
    assert "6 of 20 frames are black: 0-2, 7, 18-19" in report.text


def test_the_share_of_black_frames_from_which_a_video_is_black_is_a_choice():
    images = torch.ones(10, HEIGHT, WIDTH, 3)
    images[:6] = 0
    assert check_black_frames(images, video_black_ratio=0.7).verdict == "partly black"
    assert check_black_frames(images, video_black_ratio=0.6).verdict == "black"
    assert check_black_frames(torch.ones(10, HEIGHT, WIDTH, 3), video_black_ratio=0.0).verdict == "ok"


@given(
    frame=st.integers(0, 4),
    row=st.integers(0, HEIGHT - 1),
    column=st.integers(0, WIDTH - 1),
    channel=st.integers(0, 2),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_one_value_that_is_not_finite_makes_the_video_black(frame, row, column, channel, value):
    images = torch.full((5, HEIGHT, WIDTH, 3), 0.7)
    images[frame, row, column, channel] = value
    report = check_black_frames(images)
    assert report.verdict == "black"
    assert report.nonfinite == (frame,)
    assert report.ratios[frame] == pytest.approx(1 / (HEIGHT * WIDTH))
    assert "bf16" in report.advice


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_share_of_black_pixels_is_counted_pixel_by_pixel(seed):
    clip = np.random.default_rng(seed).integers(0, 60, (2, HEIGHT, WIDTH, 3))
    luma = np.round((clip * [299, 587, 114]).sum(-1) / 1000)
    assert check_black_frames(torch.from_numpy(clip).float() / 255).ratios == pytest.approx(
        (luma <= 25).mean((1, 2)), abs=2 / (HEIGHT * WIDTH)
    )


def test_huge_finite_values_are_not_taken_for_inf():
    assert check_black_frames(torch.full((2, HEIGHT, WIDTH, 3), 3e38)).verdict == "ok"


@pytest.mark.parametrize("colour", [(-5.0, 0.5, 0.5), (2.0, -3.0, -0.5), (0.3, -9.0, 40.0), (-1.0, -1.0, 0.9)])
def test_values_beyond_0_and_1_count_as_they_are_saved(colour):
    images = torch.tensor(colour).expand(2, HEIGHT, WIDTH, 3)
    saved = (255 * images.clamp(0, 1)).round().to(torch.uint8).numpy()
    assert check_black_frames(images).black_frames == ffmpeg_black_frames(saved, 0.10, 0.98)


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float64]), st.booleans(), st.booleans())
@settings(max_examples=12, deadline=None)
def test_dtype_layout_and_alpha_do_not_matter(dtype, channels_first, alpha):
    images = torch.rand(3, HEIGHT, WIDTH, 4 if alpha else 3).round()
    images[1, ..., :3] = 0
    moved = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if channels_first else images
    assert check_black_frames(moved.to(dtype)).ratios == check_black_frames(images[..., :3].contiguous()).ratios


def test_the_input_stays_as_it_is():
    images = torch.rand(3, HEIGHT, WIDTH, 3)
    before = images.clone()
    check_black_frames(images)
    assert torch.equal(images, before)


def test_extra_memory_does_not_grow_with_the_clip():
    script = """
import torch
from cogvideox.black_frames import check_black_frames
images = torch.rand(1, 768, 1360, 3)
check_black_frames(images)
from tests.memory import peak_kilobytes
before = peak_kilobytes()
check_black_frames(images.expand(60, -1, -1, -1))
print(peak_kilobytes() - before)
"""
    assert int(run_apart(script)) * 1024 < 16e6


@pytest.mark.parametrize("action", ["stop", "warn", "pass"])
def test_what_happens_on_black_is_a_choice(action, caplog):
    report = check_black_frames(torch.zeros(3, HEIGHT, WIDTH, 3))
    if action == "stop":
        with pytest.raises(BlackVideoError, match="3 of 3 frames are black: 0-2"):
            enforce(report, action)
    else:
        enforce(report, action)
    assert ("3 of 3 frames" in caplog.text) == (action == "warn")


def test_who_was_warned_is_not_told_to_choose_to_be(caplog):
    for images in (torch.zeros(3, HEIGHT, WIDTH, 3), torch.rand(3, HEIGHT, WIDTH, 3) * 0.05):
        report = check_black_frames(images)
        with pytest.raises(BlackVideoError, match="If the video is meant to be dark, set action to warn"):
            enforce(report, "stop")
        enforce(report, "warn")
    assert "Likely cause" in caplog.text
    assert "set action to warn" not in caplog.text


def test_partly_black_never_stops_a_video_but_is_warned_of(caplog):
    enforce(BlackFrameReport((1.0, 0.0), (), 0.98, 1.0), "stop")
    enforce(BlackFrameReport((1.0, 0.0), (), 0.98, 1.0), "warn")
    assert "partly black" in caplog.text


def test_progress_is_told_for_every_frame():
    seen = []
    check_black_frames(torch.rand(3, 8, 8, 3), events=Told(progress=lambda done, total: seen.append((done, total))))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@given(st.sets(st.integers(0, 60)).map(sorted))
def test_ranges_name_each_frame_once(frames):
    named = []
    for part in frame_ranges(frames).split(", ") if frames else []:
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == frames


@pytest.mark.parametrize(
    ("images", "changes", "said"),
    [
        (torch.zeros(3, 8, 8), {}, r"shape \[3, 8, 8\]"),
        (torch.zeros(0, 8, 8, 3), {}, "shape"),
        (torch.zeros(3, 8, 8, 1), {}, "shape"),
        (torch.zeros(3, 8, 8, 3, dtype=torch.uint8), {}, "uint8"),
        (torch.zeros(3, 8, 8, 3), {"pixel_black_threshold": 1.5}, "pixel_black_threshold is 1.5"),
        (torch.zeros(3, 8, 8, 3), {"video_black_ratio": -1}, "video_black_ratio is -1"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(images, changes, said):
    with pytest.raises(ValueError, match=said):
        check_black_frames(images, **changes)


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match="'explode'"):
        enforce(check_black_frames(torch.zeros(1, 8, 8, 3)), "explode")
