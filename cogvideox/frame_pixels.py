"""Turn the frames of a clip into RGB pixels: by the file's colour matrix and range, upright, with square pixels, of
the size that is asked for."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .media import Refused, joined_sentence, turned
from .pictures import crop_box
from .words import short

#: Pixels of a clip's frame: twice those of 8K.
MOST_FRAME_PIXELS = 1 << 26
#: swscale's name of a colour matrix, by ffmpeg's number (ISO/IEC 23091-2): BT.709, FCC, BT.601 (625 and 525 lines),
#: SMPTE 240M, BT.2020.
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
#: Transfer functions of high dynamic range, by ffmpeg's number.
_HDR = {16: "PQ", 18: "HLG"}


class FramePixels:
    """Turns a clip's frames into RGB of the size that is asked for, or of the first of them."""

    def __init__(self, stream: Any, path: Path, size: tuple[int, int] | None):
        self._path, self._size = path, size
        aspect = stream.sample_aspect_ratio
        # Beyond that it is damage: anamorphic film has 2.
        self._aspect = Fraction(aspect) if aspect and Fraction(1, 4) <= aspect <= 4 else Fraction(1)
        self._graphs: dict[tuple, tuple] = {}
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what was changed, each once."""
        return tuple(self._notes)

    def check(self, frame: Any) -> None:
        """Refuse a frame that is larger than any camera's.

        Raises:
            ValueError: with its size.
        """
        if frame.width * frame.height > MOST_FRAME_PIXELS:
            raise Refused(
                f"{short(self._path, 400)} has frames of {frame.width}x{frame.height} pixels, more than is read "
                f"({MOST_FRAME_PIXELS / 1e6:.0f} million): scale it down first."
            )

    def pixels(self, frame: Any) -> np.ndarray:
        """Return a frame as uint8 ``[H, W, 3]``."""
        from PIL import Image

        trc = int(getattr(frame, "color_trc", 0) or 0)
        if trc in _HDR:
            self._notes[
                f"{short(self._path)} is of high dynamic range ({_HDR[trc]}), and its colours are taken as they are: "
                "they may look pale. Convert it to SDR first for right ones."
            ] = None
        pixels = self._rgb(frame)
        swap, mirror, flip = _display(frame)
        pixels = turned(pixels, swap, mirror, flip)
        aspect = 1 / self._aspect if swap else self._aspect
        height, width = pixels.shape[:2]
        is_first, size = self._size is None, self._size or (max(1, round(width * aspect)), height)
        self._size = size
        if (width, height) == size and aspect == 1:
            return np.ascontiguousarray(pixels)
        if not is_first:
            # Before it is scaled, whose filter would else see what is cut off.
            left, top, right, bottom = crop_box(width, height, size[0], size[1], float(aspect))
            pixels = pixels[top:bottom, left:right]
        return np.array(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.LANCZOS))

    def _rgb(self, frame: Any) -> np.ndarray:
        """Convert a frame to uint8 ``[H, W, 3]`` as it is stored, transparency joined with white."""
        clear = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
        tagged = _MATRICES.get(
            int(frame.colorspace), "bt709" if frame.height >= 720 or frame.width >= 1280 else "bt601"
        )
        full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
        key = (frame.width, frame.height, frame.format.name, tagged, full, clear)
        if key not in self._graphs:
            # A stream that changes from frame to frame keeps one.
            self._graphs = {key: _to_rgb(*key)}
        source, sink = self._graphs[key][1:]
        frame.pts = None
        source.push(frame)
        pixels = sink.pull().to_ndarray()
        if not clear:
            return pixels
        alpha = pixels[..., 3:].astype(np.uint16)
        if alpha.min() < 255:
            self._notes[joined_sentence(self._path)] = None
        return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _to_rgb(width: int, height: int, pix_fmt: str, matrix: str, full: bool, clear: bool) -> tuple[Any, Any, Any]:
    """Make a graph of filters that turns frames into rgb24 (rgba where they are clear in places), with its two ends.

    swscale's reformatting as PyAV calls it heeds matrix and range in some versions only, and is off by up to 2 of 255
    for 10 bits.
    """
    from av.filter import Graph

    graph = Graph()
    source = graph.add("buffer", f"video_size={width}x{height}:pix_fmt={pix_fmt}:time_base=1/1000:pixel_aspect=1/1")
    how = (
        "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp:"
        f"in_color_matrix={matrix}:in_range={'pc' if full else 'tv'}"
    )
    middle, colours, sink = (
        graph.add("scale", how),
        graph.add("format", "rgba" if clear else "rgb24"),
        graph.add("buffersink"),
    )
    source.link_to(middle)
    middle.link_to(colours)
    colours.link_to(sink)
    graph.configure()
    return graph, source, sink


def _display(frame: Any) -> tuple[bool, bool, bool]:
    """Read how a camera says that a frame is to be turned, as ``media.turned`` takes it: from its display matrix
    (ISO/IEC 14496-12, 6.2.2)."""
    try:
        matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
    except KeyError:
        return False, False, False
    if len(matrix) < 9:
        return False, False, False
    a, b, _, c, d = matrix[:5].tolist()
    # x' = a x + c y and y' = b x + d y: the larger of a row says which side it comes from, its sign in which direction.
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)
