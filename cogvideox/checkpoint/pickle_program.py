"""A pickle followed on paper: what its instructions would make, with nothing run, imported or allocated.

A pickle is a program that calls functions by their names to put tensors together. Here a name stays a name, a call of
torch's own functions becomes the place of a tensor, and a name beside those that weights need ends the reading.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..words import reason, short
from .archive import Damaged

#: Instructions in the pickle: SAT's file of CogVideoX-5B has 40,000.
_MOST_INSTRUCTIONS = 400_000

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
#: The names of torch's dtypes.
_DTYPE_NAMES = {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Foreign(Exception):
    """The name that a pickle asks for, of what does not belong beside weights."""


class _Name(NamedTuple):
    """A function or class that a pickle names."""

    path: str


class _Storage(NamedTuple):
    key: Any
    dtype: str
    count: Any


class Tensor(NamedTuple):
    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: str


class Unreadable(NamedTuple):
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


def follow(pickle: bytes) -> Any:
    """What a pickle makes, with names for functions and places for tensors."""
    try:
        return _Program().follow(pickle)
    except (Damaged, Foreign):
        raise
    except Exception as error:
        # Instructions that make no sense bring whatever Python has for them; none of them does anything but move what
        # is in lists.
        raise Damaged(f"its list of tensors is damaged ({reason(error)})") from error


class _Program:
    """The stack of a pickle's instructions."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def follow(self, pickle: bytes) -> Any:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(pickle)):
            if number > _MOST_INSTRUCTIONS:
                raise Damaged(
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
            raise Damaged(f"its list of tensors has the instruction {name}, which torch.save does not write")

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
        raise Foreign(short(path))
    return _Name(path)


def _storage(saved: Any) -> _Storage:
    kind, cls, key, _, count, *_ = saved
    if kind != "storage" or not isinstance(cls, _Name) or cls.path not in _STORAGES:
        raise Damaged(f"it refers to a {short(kind)} beside storages")
    return _Storage(key, _STORAGES[cls.path], count)


def _call(function: Any, arguments: Any) -> Any:
    path = function.path if isinstance(function, _Name) else ""
    if path in _UNREADABLE:
        return Unreadable(_UNREADABLE[path])
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
    return Unreadable("conjugate or negative") if metadata else Tensor(storage, offset, size, stride, storage.dtype)


def _tensor_of(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    tensor = _tensor(storage, offset, size, stride, metadata=metadata)
    return tensor._replace(dtype=dtype.path.removeprefix("torch.")) if isinstance(tensor, Tensor) else tensor


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
