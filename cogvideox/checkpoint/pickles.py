"""Torch checkpoints (SAT's ``.pt`` files): where each tensor lies in the file, told without unpickling anything.

``torch.save`` writes a zip archive of storages, and a pickle: a program that calls functions by their names to put
tensors together. Here the
program is followed on paper: a name stays a name, a call of torch's own functions becomes the place of a tensor, and a
name beside those that weights need ends the reading. So nothing is run, imported or allocated, whatever the file
claims.
"""

import pickletools
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ..words import listed, reason, short
from .headers import DTYPES, StoredTensor, opened, what_it_is

#: Where in such a file the weights are: DeepSpeed writes ``module``, Lightning ``state_dict``; the others are trainers'
#: of LoRAs.
_LEVELS = (
    "model",
    "module",
    "state_dict",
    "model_state_dict",
    "lora",
    "lora_state_dict",
    "lora_weights",
    "transformer",
    "weights",
    "network",
    "adapter",
)
#: Levels that are looked through.
_DEPTH = 4
#: Bytes of the archive's directory and of its pickle, and instructions in it: SAT's file of CogVideoX-5B has 0.1 and
#: 0.2 million, and 40,000.
_MAX_DIRECTORY, _MAX_PICKLE, _MOST_INSTRUCTIONS = 4 << 20, 16 << 20, 400_000

_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.storage.UntypedStorage": "uint8",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    **{f"torch.{name}Storage": name.lower() for name in ("QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4")},
}
#: torch's other functions that make tensors: what they make cannot be read in place.
_UNREADABLE = {
    f"torch._utils._rebuild_{name}": what
    for name, what in {
        "sparse_tensor": "sparse",
        "qtensor": "quantized by torch",
        "meta_tensor_no_storage": "without data (on the device meta)",
        "nested_tensor": "nested",
        "wrapper_subclass": "of a class of its own, as torchao makes them,",
        "device_tensor_from_numpy": "of another device",
        "device_tensor_from_cpu_tensor": "of another device",
    }.items()
}
#: What else stands beside weights: of torch, what ``weights_only=True`` allows; of numpy, what the states of random
#: numbers are made of that SAT's trainer saves (``sat/training/model_io.py``), by the module's names in numpy 1 and 2.
_INERT = {
    "torch.device",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    *(
        f"torch.per_{name}"
        for name in (
            "tensor_affine",
            "tensor_symmetric",
            "channel_affine",
            "channel_symmetric",
            "channel_affine_float_qparams",
        )
    ),
    "_codecs.encode",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")),
    "collections.Counter",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("_reconstruct", "scalar")),
}


def read_pickle_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a torch checkpoint: ``read_pickle`` without what lies beside them."""
    return read_pickle(path)[0]


def read_pickle(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors of a torch checkpoint, as places in the file, and what else is in it beside them (numbers, settings):
    its weights are not read, and nothing in it is run.

    Raises:
        ValueError: if it is not a torch checkpoint, is damaged, or would run code.
    """
    path = Path(path)
    archive, tensors, beside = _tensors(path)
    return {name: _placed(path, archive, name, value) for name, value in tensors.items()}, beside


def read_pickle_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a torch checkpoint, wherever their numbers lie.

    Raises:
        ValueError: if it is not a torch checkpoint, is damaged, or would run code.
    """
    found = {name: value.size for name, value in _tensors(Path(path))[1].items() if isinstance(value, _Tensor)}
    return {
        name: size
        for name, size in found.items()
        if isinstance(size, tuple) and all(type(length) is int for length in size)
    }


def _tensors(path: Path) -> "tuple[_Archive, dict[str, _Tensor | _Unreadable], dict[str, Any]]":
    """An archive, the tensors of its pickle that are the weights, by their names, and what lies beside them."""
    with opened(path) as (file, size):
        try:
            archive = _open_archive(file, size)
            state = _follow(archive.pickle)
        except _Foreign as error:
            raise ValueError(
                f"{short(path, 400)} holds more than tensors ({error}), and opening that could run code on your "
                "computer, so it was not opened. Get the weights from the authors, or as safetensors."
            ) from error
        except _Damaged as error:
            raise ValueError(
                f"{short(path, 400)} ({size:,} bytes) is not a readable torch checkpoint: {error}. No weights can be "
                "taken from it. If the download was interrupted, delete it and download it again."
            ) from error
    tensors, beside = _weights(state)
    unnamed = [name for name in tensors if not isinstance(name, str)]
    if unnamed:
        raise ValueError(
            f"{short(path, 400)} has tensors under {listed(unnamed)}, and weights have names, so it is not known what "
            "they are. Save them under the names of the model they belong to."
        )
    return archive, tensors, beside


def _weights(state: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The tensors of a state by name, wherever trainers put them, and what lies beside them on the way there."""
    beside: dict[str, Any] = {}
    for _ in range(_DEPTH):
        inner = _level_below(state) if isinstance(state, dict) else None
        if inner is None:
            break
        beside |= {
            key: value
            for key, value in state.items()
            if isinstance(key, str) and value is not inner and not _is_tensor(value)
        }
        state = inner
    if not isinstance(state, dict):
        return {}, beside
    beside |= {key: value for key, value in state.items() if isinstance(key, str) and not _is_tensor(value)}
    return {name: value for name, value in state.items() if _is_tensor(value)}, beside


def _level_below(state: dict) -> dict | None:
    """Where the weights are that are not on this level: under one of the usual names, or under the only one that holds
    tensors."""
    for level in _LEVELS:
        if isinstance(state.get(level), dict):
            return state[level]
    if any(map(_is_tensor, state.values())):
        return None
    below = [value for name, value in state.items() if isinstance(name, str) and _holds_tensors(value)]
    return below[0] if len(below) == 1 else None


def _holds_tensors(value: Any) -> bool:
    """Whether a level, or one below it, has tensors with names. Each is looked at once: they may hold each other."""
    level, seen = [value], {id(value)}
    for _ in range(_DEPTH - 1):
        named = [
            inner
            for outer in level
            if isinstance(outer, dict)
            for name, inner in outer.items()
            if isinstance(name, str)
        ]
        if any(map(_is_tensor, named)):
            return True
        level = list(
            {id(inner): inner for inner in named if isinstance(inner, dict) and id(inner) not in seen}.values()
        )
        seen |= set(map(id, level))
    return False


def _is_tensor(value: Any) -> bool:
    return isinstance(value, _Tensor | _Unreadable)


class _Damaged(Exception):
    """What is wrong with a file."""


class _Foreign(Exception):
    """The name that a pickle asks for, of what does not belong beside weights."""


# --- The archive ---


@dataclass(frozen=True)
class _Archive:
    """Its pickle, and where the storages lie in the file: (offset, bytes) by their names."""

    pickle: bytes
    storages: dict[str, tuple[int, int]]


class _Bounded:
    """A file as zipfile reads it, which would read a directory of any size."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, count: int = -1) -> bytes:
        if count > _MAX_DIRECTORY:
            raise _Damaged(f"the directory of the archive would take {count:,} bytes, which no checkpoint's does")
        return self._read(_MAX_DIRECTORY if count < 0 else count)


def _open_archive(file: BinaryIO, size: int) -> _Archive:
    head = file.read(512)
    if not head.startswith(b"PK\x03\x04"):
        raise _Damaged(what_it_is(head) or "it is no archive as torch.save has written them since version 1.6")
    try:
        with zipfile.ZipFile(_Bounded(file)) as directory:
            infos = directory.infolist()
    except (_Damaged, OSError):
        raise
    except Exception as error:
        # zipfile knows BadZipFile; damaged numbers bring struct.error, NotImplementedError, UnicodeDecodeError and
        # others out of it.
        raise _Damaged(f"the archive is truncated or damaged ({reason(error)})") from error
    names = {info.filename: info for info in infos}
    if len(names) < len(infos):
        raise _Damaged("two records of the archive have one name")
    pickles = [name for name in names if name.split("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise _Damaged(
            f"the archive holds {len(pickles) or 'no'} data.pkl, and one that torch.save has written has one"
        )
    root = pickles[0].removesuffix("data.pkl")
    wanted = [name for name in names if name.startswith(f"{root}data/") or name in (pickles[0], f"{root}byteorder")]
    places = {name: _place(file, size, names[name]) for name in wanted}
    end = 0
    for name, (offset, count) in sorted(places.items(), key=lambda item: item[1]):
        if offset < end:
            raise _Damaged(f"{short(name)} and the record before it share bytes")
        end = offset + count
    if _read(file, names.get(f"{root}byteorder"), places) not in (b"", b"little"):
        raise _Damaged("it was written on a machine of another byte order (big-endian)")
    content = _read(file, names[pickles[0]], places)
    return _Archive(
        content,
        {name.removeprefix(f"{root}data/"): place for name, place in places.items() if name.startswith(f"{root}data/")},
    )


def _place(file: BinaryIO, size: int, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a record's bytes lie: (offset, bytes). torch stores them as they are."""
    if info.flag_bits & 1:
        raise _Damaged("the archive is locked with a password: unpack it, and pack nothing")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _Damaged(
            "the archive was packed again, with compression, and torch.save uses none: unpack it, and load and save "
            "it with torch"
        )
    file.seek(info.header_offset)
    local = file.read(30)
    begin = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if local[:4] != b"PK\x03\x04" or begin + info.file_size > size:
        raise _Damaged(f"the archive is truncated or damaged: {short(info.filename)} is not where its directory says")
    return begin, info.file_size


def _read(file: BinaryIO, info: zipfile.ZipInfo | None, places: dict[str, tuple[int, int]]) -> bytes:
    """A small record; nothing, if there is none."""
    if info is None:
        return b""
    offset, count = places[info.filename]
    if count > _MAX_PICKLE:
        raise _Damaged(
            f"{short(info.filename)} would take {count:,} bytes, and what it says of weights takes at most "
            f"{_MAX_PICKLE:,}"
        )
    file.seek(offset)
    content = file.read(count)
    if zlib.crc32(content) != info.CRC:
        raise _Damaged(f"{short(info.filename)} is damaged: its checksum is another")
    return content


# --- The pickle ---


class _Name(NamedTuple):
    """A function or class that a pickle names."""

    path: str


class _Storage(NamedTuple):
    key: Any
    dtype: str
    count: Any


class _Tensor(NamedTuple):
    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: str


class _Unreadable(NamedTuple):
    """A tensor that does not lie in the file as its numbers, and what it is instead."""

    what: str


class _Inert:
    """What a call would make that is no tensor."""


#: Instructions whose argument is the value.
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *(
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "BINSTRING",
        "SHORT_BINSTRING",
    ),
}


def _follow(pickle: bytes) -> Any:
    """What a pickle makes, with names for functions and places for tensors."""
    try:
        return _Program().follow(pickle)
    except (_Damaged, _Foreign):
        raise
    except Exception as error:
        # Instructions that make no sense bring whatever Python has for them; none of them does anything but move what
        # is in lists.
        raise _Damaged(f"its list of tensors is damaged ({reason(error)})") from error


class _Program:
    """The stack of a pickle's instructions."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def follow(self, pickle: bytes) -> Any:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(pickle)):
            if number > _MOST_INSTRUCTIONS:
                raise _Damaged(
                    f"its list of tensors has more than {_MOST_INSTRUCTIONS:,} instructions, which no checkpoint's has"
                )
            self.step(instruction.name, argument)
        return self.stack[-1]

    def step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in _FRAME:
            raise _Damaged(f"its list of tensors has the instruction {name}, which torch.save does not write")

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def make(self, count: int) -> None:
        """Replace the last values by the tuple of them."""
        self.stack.append(tuple(self.pop(len(self.stack) - count)))

    def name(self) -> None:
        """Replace a module and a name in it by what they name."""
        module, inner = self.pop(len(self.stack) - 2)
        self.stack.append(_named(f"{module}.{inner}"))

    def call(self) -> None:
        """Replace a function and its arguments by what the call would make."""
        function, arguments = self.pop(len(self.stack) - 2)
        self.stack.append(_call(function, arguments))

    def pop(self, start: int) -> list[Any]:
        """Take off the stack what lies from ``start`` on."""
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError("nothing is left on the stack")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def marked(self) -> list[Any]:
        return self.pop(self.marks.pop())

    def set_items(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            _put(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)


#: What each instruction does. Nothing else is done, whatever a pickle says.
_STEPS: Mapping[str, Callable[[_Program, Any], Any]] = {
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Program.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda program, place: program.stack.append(program.memo[place])),
    "MEMOIZE": lambda program, _: program.remember(len(program.memo)),
    "MARK": lambda program, _: program.marks.append(len(program.stack)),
    "TUPLE": lambda program, _: program.stack.append(tuple(program.marked())),
    "TUPLE1": lambda program, _: program.make(1),
    "TUPLE2": lambda program, _: program.make(2),
    "TUPLE3": lambda program, _: program.make(3),
    "NONE": lambda program, _: program.stack.append(None),
    "NEWTRUE": lambda program, _: program.stack.append(True),
    "NEWFALSE": lambda program, _: program.stack.append(False),
    "EMPTY_DICT": lambda program, _: program.stack.append({}),
    "EMPTY_LIST": lambda program, _: program.stack.append([]),
    "EMPTY_TUPLE": lambda program, _: program.stack.append(()),
    "EMPTY_SET": lambda program, _: program.stack.append(_Inert()),
    "GLOBAL": lambda program, path: program.stack.append(_named(path.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda program, _: program.name(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda program, _: program.call()),
    "BINPERSID": lambda program, _: program.stack.append(_storage(program.stack.pop())),
    "SETITEM": lambda program, _: program.set_items(program.pop(len(program.stack) - 2)),
    "SETITEMS": lambda program, _: program.set_items(program.marked()),
    "APPEND": lambda program, _: program.append(program.pop(len(program.stack) - 1)),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda program, _: program.append(program.marked())),
    # The state of an OrderedDict (its _metadata) or of what is no tensor.
    "BUILD": lambda program, _: program.stack.pop(),
    "POP": lambda program, _: program.stack.pop(),
}
#: Instructions that only frame the others.
_FRAME = ("PROTO", "FRAME", "STOP")


def _put(target: dict, pairs: Any) -> None:
    for key, value in pairs:
        # Tuples in tuples could be hashed until the process ends.
        target[key if key is None or type(key) in (str, int, float, bool, bytes) else _Inert()] = value


def _named(path: str) -> _Name:
    if not any(path in known for known in (_CALLS, _STORAGES, _INERT, _UNREADABLE, _DTYPE_NAMES)):
        raise _Foreign(short(path))
    return _Name(path)


def _storage(saved: Any) -> _Storage:
    kind, cls, key, _, count, *_ = saved
    if kind != "storage" or not isinstance(cls, _Name) or cls.path not in _STORAGES:
        raise _Damaged(f"it refers to a {short(kind)} beside storages")
    return _Storage(key, _STORAGES[cls.path], count)


def _call(function: Any, arguments: Any) -> Any:
    path = function.path if isinstance(function, _Name) else ""
    if path in _UNREADABLE:
        return _Unreadable(_UNREADABLE[path])
    return _CALLS[path](*arguments) if path in _CALLS else _Inert()


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Any:
    # Conjugate or negative numbers are stored as they are not.
    return _Unreadable("conjugate or negative") if metadata else _Tensor(storage, offset, size, stride, storage.dtype)


def _tensor_of(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    tensor = _tensor(storage, offset, size, stride, metadata=metadata)
    return tensor._replace(dtype=dtype.path.removeprefix("torch.")) if isinstance(tensor, _Tensor) else tensor


def _ordered(pairs: Any = ()) -> dict:
    made: dict = {}
    _put(made, pairs)
    return made


_CALLS: dict[str, Callable[..., Any]] = {
    "torch.Size": lambda sizes=(): tuple(sizes),
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    # Of a tensor with attributes, as model-parallel trainers give them.
    "torch._tensor._rebuild_from_type_v2": lambda function, cls, arguments, state: _call(function, arguments),
}


def _placed(path: Path, archive: _Archive, name: str, value: _Tensor | _Unreadable) -> StoredTensor:
    """The place in the file of a tensor, which must lie there in one piece.

    Raises:
        ValueError: if it does not, or what is said of it does not fit its storage.
    """
    if isinstance(value, _Unreadable):
        raise _unreadable(path, name, f"is {value.what} and does not lie in the file as plain numbers")
    storage, offset, size, stride, kind = value
    dtype, stored = _DTYPES.get(kind), _DTYPES.get(storage.dtype)
    if dtype is None or stored is None:
        raise _unreadable(path, name, f"is stored as {short(kind)}, which no weight of CogVideoX is")
    begin, nbytes = archive.storages.get(storage.key, (0, -1)) if isinstance(storage.key, str) else (0, -1)
    if nbytes < 0:
        raise _unreadable(path, name, f"should lie in the record data/{short(storage.key)}, which is not there")
    sizes = tuple(size) if isinstance(size, tuple) else (None,)
    numbers = (offset, storage.count, *sizes)
    if (
        any(type(number) is not int or number < 0 for number in numbers)
        or len(sizes) > 64
        or not isinstance(stride, tuple)
        or len(stride) != len(sizes)
    ):
        raise _unreadable(
            path,
            name,
            f"cannot have the shape {short(size)} and the strides {short(stride)} in {short(storage.count)} numbers",
        )
    count = prod(sizes)
    if storage.count * stored.itemsize != nbytes or (offset + count) * dtype.itemsize > nbytes:
        raise _unreadable(path, name, f"of shape {short(list(sizes))} cannot lie in {nbytes:,} bytes")
    step = 1
    for length, jump in zip(reversed(sizes), reversed(stride), strict=True):
        if count and length != 1 and jump != step:
            raise _unreadable(path, name, "does not lie in one piece")
        step *= length
    return StoredTensor(path, dtype, sizes, begin + offset * dtype.itemsize, count * dtype.itemsize)


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_DTYPE_NAMES = {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _unreadable(path: Path, name: str, why: str) -> ValueError:
    return ValueError(
        f"{short(path, 400)}: {short(name)} {why}, so it cannot be read in place. Save it again with torch.save, or "
        "use safetensors."
    )
