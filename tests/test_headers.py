"""Safetensors headers are read as strictly as the library reads them, and a file that is something else is called what
it is."""

import copy
import gzip
import json
import os
import random
import struct
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cogvideox.checkpoint.foreign import ForeignError
from cogvideox.checkpoint.headers import DTYPES, read_header, read_metadata
from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.checkpoint.reading import read_any_header
from tests import layouts
from tests.tiny_checkpoint import build_transformer

GOOD = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [0, 12]},
    "a": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    "none": {"dtype": "F16", "shape": [0, 5], "data_offsets": [16, 16]},
    "c": {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]},
}


def written(file, header, data=bytes(20)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def ours(file):
    try:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in read_header(file).items()}
    except ValueError:
        return None


def theirs(file):
    try:
        with safe_open(file, "pt") as opened:
            return {
                name: (tuple(opened.get_slice(name).get_shape()), DTYPES[opened.get_slice(name).get_dtype()])
                for name in opened.keys()
            }
    except Exception:
        return None


def mutated(rng):
    """A header with one or two of its values replaced, moved, dropped or doubled, and data that may be of another
    length."""
    header = copy.deepcopy(GOOD)
    for _ in range(rng.choice((1, 1, 2))):
        entry = header[
            rng.choice([name for name in header if name != "__metadata__" and isinstance(header[name], dict)])
        ]
        odd = rng.choice(
            (
                -1,
                0,
                1,
                3,
                4,
                16,
                20,
                2**40,
                2**62,
                2**63,
                2**64,
                1e300,
                4.0,
                True,
                None,
                "4",
                [],
                {},
                "F32",
                "F8_E8M0",
                "\ud800",
            )
        )
        change = rng.randrange(6)
        if change == 0:
            entry[rng.choice(("dtype", "shape", "data_offsets"))] = odd
        elif change == 1 and isinstance(entry.get("shape"), list):
            entry["shape"].insert(0, odd)
        elif change == 2 and isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2:
            entry["data_offsets"][rng.randrange(2)] = odd
        elif change == 3:
            entry.pop(rng.choice(("dtype", "shape", "data_offsets")), None)
        elif change == 4:
            header["__metadata__"] = rng.choice(({"a": odd}, odd, {"a": "b"}))
        else:
            header["more"] = rng.choice(
                (copy.deepcopy(GOOD["c"]), {"dtype": "U8", "shape": [1], "data_offsets": [20, 21]}, odd)
            )
    return header, bytes(rng.choice((20, 20, 20, 21, 19, 0)))


def test_what_the_library_refuses_is_refused_and_what_is_read_is_what_it_reads(tmp_path):
    rng, read = random.Random(20), 0
    for _ in range(600):
        file = written(tmp_path / "x.safetensors", *mutated(rng))
        mine = ours(file)
        if mine is not None:
            assert mine == theirs(file)
            read += 1
    assert 10 < read < 400
    assert ours(written(tmp_path / "x.safetensors", GOOD)) == theirs(tmp_path / "x.safetensors") != None  # noqa: E711


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
        b'{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\0',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"dtype":"F32"}}',
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[9223372036854775808,2,0],"data_offsets":[0,0]}}',
    ],
)
def test_texts_that_python_would_read_and_the_library_refuses(tmp_path, text):
    file = written(tmp_path / "x.safetensors", text, bytes(4 if b"[0,0]" not in text else 0))
    assert theirs(file) is None
    assert ours(file) is None


def test_a_tensor_that_is_there_twice_is_not_the_one_that_comes_last(tmp_path):
    text = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}'
    with pytest.raises(ValueError, match="a stands in it twice"):
        read_header(written(tmp_path / "x.safetensors", text, bytes(4)))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' + b"[" * 3_000_000,
        b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"9999999999," * 400_000 + b"0]}}",
    ],
)
def test_a_header_that_would_take_hours_or_all_memory_is_refused_at_once(tmp_path, text):
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        read_header(written(tmp_path / "x.safetensors", text))


def test_a_dtype_that_is_unknown_is_named(tmp_path):
    for name in ("F2", "U16", "C64"):
        header = {"scale": {"dtype": name, "shape": [8], "data_offsets": [0, 8]}}
        with pytest.raises(ValueError, match=f"scale is stored as {name}, which is unknown here; known are F64, F32"):
            read_header(written(tmp_path / "x.safetensors", header, bytes(8)))


@pytest.mark.parametrize(
    ("name", "program"), [("F8_E8M0", "MXFP8"), ("F4", "NVFP4"), ("F6_E2M3", "MXFP6"), ("F8_E4M3FNUZ", "AMD")]
)
def test_a_dtype_of_packed_weights_is_no_damage(tmp_path, name, program):
    header = {"scale": {"dtype": name, "shape": [8], "data_offsets": [0, 8]}}
    with pytest.raises(ForeignError, match=rf"is packed by .*{program}.* \(scale is stored as {name}\)"):
        read_header(written(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_download_of_any_kind_that_is_not_finished_is_told(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    (tmp_path / "x.gguf").write_bytes(bytes(100))
    written(tmp_path / "x.safetensors", GOOD, bytes(20))
    for ending in ("pt", "gguf", "safetensors"):
        (tmp_path / f"x.{ending}.aria2").touch()
        with pytest.raises(ValueError, match="its download is not finished.*Resume the download"):
            read_any_header(tmp_path / f"x.{ending}")


def test_a_file_that_is_longer_than_its_header_says(tmp_path):
    with pytest.raises(ValueError, match="goes on for 5 bytes after the last tensor"):
        read_header(written(tmp_path / "x.safetensors", GOOD, bytes(25)))


def test_notes_that_are_no_texts_are_refused_where_they_are_read(tmp_path):
    assert read_metadata(written(tmp_path / "x.safetensors", GOOD)) == {"format": "pt"}
    with pytest.raises(ValueError, match="__metadata__ are not texts by name"):
        read_metadata(written(tmp_path / "x.safetensors", GOOD | {"__metadata__": {"alpha": 4}}))


def other_files(folder):
    """What lies where weights are expected, and the words for it."""
    torch.save({"a": torch.ones(3)}, folder / "zip")
    torch.save({"a": torch.ones(3)}, folder / "old", _use_new_zipfile_serialization=False)
    layouts.write_gguf(folder / "gguf", {"a": torch.ones(3)}, "Q8_0")
    save_file({"a": torch.ones(3)}, folder / "safetensors")
    with zipfile.ZipFile(folder / "packed", "w") as archive:
        archive.write(folder / "safetensors", "model.safetensors")
    contents = {
        "is empty": b"",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "a web page": b"<!DOCTYPE html><html><body>Log in to download</body></html>",
        "nothing but zeros": bytes(4096),
        "text in JSON": b'{"error": "Access to this model is restricted"}',
        "packed with gzip": gzip.compress(b"x" * 99),
        "a zip archive": (folder / "zip").read_bytes(),
        "a Python pickle": (folder / "old").read_bytes(),
        "a GGUF file": (folder / "gguf").read_bytes(),
        "a safetensors file": (folder / "safetensors").read_bytes(),
    }
    return contents | {"data.pkl": (folder / "packed").read_bytes()}


@pytest.mark.parametrize(
    ("ending", "own"),
    [
        (".safetensors", ("a safetensors file", "data.pkl")),
        (".gguf", ("a GGUF file", "data.pkl")),
        (".pt", ("a zip archive",)),
    ],
)
def test_another_thing_than_weights_is_called_what_it_is(tmp_path, ending, own):
    for what, content in other_files(tmp_path).items():
        file = tmp_path / f"x{ending}"
        file.write_bytes(content)
        if what not in own:
            with pytest.raises(ValueError, match="is not a readable") as caught:
                open_checkpoint(file)
            assert what in str(caught.value), what


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no devices on this system")
def test_a_device_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").symlink_to("/dev/zero")
    for place in ("/dev/null", tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match="no regular file"):
            open_checkpoint(place)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.bool, torch.int64])
def test_integers_are_no_weights(tmp_path, dtype):
    state = {
        name: value.to(dtype) if name == "proj_out.bias" else value
        for name, value in build_transformer().state_dict().items()
    }
    with pytest.raises(
        ValueError,
        match=f"1 of 64 weights of the transformer as {str(dtype)[6:]} \\(proj_out.bias\\), and floating-point numbers",
    ):
        open_checkpoint(layouts.write_file(tmp_path / "x.safetensors", state))
