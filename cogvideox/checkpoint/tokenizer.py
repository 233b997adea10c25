"""T5's tokenizer as it lies on disk: whether it is whole, and whether its tokens are those of the text encoder's table.
Nothing is built for it.

``spiece.model`` is SentencePiece's ``ModelProto`` (https://github.com/google/sentencepiece,
src/sentencepiece_model.proto) in protobuf's wire format: pieces are field 1 (in each: the text 1, the score 2), the
trainer's settings field 2 (in them: the kind of model 3), the normalizer's field 3.
"""

import hashlib
import math
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..files import read_bytes, read_json
from ..words import short

#: The largest that is known, UMT5's, has 4.5 MB.
_MAX_BYTES = 32 << 20
#: Of T5's own, which every CogVideoX repository has: its size, its SHA-256 and its number of pieces.
_T5_BYTES, _T5_SHA256, _T5_PIECES = 791_656, "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86", 32_000
#: The first pieces of T5's vocabulary: padding, end, unknown.
SPECIAL = ("<pad>", "</s>", "<unk>")
_UNIGRAM = 1
_VARINT, _EIGHT_BYTES, _TEXT, _FOUR_BYTES = 0, 1, 2, 5


def has_tokenizer(folder: Path) -> bool:
    """Whether T5's tokenizer lies in a folder, as SentencePiece or in the format of tokenizers."""
    return bool(tokenizer_files(folder))


def check_tokenizer(folder: Path, rows: int | None = None) -> None:
    """Refuse a tokenizer that is damaged, or another model's.

    Args:
        folder: where ``spiece.model``, ``tokenizer.json`` or both lie.
        rows: of the text encoder's table of tokens, where that is known.

    Raises:
        ValueError: naming the file.
    """
    for file in tokenizer_files(folder):
        state = file.stat()
        count = _count_pieces(file, state.st_size, state.st_mtime_ns)
        if rows is not None and count > rows:
            raise wrong_tokenizer(
                file, f"has {count:,} tokens, and the text encoder's table has {rows:,} rows: it is another model's"
            )


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files that T5's tokenizer is read from."""
    return [file for name in ("spiece.model", "tokenizer.json") if (file := folder / name).is_file()]


def wrong_tokenizer(file: Path, what: str) -> ValueError:
    """The error for a tokenizer that cannot be used; ``what`` is wrong with it."""
    return ValueError(
        f"{short(file, 400)} {what}. Prompts would not become the tokens that T5 was trained with. Download "
        f"tokenizer/spiece.model of a CogVideoX repository again (it has {_T5_BYTES:,} bytes); it is enough alone."
    )


@lru_cache(maxsize=16)
def _count_pieces(file: Path, size: int, changed: int) -> int:
    """The number of tokens in a whole vocabulary of T5's kind; the file's size and time are what a result is kept
    for."""
    return _count_json(file) if file.suffix == ".json" else _count_sentencepiece(file)


def _count_sentencepiece(file: Path) -> int:
    data = read_bytes(file, _MAX_BYTES)
    if len(data) == _T5_BYTES:
        if hashlib.sha256(data).hexdigest() == _T5_SHA256:
            return _T5_PIECES
        raise wrong_tokenizer(file, "has the size of T5's own and other bytes, so it is damaged")
    if not data:
        raise wrong_tokenizer(file, "is empty, as an interrupted download leaves it")
    if data.startswith(b"version https://git-lfs"):
        raise wrong_tokenizer(file, "is a Git LFS pointer, the note of where the file is, and not the file")
    try:
        pieces, kind = _read_model(data)
    except (ValueError, IndexError, struct.error) as error:
        raise wrong_tokenizer(file, f"({len(data):,} bytes) is no whole SentencePiece model: {error}") from error
    if kind != _UNIGRAM or tuple(pieces[: len(SPECIAL)]) != SPECIAL:
        raise wrong_tokenizer(
            file, f"is another model's: T5's is a unigram model that begins with {', '.join(SPECIAL)}"
        )
    return len(pieces)


def _read_model(data: bytes) -> tuple[list[str], int]:
    """The pieces of a SentencePiece model in their order, and its kind.

    Raises:
        ValueError, IndexError, struct.error: if it is damaged.
    """
    pieces: list[str] = []
    kind, seen = _UNIGRAM, set()
    for number, wire, start, end in _fields(data, 0, len(data)):
        seen.add(number)
        if number == 1 and wire == _TEXT:
            text, score = "", 0.0
            for inner, _, first, last in _fields(data, start, end):
                if inner == 1:
                    text = data[first:last].decode("utf-8")
                elif inner == 2:
                    (score,) = struct.unpack("<f", data[first:last])
            if not text or not math.isfinite(score):
                raise ValueError(f"piece {len(pieces)} is broken")
            pieces.append(text)
        elif number == 2 and wire == _TEXT:
            kind = next(
                (_varint(data, first)[0] for inner, _, first, _ in _fields(data, start, end) if inner == 3), kind
            )
    if not {1, 2, 3} <= seen:
        raise ValueError("it ends before its settings")
    if len(set(pieces)) < len(pieces):
        raise ValueError("pieces are there twice")
    return pieces, kind


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message between two offsets: number, kind on the wire, and where the value begins and ends."""
    while at < end:
        key, start = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _TEXT:
            size, start = _varint(data, start)
            at = start + size
        elif wire == _VARINT:
            at = _varint(data, start)[1]
        elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
            at = start + (4 if wire == _FOUR_BYTES else 8)
        else:
            raise ValueError(f"byte {start - 1:,} begins nothing")
        if at > end or not number:
            raise ValueError(f"it breaks off at byte {start:,}")
        yield number, wire, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of at most ten bytes, and where it ends."""
    value = 0
    for place in range(10):
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError(f"the number at byte {at:,} does not end")


def _count_json(file: Path) -> int:
    model = read_json(file).get("model")
    if not isinstance(model, dict) or model.get("type") != "Unigram" or not isinstance(model.get("vocab"), list):
        kind = short(model.get("type")) if isinstance(model, dict) else "none"
        raise wrong_tokenizer(file, f"is another model's: it holds a model of the kind {kind}, and T5's is Unigram")
    vocabulary = model["vocab"]
    right = (
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and _is_finite(entry[1])
        for entry in vocabulary
    )
    if not all(right):
        raise wrong_tokenizer(file, "is damaged: its vocabulary should be texts, each with a number")
    if tuple(text for text, _ in vocabulary[: len(SPECIAL)]) != SPECIAL or len(vocabulary) == len(SPECIAL):
        raise wrong_tokenizer(file, f"is another model's, or damaged: T5's vocabulary begins with {', '.join(SPECIAL)}")
    return len(vocabulary)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf
