"""Sizes and lengths: what the model can make, and a sentence for what it cannot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvideox.geometry import (
    check_frames,
    check_latent,
    check_size,
    empty_latent,
    latent_frames,
    padding_frames,
    pixel_frames,
)


def test_an_empty_latent_has_the_shape_of_the_contract():
    latent = empty_latent(1360, 768, 81, 2)
    assert latent.shape == (2, 16, 21, 96, 170)
    assert latent.dtype == torch.float32
    assert not latent.any()


@given(st.integers(0, 60))
def test_every_16n_plus_1_is_accepted_and_goes_to_latents_and_back(n):
    frames = 16 * n + 1
    check_frames(frames)
    assert pixel_frames(latent_frames(frames)) == frames


@given(st.integers(-5, 1000).filter(lambda frames: frames % 16 != 1))
def test_a_wrong_length_names_the_two_nearest_right_ones(frames):
    with pytest.raises(ValueError) as caught:
        check_frames(frames)
    near = sorted((good for good in range(1, 1100, 16)), key=lambda good: (abs(good - frames), good))[:2]
    assert "Set it to {} or {}.".format(*sorted(near)) in str(caught.value)
    assert str(frames) in str(caught.value)


@given(st.integers(1, 5000).filter(lambda size: size % 16))
def test_a_wrong_size_names_the_nearest_right_ones(size):
    with pytest.raises(ValueError, match=f"width is {size} pixels") as caught:
        check_size(size, 768)
    numbers = [
        int(word.strip(".")) for word in str(caught.value).split("Set it to")[1].split() if word.strip(".").isdigit()
    ]
    assert all(number % 16 == 0 and abs(number - size) < 16 for number in numbers)


def test_zero_videos_are_refused():
    with pytest.raises(ValueError, match="batch size is 0"):
        empty_latent(1360, 768, 81, 0)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 16, 60, 90), "4 dimensions"),
        ((1, 4, 5, 60, 90), "4 channels"),
        ((1, 16, 0, 60, 90), "empty"),
        ((1, 16, 5, 61, 90), "multiples of 16"),
    ],
)
def test_a_latent_of_another_model_is_refused(shape, said):
    with pytest.raises(ValueError, match=said):
        check_latent(torch.zeros(shape), patch_size=2)


@given(st.integers(1, 50))
def test_padding_makes_latent_frames_even_for_1_5_and_does_nothing_for_1_0(frames):
    assert (frames + padding_frames(frames, {"patch_size_t": 2})) % 2 == 0
    assert padding_frames(frames, {"patch_size_t": 2}) in (0, 1)
    assert padding_frames(frames, {}) == 0
