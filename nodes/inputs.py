"""Checks of what comes in at a node's sockets and widgets against what the node declares, before the node is run.

ComfyUI compares the names of the types that are connected, and nothing checks what a script or another pack's node
really hands over.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from ..cogvideox.handles import VAE, Model, TextEncoder
from ..cogvideox.tensors import check_tensor, tensor_text
from ..cogvideox.words import listed, short

#: Letters of a text at most. A prompt of about 1000 is all that the model reads.
_LONGEST_TEXT = 100_000
_LOADER = "CogVideoX-1.5 Model Loader"
_HANDLES = {
    Model: "transformer (COGVIDEOX_MODEL)",
    TextEncoder: "text encoder (COGVIDEOX_TEXT_ENCODER)",
    VAE: "video VAE (COGVIDEOX_VAE)",
}
#: Sockets of ComfyUI's own models, by the names of the models' classes.
_CORE = {
    "ModelPatcher": "MODEL",
    "CLIP": "CLIP",
    "VAE": "VAE",
    "ControlBase": "CONTROL_NET",
    "ClipVisionModel": "CLIP_VISION",
}
#: By type of a socket or widget: what belongs there, and what to do if something else comes in.
_WANTED = {
    "COGVIDEOX_MODEL": ("a transformer (COGVIDEOX_MODEL)", f"Connect the model of {_LOADER}, or of a node behind it."),
    "COGVIDEOX_TEXT_ENCODER": ("a text encoder (COGVIDEOX_TEXT_ENCODER)", f"Connect the text_encoder of {_LOADER}."),
    "COGVIDEOX_TEXT_ENCODER,CLIP": (
        "a text encoder (COGVIDEOX_TEXT_ENCODER or CLIP)",
        f"Connect the text_encoder of {_LOADER}, or a T5-XXL of CLIPLoader; CogVideoX-1.5 Quantize gives one only if "
        "its own is connected.",
    ),
    "COGVIDEOX_VAE": ("a video VAE (COGVIDEOX_VAE)", f"Connect the vae of {_LOADER}."),
    "COGVIDEOX_VAE,VAE": (
        "a video VAE (COGVIDEOX_VAE or VAE)",
        f"Connect the vae of {_LOADER}, or CogVideoX's VAE of Load VAE.",
    ),
    "MODEL": ("a MODEL", "Connect the MODEL of a loader of ComfyUI's, such as Load Diffusion Model."),
    "LATENT": (
        "a video latent (LATENT)",
        "Connect Empty CogVideoX-1.5 Latent, or another node that gives CogVideoX's latents.",
    ),
    "CONDITIONING": ("a CONDITIONING", "Connect CogVideoX-1.5 Text Encode."),
    "IMAGE": ("an IMAGE", "Connect an IMAGE, such as of Load Image or CogVideoX-1.5 VAE Decode."),
    "MASK": ("a MASK", "Connect a MASK, such as of Load Image or Convert Image to Mask."),
    "IMAGE,MASK": ("an IMAGE or a MASK", "Connect the frames of a mask's video, such as of Get Video Components."),
    "INT": ("a whole number", "Type one in, or connect one."),
    "FLOAT": ("a number", "Type one in, or connect one."),
    "STRING": ("a text", "Type it in, or connect one."),
    "BOOLEAN": ("a switch, on or off (true or false)", "Switch it, or connect a BOOLEAN."),
    "COMBO": ("one of its choices", "Choose one."),
}


class Declares(Protocol):
    """What is read of a node's class."""

    DISPLAY_NAME: ClassVar[str]
    INPUT_TYPES: ClassVar[Callable[[], dict[str, dict[str, tuple]]]]
    execute: ClassVar[Callable[..., Any]]
    #: The widget that is marked where the node cannot run as it stands in a graph; without one that of the loader its
    #: model comes from.
    FIELD: ClassVar[str]
    #: The engine's checks of the widgets, which are its parameters: each a tuple of the widget to be marked, a function
    #: that raises ValueError, and its arguments.
    checks: ClassVar[Callable[..., list[tuple]]]
    #: Given the inputs of ``execute``, or ``queued.UNKNOWN`` for what only the run knows: what it will give, without
    #: reading a weight; None where only the run can say. ValueError for what cannot run.
    foresee: ClassVar[Callable[..., tuple | None]]

    @classmethod
    def objections(cls, given: dict[str, Any]) -> dict[str, str]: ...


class OfField(ValueError):
    """A sentence about one input of a node.

    Attributes:
        field: its name. Of one that another node gives, that node is marked, at its widget that stands behind a point
            (``latent_image.length``), if it has that.
    """

    def __init__(self, said: str, field: str):
        super().__init__(said)
        self.field = field


@contextmanager
def of_field(field: str) -> Iterator[None]:
    """Have what is refused in a ``with`` block be about one input of the node."""
    try:
        yield
    except ValueError as error:
        raise OfField(str(error), field) from error


class _Odd(Exception):
    """Raised for a value that does not belong: ``flaw`` ends a sentence that begins with the socket's name, and
    ``remedy`` is what to do, if that is not the usual for the type."""

    def __init__(self, flaw: str, remedy: str | None = None):
        super().__init__(flaw)
        self.flaw, self.remedy = flaw, remedy


def checked(node: type[Declares], given: dict[str, Any]) -> dict[str, Any]:
    """Make the arguments of a node's ``execute`` from what the node was given.

    Numbers come out as Python's, whichever library they came from, and tensors detached from autograd. What is optional
    and None is left out.

    Raises:
        ValueError: naming the node, the socket, what came, what is wanted and what to connect.
    """
    types = node.INPUT_TYPES()
    required, optional, hidden = (types.get(part, {}) for part in ("required", "optional", "hidden"))
    declared, defaults = {**required, **optional}, inspect.signature(node.execute).parameters
    unknown = [name for name in given if name not in declared and name not in hidden]
    if unknown:
        raise ValueError(
            f"{node.DISPLAY_NAME} has no input called {listed(unknown)}, so what is connected there would have no "
            f"effect. It has {', '.join(declared)}: take the other away, or update the pack if the workflow is newer."
        )
    found = {name: given[name] for name in hidden if name in given}
    for name, spec in declared.items():
        if given.get(name) is not None:
            found[name] = check_value(node, name, spec, given[name])
        elif name in required and (name in given or defaults[name].default is inspect.Parameter.empty):
            raise ValueError(nothing_at(node, name, spec))
    return found


def nothing_at(node: type[Declares], name: str, spec: tuple) -> str:
    """Say that a required input is None."""
    wanted, remedy = _WANTED[_kind(spec)]
    return f"{node.DISPLAY_NAME}: nothing comes in at {name}, which needs {wanted}. {remedy}"


def inputs_of(node: type[Declares]) -> dict[str, tuple]:
    """Return what a node's ``INPUT_TYPES`` says of its inputs, by name; for a loader's lists folders are looked
    through."""
    types = node.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def objections(
    node: type[Declares], given: dict[str, Any], declared: dict[str, tuple], limits: bool = True
) -> dict[str, str]:
    """Collect the sentences about the widgets whose values do not belong there, by the widget's name. None is what
    another node will give, and is passed over.

    Args:
        declared: what ``inputs_of`` gave.
        limits: whether the limits of numbers count. They do not before the engine is asked, which says better why.
    """
    said: dict[str, str] = {}
    for name, value in given.items():
        if value is not None:
            try:
                check_value(node, name, declared[name], value, limits)
            except ValueError as error:
                said[name] = str(error)
    return said


def check_value(node: type[Declares], name: str, spec: tuple, value: object, limits: bool = True) -> object:
    """Check one value and return it as ``execute`` takes it.

    Args:
        spec: what ``INPUT_TYPES`` says of it.
        limits: whether the limits of numbers count.

    Raises:
        ValueError: if it is not what is declared.
    """
    kind = _kind(spec)
    wanted, remedy = _WANTED[kind]
    try:
        return _READERS[kind](value, spec[1] if limits and len(spec) > 1 else {})
    except _Odd as odd:
        raise ValueError(
            f"{node.DISPLAY_NAME}: {name} {odd.flaw}, and {wanted} belongs there. {odd.remedy or remedy}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{node.DISPLAY_NAME}: {name}: {error}") from error


def _kind(spec: tuple) -> str:
    return spec[0] if isinstance(spec[0], str) else "COMBO"


def _handle(kind: type | tuple[()], *names: str) -> Callable:
    """Read a handle of ours, or what has all these names, as core's models of a kind do. Which model's it is, the node
    finds out."""

    def read(value, _):
        if isinstance(value, kind) or (names and all(hasattr(value, name) for name in names)):
            return value
        raise _Odd(f"is {seen(value)}")

    return read


def _latent(value, _):
    remedy = _WANTED["LATENT"][1]
    if not isinstance(value, dict):
        raise _Odd(f"is {seen(value)}")
    if "samples" not in value:
        raise _Odd(f"is {seen(value)}, without samples")
    return {**value, "samples": check_tensor(value["samples"], "what the LATENT has for samples", remedy)}


def _conditioning(value, _):
    if not isinstance(value, list | tuple):
        raise _Odd(f"is {seen(value)}")
    if not value:
        raise _Odd("is an empty CONDITIONING, without a prompt")
    entries = []
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) < 2:
            raise _Odd(f"is a list with {seen(entry)} in it, where each entry is a pair of embeddings and settings")
        if not isinstance(entry[1], dict):
            raise _Odd(f"has {seen(entry[1])} where the settings of the prompt are")
        entries.append(
            [check_tensor(entry[0], "what the CONDITIONING has for embeddings", _WANTED["CONDITIONING"][1]), entry[1]]
        )
    return entries


def _image(value, _):
    if not isinstance(value, torch.Tensor):
        raise _Odd(f"is {seen(value)}")
    remedy = _WANTED["IMAGE"][1]
    if value.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        remedy = (
            "An IMAGE is float from 0 to 1: divide pixels from 0 to 255 by 255, or connect the IMAGE of Load Image."
        )
    # Programs that keep all on a card (ComfyUI's --gpu-only) have pictures there; nodes work on them beside it.
    return check_tensor(value, "what comes in", remedy).cpu()


def _mask(value, _):
    if not isinstance(value, torch.Tensor):
        raise _Odd(f"is {seen(value)}")
    return check_tensor(value, "what comes in", _WANTED["MASK"][1]).cpu()


def _number(value, options) -> float:
    try:
        number = math.nan if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real) else float(value)
    except (OverflowError, ValueError):
        raise _Odd("is a number of more than 300 digits") from None
    if not math.isfinite(number):
        raise _Odd(f"is {seen(value)}")
    return number


def _within(number, options):
    if not options.get("min", number) <= number <= options.get("max", number):
        limits = f"from {options.get('min', '-∞')} to {options.get('max', '∞')}"
        raise _Odd(f"is {short(number)}, beyond its limits ({limits})", "Type in one within them, or connect one.")
    return number


def _float(value, options):
    return _within(_number(value, options), options)


def _int(value, options):
    # A float cannot hold every whole number, so it only serves to tell whether the value is one.
    number = (
        int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else _number(value, options)
    )
    if abs(number) > 10**80:
        raise _Odd("is a number of more than 80 digits")
    if number != int(number):
        raise _Odd(f"is {seen(value)}")
    return _within(int(number), options)


def _string(value, _):
    if not isinstance(value, str):
        raise _Odd(f"is {seen(value)}")
    if len(value) > _LONGEST_TEXT:
        raise _Odd(
            f"has {len(value):,} letters, of which the model reads about 1,000", "Connect or type in the prompt alone."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Odd(
            f"holds half a letter (at {error.start + 1}: {short(value[error.start])}), so it cannot be read",
            "Type it in again.",
        ) from None
    return value


def _boolean(value, _):
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise _Odd(f"is {seen(value)}")


def _choice(value, _):
    # The engine says whether it is one of them, and what the others are.
    if isinstance(value, str):
        return value
    raise _Odd(f"is {seen(value)}")


_READERS: dict[str, Callable] = {
    "COGVIDEOX_MODEL": _handle(Model),
    "COGVIDEOX_TEXT_ENCODER": _handle(TextEncoder),
    "COGVIDEOX_TEXT_ENCODER,CLIP": _handle(TextEncoder, "cond_stage_model", "tokenizer"),
    "COGVIDEOX_VAE": _handle(VAE),
    "COGVIDEOX_VAE,VAE": _handle(VAE, "first_stage_model", "decode"),
    "MODEL": _handle((), "model", "model_options", "clone"),
    "LATENT": _latent,
    "CONDITIONING": _conditioning,
    "IMAGE": _image,
    "MASK": _mask,
    "IMAGE,MASK": _mask,
    "INT": _int,
    "FLOAT": _float,
    "STRING": _string,
    "BOOLEAN": _boolean,
    "COMBO": _choice,
}


def seen(value: object) -> str:
    """Say what a value is, in the words of a person who looks at the graph."""
    for kind, name in _HANDLES.items():
        if isinstance(value, kind):
            return f"a {name}"
    for cls in type(value).__mro__:
        if cls.__name__ in _CORE and cls.__module__.startswith("comfy"):
            return f"a {_CORE[cls.__name__]} of ComfyUI's own loaders ({type(value).__name__})"
    if isinstance(value, torch.Tensor):
        what = {4: "an IMAGE or another tensor", 3: "a MASK or another tensor"}.get(
            value.ndim if not value.is_nested else 0, "a tensor"
        )
        return f"{what} ({tensor_text(value)})"
    if isinstance(value, np.ndarray):
        return f"a NumPy array ({value.dtype} {list(value.shape)})"
    if isinstance(value, dict):
        known = {"samples": "a LATENT", "waveform": "an AUDIO"}
        name = next((said for key, said in known.items() if key in value), "a dictionary")
        return f"{name} (with {listed(value)})" if value else "an empty dictionary"
    if isinstance(value, list | tuple):
        pairs = bool(value) and all(
            isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict) for entry in value
        )
        return "a CONDITIONING" if pairs else f"a list of {len(value)}"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {short(repr(value))}"
    if isinstance(value, bool | np.bool_ | numbers.Number):
        return short(value)
    return f"a {short(type(value).__name__)}"
