"""The base class of the nodes: their category, and a check of the installed packages and of a node's inputs before it
runs."""

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any, ClassVar

from ..cogvideox.dependencies import require_dependencies
from ..cogvideox.geometry import LARGEST_SIDE, LONGEST, SIZE_STEP
from . import host
from .inputs import checked, inputs_of, objections
from .queued import Validation

logger = logging.getLogger(__name__)

#: What a LATENT of this pack's nodes says of how it is to be decoded (``in_pairs`` of ``vae.decode``): a VAE that was
#: loaded apart from the transformer cannot know.
IN_PAIRS = "cogvideox_in_pairs"
#: The widgets of a clip's size and length, but for what differs with the model that a node is for.
SIZE = {"min": SIZE_STEP, "max": LARGEST_SIDE, "step": SIZE_STEP}
#: A widget's limits that is a share of the steps, or of the work.
SHARE = {"min": 0.0, "max": 1.0, "step": 0.05, "round": 0.001}
#: A VAE's socket.
VAE = (
    "COGVIDEOX_VAE,VAE",
    {"tooltip": "The video VAE of the model loader, or CogVideoX's VAE loaded by ComfyUI's Load VAE."},
)
LENGTH = (
    "INT",
    {
        "default": 81,
        "min": 1,
        "max": LONGEST,
        "step": 16,
        "tooltip": (
            "Frames to make, 16N+1: 81 is 5 seconds and 161 is 10 seconds at 16 fps. Longer than 161 was not trained."
        ),
    },
)
#: The length of what CogVideoX-Fun-V1.5 and VOID make.
LENGTH_IN_PAIRS = (
    "INT",
    {
        "default": 85,
        "min": 1,
        "max": LONGEST,
        "step": 4,
        "tooltip": "Frames to make, 8N+5 (77, 85 …) or 1. Longer than 85 was not trained.",
    },
)


class Node:
    """Base of a node, whose work is ``execute``. Before it is run the dependencies and the inputs are checked, so that
    what is wrong is told in a sentence."""

    CATEGORY = "CogVideoX-1.5"
    FUNCTION = "run"
    #: A node declares these.
    DISPLAY_NAME: ClassVar[str]
    RETURN_NAMES: ClassVar[tuple[str, ...]]
    INPUT_TYPES: ClassVar[Callable[[], dict[str, dict[str, tuple]]]]
    execute: ClassVar[Callable[..., Any]]
    #: These three are described by ``Declares``.
    FIELD: ClassVar[str] = ""
    checks: ClassVar[Callable[..., list[tuple]]] = staticmethod(lambda: [])
    foresee: ClassVar[Callable[..., tuple | None]] = staticmethod(lambda **_: None)
    VALIDATE_INPUTS = Validation()

    def run(self, **inputs: Any) -> Any:
        """Check the inputs and execute the node: what ComfyUI calls.

        Raises:
            ValueError: if an input is not what the node declares.
            RuntimeError: if a package that is needed is missing or too old, or cannot be imported for another one.
        """
        with host.failures_shown():
            require_dependencies()
            return self._in_words(self.execute(**checked(type(self), inputs)))

    @classmethod
    def _in_words(cls, result: Any) -> Any:
        """Say the reports among a node's outputs in the page's language."""
        outputs = result["result"] if isinstance(result, dict) else result
        words = tuple(
            host.said(value) if name == "report" and isinstance(value, str) else value
            for name, value in zip(cls.RETURN_NAMES, outputs, strict=True)
        )
        return {**result, "result": words} if isinstance(result, dict) else words

    @classmethod
    def objections(cls, given: dict[str, Any]) -> dict[str, str]:
        """Collect the sentences about widgets whose values cannot run, by the widget's name.

        Args:
            given: the widgets' values by name. None is one that another node will give, and is left to the run.
        """
        declared = inputs_of(cls)
        said = objections(cls, given, declared, limits=False)
        # A check is left out if one of its arguments will be given by another node, or is no value for its widget.
        # What is left out of a graph is as the node has it.
        usual = {
            name: parameter.default if parameter.default is not inspect.Parameter.empty else None
            for name, parameter in inspect.signature(cls.execute).parameters.items()
        }
        names = inspect.signature(cls.checks).parameters
        values = {name: None if name in said else given.get(name, usual.get(name)) for name in names}
        for widget, check, *arguments in cls.checks(**values):
            if widget not in said and not any(value is None for value in arguments):
                try:
                    check(*arguments)
                except ValueError as error:
                    said[widget] = str(error)
        return said or objections(cls, given, declared)

    @classmethod
    def fingerprint(cls, given: dict, look: Callable[[], Any]) -> Any:
        """Answer ``IS_CHANGED``: with what ``look`` says of the files that were chosen, or with why there are none;
        with NaN, which never equals itself, where another node will choose."""
        if any(value is None for value in given.values()):
            return math.nan
        odd = objections(cls, given, inputs_of(cls))
        if odd:
            return "\n".join(odd.values())
        try:
            return look()
        except (ValueError, OSError) as error:
            return str(error)


def with_latents(positive, negative, latents):
    """Return both conditionings with what the model reads beside the noise, as core's nodes put it there."""
    return (
        [[embeddings, {**extra, "concat_latent_image": latents}] for embeddings, extra in given]
        for given in (positive, negative)
    )
