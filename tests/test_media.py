"""Pictures and clips as phones, cameras and programs make them come in as what a person sees."""

import errno
import math
import re
import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from cogvideox.clip_files import read_sound, read_video
from cogvideox.image_files import read_image
from tests.memory import rise_of_peak
from tests.told import Told

WIDTH, HEIGHT = 64, 48
#: Dark on the left, white on the right: its mean is 0.5.
RAMP = np.tile(np.linspace(0, 1, WIDTH), (HEIGHT, 1))
GREY, DEEP = (RAMP * 255).round().astype(np.uint8), (RAMP * 65535).round().astype(np.uint16)


def grey(mode: str = "L") -> Image.Image:
    return Image.fromarray(GREY).convert(mode)


def clear(alpha: int, mode: str = "RGBA") -> Image.Image:
    return Image.merge(mode, [grey()] * (len(mode) - 1) + [Image.new("L", (WIDTH, HEIGHT), alpha)])


def write_png(path: Path, colour_type: int, values: np.ndarray, clear_value: int | None = None) -> None:
    """A PNG of 16 bits, of a colour type that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    transparency = b"" if clear_value is None else chunk(b"tRNS", struct.pack(">H", clear_value))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def display_p3() -> bytes:
    """An ICC profile with the primaries of Display P3 and a gamma of 2.2."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    name = b"Display P3"
    tags = {
        b"desc": b"desc"
        + bytes(4)
        + struct.pack(">I", len(name) + 1)
        + name
        + bytes(1 + 4 + 4 + 2 + 1 + 67)
        + bytes(2),
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
        **{
            key: b"XYZ " + bytes(4) + fixed(*column)
            for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3.T, strict=True)
        },
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for key, value in tags.items():
        table += key + struct.pack(">II", offset + len(data), len(value))
        data += value
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(
        ">I4sI4s4s4s12s4s", 128 + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ", bytes(12), b"acsp"
    ) + bytes(28)
    return (head + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + body


#: Colours to XYZ under D50, column by column (Display P3's and sRGB's own profiles).
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


@pytest.fixture
def read(tmp_path):
    """``read(name)``: the picture of that name, and what was said about it."""

    def get(name: str) -> tuple[np.ndarray, str]:
        notes = []
        image = read_image(tmp_path / name, Told(notes))
        assert image.dtype == torch.float32
        return image[0].numpy(), " ".join(notes)

    return get


class TestPictures:
    @pytest.mark.parametrize(
        ("name", "image"),
        [
            ("grey.png", grey()),
            ("grey.jpg", grey()),
            ("colour.png", grey("RGB")),
            ("palette.png", grey("P")),
            ("palette.gif", grey("P")),
            ("opaque.png", clear(255)),
            ("opaque_grey.png", clear(255, "LA")),
            ("opaque.webp", clear(255)),
            ("16_bits.png", Image.fromarray(DEEP)),
            ("16_bits.tiff", Image.fromarray(DEEP)),
            ("16_bits.pgm", Image.fromarray(DEEP.astype(np.int32))),
            ("float.tiff", Image.fromarray(RAMP.astype(np.float32))),
            ("printing.jpg", grey("RGB").convert("CMYK")),
            ("printing.tiff", grey("RGB").convert("CMYK")),
            ("old.bmp", grey("RGB")),
            ("old.tga", grey("RGB")),
        ],
    )
    def test_a_ramp_is_a_ramp_in_every_format(self, read, tmp_path, name, image):
        image.save(tmp_path / name, **({"quality": 95} if name.endswith(("jpg", "webp")) else {}))
        pixels, said = read(name)
        assert np.abs(pixels - RAMP[..., None]).max() < (3 if name.endswith(("jpg", "webp")) else 0.51) / 255
        assert ("CMYK" in said) == name.startswith("printing")
        if "CMYK" not in said:
            assert said == ""

    @pytest.mark.parametrize(("name", "channels"), [("grey", 1), ("colour", 3), ("colour_alpha", 4)])
    def test_16_bits_of_every_kind_of_png(self, read, tmp_path, name, channels):
        values = np.stack([DEEP] * min(channels, 3) + [np.full_like(DEEP, 65535)] * (channels == 4), -1)
        write_png(tmp_path / "x.png", {1: 0, 3: 2, 4: 6}[channels], values)
        pixels, said = read("x.png")
        assert np.abs(pixels - RAMP[..., None]).max() < (1e-5 if channels == 1 else 1.01 / 255)
        assert said == ""

    def test_16_and_32_bits_keep_their_precision(self, read, tmp_path):
        fine = 0.5 + RAMP / 1000
        Image.fromarray((fine * 65535).round().astype(np.uint16)).save(tmp_path / "x.png")
        Image.fromarray(fine.astype(np.float32)).save(tmp_path / "x.tiff")
        for name in ("x.png", "x.tiff"):
            assert np.abs(read(name)[0] - fine[..., None]).max() < 1e-5

    @pytest.mark.parametrize(
        ("image", "options", "corner", "mean"),
        [
            (clear(0), {}, 1.0, 1.0),
            (clear(0, "LA"), {}, 1.0, 1.0),
            (clear(128), {}, 127 / 255, 1 - 0.5 * 128 / 255),
            (grey("P"), {"transparency": 0}, 1.0, 0.5 + 1 / WIDTH),
            (grey("RGB"), {"transparency": (0, 0, 0)}, 1.0, 0.5 + 1 / WIDTH),
            (grey("L"), {"transparency": 0}, 1.0, 0.5 + 1 / WIDTH),
        ],
    )
    def test_what_is_transparent_becomes_white_and_never_the_colour_under_it(
        self, read, tmp_path, image, options, corner, mean
    ):
        image.save(tmp_path / "x.png", **options)
        pixels, said = read("x.png")
        assert pixels[0, 0] == pytest.approx([corner] * 3, abs=0.5 / 255)
        assert pixels.mean() == pytest.approx(mean, abs=1 / 255)
        assert "joined with a white background" in said

    @pytest.mark.parametrize("colour_type", [0, 4])
    def test_transparency_of_16_bits(self, read, tmp_path, colour_type):
        values = DEEP if colour_type == 0 else np.stack([DEEP, np.where(DEEP == 0, 0, 65535)], -1)
        write_png(tmp_path / "x.png", colour_type, values, 0 if colour_type == 0 else None)
        pixels, said = read("x.png")
        assert pixels[0, 0].tolist() == [1, 1, 1]
        assert pixels[0, 1:].mean() == pytest.approx(RAMP[0, 1:].mean(), abs=1 / 255)
        assert "white background" in said

    @pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tiff"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_orientation_is_turned_upright(self, read, tmp_path, name, orientation):
        upright = np.zeros((HEIGHT, WIDTH), np.uint8)
        upright[: HEIGHT // 2, : WIDTH // 2], upright[HEIGHT // 2 :, : WIDTH // 2] = 255, 100
        # What a camera held so stores: the opposite of what is to be done when it is shown.
        stored = {
            1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
            5: upright.T, 6: np.rot90(upright, 1), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
        }[orientation]  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif)
        pixels, _ = read(name)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        quarters = [pixels[y, x, 0] for y in (12, 36) for x in (16, 48)]
        assert quarters == pytest.approx([1, 0, 100 / 255, 0], abs=3 / 255)

    def test_a_colour_profile_is_applied(self, read, tmp_path):
        colour = np.array([200, 100, 60])
        Image.new("RGB", (8, 8), tuple(colour.tolist())).save(tmp_path / "p3.png", icc_profile=display_p3())
        linear = np.linalg.solve(SRGB, P3 @ (colour / 255) ** 2.2).clip(0, 1)
        expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        pixels, said = read("p3.png")
        assert pixels[0, 0] == pytest.approx(expected, abs=1.5 / 255)
        assert abs(expected - colour / 255).max() > 10 / 255
        assert "Display P3" in said

    def test_linear_srgb_is_not_taken_for_srgb(self, read, tmp_path):
        """Its name, such as GIMP's, says sRGB too."""
        icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        for curve in re.finditer(rb"[rgb]TRC(.{4})", icc[:600], re.DOTALL):
            place = int.from_bytes(curve[1], "big")
            icc[place : place + 12] = b"curv" + bytes(8)
        Image.new("RGB", (8, 8), (55, 55, 55)).save(tmp_path / "linear.png", icc_profile=bytes(icc))
        pixels, said = read("linear.png")
        assert pixels[0, 0] == pytest.approx(128 / 255, abs=1 / 255)
        assert "to sRGB" in said

    def test_srgb_is_left_as_it_is_and_a_damaged_profile_is_said(self, read, tmp_path):
        grey("RGB").save(
            tmp_path / "a.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        )
        assert read("a.png")[1] == ""
        grey("RGB").save(tmp_path / "b.png", icc_profile=b"nonsense" * 30)
        pixels, said = read("b.png")
        assert "colour profile" in said
        assert np.abs(pixels - RAMP[..., None]).max() < 0.51 / 255

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_a_profile_that_lacks_a_curve_is_damaged_whatever_its_name(self, read, tmp_path, mode):
        icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"rTRC", b"none")
        grey(mode).save(tmp_path / "c.png", icc_profile=icc)
        pixels, said = read("c.png")
        assert "is damaged" in said
        assert np.abs(pixels - RAMP[..., None]).max() < 0.51 / 255

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
    def test_of_several_pictures_the_first_is_used_and_that_is_said(self, read, tmp_path, suffix):
        others = [Image.new("RGB", (WIDTH, HEIGHT), "red")]
        grey("RGB").save(
            tmp_path / f"x.{suffix}",
            save_all=True,
            append_images=others,
            **({"lossless": True} if suffix == "webp" else {}),
        )
        pixels, said = read(f"x.{suffix}")
        assert pixels.mean() == pytest.approx(0.5, abs=2 / 255)
        assert "the first is used" in said

    def test_a_huge_picture_is_read_smaller_and_a_larger_one_refused(self, read, tmp_path, monkeypatch):
        monkeypatch.setattr("cogvideox.image_files._KEPT_PIXELS", 1000)
        monkeypatch.setattr("cogvideox.image_files._MOST_PIXELS", WIDTH * HEIGHT)
        for name in ("x.png", "x.jpg"):
            grey().save(tmp_path / name)
            pixels, said = read(name)
            height, width = pixels.shape[:2]
            assert width * height <= 1000
            assert width / height == pytest.approx(WIDTH / HEIGHT, rel=0.1)
            assert pixels.mean() == pytest.approx(0.5, abs=0.02)
            assert f"is {WIDTH}x{HEIGHT} pixels" in said
        Image.fromarray(DEEP).save(tmp_path / "16.png")
        assert read("16.png")[0].mean() == pytest.approx(0.5, abs=0.02)
        grey().resize((WIDTH + 1, HEIGHT)).save(tmp_path / "y.png")
        with pytest.raises(ValueError, match="is 65x48 pixels.*more than is read"):
            read("y.png")

    def test_beyond_pillows_own_limit_there_is_no_traceback(self, read, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        grey().save(tmp_path / "x.png")
        assert read("x.png")[0].shape == (HEIGHT, WIDTH, 3)
        assert Image.MAX_IMAGE_PIXELS == 100

    @pytest.mark.parametrize(("size", "name"), [((1, 1), "a.png"), ((500, 1), "b.png"), ((1, 500), "c.gif")])
    def test_a_line_of_pixels_is_a_picture(self, read, tmp_path, size, name):
        from cogvideox.pictures import fit_size

        Image.new("RGB", size, "white").save(tmp_path / name)
        pixels, _ = read(name)
        assert pixels.shape == (size[1], size[0], 3)
        assert fit_size(torch.from_numpy(pixels)[None], 80, 48).min() > 0.99

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("empty.png", b"", "The file is empty"),
            ("text.png", b"hello", "in no format that Pillow knows"),
            ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(100), "HEIC picture.*Most Compatible"),
            ("page.jpg", b"\n<!DOCTYPE html><html>", "It is a web page"),
            ("drawing.svg", b"<svg xmlns=''/>", "It is a drawing"),
            ("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "It is a drawing"),
            ("film.exr", b"\x76\x2f\x31\x01" + bytes(100), "high dynamic range"),
            ("clip.png", b"\0\0\0\x18ftypisom" + bytes(100), "It is a video"),
            ("camera.NEF", b"II*\0", "raw file"),
            ("pointer.png", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ],
    )
    def test_what_is_no_picture_is_a_sentence_that_says_what_it_is(self, read, tmp_path, name, content, said):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{said}"):
            read(name)

    def test_heic_is_read_where_pillow_heif_is_installed(self, read, tmp_path, monkeypatch):
        (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))

        class Heif(ImageFile.ImageFile):
            format = "HEIF"

            def _open(self):
                self._size, self._mode = (4, 2), "RGB"

            def load(self):
                self.im = Image.new("RGB", self.size, "red").im
                return Image.Image.load(self)

        def register():
            monkeypatch.setitem(Image.OPEN, "HEIF", (Heif, lambda prefix: prefix[4:12] == b"ftypheic"))

        monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
        pixels, _ = read("phone.heic")
        assert pixels.shape == (2, 4, 3)

    @pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tiff"])
    def test_a_cut_picture_is_refused(self, read, tmp_path, name):
        Image.effect_noise((200, 200), 50).convert("RGB").save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an image"):
            read(name)

    @pytest.mark.parametrize(
        ("name", "values", "said"),
        [
            ("a.tiff", (RAMP * 255).astype(np.float32), "floating-point values from 0 to 255"),
            ("b.tiff", np.full_like(RAMP, np.nan, np.float32), "nan"),
            ("c.tiff", DEEP.astype(np.int32), "which of them is white is not known"),
        ],
    )
    def test_values_whose_white_is_not_known_are_refused(self, read, tmp_path, name, values, said):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(ValueError, match=said):
            read(name)

    def test_a_folder_and_nothing_are_sentences(self, read, tmp_path):
        (tmp_path / "folder.png").mkdir()
        for name, said in (("folder.png", "is a folder"), ("none.png", "cannot be read as an image .*No such file")):
            with pytest.raises(ValueError, match=said):
                read(name)


# --- Clips --------------------------------------------------------------------


def write_clip(
    path: Path,
    rate=16,
    frames=20,
    size=(WIDTH, HEIGHT),
    levels=None,
    codec="libx264",
    pix_fmt="yuv420p",
    tone=False,
    times=None,
    **tags,
):
    """A clip of grey frames, from black to white or of the given levels, with an optional tone and times in ms."""
    levels = np.linspace(0, 255, frames).round() if levels is None else levels
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=rate, options={"crf": "5", "preset": "ultrafast"} if codec == "libx264" else {}
        )
        (stream.width, stream.height), stream.pix_fmt = size, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if tone:
            sound = container.add_stream("aac", rate=48_000)
            sound.codec_context.layout = "mono"
        for index, level in enumerate(levels):
            if isinstance(level, av.VideoFrame):
                frame = level
            else:
                frame = av.VideoFrame.from_ndarray(
                    np.full((size[1], size[0], 3), level, np.uint8), format="rgb24"
                ).reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if tone:
            wave = (0.5 * np.sin(np.arange(int(48_000 * len(levels) / rate)) * 2 * math.pi * 440 / 48_000)).astype(
                np.float32
            )
            for start in range(0, len(wave), 1024):
                piece = av.AudioFrame.from_ndarray(
                    wave[None, start : start + 1024].copy(), format="fltp", layout="mono"
                )
                piece.sample_rate, piece.pts = 48_000, start
                container.mux(sound.encode(piece))
            container.mux(sound.encode())
        container.mux(stream.encode())
    return path


def plane_frame(y: int, u: int, v: int, size=(WIDTH, HEIGHT)) -> av.VideoFrame:
    frame = av.VideoFrame(*size, "yuv420p")
    for plane, value in zip(frame.planes, (y, u, v), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    return frame


def levels(clip: torch.Tensor) -> list[float]:
    return (clip.float().mean((1, 2, 3)) * (255 if clip.dtype == torch.float32 else 1)).tolist()


class TestClips:
    def test_frames_are_what_they_were(self, tmp_path):
        clip = read_video(write_clip(tmp_path / "x.mp4"))
        assert clip.shape == (20, HEIGHT, WIDTH, 3)
        assert levels(clip) == pytest.approx(np.linspace(0, 255, 20).tolist(), abs=2)
        assert torch.equal(read_video(tmp_path / "x.mp4", dtype=torch.uint8), (clip * 255).round().to(torch.uint8))

    @pytest.mark.parametrize("rate", [8, 16, 24, 25, 30, 60, Fraction(30000, 1001)])
    def test_a_second_stays_a_second(self, tmp_path, rate):
        notes = []
        seconds = 2
        clip = read_video(write_clip(tmp_path / "x.mp4", rate, round(seconds * rate)), fps=16, events=Told(notes))
        assert len(clip) == 16 * seconds
        # Brightness rises evenly with time: each frame has that of its moment, up to half a frame of the source and of
        # rounding.
        at = np.arange(16 * seconds) / 16 * rate / (round(seconds * rate) - 1) * 255
        assert np.abs(np.array(levels(clip)) - at.astype(float)).max() < 255 / seconds / rate * 0.51 + 2
        assert bool(notes) == (rate != 16)
        if notes:
            assert f"has {float(rate):.4g} frames a second and 16 are made of them" in notes[0]

    def test_variable_rates_follow_their_times(self, tmp_path):
        path = write_clip(
            tmp_path / "x.mkv", 25, levels=[0, 50, 100, 150, 200, 250], times=[0, 100, 150, 700, 1000, 2000]
        )
        clip = read_video(path, fps=8, events=Told())
        # At 0, 125, 250, 375 … ms: the nearest of the times above, the earlier of two.
        assert [round(level / 50) for level in levels(clip)] == [0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5][
            : len(clip)
        ]

    def test_as_many_frames_are_read_as_are_used_and_the_rest_is_said(self, tmp_path, monkeypatch):
        from cogvideox.frame_pixels import FramePixels

        made, real = [], FramePixels.pixels
        monkeypatch.setattr(FramePixels, "pixels", lambda self, frame: made.append(1) or real(self, frame))
        notes = []
        clip = read_video(write_clip(tmp_path / "x.mp4", 32, 128), 17, fps=16, step=16, events=Told(notes))
        assert (len(clip), len(made)) == (17, 17)
        assert "Only the first 17 frames (1.1 s) of 4.0 s" in notes[-1]

    def test_the_length_is_what_the_model_makes(self, tmp_path):
        notes = []
        path = write_clip(tmp_path / "x.mp4")
        assert len(read_video(path, step=16, events=Told(notes))) == 17
        assert "the last 3 were cut" in notes[-1]
        clip = read_video(path, 12, step=16, events=Told(notes))
        assert len(clip) == 17
        assert (clip[12:] == clip[11]).all()

    @pytest.mark.parametrize("turn", range(8))
    def test_a_phone_held_in_any_way_gives_an_upright_clip(self, tmp_path, turn):
        upright = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        upright[: HEIGHT // 2, : WIDTH // 2], upright[HEIGHT // 2 :, : WIDTH // 2] = 255, 100
        one = 1 << 16
        # (a, b, c, d) of the matrix that is applied when it is shown, and how the camera stored it.
        (a, b, c, d), stored = [
            ((one, 0, 0, one), upright),
            ((0, one, -one, 0), np.rot90(upright, 1)),
            ((-one, 0, 0, -one), np.rot90(upright, 2)),
            ((0, -one, one, 0), np.rot90(upright, -1)),
            ((-one, 0, 0, one), upright[:, ::-1]),
            ((one, 0, 0, -one), upright[::-1]),
            ((0, one, one, 0), upright.swapaxes(0, 1)),
            ((0, -one, -one, 0), upright[::-1, ::-1].swapaxes(0, 1)),
        ][turn]
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="rgb24").reformat(format="yuv420p")
        write_clip(tmp_path / "x.mp4", size=(frame.width, frame.height), levels=[frame])
        content = bytearray((tmp_path / "x.mp4").read_bytes())
        # The track header: type, version and flags, 36 bytes of others, then the matrix.
        place = content.index(b"tkhd") + 4 + 4 + 36
        content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        (tmp_path / "x.mp4").write_bytes(content)
        clip = read_video(tmp_path / "x.mp4")
        assert clip.shape == (1, HEIGHT, WIDTH, 3)
        assert [clip[0, y, x, 0].item() for y in (12, 36) for x in (16, 48)] == pytest.approx(
            [1, 0, 100 / 255, 0], abs=0.03
        )

    def test_pixels_that_are_not_square_are_made_so(self, tmp_path):
        path = write_clip(tmp_path / "x.mp4", sample_aspect_ratio=Fraction(2))
        assert read_video(path, 1, events=Told()).shape == (1, HEIGHT, 2 * WIDTH, 3)
        assert read_video(path, 1, size=(32, 48), events=Told()).shape == (1, 48, 32, 3)

    @pytest.mark.parametrize(
        ("size", "planes", "tags", "expected"),
        [
            # Pure red in BT.709 and in BT.601 (ITU-R BT.709-6 and BT.601-7, 8 bits).
            ((64, 48), (63, 102, 240), {"colorspace": 1}, (255, 0, 0)),
            ((64, 48), (81, 90, 240), {"colorspace": 5}, (255, 0, 0)),
            ((64, 48), (81, 90, 240), {}, (255, 0, 0)),
            ((1280, 720), (63, 102, 240), {}, (255, 0, 0)),
            # White in limited and in full range.
            ((64, 48), (235, 128, 128), {"color_range": 1}, (255, 255, 255)),
            ((64, 48), (235, 128, 128), {}, (255, 255, 255)),
            ((64, 48), (255, 128, 128), {"color_range": 2}, (255, 255, 255)),
            ((64, 48), (235, 128, 128), {"color_range": 2}, (235, 235, 235)),
        ],
    )
    def test_colours_follow_the_files_matrix_and_range(self, tmp_path, size, planes, tags, expected):
        frame = plane_frame(*planes, size)
        for name, value in tags.items():
            setattr(frame, name, value)
        clip = read_video(write_clip(tmp_path / "x.mp4", size=size, levels=[frame], **tags), dtype=torch.uint8)
        assert clip[0, size[1] // 2, size[0] // 2].tolist() == pytest.approx(expected, abs=2)

    @pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p", "yuv422p", "yuv444p10le"])
    def test_white_is_white_in_every_pixel_format(self, tmp_path, pix_fmt):
        clip = read_video(write_clip(tmp_path / "x.mp4", pix_fmt=pix_fmt, levels=[255, 255, 0]), dtype=torch.uint8)
        assert levels(clip) == pytest.approx([255, 255, 0], abs=1)

    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt"),
        [("x.mkv", "libx264", "yuv420p"), ("x.ts", "mpeg2video", "yuv420p"), ("x.avi", "mpeg4", "yuv420p")],
    )
    def test_other_containers_and_codecs(self, tmp_path, name, codec, pix_fmt):
        clip = read_video(write_clip(tmp_path / name, 25, 10, codec=codec, pix_fmt=pix_fmt), fps=25, events=Told())
        assert levels(clip) == pytest.approx(np.linspace(0, 255, 10).tolist(), abs=5)

    def test_a_gif_is_a_clip_and_what_is_clear_in_it_is_white(self, tmp_path):
        first = Image.new("P", (WIDTH, HEIGHT), 0)
        first.putpalette([255, 0, 0, 0, 0, 255])
        first.paste(1, (0, 0, WIDTH // 2, HEIGHT))
        first.save(
            tmp_path / "x.gif",
            save_all=True,
            append_images=[first.transpose(Image.Transpose.ROTATE_180)],
            transparency=0,
            duration=500,
            disposal=2,
        )
        notes = []
        clip = read_video(tmp_path / "x.gif", fps=8, events=Told(notes))
        assert len(clip) == 8
        assert clip[0, 20, WIDTH - 5].tolist() == [1, 1, 1]
        assert clip[0, 20, 5].tolist() == [0, 0, 1]
        assert any("white background" in note for note in notes)

    def test_frames_are_scaled_as_pictures_are(self, tmp_path):
        from cogvideox.pictures import fit_size

        rows = np.random.default_rng(1).integers(60, 200, (72, 100, 3)).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(rows, format="rgb24").reformat(format="yuv444p")
        path = write_clip(tmp_path / "x.mp4", size=(100, 72), levels=[frame], pix_fmt="yuv444p")
        assert (read_video(path, size=(80, 48)) - fit_size(read_video(path), 80, 48)).abs().max() < 2 / 255

    def test_what_is_made_of_each_frame_is_all_that_is_kept(self, tmp_path):
        path = write_clip(tmp_path / "x.mp4", 16, 9)
        kept = read_video(path, 9, dtype=torch.uint8, fit=lambda frame: frame[:4, :4] / 255)
        assert torch.equal(kept, read_video(path)[:, :4, :4])

    def test_frames_of_another_size_than_the_first_are_brought_to_that(self, tmp_path):
        parts = [write_clip(tmp_path / f"{size[0]}.h264", 16, 9, size) for size in ((96, 64), (64, 64))]
        (tmp_path / "x.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
        assert read_video(tmp_path / "x.h264").shape == (18, 64, 96, 3)
        assert read_video(tmp_path / "x.h264", size=(48, 32)).shape == (18, 32, 48, 3)

    def test_a_cut_clip_gives_its_frames_until_there_and_says_so(self, tmp_path):
        path = write_clip(tmp_path / "x.mkv", 16, 200, tone=True)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        notes = []
        clip = read_video(path, fps=16, events=Told(notes))
        assert 20 < len(clip) < 180
        assert any("s" in note and ("ends after" in note or "is damaged after" in note) for note in notes)

    def test_damage_in_the_middle_loses_only_that(self, tmp_path):
        path = write_clip(tmp_path / "x.avi", 16, 40, codec="mjpeg", pix_fmt="yuvj420p")
        content = bytearray(path.read_bytes())
        places = [place for place in range(len(content) - 4) if content[place : place + 3] == b"\xff\xd8\xff"]
        content[places[20] : places[21] - 8] = bytes(places[21] - 8 - places[20])
        path.write_bytes(content)
        notes = []
        clip = read_video(path, fps=16, events=Told(notes))
        assert len(clip) == 40
        assert any("damaged" in note for note in notes)

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("empty.mp4", b"", "cannot be read as a video: it is empty"),
            ("text.mp4", b"hello " * 100, "cannot be read as a video"),
            ("cut.mp4", None, "cannot be read as a video"),
            (
                "list.m3u8",
                b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nx.ts\n#EXT-X-ENDLIST\n",
                "cannot be read as a video",
            ),
            ("list.ffconcat", b"ffconcat version 1.0\nfile x.ts\n", "cannot be read as a video"),
        ],
    )
    def test_what_is_no_clip_is_a_sentence(self, tmp_path, name, content, said):
        write_clip(tmp_path / "x.ts", codec="mpeg2video", rate=25)
        if content is None:
            content = write_clip(tmp_path / "whole.mp4").read_bytes()[:-2000]
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {said}") as caught:
            read_video(tmp_path / name)
        assert "'3'" not in str(caught.value)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
    def test_a_still_picture_is_no_clip(self, tmp_path, suffix):
        grey("RGB").save(tmp_path / f"x.{suffix}")
        with pytest.raises(ValueError, match="picture"):
            read_video(tmp_path / f"x.{suffix}")

    def test_sound_alone_is_no_clip(self, tmp_path):
        with av.open(str(tmp_path / "x.m4a"), "w") as container:
            stream = container.add_stream("aac", rate=48_000)
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.sample_rate = 48_000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        with pytest.raises(ValueError, match="holds sound and no video"):
            read_video(tmp_path / "x.m4a")

    def test_a_long_clip_takes_the_memory_of_what_is_used_of_it(self, tmp_path):
        size = (480, 288)
        path = write_clip(tmp_path / "x.mp4", 30, 300, size=size, levels=[plane_frame(100, 128, 128, size)] * 300)
        read_video(path, 1, events=Told())  # What is loaded once is loaded.
        clips = []
        rise = rise_of_peak(
            lambda: clips.append(
                read_video(path, 161, fps=16, size=(160, 96), step=16, dtype=torch.uint8, events=Told())
            )
        )
        assert clips[0].shape == (161, 96, 160, 3)
        # All frames in fp32 are 498 MB, those in use 7 MB.
        assert rise < 100e6


class TestSound:
    def test_it_is_read_from_the_first_picture_on_for_as_long_as_the_video_lasts(self, tmp_path):
        path = write_clip(tmp_path / "x.mp4", 16, 48, tone=True)
        sound, rate = read_sound(path, 2.0)
        assert (sound.shape, rate) == ((2, 96_000), 48_000)
        # A tone of half the full scale.
        assert np.sqrt((sound[:, 5000:90_000] ** 2).mean()) == pytest.approx(0.5 / math.sqrt(2), rel=0.35)
        spectrum = np.abs(np.fft.rfft(sound[0, :48_000]))
        assert spectrum.argmax() == 440

    def test_what_is_shorter_ends_in_silence_and_none_is_said(self, tmp_path):
        sound, _ = read_sound(write_clip(tmp_path / "x.mp4", 16, 16, tone=True), 3.0)
        assert np.abs(sound[:, 60_000:]).max() < 0.01
        notes = []
        assert read_sound(write_clip(tmp_path / "y.mp4"), 1.0, Told(notes)) is None
        assert "no sound" in notes[0]


def test_a_number_that_ffmpeg_takes_for_a_size_is_the_files_fault(tmp_path, monkeypatch):
    """What ffmpeg says is "Cannot allocate memory", and closing other programs would not help."""
    import av

    def open_(*_, **__):
        raise av.error.FFmpegError(errno.ENOMEM, "Cannot allocate memory", "x.mp4")

    (tmp_path / "x.mp4").write_bytes(b"clip")
    monkeypatch.setattr(av, "open", open_)
    with pytest.raises(ValueError, match="claims more than any memory holds, as a damaged file does"):
        read_video(tmp_path / "x.mp4")
