"""What is wrong with a graph, told as it is queued: each node of this pack is asked about its widgets, and for what it
will give, which is made from configs and headers alone.

ComfyUI validates nodes one by one, shows none of them the others, and repeats what a node answers for each widget whose
value the node asked for. So the whole graph is looked at first, and then each node asks for those alone that are wrong.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from . import host
from .inputs import Declares, OfField, nothing_at

logger = logging.getLogger(__name__)

#: A value that only the run knows.
UNKNOWN = object()
#: How ComfyUI reads a widget's value of a type, before it looks at it.
_READ = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


def _marked(conditioning: Any, **said: Any) -> tuple:
    return ([[embeddings, {**more, **said}] for embeddings, more in conditioning],)


def _during(conditioning: Any, start: Any, end: Any, **_: Any) -> tuple:
    return _marked(conditioning, start_percent=float(start), end_percent=float(end))


def _steered(strength: Any, *conditionings: Any) -> tuple:
    if strength is UNKNOWN or float(strength) == 0:
        # At 0 core hands them on as they are.
        return tuple(UNKNOWN if strength is UNKNOWN else given for given in conditionings)
    return tuple(_marked(given, control=UNKNOWN)[0] for given in conditionings)


def _side_by_side(conditioning_1: Any, conditioning_2: Any) -> tuple:
    # Of one that only the run knows there is a prompt at least.
    both = ([[UNKNOWN, {}]] if given is UNKNOWN else given for given in (conditioning_1, conditioning_2))
    return ([entry for given in both for entry in given],)


def _resized(samples: Any, width: int, height: int) -> tuple:
    latents = samples["samples"]
    # Of a size that was typed wrongly no memory is taken.
    return ({**samples, "samples": latents.new_zeros(1).expand(*latents.shape[:-2], height, width)},)


def _upscaled(samples: Any, width: int, height: int, **_: Any) -> tuple:
    # One side alone, and none, are core's to work out.
    return _resized(samples, max(64, width) // 8, max(64, height) // 8) if width and height else ()


def _scaled(samples: Any, scale_by: float, **_: Any) -> tuple:
    height, width = samples["samples"].shape[-2:]
    return _resized(samples, round(width * scale_by), round(height * scale_by))


def _value_as(kind: type) -> Callable[..., tuple]:
    return lambda value, **_: (value if value is UNKNOWN else kind(value),)


#: What nodes of ComfyUI's own give, of those that say it in the graph, from what they are given. One that raises, as of
#: ``UNKNOWN``, gives what only the run knows.
_CORE: dict[str, Callable[..., tuple]] = {
    "CLIPTextEncode": lambda **_: ([[None, {}]],),
    "ConditioningSetTimestepRange": _during,
    "ConditioningCombine": _side_by_side,
    "ConditioningZeroOut": lambda conditioning, **_: (conditioning,),
    **dict.fromkeys(("ConditioningAverage", "ConditioningConcat"), lambda conditioning_to, **_: (conditioning_to,)),
    "ControlNetApply": lambda conditioning, strength, **_: _steered(strength, conditioning),
    **dict.fromkeys(
        ("ControlNetApplyAdvanced", "ControlNetApplySD3"),
        lambda positive, negative, strength, **_: _steered(strength, positive, negative),
    ),
    **dict.fromkeys(
        ("ConditioningSetArea", "ConditioningSetAreaPercentage", "ConditioningSetAreaPercentageVideo"),
        lambda conditioning, **_: _marked(conditioning, area=UNKNOWN),
    ),
    "ConditioningSetMask": lambda conditioning, **_: _marked(conditioning, mask=UNKNOWN),
    **dict.fromkeys(("KSampler", "KSamplerAdvanced"), lambda latent_image, **_: (latent_image,)),
    "LatentUpscale": _upscaled,
    "LatentUpscaleBy": _scaled,
    "PrimitiveInt": _value_as(int),
    "PrimitiveFloat": _value_as(float),
    "PrimitiveBoolean": _value_as(bool),
    **dict.fromkeys(("PrimitiveString", "PrimitiveStringMultiline"), _value_as(str)),
}


class Queued:
    """A graph as ComfyUI queues it.

    Attributes:
        wrong: by node, and by the widget to be marked, the sentence about it.
        unlisted: by node, widgets with a name that is not in the list, as of a model that another computer listed
            otherwise. ComfyUI would refuse it, if the node did not ask for it.
    """

    def __init__(self, nodes: Mapping[str, dict], classes: Mapping[str, type[Declares]]):
        self.nodes, self._classes = nodes, classes
        self.wrong: dict[str, dict[str, str]] = {}
        self.unlisted: dict[str, list[str]] = {}
        self._outputs: dict[str, tuple] = {}
        for node in nodes:
            self.outputs(node)
        # Handles are not kept: what the run makes of its own is then all that there is.
        self._outputs.clear()

    def class_of(self, node: str) -> type[Declares] | None:
        kind = self.nodes[node].get("class_type")
        return self._classes.get(kind) if isinstance(kind, str) else None

    def outputs(self, node: str) -> tuple:
        """Return what a node will give; nothing where only the run can say."""
        if node not in self._outputs:
            # A loop ends here; ComfyUI tells of it.
            self._outputs[node] = ()
            cls = self.class_of(node)
            self._outputs[node] = self._of_core(node) if cls is None else self._ask(node, cls)
        return self._outputs[node]

    def _of_core(self, node: str) -> tuple:
        """Return what a node of ComfyUI's own will give, as far as that is known."""
        gives = _CORE.get(str(self.nodes[node].get("class_type")))
        if gives is None:
            return ()
        inputs = self.nodes[node].get("inputs", {})
        try:
            return gives(
                **{name: self._linked(value) if isinstance(value, list) else value for name, value in inputs.items()}
            )
        except Exception:
            # Something is not known yet; or it is wrong with a node of ComfyUI's own, which says so.
            return ()

    def widgets(self, node: str) -> list[str]:
        """Return a node's inputs that no other node gives."""
        given = self.nodes[node].get("inputs", {})
        return [name for name in given if not isinstance(given[name], list)]

    def _ask(self, node: str, cls: type[Declares]) -> tuple:
        given, widgets = self._inputs(node, cls), self.widgets(node)
        # A number or a text is known from another node too.
        plain = {name for name, value in given.items() if name in widgets or isinstance(value, int | float | str)}
        inputs = self.nodes[node].get("inputs", {})
        wrong = cls.objections(
            {name: value if name in plain else None for name, value in given.items() if name in inputs}
        )
        for name, said in wrong.items():
            self._object(node, name, said)
        if wrong or any(value is None for value in given.values()):
            return ()
        try:
            return cls.foresee(**given) or ()
        except ValueError as error:
            self._object(node, error.field if isinstance(error, OfField) else cls.FIELD, str(error))
        except Exception:
            # Anything else is the run's to tell, as it was before the graph was looked at.
            logger.debug("%s (%s) cannot be foreseen", cls.DISPLAY_NAME, node, exc_info=True)
        return ()

    def _inputs(self, node: str, cls: type[Declares]) -> dict[str, Any]:
        """Return what a node's ``execute`` will be given, by name; None for a widget's value that ComfyUI refuses."""
        types: dict[str, dict[str, Any]] = cls.INPUT_TYPES()
        declared = {**types.get("required", {}), **types.get("optional", {})}
        given = self.nodes[node].get("inputs", {})
        lists = {name: spec[0] for name, spec in declared.items() if not isinstance(spec[0], str)}
        self.unlisted[node] = [name for name in lists if name in given and given[name] not in lists[name]]
        hidden = {"PROMPT": self.nodes, "UNIQUE_ID": node}
        found: dict[str, Any] = {name: hidden[kind] for name, kind in types.get("hidden", {}).items()}
        for name, parameter in inspect.signature(cls.execute).parameters.items():
            if name not in declared:
                continue
            if name not in given:
                if name in types.get("required", {}):
                    found[name] = None
                elif parameter.default is not None:
                    found[name] = parameter.default
            elif isinstance(given[name], list):
                found[name] = self._linked(given[name])
            else:
                found[name] = _read(declared[name], given[name])
                if given[name] is None and name in lists and name in types.get("required", {}):
                    # Scripts can send it. ComfyUI refuses other widgets without a value itself.
                    self._object(node, name, nothing_at(cls, name, declared[name]))
        return found

    def _linked(self, link: list) -> Any:
        with suppress(TypeError, ValueError, LookupError):
            node, slot = link
            return self.outputs(node)[slot] if node in self.nodes else UNKNOWN
        return UNKNOWN

    def _object(self, node: str, field: str, said: str) -> None:
        """Keep a sentence at a node's widget; of an input that another node of this pack gives, at that node; and
        without any at the loader that the model comes from."""
        field, _, beyond = field.partition(".")
        link = self.nodes[node].get("inputs", {}).get(field)
        if isinstance(link, list) and link and link[0] in self.nodes and self.class_of(link[0]) is not None:
            node, field = link[0], beyond
            field = field or self._classes[self.nodes[node]["class_type"]].FIELD
        while not field and isinstance(link := self.nodes[node]["inputs"].get("model"), list):
            node = link[0]
        field = field or self._classes[self.nodes[node]["class_type"]].FIELD
        widgets = self.widgets(node)
        kept = self.wrong.setdefault(node, {})
        field = field if field in widgets or not widgets else widgets[0]
        kept[field] = said if kept.get(field) in (None, said) else f"{kept[field]}\n{said}"


def _read(spec: tuple, value: Any) -> Any:
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    kind = spec[0]
    if not isinstance(kind, str):
        return value
    try:
        return _READ[kind](value) if kind in _READ else UNKNOWN
    except Exception:
        # Whatever a value's class raises: ComfyUI says so, at the widget.
        return None


_current = Queued({}, {})


def watch(classes: Mapping[str, type[Declares]]) -> None:
    """Look at each graph that is queued from now on, before ComfyUI validates it."""

    def look(nodes: Mapping[str, dict]) -> None:
        global _current
        before, _current = _current, Queued({}, {})
        _current = Queued(nodes, classes)
        for node in before.wrong:
            mended = node in nodes and node not in _current.wrong
            if mended and before.nodes[node].get("class_type") == nodes[node].get("class_type"):
                host.show("", node)

    host.watch_queue(look)


class Validation:
    """``VALIDATE_INPUTS`` of a node: asks for the widgets that are wrong in the graph that is being queued, and answers
    with the sentences about them.

    Outside a queued graph it takes any widgets, and answers for those alone.
    """

    def __get__(self, _: object, cls: type[Declares]) -> "_Answer":
        return _Answer(cls)


class _Answer:
    """Callable whose signature ComfyUI reads."""

    def __init__(self, cls: type[Declares]):
        self._cls, self._queued = cls, _current
        own = [node for node in _current.nodes if _current.class_of(node) is cls]
        asked = {name for node in own for name in (*_current.wrong.get(node, ()), *_current.unlisted.get(node, ()))}
        names = asked if own else set(inspect.signature(cls.checks).parameters)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        inputs = [name for name in inspect.signature(cls.execute).parameters if name in names]
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in inputs])

    def __call__(self, *values: Any, **named: Any) -> str | bool:
        given = self.__signature__.bind(*values, **named).arguments
        node = host.running_node() if self._queued.nodes else None
        node = node if node in self._queued.nodes else None
        told = self._cls.objections(given) if node is None else self._queued.wrong.get(node, {})
        refused = "\n".join(told.values())
        said = host.said(refused)
        if said != refused:
            logger.warning("%s", refused)
        if refused and node is not None:
            # The page's box of errors names the widget alone, and has the sentence behind a button.
            host.show(refused, node)
        return said or True
