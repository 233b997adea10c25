"""The pictures people look at: the preview of a video that is being made, and the sheet of frames the check objects
to."""

import numpy
import pytest
import torch
from einops import rearrange
from PIL import Image, ImageFont

from cogvideox.black_frames import BlackFrameReport, check_black_frames
from cogvideox.contact_sheet import _CHINESE, contact_sheet
from cogvideox.languages import translate
from cogvideox.preview import LATENT_RGB, preview_frames, stretched


def test_a_preview_has_a_frame_for_each_latent_frame_and_shows_where_and_when_it_is_bright():
    latents = torch.randn(2, 16, 5, 12, 20, generator=torch.Generator().manual_seed(0)) * 0.05
    # Channel 9 is the brightest of the factors.
    latents[0, 9, 3, :, 10:] += 3
    frames = preview_frames(latents, 512)
    assert [frame.size for frame in frames] == [(20, 12)] * 5
    means = torch.tensor(
        [
            [sum(frame.crop(box).convert("L").tobytes()) / 120 for box in ((0, 0, 10, 12), (10, 0, 20, 12))]
            for frame in frames
        ]
    )
    assert means.argmax() == 7  # frame 3, right half
    assert means[3, 1] > 2 * means[3, 0]


def test_latents_that_another_program_draws_are_stretched_as_our_pictures_are():
    latents = torch.randn(2, 16, 5, 12, 20, generator=torch.Generator().manual_seed(0))
    colours = rearrange(stretched(latents)[0], "c t h w -> t h w c") @ LATENT_RGB
    drawn = (colours + 1).div(2).clamp(0, 1).mul(255).round()
    for frame, wanted in zip(drawn, preview_frames(latents, 512), strict=True):
        assert (frame - torch.from_numpy(numpy.array(wanted).copy())).abs().max() <= 1


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(1, 16, 2, 4, 4),
        torch.full((1, 16, 2, 4, 4), float("nan")),
        torch.randn(1, 16, 1, 96, 170).bfloat16(),
    ],
)
def test_a_preview_is_made_of_anything(latents):
    frames = preview_frames(latents, 64)
    assert len(frames) == latents.shape[2]
    assert max(frames[0].size) <= 64


def gradient_clip(frames):
    row = torch.linspace(0.3, 1, 40)
    return rearrange(row.expand(frames, 3, 24, 40), "f c h w -> f h w c").clone()


def test_a_sheet_shows_the_frames_objected_to_and_no_others():
    images = gradient_clip(6)
    assert contact_sheet(images, check_black_frames(images)) is None
    one, four = images.clone(), images.clone()
    one[2] = 0
    four[[1, 2, 4, 5]] = 0
    sheets = [contact_sheet(clip, check_black_frames(clip)) for clip in (one, four)]
    assert [sheet.size for sheet in sheets] == [(624, 58 + lines * (180 + 34 + 16)) for lines in (1, 2)]
    for sheet in sheets:
        assert sheet.getpixel((sheet.width // 4, 100)) == (0, 0, 0)
        # A frame that is well is not there: it would be bright.
        assert max(sheet.crop((0, 58, 300, 58 + 180)).convert("L").getextrema()) < 150


def test_a_sheet_makes_a_single_broken_pixel_visible():
    images = gradient_clip(2)
    images[1, 7, 30, 1] = float("inf")
    sheet = contact_sheet(images, check_black_frames(images))
    magenta = [count for count, colour in sheet.getcolors(1 << 20) if colour == (255, 0, 255)]
    assert magenta
    assert magenta[0] >= 25


def test_a_sheet_of_a_long_black_video_stays_small_and_has_its_first_and_last_frame():
    images = torch.zeros(161, 16, 16, 3)
    images[0, :, :, :] = float("nan")
    sheet = contact_sheet(images, check_black_frames(images))
    assert isinstance(sheet, Image.Image)
    assert sheet.width * sheet.height < 1e6
    assert (255, 0, 255) in [colour for _, colour in sheet.getcolors(1 << 20)]


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1), (1, 1), (3, 5), (300, 2000), (680, 384)])
def test_a_sheet_of_frames_of_any_size_and_number_stays_small(height, width):
    images = torch.zeros(1, height, width, 3).expand(500, -1, -1, -1)
    sheet = contact_sheet(images, BlackFrameReport((1.0,) * 500, (), 0.98, 1.0))
    assert sheet.width <= 1000
    assert sheet.height <= 800


def test_a_frame_on_a_sheet_has_its_shape_and_its_mean():
    images = gradient_clip(1)[:, :, :20]
    report = BlackFrameReport((1.0,), (), 0.98, 1.0)
    sheet = torch.from_numpy(numpy.asarray(contact_sheet(images, report)).copy()).float() / 255
    # 24 x 20, enlarged to 190 high.
    frame = sheet[58 : 58 + 190, 8 : 8 + 158]
    assert frame[:, :8].mean() == pytest.approx(images[0, :, 0].mean().item(), abs=0.01)
    assert frame[:, -8:].mean() == pytest.approx(images[0, :, -1].mean().item(), abs=0.01)


@pytest.mark.parametrize("bad", [30, 100, 1000])
def test_the_title_of_a_sheet_is_not_cut(bad):
    images = torch.ones(1, 16, 16, 3).expand(bad + 161, -1, -1, -1)
    sheet = contact_sheet(images, BlackFrameReport((1.0,) * bad + (0.0,) * 161, (), 0.98, 1.0))
    edge = sheet.crop((sheet.width - 8, 0, sheet.width, 50))
    assert edge.getcolors() == [(8 * 50, (32, 32, 32))]


def test_labels_are_in_the_pages_language_where_a_font_has_its_letters(tmp_path, monkeypatch):
    images, font = torch.zeros(3, 16, 16, 3), tmp_path / "font.ttf"
    font.write_bytes(ImageFont.load_default(10).path.getvalue())

    def drawn(fonts, language):
        monkeypatch.setattr("cogvideox.contact_sheet._CHINESE", fonts)
        translated = contact_sheet(images, check_black_frames(images), lambda text: translate(text, language))
        return translated.tobytes()

    english = drawn((), "en")
    assert drawn(("no such font.ttc",), "zh") == english
    assert drawn(("no such font.ttc", str(font)), "zh") != english
    assert drawn((str(font),), "en") == english


@pytest.mark.parametrize("name", _CHINESE)
def test_a_font_of_labels_has_all_that_they_are_made_of(name):
    """As far as it is here: some with Chinese letters have no others."""
    try:
        font = ImageFont.truetype(name, 34)
    except OSError:
        pytest.skip("no such font here")
    missing = bytes(font.getmask("\U000fffff"))
    assert not [letter for letter in "黑：07%NIx·" if bytes(font.getmask(letter)) == missing]
