"""Images and clips that come in are fitted as core's nodes fit them, and what was changed is said."""

import re

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cogvideox import pictures
from cogvideox.pictures import check_images, check_mask, crop_box, fit_grid, fit_length, fit_size, nearest_length
from tests.helpers import run_apart


@pytest.mark.parametrize(
    ("old", "new"), [((100, 60), (64, 48)), ((60, 100), (64, 48)), ((31, 47), (96, 32)), ((64, 48), (32, 24))]
)
def test_scaling_is_pillows_lanczos_of_the_centre(old, new):
    # Not up to black and white: in 8 bits Pillow clamps between its two passes too.
    image = 0.3 + 0.4 * torch.rand(1, old[1], old[0], 3, generator=torch.Generator().manual_seed(1))
    ours = fit_size(image, *new)
    assert ours.shape == (1, new[1], new[0], 3)
    pixels = Image.fromarray((image[0].numpy() * 255).round().astype("uint8"))
    width, height = old
    wide = width / height > new[0] / new[1]
    cut = round((width - height * new[0] / new[1]) / 2) if wide else round((height - width * new[1] / new[0]) / 2)
    box = (cut, 0, width - cut, height) if wide else (0, cut, width, height - cut)
    theirs = numpy.asarray(pixels.crop(box).resize(new, Image.Resampling.LANCZOS)) / 255
    assert (ours[0] - torch.from_numpy(theirs)).abs().max() < 2 / 255


def test_an_image_of_that_size_is_not_touched():
    image = torch.rand(1, 48, 64, 3)
    assert fit_size(image, 64, 48) is image


@given(count=st.integers(1, 200), step=st.sampled_from([8, 16]))
def test_a_clip_becomes_the_nearest_length_that_is_made_and_says_so(count, step):
    clip = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 1, 3)
    fitted, note = fit_length(clip, step)
    length = len(fitted)
    assert length % step == 1
    assert abs(length - count) <= step / 2 or 1 < count <= step + 1
    assert length > 1 or count == 1
    assert (note is None) == (length == count)
    if note:
        assert str(count) in note
        assert str(length if length < count else length - count) in note
    assert fitted[:count, 0, 0, 0].tolist() == list(range(min(count, length)))
    assert all(frame == count - 1 for frame in fitted[count:, 0, 0, 0].tolist())


def test_sides_are_cropped_to_the_grid_at_the_centre_and_it_says_so():
    image = torch.rand(1, 50, 70, 3)
    fitted, note = fit_grid(image)
    assert torch.equal(fitted, image[:, 1:49, 3:67])
    assert "70x50" in note
    assert "64x48" in note
    assert fit_grid(fitted) == (fitted, None)
    with pytest.raises(ValueError, match="8x32"):
        fit_grid(torch.rand(1, 32, 8, 3))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.rand(1, 8, 8, 4), "has an alpha channel"),
        (torch.rand(1, 8, 8, 1), "is grey"),
        (torch.rand(1, 8, 8, 7), "has 7 channels"),
        (torch.rand(8, 8, 3), r"shape \[8, 8, 3\]"),
        (torch.rand(0, 8, 8, 3), "has the shape"),
        (torch.full((1, 8, 8, 3), torch.nan), "192 values that are NaN"),
        (torch.full((1, 8, 8, 3), 255.0), "Divide it by 255"),
        (torch.full((1, 8, 8, 3), -1.0), "from -1 to -1"),
    ],
)
def test_what_is_no_image_is_refused_with_a_sentence(image, said):
    with pytest.raises(ValueError, match=said) as caught:
        check_images(image, "start_image")
    assert "start_image" in str(caught.value)


def test_what_resampling_sharpened_beyond_white_is_clamped():
    image = torch.tensor([-0.05, 0.5, 1.05]).expand(1, 2, 2, 3)
    assert check_images(image, "images")[0, 0, 0].tolist() == [0.0, 0.5, 1.0]


def test_a_clip_that_is_well_is_given_back_itself_and_one_that_is_not_stays_as_it_was():
    clip = torch.rand(3, 8, 8, 3)
    assert check_images(clip, "images") is clip
    half = clip.half()
    assert torch.equal(check_images(half, "images"), half.float())
    over = clip * 1.05
    before = over.clone()
    assert torch.equal(check_images(over, "images"), before.clamp(0, 1))
    assert torch.equal(over, before)


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (2, 15, 7, 2), (4, 31, 15, 1)])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "holds 1 values"),
        (float("inf"), "holds 1 values"),
        (7.0, "from 0.5 to 7"),
        (-1.0, "from -1 to 0.5"),
    ],
)
def test_it_is_looked_at_in_pieces_of_which_none_is_overlooked(monkeypatch, place, value, said):
    monkeypatch.setattr(pictures, "_BLOCK", 5 * 16 * 3)
    clip = torch.full((5, 32, 16, 3), 0.5)
    clip[place] = value
    with pytest.raises(ValueError, match=said):
        check_images(clip, "images")


def test_beside_a_clip_there_is_no_copy_of_it():
    script = """
import torch
from cogvideox.pictures import check_images
images = torch.rand(2, 768, 1360, 3)
check_images(images, "images")
from tests.memory import peak_kilobytes
before = peak_kilobytes()
check_images(images.repeat(1, 1, 1, 1), "images")
check_images(images[:1].expand(100, -1, -1, -1), "images")
print(peak_kilobytes() - before)
"""
    # One copy of two frames, made above, and little else: the second clip is of 1.25 GB.
    assert int(run_apart(script)) * 1024 < 64e6


def test_sizes_that_no_machine_has_are_refused_in_time():
    with pytest.raises(ValueError, match="takes 3,377,699,720,527,872 bytes|would take"):
        check_images(torch.zeros(1, 16, 16, 3).expand(2**40, 16, 16, 3), "images")


class TestMask:
    def test_what_a_mask_can_be_is_one_shape(self):
        mask = torch.rand(2, 4, 6)
        assert check_mask(mask, "mask").equal(mask)
        assert check_mask(mask[0], "mask").equal(mask[:1])
        assert check_mask(torch.stack([mask, 1 - mask], dim=-1), "mask").equal(mask)

    @pytest.mark.parametrize("shape", [(6,), (0, 4, 6), (2, 4, 0), (1, 2, 3, 4, 5)])
    def test_what_is_none_is_refused(self, shape):
        with pytest.raises(ValueError, match=rf"shape {re.escape(str(list(shape)))}, but a mask is \[frames, height"):
            check_mask(torch.zeros(shape), "mask")


def test_of_a_line_of_pixels_something_is_left():
    assert crop_box(1, 1000, 16, 16) == (0, 499, 1, 501)
    assert crop_box(1000, 1, 16, 16) == (499, 0, 501, 1)
    assert fit_size(torch.ones(1, 1, 1000, 3), 16, 16).equal(torch.ones(1, 16, 16, 3))


@pytest.mark.parametrize("size", [(8, 100), (100, 8)])
def test_pictures_that_the_model_cannot_read_are_refused(size):
    with pytest.raises(ValueError, match=f"are {size[1]}x{size[0]} pixels, and the smallest"):
        fit_grid(torch.zeros(1, *size, 3))


@pytest.mark.parametrize(
    ("count", "step", "in_pairs", "wanted", "said"),
    [
        (1, 16, False, 1, None),
        (17, 16, False, 17, None),
        (10, 16, False, 17, "makes 16N+1, so the last was repeated 7 times."),
        (20, 16, False, 17, "makes 16N+1, so the last 3 were cut: 17 are left."),
        (2, 8, True, 5, "makes 8N+5, so the last was repeated 3 times."),
        (15, 8, True, 13, "makes 8N+5, so the last 2 were cut: 13 are left."),
    ],
)
def test_the_nearest_length_and_what_it_changes(count, step, in_pairs, wanted, said):
    length, note = nearest_length(count, step, in_pairs)
    assert length == wanted
    assert note is said is None or note == f"The clip has {count} frames and this model {said}"
