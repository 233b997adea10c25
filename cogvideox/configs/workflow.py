"""ComfyUI workflows, whose CogVideoX loader nodes hold a dtype widget: ours, and those of ComfyUI-CogVideoXWrapper."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..precision.verdict import Finding
from .report import BLACK, WHERE, WORKFLOW, ConfigReport, first_lines, read_file

OURS = "CogVideoX15ModelLoader"
#: The widgets of our loader and of the nodes of kijai/ComfyUI-CogVideoXWrapper (nodes.py, model_loading.py), in the order of a file's list of values.
WIDGETS = {
    OURS: ("model", "dtype", "on_mismatch", "memory", "scan_weights", "text_encoder_name", "vae_name"),
    "DownloadAndLoadCogVideoModel": ("model", "precision", "quantization", "enable_sequential_cpu_offload", "attention_mode", "load_device"),
    "CogVideoXModelLoader": ("model", "base_precision", "quantization", "load_device", "enable_sequential_cpu_offload", "attention_mode"),
    "DownloadAndLoadCogVideoGGUFModel": ("model", "vae_precision", "fp8_fastmode", "load_device", "enable_sequential_cpu_offload", "attention_mode"),
    "CogVideoXVAELoader": ("model_name", "precision"),
    "CogVideoLoraSelect": ("lora", "strength", "fuse_lora"),
    "CogVideoLoraSelectComfy": ("lora", "strength", "fuse_lora"),
    "CogVideoTextEncode": ("prompt", "strength", "force_offload"),
    "CogVideoTextEncodeCombine": ("combination_mode", "weighted_average_ratio"),
    "CogVideoImageEncode": ("enable_tiling", "noise_aug_strength", "strength", "start_percent", "end_percent"),
    # The page itself adds what becomes of the seed.
    "CogVideoSampler": ("num_frames", "steps", "cfg", "seed", "control_after_generate", "scheduler", "denoise_strength"),
    "CogVideoDecode": ("enable_vae_tiling",),  # and the tiles' sizes
}
#: Loader -> its widget with the dtype.
_LOADERS = {
    OURS: "dtype",
    "DownloadAndLoadCogVideoModel": "precision",
    "CogVideoXModelLoader": "base_precision",
    "DownloadAndLoadCogVideoGGUFModel": "vae_precision",
    "CogVideoXVAELoader": "precision",
}
_VAE_ONLY = ("DownloadAndLoadCogVideoGGUFModel", "CogVideoXVAELoader")
#: Values of a node's mode on the page.
MUTED, BYPASSED = 2, 4
_LINKED = object()  # instead of a widget's value: it comes from another node


def check_workflow(file: Path) -> ConfigReport:
    """Judge the dtype widgets of a workflow's loader nodes.

    Raises:
        ValueError: if it is no workflow.
    """
    nodes = list(_active_nodes(read_workflow(file)))
    loaders = [(where, kind, widgets) for where, kind, widgets in nodes if kind in _LOADERS]
    if not loaders:
        none = Finding("workflow", "ok", "It holds no loader of a CogVideoX that is switched on, so no dtype in it can be wrong.")
        return ConfigReport(file, WORKFLOW, "none", (none,))
    names = dict.fromkeys(str(widgets["model"]) for _, _, widgets in loaders if isinstance(widgets.get("model"), str))
    model = ", ".join(f"{name} (trained in {'fp16' if is_2b(name) else 'bf16'})" for name in names)
    findings = tuple(_judge_loader(*loader) for loader in loaders)
    return ConfigReport(file, WORKFLOW, f"{model}: by the name, which is all that a workflow says" if model else "not named", findings)


def is_2b(name: str) -> bool:
    """Whether a model is CogVideoX-2b, the one that was trained in fp16, going by its name."""
    return bool(re.search(r"(^|[^0-9])2b", name, re.IGNORECASE))


def _judge_loader(where: str, kind: str, widgets: Mapping) -> Finding:
    widget = _LOADERS[kind]
    dtype = widgets.get(widget)
    dtype = ("auto" if kind == OURS else "bf16") if dtype is None else dtype
    name = widgets.get("model")
    name = name if isinstance(name, str) else "a model that is not named"
    if dtype is not _LINKED and dtype not in ("auto", "bf16", "fp16", "fp32"):
        return Finding(where, "warning", f"{widget} is {dtype!r}, which this check does not know.", f"Set {widget} to bf16.")
    if kind in _VAE_ONLY:
        if dtype is _LINKED:
            return Finding(where, "warning", f"{widget} comes from another node.", "See that what arrives there is bf16 or fp32.")
        if dtype == "fp16":
            return Finding(where, "warning", f"{widget} is fp16, in which the VAE can overflow to NaN.", f"Set {widget} to bf16 or fp32.")
        return Finding(where, "ok", f"{widget} is {dtype}.")
    if is_2b(name):
        said = "comes from another node" if dtype is _LINKED else f"is {dtype}"
        return Finding(where, "ok", f"{widget} {said}, and {name} was trained in fp16, going by the name: no dtype makes it black.")
    if dtype not in ("fp16", _LINKED):
        return Finding(where, "ok", f"{widget} is {dtype}, in which a bf16-trained model stays finite.")
    on_mismatch = widgets.get("on_mismatch", "fix") if kind == OURS else None
    if on_mismatch == "fix":
        return Finding(where, "ok", "dtype is fp16 with on_mismatch fix: a bf16-trained model runs in range-safe fp16, which stays finite.")
    if dtype is _LINKED or on_mismatch is _LINKED:
        linked = widget if dtype is _LINKED else "on_mismatch"
        return Finding(where, "warning", f"{linked} comes from another node.", f"See that {name} does not end up in plain fp16.")
    reason = f"{widget} is fp16 and {name} was trained in bf16, going by the name"
    remedy = f"Set {widget} to bf16, or to fp32 on a GPU that has no bf16 (V100, T4, RTX 20xx)."
    if kind == OURS:
        remedy = "Set dtype to auto, or on_mismatch to fix."
    if on_mismatch == "stop":
        return Finding(where, "mismatch", f"{reason}: with on_mismatch stop the loader will stop.", remedy)
    if kind == "DownloadAndLoadCogVideoModel" and "1.5" in name:
        return Finding(where, "mismatch", f"{reason}: this node stops with an error for a 1.5 model in fp16.", remedy)
    return Finding(where, "mismatch", f"{reason}: {BLACK}.", remedy)


def read_workflow(file: Path) -> dict:
    """The graph in a workflow's file: as the page saves it (``nodes``, ``links``), or as the API takes it (``{id: {class_type, inputs}}``).

    Raises:
        ValueError: if it is no workflow.
    """
    try:
        data = json.loads(read_file(file).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not JSON ({first_lines(error)}), so there are no nodes to look at. Save the workflow again in ComfyUI."
        ) from error
    graph = _find_graph(data)
    if graph is None:
        seen = f"a JSON object with {', '.join(list(data)[:4]) or 'nothing in it'}" if isinstance(data, dict) else f"a JSON {type(data).__name__}"
        raise ValueError(f"{file} is {seen}, which is not a ComfyUI workflow: there are no nodes in it to look at. {WHERE}")
    return graph


def _find_graph(data) -> dict | None:
    if not isinstance(data, dict):
        return None
    if is_page(data) or any(isinstance(node, dict) and "class_type" in node for node in data.values()):
        return data
    # What the page sends to the queue and what lies in the metadata of a picture: the graph under one more name.
    return next((graph for key in ("prompt", "workflow") if (graph := _find_graph(data.get(key))) is not None), None)


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
            yield f'node {id_} "{node["class_type"]}"', node["class_type"], _api_widgets(node)


def _api_widgets(node: Mapping) -> dict:
    inputs = node.get("inputs")
    return {name: _LINKED if isinstance(value, list) else value for name, value in inputs.items()} if isinstance(inputs, dict) else {}


def _ui_nodes(workflow: Mapping) -> Iterator[tuple[str, str, dict]]:
    nodes = [
        (subgraph, inside, node)
        for subgraph, inside, graph in graphs(workflow)
        for node in graph["nodes"]
        if isinstance(node, dict) and isinstance(node.get("type"), str)
    ]

    def is_off(node) -> bool:
        return node.get("mode") in (MUTED, BYPASSED)

    # A subgraph is switched off with the nodes that stand for it.
    muted = {node["type"] for *_, node in nodes if is_off(node)} - {node["type"] for *_, node in nodes if not is_off(node)}
    for subgraph, inside, node in nodes:
        if subgraph not in muted and not is_off(node):
            yield f'node {node.get("id")} "{node["type"]}"{inside}', node["type"], _ui_widgets(node)


def graphs(workflow: Mapping, inside: str = "") -> Iterator[tuple[str | None, str, Mapping]]:
    """The graph as the page saves it and its subgraphs, as (id, where, graph)."""
    yield workflow.get("id") if inside else None, inside, workflow
    definitions = workflow.get("definitions")
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    for subgraph in subgraphs if isinstance(subgraphs, list) else []:
        if isinstance(subgraph, dict) and isinstance(subgraph.get("nodes"), list):
            yield from graphs(subgraph, f' in subgraph "{subgraph.get("name") or subgraph.get("id")}"')


def _ui_widgets(node: Mapping) -> dict:
    linked = {
        socket["widget"].get("name"): _LINKED
        for socket in _sockets(node)
        if isinstance(socket.get("widget"), dict) and socket.get("link") is not None
    }
    return widget_values(node) | linked


def _sockets(node: Mapping) -> list[dict]:
    inputs = node.get("inputs")
    return [socket for socket in inputs if isinstance(socket, dict)] if isinstance(inputs, list) else []


def widget_values(node: Mapping, order: Sequence[str] = ()) -> dict:
    """A node's widgets by name, as the page saves them. Newer files name them; older ones only list the values, in the order of the node's inputs.

    Args:
        order: that of a node which ``WIDGETS`` does not know.
    """
    values, named = node.get("widgets_values"), node.get("widgets_values_named")
    widgets = {}
    if isinstance(values, dict):
        widgets = dict(values)
    elif isinstance(values, list):
        names = [socket["widget"].get("name") for socket in _sockets(node) if isinstance(socket.get("widget"), dict)]
        # The sockets of older files are only the widgets that were turned into inputs, so their order counts only where all are there.
        order = names if len(names) == len(values) else WIDGETS.get(node["type"], order)
        widgets = dict(zip(order, values, strict=False))
    return widgets | named if isinstance(named, dict) else widgets
