"""ComfyUI's page and server: help pages and templates, the graph that is queued, and what is shown on a node."""

import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cogvideox.dependencies import import_failure
from ...cogvideox.words import reason, short
from . import comfyui
from .language import said

if TYPE_CHECKING:
    from aiohttp.web import FileResponse, Request
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: The package that the nodes and the engine lie in, whatever ComfyUI calls it.
_PACK = f"{__name__.rpartition('.nodes.')[0]}."
#: Letters of a line on a node at most.
_LINE = 2000
#: Nodes that show why they failed.
_failed: set[str | None] = set()


def serve_files() -> None:
    """Serve the help pages and the example workflows at the addresses where ComfyUI's page looks for them, whatever the
    pack's folder is called.

    ComfyUI serves both under the folder's name. But aiohttp finds no static route whose path holds a space or a letter
    beyond ASCII (https://github.com/aio-libs/aiohttp/issues/13433), and the page cuts the name at dots. ComfyUI's own
    routes, and other packs', come before these, as they are more specific.
    """
    server = comfyui.server()
    if server is None:
        return
    pack = Path(__file__).parents[2]
    for address, folder in (("extensions", "web"), ("workflow_templates", "example_workflows")):
        server.routes.get(f"/{address}/{{pack:{names_in_urls(pack.name)}}}/{{path:.+}}")(
            _send_from((pack / folder).resolve())
        )


def names_in_urls(folder: str) -> str:
    """Write a regular expression, without braces, for the names by which the page knows the pack in ``folder``: the
    folder's own, and that cut at dots."""
    names = {folder, re.split(r"[.@]", folder)[0]} - {""}
    return "|".join("".join(f"\\U{ord(letter):08x}" for letter in name) for name in sorted(names))


def _send_from(root: Path) -> "Callable[[Request], Awaitable[FileResponse]]":
    from aiohttp import web

    async def send(request: "Request") -> "FileResponse":
        path = (root / request.match_info["path"]).resolve()
        if not (path.is_file() and path.is_relative_to(root)):
            raise web.HTTPNotFound()
        return web.FileResponse(path)

    return send


def watch_queue(look: Callable[[dict[str, dict]], None]) -> None:
    """Call ``look`` with the nodes by id of each graph that is queued from now on, before ComfyUI validates it."""

    def remember(data: dict) -> dict:
        # A script may post anything, and ComfyUI has not looked at it yet.
        prompt = data.get("prompt") if isinstance(data, dict) else None
        needed = _needed(_nodes_of(prompt), data.get("partial_execution_targets") if isinstance(data, dict) else None)
        for node in _failed & needed.keys():
            # One of core's may run without anything of ours, as a LoRA of strength 0 does.
            _forget(node)
        look(needed)
        return data

    server = comfyui.server()
    if server is not None:
        server.add_on_prompt_handler(remember)


def _nodes_of(prompt: Any) -> dict[str, dict]:
    """Return what of a graph is nodes."""
    return {
        key: node
        for key, node in (prompt.items() if isinstance(prompt, dict) else ())
        if isinstance(node, dict) and isinstance(node.get("inputs", {}), dict)
    }


def _needed(graph: dict[str, dict], targets: Any) -> dict[str, dict]:
    """Return the nodes that ComfyUI will run: those that an output of the graph is made of.

    Args:
        targets: the outputs that were asked for; all of them unless it is a list.
    """
    classes, found = comfyui.node_classes(), dict[str, dict]()
    if not classes:
        return graph
    ahead = [
        key
        for key, node in graph.items()
        if getattr(classes.get(str(node.get("class_type"))), "OUTPUT_NODE", False)
        and (not isinstance(targets, list) or key in targets)
    ]
    while ahead:
        key = ahead.pop()
        if key in graph and key not in found:
            found[key] = graph[key]
            links = graph[key].get("inputs", {}).values()
            ahead += [link[0] for link in links if isinstance(link, list) and link and isinstance(link[0], str)]
    return found


def offer(replacements: Sequence[tuple[str, str, dict[str, str], list[str]]]) -> None:
    """Have ComfyUI's page offer nodes in the place of ones that are missing, where it knows how.

    Args:
        replacements: the missing node's id, the new one's, the old input by the new one's name, and the old one's
            widgets in their order. The first output of both is the same.
    """
    manager: Any = getattr(comfyui.server(), "node_replace_manager", None)
    if manager is None:
        return
    for old, new, inputs, widgets in replacements:
        mapping = [{"new_id": ours, "old_id": theirs} for ours, theirs in inputs.items()]
        outputs = [{"new_idx": 0, "old_idx": 0}]
        manager.register(comfyui.comfy_api.latest.io.NodeReplace(new, old, widgets, mapping, outputs))


def running_node() -> str | None:
    """Return the id of the node that ComfyUI validates or runs; None outside of it."""
    return getattr(_context(), "node_id", None)


def is_connected(prompt: dict | None, node: str | None, slot: int) -> bool:
    """Say whether anything that is run of a graph takes an output of a node; False where the graph is unknown."""
    return any(
        [node, slot] == link
        for other in _needed(_nodes_of(prompt), None).values()
        for link in other.get("inputs", {}).values()
    )


def show(text: str, node: str | None = None) -> None:
    """Show a text on a node, or the one that is running, in the page's language and each line printable, if ComfyUI's
    page can. The caller logs what must not be missed."""
    server, node = comfyui.server(), node or running_node()
    if node is not None and hasattr(server, "send_progress_text"):
        # Nodes that are drawn by Vue read it as Markdown, where two spaces keep the break of a line. Of no text at all
        # the page takes no notice.
        lines = "  \n".join(short(line, _LINE) for line in said(text).splitlines())
        server.send_progress_text(lines or " ", node)


def _forget(node: str | None) -> None:
    """Take off a node why it failed."""
    if node in _failed:
        _failed.discard(node)
        show("", node)


@contextmanager
def failures_shown() -> Iterator[None]:
    """Show on the node that is running, one of ours or of core's, why it failed, until it runs again, and raise that in
    the page's language: ComfyUI's page tells where in the code an error came from, and not what it says.

    Raises:
        ValueError: in the page's language, where one was raised.
        RuntimeError: likewise; and where a package is missing or cannot be imported for another one.
        Exception: anything else, such as a full disk, as it is.
    """
    node = running_node()
    _forget(node)
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "InterruptProcessingException":
            # Cancelled by its user: an Exception in older versions of ComfyUI.
            raise
        # A library's import may fail in any way.
        told = import_failure(error) or error
        in_words = isinstance(told, ValueError | RuntimeError | ImportError)
        # The page prints a class with its module and before its sentence: of the engine's own, nobody needs that.
        plain, words = ValueError if isinstance(told, ValueError) else RuntimeError, said(str(told))
        if node is not None:
            _failed.add(node)
            # Some say nothing without their class: MemoryError, or KeyError, which has the key alone.
            show(words if in_words and words else f"{type(told).__name__}: {words}".removesuffix(": "), node)
        if in_words and (type(told).__module__.startswith(_PACK) or words != str(error)):
            # The log has both, as one is the other's cause: the English sentence and the page's.
            raise plain(words) from error
        raise


def tell(text: str, warns: bool = False) -> None:
    """Log a report of the node that is running, and show it on the node."""
    logger.log(logging.WARNING if warns else logging.INFO, "%s", text)
    show(text)


def pictures(picture: "Image") -> dict:
    """Save a picture in ComfyUI's temp folder, and return what a node gives as its ``ui`` to show it; nothing without
    ComfyUI, or where it cannot be saved: what the node does goes on without it."""
    if not comfyui.IN_COMFYUI:
        return {}
    folder = Path(comfyui.folder_paths.get_temp_directory())
    name = f"cogvideox15_{uuid.uuid4().hex}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, compress_level=1)
    except OSError as error:
        logger.warning("A picture for the node could not be saved in %s: %s", folder, reason(error))
        return {}
    return {"images": [{"filename": name, "subfolder": "", "type": "temp"}]}


def show_pictures(pictures: dict) -> None:
    """Show what ``pictures`` gave on the node that is running, at once: for a node that is about to raise an error, and
    so returns nothing."""
    server, context = comfyui.server(), _context()
    if pictures and server is not None and context is not None:
        told = {
            "node": context.node_id,
            "display_node": context.node_id,
            "output": pictures,
            "prompt_id": context.prompt_id,
        }
        server.send_sync("executed", told, server.client_id)


def _context() -> Any:
    """Return what ComfyUI says of the node and prompt that it validates or runs; None outside of it."""
    return comfyui.comfy_execution.utils.get_executing_context() if comfyui.IN_COMFYUI else None
