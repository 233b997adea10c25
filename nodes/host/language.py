"""In which language ComfyUI's page is, and what is said to it in that language; and the order of the templates there.

The page's language is the setting ``Comfy.Locale`` of its user, which ComfyUI keeps; where nobody has set it, the page
takes the browser's, which each request names in ``Accept-Language``. Scripts that send neither are answered in English.
"""

import json
import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ...cogvideox.languages import ENGLISH, supported, translate
from . import comfyui

if TYPE_CHECKING:
    from aiohttp.web import Request, StreamResponse

_PACK = Path(__file__).parents[2]
_TEMPLATES = _PACK / "example_workflows"
#: The example workflows, the first ones first. ComfyUI lists them as the folder has them, in any order.
_ORDER = (
    "text_to_video",
    "image_to_video",
    "video_to_video",
    "text_to_video_lora",
    "text_to_video_fast",
    "native_nodes",
    "long_video",
    "extend",
    "super_resolution",
    "inpaint",
    "object_removal",
)
#: Pages that are remembered at most.
_MOST_CLIENTS = 64
#: The language of the request that is being answered.
_asked: ContextVar[str | None] = ContextVar("asked", default=None)
#: The language of each page that queued something, by its client id: a graph runs after its request was answered.
_of_client: dict[Any, str] = {}


def watch_language() -> None:
    """Notice the language of each graph that is queued from now on, and give the example workflows, in their order, and
    the blocks to Chinese pages in Chinese."""
    server = comfyui.server()
    app = getattr(server, "app", None)
    if server is None or app is None or app.frozen:
        return
    from aiohttp import web

    @web.middleware
    async def in_language(
        request: "Request", handler: "Callable[[Request], Awaitable[StreamResponse]]"
    ) -> "StreamResponse":
        path = request.path.removeprefix("/api")
        if request.method == "POST" and path == "/prompt":
            _asked.set(_language_of(server, request))
        if request.method != "GET" or not path.startswith(("/workflow_templates", "/global_subgraphs")):
            return await handler(request)
        language = _language_of(server, request)
        answer = _template(path, language) or await handler(request)
        # The same address has another text once the language is changed.
        answer.headers["Cache-Control"] = "no-cache"
        if isinstance(answer, web.Response) and answer.content_type == "application/json":
            answer.text = _listed(path, answer.text or "", language)
        return answer

    app.middlewares.append(in_language)
    server.add_on_prompt_handler(_remember)


def said(text: str) -> str:
    """Say a finished English text in the language of the page that queued what is being checked or run."""
    return translate(text, _language())


def _language() -> str:
    asked = _asked.get()
    if asked is not None:
        return asked
    return _of_client.get(getattr(comfyui.server(), "client_id", None), ENGLISH)


def _remember(data: dict) -> dict:
    # A script may post anything.
    client = data.get("client_id") if isinstance(data, dict) else None
    if client is None or isinstance(client, str):
        _of_client.pop(client, None)
        _of_client[client] = _asked.get() or ENGLISH
        if len(_of_client) > _MOST_CLIENTS:
            del _of_client[next(iter(_of_client))]
    return data


def _language_of(server: Any, request: "Request") -> str:
    """Find the language of the page that sent a request, among those that we speak."""
    try:
        chosen = server.user_manager.settings.get_settings(request).get("Comfy.Locale")
    except Exception:
        # Another ComfyUI, or a user that it does not know: then the browser's, as without a setting.
        chosen = None
    if not isinstance(chosen, str):
        chosen = request.headers.get("Accept-Language", ENGLISH).split(",")[0].split(";")[0]
    return supported(chosen) or ENGLISH


def _template(path: str, language: str) -> Any:
    """Answer for a file of an example workflow, in Chinese or by its Chinese name; None for anything else."""
    from aiohttp import web

    _, pack, name = ["", *path.split("/")[2:], "", ""][:3]
    if language == ENGLISH or unquote(pack) not in {_PACK.name, re.split(r"[.@]", _PACK.name)[0]}:
        return None
    stem, dot, ending = unquote(name).rpartition(".")
    names = {_title(file.stem, language): file.stem for file in _TEMPLATES.glob("*.json")}
    file = _TEMPLATES / f"{names.get(stem, stem)}{dot}{ending}"
    if file.parent != _TEMPLATES or not file.is_file():
        return None
    if ending != "json":
        # Thumbnails have words, too.
        own = _TEMPLATES / language / file.name
        return web.FileResponse(own if own.is_file() else file) if stem in names else None
    workflow = json.loads(file.read_text(encoding="utf-8"))
    return web.json_response(workflow_in(workflow, language))


def _title(stem: str, language: str) -> str:
    return stem if language == ENGLISH else translate(stem.replace("_", " "), language)


def _listed(path: str, text: str, language: str) -> str:
    """Name the example workflows, and the blocks, in a list of all packs' in another language, and put the example
    workflows in order. What is not as it is known stays as it is."""
    if language == ENGLISH and path != "/workflow_templates":
        return text
    try:
        answer = json.loads(text)
        if path == "/workflow_templates":
            stems = sorted(answer[_PACK.name], key=lambda stem: _ORDER.index(stem) if stem in _ORDER else len(_ORDER))
            answer[_PACK.name] = [_title(stem, language) for stem in stems]
        elif path == "/global_subgraphs":
            for block in answer.values():
                _name_block(block, language)
        elif path.startswith("/global_subgraphs/"):
            _name_block(answer, language)
    except (ValueError, KeyError, TypeError, AttributeError):
        return text
    return json.dumps(answer)


def _name_block(block: dict, language: str) -> None:
    if block["info"]["node_pack"] == f"custom_nodes.{_PACK.name}":
        block["name"] = translate(block["name"], language)
        if block.get("data"):
            block["data"] = json.dumps(workflow_in(json.loads(block["data"]), language))


def workflow_in(workflow: dict, language: str) -> dict:
    """Translate what a workflow says: titles of nodes and groups, notes, names and descriptions of subgraphs. The
    workflow given is changed, and returned."""
    for graph in (workflow, *workflow.get("definitions", {}).get("subgraphs", [])):
        for holder in (graph, *graph.get("groups", ()), *graph.get("nodes", ())):
            for name in ("name", "title", "description"):
                if isinstance(holder.get(name), str):
                    holder[name] = translate(holder[name], language)
        for node in graph.get("nodes", ()):
            if node.get("type") in ("Note", "MarkdownNote"):
                node["widgets_values"] = [
                    translate(text, language) if isinstance(text, str) else text for text in node["widgets_values"]
                ]
    return workflow
