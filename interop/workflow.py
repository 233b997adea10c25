"""ComfyUI workflows, whose CogVideoX loader nodes hold a dtype widget: ours, and those of all public packs that load a
CogVideoX. One file, as the table of the loaders says both how their widgets are read and how their dtype is judged."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cogvideox.files import parse_json, read_text
from cogvideox.precision.verdict import MISMATCH, OK, WARNING, Finding
from cogvideox.words import listed, reason, short

from .kinds import KINDS
from .pictures import PICTURES, texts_in
from .report import BLACK, WHERE, WORKFLOW, ConfigReport
from .tables import FUN_LOADERS, ORDERS, order_of

logger = logging.getLogger(__name__)

OURS = "CogVideoX15ModelLoader"
#: The widgets of our loader and of the wrapper's nodes, as they are now, in the order of a file's list of values.
#: ``tables.ORDERS`` has all ages.
WIDGETS = {
    OURS: KINDS[OURS].widgets,
    **{
        kind: ORDERS[kind][0]
        for kind in (
            *(
                "DownloadAndLoadCogVideoModel",
                "CogVideoXModelLoader",
                "DownloadAndLoadCogVideoGGUFModel",
                "CogVideoXVAELoader",
                "CogVideoLoraSelect",
            ),
            *(
                "CogVideoLoraSelectComfy",
                "CogVideoTextEncode",
                "CogVideoTextEncodeCombine",
                "CogVideoImageEncode",
                "CogVideoSampler",
            ),
        )
    },
    "CogVideoDecode": ("enable_vae_tiling",),  # and the tiles' sizes
}


class _Loader(NamedTuple):
    """A node that loads a CogVideoX, or may.

    Attributes:
        model, dtype: its widgets with the model's name and with the dtype; no dtype where it lets one choose none.
        default: the dtype if the file does not say it.
        order: its widgets in a list of values, where ``tables.ORDERS`` has it not.
        runs: what it computes in, for values that are no dtype or mean another one; "" is what ComfyUI chooses.
        any_model: it loads other models too, so it counts only where the name is a CogVideoX's.
        fallback: the widget that decides where ``dtype`` leaves it to ComfyUI.
    """

    model: str
    dtype: str = ""
    default: str = "bf16"
    order: tuple[str, ...] = ()
    runs: Mapping[str, str] = {}
    any_model: bool = False
    fallback: str = ""


#: Weights that are stored small, and computed with in what ComfyUI chooses.
_STORED = dict.fromkeys(("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", "auto", "target"), "")
_LOADERS = {
    OURS: _Loader("model", "dtype", "auto"),
    "DownloadAndLoadCogVideoModel": _Loader("model", "precision"),
    "CogVideoXModelLoader": _Loader("model", "base_precision"),
    "DownloadAndLoadCogVideoGGUFModel": _Loader("model", "vae_precision"),
    "CogVideoXVAELoader": _Loader("model_name", "precision"),
    # MinusZoneAI/ComfyUI-CogVideoX-MZ, mz_cogvideox_core.py: fp8_e4m3fn multiplies in fp16, fp8_e5m2 in bf16; its first
    # versions said default.
    "MZ_CogVideoXLoader": _Loader(
        "unet_name", "weight_dtype", runs={"fp8_e4m3fn": "fp16", "fp8_e5m2": "bf16", "default": "bf16", "GGUF": "bf16"}
    ),
    **dict.fromkeys(FUN_LOADERS, _Loader("model", "precision", "fp16")),
    # ComfyUI's own nodes, and others' that load what they do.
    "UNETLoader": _Loader("unet_name", "weight_dtype", "default", ("unet_name", "weight_dtype"), _STORED, True),
    "CheckpointLoaderSimple": _Loader("ckpt_name", order=("ckpt_name",), any_model=True),
    "DiffusersLoader": _Loader("model_path", order=("model_path",), any_model=True),
    "UnetLoaderGGUF": _Loader("unet_name", order=("unet_name",), any_model=True),
    "UnetLoaderGGUFAdvanced": _Loader(
        "unet_name", order=("unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"), any_model=True
    ),
    "LoaderGGUF": _Loader("gguf_name", order=("gguf_name",), any_model=True),
    "UnetLoaderNF4": _Loader("unet_name", order=("unet_name",), any_model=True),
    "DiffusionModelLoaderKJ": _Loader(
        *(
            "model_name",
            "compute_dtype",
            "default",
            ("model_name", "weight_dtype", "compute_dtype"),
            _STORED,
            True,
            "weight_dtype",
        ),
    ),
    "UNETLoaderMultiGPU": _Loader("unet_name", "weight_dtype", "default", ("unet_name", "weight_dtype"), _STORED, True),
    "UNETLoaderDisTorch2MultiGPU": _Loader(
        "unet_name", "weight_dtype", "default", ("unet_name", "weight_dtype"), _STORED, True
    ),
    "UnetLoaderGGUFMultiGPU": _Loader("unet_name", order=("unet_name",), any_model=True),
    "UnetLoaderGGUFDisTorch2MultiGPU": _Loader("unet_name", order=("unet_name",), any_model=True),
}
#: Names of CogVideoX's files, and of the one descendant for which ComfyUI has nodes, VOID.
_COGVIDEO = "cog.?video|void.?pass"
_VAE_ONLY = ("DownloadAndLoadCogVideoGGUFModel", "CogVideoXVAELoader")
_DTYPES = KINDS[OURS].input("dtype").options
#: Values of a node's mode on the page.
MUTED, BYPASSED = 2, 4
#: More nodes than this no person has laid out.
MAX_NODES = 20_000
#: The number of what brings a subgraph its inputs.
_SUBGRAPH_INPUTS = -10
_LINKED = object()  # instead of a widget's value: it comes from another node


def check_workflow(file: Path) -> ConfigReport:
    """Judge the dtype widgets of a workflow's loader nodes.

    Raises:
        ValueError: if it is no workflow.
    """
    nodes = list(_active_nodes(read_workflow(file)))
    loaders = [
        (where, kind, widgets) for where, kind, widgets in nodes if kind in _LOADERS and _loads_cogvideo(kind, widgets)
    ]
    if not loaders:
        none = Finding(
            "workflow", OK, "It holds no loader of a CogVideoX that is switched on, so no dtype in it can be wrong."
        )
        return ConfigReport(file, WORKFLOW, "none", (none,))
    named = [widgets.get(_LOADERS[kind].model) for _, kind, widgets in loaders if kind != "CogVideoXVAELoader"]
    names = dict.fromkeys(name for name in named if isinstance(name, str))
    model = ", ".join(f"{short(name)} (trained in {'fp16' if is_2b(name) else 'bf16'})" for name in names)
    findings = tuple(_judge_loader(*loader) for loader in loaders)
    return ConfigReport(
        file, WORKFLOW, f"{model}: by the name, which is all that a workflow says" if model else "not named", findings
    )


def is_2b(name: str) -> bool:
    """Whether a model is CogVideoX-2b, the one that was trained in fp16, going by its name."""
    return bool(re.search(r"(^|[^0-9])2b", name, re.IGNORECASE))


def _loads_cogvideo(kind: str, widgets: Mapping) -> bool:
    name = widgets.get(_LOADERS[kind].model)
    return not _LOADERS[kind].any_model or (
        isinstance(name, str) and re.search(_COGVIDEO, name, re.IGNORECASE) is not None
    )


class _Chosen(NamedTuple):
    """What a loader's widgets say of the dtype.

    Attributes:
        widget: the one that says it; "" for none.
        value: what it says.
        runs: the dtype that the model runs in; "" is what ComfyUI chooses, None what another node says.
    """

    widget: str
    value: str
    runs: str | None

    @property
    def text(self) -> str:
        if self.runs is None:
            return f"{self.widget} comes from another node"
        if self.runs != self.value:
            return f"{self.widget} is {self.value}, which computes in {self.runs}"
        return f"{self.widget} is {short(self.value)}"


def _chosen(loader: _Loader, widgets: Mapping) -> _Chosen:
    """Read the dtype off a loader's widgets."""
    if not loader.dtype:
        return _Chosen("", "default", "")
    widget, dtype = loader.dtype, widgets.get(loader.dtype)
    dtype = loader.default if dtype is None else dtype
    if loader.fallback and dtype == "default" and widgets.get(loader.fallback) == "fp16":
        widget, dtype = loader.fallback, "fp16"
    if dtype is _LINKED:
        return _Chosen(widget, "", None)
    value = dtype if isinstance(dtype, str) else repr(dtype)
    return _Chosen(widget, value, loader.runs.get(value, value))


def _judge_loader(where: str, kind: str, widgets: Mapping) -> Finding:
    chosen = _chosen(_LOADERS[kind], widgets)
    if chosen.runs == "":
        said = f"{chosen.widget} is {short(chosen.value)}" if chosen.widget else "The node has no widget for the dtype"
        return Finding(
            where,
            OK,
            f"{said}: ComfyUI computes in bf16 where the card has it, in which every CogVideoX stays finite.",
        )
    if chosen.runs is not None and chosen.runs not in _DTYPES:
        return Finding(
            where,
            WARNING,
            f"{chosen.widget} is {short(repr(chosen.value))}, which this check does not know.",
            f"Set {chosen.widget} to bf16.",
        )
    if kind in _VAE_ONLY:
        return _judge_vae(where, chosen)
    name = widgets.get(_LOADERS[kind].model)
    if name is None and kind == "DownloadAndLoadCogVideoModel":
        name = "CogVideoX-2b"  # the only one there was when the node had no widget for it
    name = short(name) if isinstance(name, str) else "a model that is not named"
    if is_2b(name):
        return Finding(
            where, OK, f"{chosen.text}, and {name} was trained in fp16, going by the name: no dtype makes it black."
        )
    if chosen.runs not in ("fp16", None):
        return Finding(where, OK, f"{chosen.text}, in which a bf16-trained model stays finite.")
    return _judge_fp16(where, kind, name, chosen, widgets)


def _judge_vae(where: str, chosen: _Chosen) -> Finding:
    """Judge a loader of a VAE, which bf16 and fp32 suit."""
    if chosen.runs is None:
        return Finding(where, WARNING, f"{chosen.text}.", "See that what arrives there is bf16 or fp32.")
    if chosen.runs == "fp16":
        return Finding(
            where,
            WARNING,
            f"{chosen.text}, in which the VAE can overflow to NaN.",
            f"Set {chosen.widget} to bf16 or fp32.",
        )
    return Finding(where, OK, f"{chosen.text}.")


def _judge_fp16(where: str, kind: str, name: str, chosen: _Chosen, widgets: Mapping) -> Finding:
    """Judge a loader that runs a bf16-trained model in fp16, or in what another node says."""
    on_mismatch = widgets.get("on_mismatch", "fix") if kind == OURS else None
    if on_mismatch == "fix":
        return Finding(
            where,
            OK,
            "dtype is fp16 with on_mismatch fix: a bf16-trained model runs in range-safe fp16, which stays finite.",
        )
    if chosen.runs is None or on_mismatch is _LINKED:
        linked = chosen.widget if chosen.runs is None else "on_mismatch"
        return Finding(
            where, WARNING, f"{linked} comes from another node.", f"See that {name} does not end up in plain fp16."
        )
    because = f"{chosen.text} and {name} was trained in bf16, going by the name"
    remedy = f"Set {chosen.widget} to bf16, or to fp32 on a GPU that has no bf16 (V100, T4, RTX 20xx)."
    if kind == OURS:
        remedy = "Set dtype to auto, or on_mismatch to fix."
    if on_mismatch == "stop":
        return Finding(where, MISMATCH, f"{because}: with on_mismatch stop the loader will stop.", remedy)
    if kind == "DownloadAndLoadCogVideoModel" and "1.5" in name:
        return Finding(where, MISMATCH, f"{because}: this node stops with an error for a 1.5 model in fp16.", remedy)
    return Finding(where, MISMATCH, f"{because}: {BLACK}.", remedy)


def read_workflow(file: Path) -> dict:
    """The graph in a workflow's file: as the page saves it (``nodes``, ``links``), or as the API takes it (``{id:
    {class_type, inputs}}``).

    Raises:
        ValueError: if it is no workflow, and no picture or video with one in it.
    """
    data: Any = None
    if file.suffix.lower() in PICTURES:
        graph: dict | None = _graph_inside(file)
    else:
        text = read_text(file)
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(
                f"{short(file, 400)} is not JSON ({reason(error)}), so there are no nodes to look at. Save the "
                "workflow again in ComfyUI."
            ) from error
        graph = _find_graph(data)
    if graph is None:
        seen = (
            f"a JSON object with {listed(data, 4) or 'nothing in it'}"
            if isinstance(data, dict)
            else f"a JSON {type(data).__name__}"
        )
        raise ValueError(
            f"{short(file, 400)} is {seen}, which is not a ComfyUI workflow: there are no nodes in it to look at. "
            f"{WHERE}"
        )
    count = sum(len(part["nodes"]) for _, _, part in graphs(graph)) if is_page(graph) else len(graph)
    if count > MAX_NODES:
        raise ValueError(
            f"{short(file, 400)} has {count:,} nodes, and a workflow that a person laid out has at most a few hundred "
            f"(here the limit is {MAX_NODES:,}): it was made by a program, or is damaged. Choose another file."
        )
    return graph


def _graph_inside(file: Path) -> dict:
    """The workflow that a picture or video was made by, which ComfyUI writes into it.

    Raises:
        ValueError: if there is none in it, or none that is found here.
    """
    for text in texts_in(file):
        try:
            graph = _find_graph(parse_json(text))
        except ValueError as error:
            logger.info("%s: %s", file, reason(error))
            continue
        if graph is not None:
            return graph
    raise ValueError(
        f"{short(file, 400)} is a picture or video, and no workflow is found in it here: sites and programs that save "
        "it again leave it out. Drop it onto ComfyUI's page; if a workflow opens, save that as JSON and give the JSON."
    )


def _find_graph(data) -> dict | None:
    if not isinstance(data, dict):
        return None
    if is_page(data) or any(isinstance(node, dict) and "class_type" in node for node in data.values()):
        return data
    # What the page sends to the queue, what lies in the metadata of a picture, and what servers take: the graph under
    # one more name.
    return next(
        (
            graph
            for key in ("prompt", "output", "workflow", "input")
            if (graph := _find_graph(data.get(key))) is not None
        ),
        None,
    )


def is_page(graph: Mapping) -> bool:
    """Whether a graph is as the page saves it, and not as the API takes it."""
    return isinstance(graph.get("nodes"), list)


def _active_nodes(graph: Mapping) -> Iterator[tuple[str, str, dict]]:
    """Every node that is switched on, as (where, type, widgets by name)."""
    if is_page(graph):
        yield from _ui_nodes(graph)
        return
    for id_, node in graph.items():
        if isinstance(node, dict) and isinstance(node.get("class_type"), str):
            yield f'node {short(id_)} "{short(node["class_type"])}"', node["class_type"], _api_widgets(node)


def _api_widgets(node: Mapping) -> dict:
    inputs = node.get("inputs")
    return (
        {name: _LINKED if isinstance(value, list) else value for name, value in inputs.items()}
        if isinstance(inputs, dict)
        else {}
    )


def _ui_nodes(workflow: Mapping) -> Iterator[tuple[str, str, dict]]:
    parts = list(graphs(workflow))
    nodes = [
        (subgraph, inside, node)
        for subgraph, inside, graph in parts
        for node in graph["nodes"]
        if isinstance(node, dict) and isinstance(node.get("type"), str)
    ]

    def is_off(node) -> bool:
        return node.get("mode") in (MUTED, BYPASSED)

    # A subgraph is switched off with the nodes that stand for it.
    muted = {node["type"] for *_, node in nodes if is_off(node)} - {
        node["type"] for *_, node in nodes if not is_off(node)
    }
    # Nodes that stand for one subgraph may each be set otherwise.
    shown: dict[str | None, dict[str, dict]] = {subgraph: {} for subgraph, *_ in parts}
    for *_, node in nodes:
        if node["type"] in shown and not is_off(node):
            widgets = _ui_widgets(node)
            shown[node["type"]][repr(widgets)] = widgets
    promoted = {
        subgraph: [_promoted(graph, widgets) for widgets in shown[subgraph].values() or [{}]]
        for subgraph, _, graph in parts
    }
    for subgraph, inside, node in nodes:
        if subgraph not in muted and not is_off(node):
            every = [_ui_widgets(node, links) for links in promoted[subgraph]] if inside else [_ui_widgets(node)]
            for widgets in {repr(widgets): widgets for widgets in every}.values():
                yield f'node {short(node.get("id"))} "{short(node["type"])}"{inside}', node["type"], widgets


def graphs(workflow: Mapping, inside: str = "") -> Iterator[tuple[str | None, str, Mapping]]:
    """The graph as the page saves it and its subgraphs, as (id, where, graph)."""
    id_ = workflow.get("id")
    yield id_ if inside and isinstance(id_, str) else None, inside, workflow
    definitions = workflow.get("definitions")
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    for subgraph in subgraphs if isinstance(subgraphs, list) else []:
        if isinstance(subgraph, dict) and isinstance(subgraph.get("nodes"), list):
            yield from graphs(subgraph, f' in subgraph "{short(subgraph.get("name") or subgraph.get("id"))}"')


def _promoted(graph: Mapping, shown: Mapping) -> dict[int, Any]:
    """The links in a subgraph that bring what a widget of the node that stands for it is set to, by their numbers: its
    value, of those that ``shown`` has, or None where the widget inside has it."""
    entries, links = graph.get("inputs"), graph.get("links")
    names = [
        entry.get("name") if isinstance(entry, dict) else None
        for entry in (entries if isinstance(entries, list) else [])
    ]
    return {
        link["id"]: shown.get(names[slot])
        for link in (links if isinstance(links, list) else [])
        if isinstance(link, dict)
        and link.get("origin_id") == _SUBGRAPH_INPUTS
        and type(link.get("id")) is int
        and type(slot := link.get("origin_slot")) is int
        and 0 <= slot < len(names)
        and isinstance(names[slot], str)
    }


def _ui_widgets(node: Mapping, promoted: Mapping[int, Any] | None = None) -> dict:
    linked = {
        socket["widget"]["name"]: promoted.get(link, _LINKED) if promoted and type(link) is int else _LINKED
        for socket in _widget_sockets(node)
        if (link := socket.get("link")) is not None
    }
    return widget_values(node) | {name: value for name, value in linked.items() if value is not None}


def _widget_sockets(node: Mapping) -> list[dict]:
    """The sockets of widgets that have a name."""
    inputs = node.get("inputs")
    sockets = [socket for socket in inputs if isinstance(socket, dict)] if isinstance(inputs, list) else []
    return [
        socket
        for socket in sockets
        if isinstance(socket.get("widget"), dict) and isinstance(socket["widget"].get("name"), str)
    ]


def widget_values(node: Mapping, order: Sequence[str] = ()) -> dict:
    """A node's widgets by name, as the page saves them. Newer files name them; older ones only list the values, in the
    order of the node's inputs.

    Args:
        order: that of a node which is not known here.
    """
    values, named = node.get("widgets_values"), node.get("widgets_values_named")
    widgets = {}
    if isinstance(values, dict):
        widgets = dict(values)
    elif isinstance(values, list):
        widgets = dict(zip(_order(node, values, order), values, strict=False))
    return widgets | named if isinstance(named, dict) else widgets


def _order(node: Mapping, values: Sequence, order: Sequence[str]) -> Sequence[str]:
    names, kind = [socket["widget"]["name"] for socket in _widget_sockets(node)], node["type"]
    # The sockets of older files are only the widgets that were turned into inputs, so their order counts only where all
    # are there.
    if len(names) == len(values):
        return names
    if kind in ORDERS:
        return order_of(kind, values)
    if kind in WIDGETS:
        return WIDGETS[kind]
    loader = _LOADERS.get(kind)
    return order if loader is None else loader.order
