"""The only file that knows ComfyUI: model folders, device, progress, interruption, room on the device.

Without ComfyUI each function answers with plain torch, so that every node also runs in a script and in a test.
"""

import importlib.util
import os
import re
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..cogvideox.words import listed, reason, short

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..cogvideox.checkpoint.catalogue import Entry
    from ..cogvideox.precision.hardware import Hardware
    from ..cogvideox.weights import Weights

IN_COMFYUI = importlib.util.find_spec("folder_paths") is not None and importlib.util.find_spec("comfy") is not None
#: The pack's own folder under models/, and the one ComfyUI has for checkpoints in diffusers layout.
_FOLDERS = ("CogVideo", "diffusers")
#: Letters of a line on a node.
_LINE = 2000
_PART_FOLDERS = {"text_encoder": "text_encoders", "vae": "vae"}

if IN_COMFYUI:
    import comfy.cli_args
    import comfy.model_management
    import comfy.utils
    import comfy_execution.utils
    import folder_paths
    from server import PromptServer

    folder_paths.add_model_folder_path("CogVideo", str(Path(folder_paths.models_dir) / "CogVideo"))


def serve_files() -> None:
    """Serve the help pages and the example workflows where ComfyUI's page asks for them, whatever the pack's folder is
    called.

    ComfyUI serves both under the folder's name. But aiohttp finds no static route whose path holds a space or a letter
    beyond ASCII (https://github.com/aio-libs/aiohttp/issues/13433), and the page cuts the name at dots. Those routes,
    and other packs', come before these, as they are more specific.
    """
    server = getattr(PromptServer, "instance", None) if IN_COMFYUI else None
    if server is None:
        return
    pack = Path(__file__).parents[1]
    for address, folder in (("extensions", "web"), ("workflow_templates", "example_workflows")):
        server.routes.get(f"/{address}/{{pack:{names_in_urls(pack.name)}}}/{{path:.+}}")(
            _send_from((pack / folder).resolve())
        )


def names_in_urls(folder: str) -> str:
    """A regular expression, without braces, for the names under which the page knows the pack in ``folder``: its own,
    and it cut at dots."""
    names = {folder, re.split(r"[.@]", folder)[0]} - {""}
    return "|".join("".join(f"\\U{ord(letter):08x}" for letter in name) for name in sorted(names))


def _send_from(root: Path):
    from aiohttp import web

    async def send(request):
        path = (root / request.match_info["path"]).resolve()
        if not (path.is_file() and path.is_relative_to(root)):
            raise web.HTTPNotFound()
        return web.FileResponse(path)

    return send


def checkpoints() -> "list[Entry]":
    """The CogVideoX checkpoints in ComfyUI's model folders and in the Hugging Face cache: folders of diffusers and SAT,
    and single files."""
    from ..cogvideox.checkpoint.catalogue import list_checkpoints
    from ..cogvideox.checkpoint.folders import hub_cache

    return list_checkpoints(
        [*_roots(*_FOLDERS), *([hub_cache()] if IN_COMFYUI else [])],
        _roots("CogVideo", "diffusion_models", "checkpoints"),
    )


def parts(kind: str) -> "list[Entry]":
    """The files of text encoders or VAEs that run with a checkpoint that is there, the most exact (least rounded)
    first."""
    from ..cogvideox.checkpoint.catalogue import list_parts

    widths = {0, *(entry.width for entry in checkpoints())}
    # Where no checkpoint tells what it reads, every text encoder may be the right one.
    found = [entry for entry in list_parts(kind, _roots(_PART_FOLDERS[kind])) if widths == {0} or entry.width in widths]
    return sorted(found, key=lambda entry: entry.rounding)


def checkpoint_path(choice: str) -> Path:
    """Where the checkpoint lies that was chosen by its label or name; outside ComfyUI ``choice`` is a path.

    Raises:
        ValueError: if ComfyUI's model folders hold no such checkpoint, or one that cannot run.
    """
    from ..cogvideox.checkpoint.catalogue import find_entry
    from ..cogvideox.checkpoint.layout import open_checkpoint

    if not IN_COMFYUI:
        return _typed(choice, "checkpoint")
    found = checkpoints()
    entry = find_entry(found, choice)
    if entry is not None:
        return entry.path
    there = _unlisted((*_FOLDERS, "diffusion_models"), choice)
    if there is not None:
        # It says why it is not offered.
        open_checkpoint(there)
        return there
    places = _places(_roots(*_FOLDERS))
    if not found:
        raise ValueError(
            f"No CogVideoX checkpoint was found in {places}, so there is nothing to load. Download one, for example "
            "zai-org/CogVideoX1.5-5B from huggingface.co, into a folder of its own there, then press R to refresh."
        )
    raise ValueError(
        f"There is no CogVideoX checkpoint called {short(repr(choice))} in {places}. Choose one that is there "
        f"({listed((entry.name for entry in found), 20)}), or put {short(choice)} there and press R to refresh."
    )


def part_path(kind: str, choice: str) -> Path:
    """Where the text encoder or VAE lies that was chosen by its label or name; outside ComfyUI ``choice`` is a path.

    Raises:
        ValueError: if ComfyUI's model folders hold no such file, or one that cannot run.
    """
    from ..cogvideox.checkpoint.catalogue import find_entry
    from ..cogvideox.checkpoint.layout import open_part

    what = kind.replace("_", " ")
    if not IN_COMFYUI:
        return _typed(choice, what)
    entry = find_entry(parts(kind), choice)
    there = _unlisted((_PART_FOLDERS[kind],), choice) if entry is None else None
    if there is not None:
        # It says why it is not offered.
        open_part(there, kind)
        return there
    if entry is None:
        there = listed((entry.name for entry in parts(kind)), 20) or "none"
        places = _places(_roots(_PART_FOLDERS[kind]))
        raise ValueError(
            f"There is no {what} for CogVideoX called {short(repr(choice))} in {places} (there: {there}). Choose "
            "another, or auto."
        )
    return entry.path


def _unlisted(names: tuple[str, ...], choice: str) -> Path | None:
    """What lies under the chosen name in the folders registered under ``names``, though it is not offered."""
    from ..cogvideox.checkpoint.catalogue import SEPARATOR

    name = choice.split(SEPARATOR)[0]
    # Below the folders only.
    places = [(root, root / name) for root in _roots(*names) if name and ".." not in Path(name).parts]
    return next((place for root, place in places if place.is_relative_to(root) and os.path.exists(place)), None)


def loras() -> list[str]:
    """The LoRAs in ComfyUI's folders that can be CogVideoX's, by their path below the folder."""
    from ..cogvideox.checkpoint.catalogue import list_parts

    return [entry.name for entry in list_parts("lora", _lora_roots())]


def lora_path(choice: str) -> Path:
    """Where the LoRA lies that was chosen by its name; outside ComfyUI ``choice`` is a path.

    Raises:
        ValueError: if ComfyUI's folders hold no such file.
    """
    if not choice:
        raise ValueError(
            "No LoRA is chosen, so there is none to apply. Put one into models/loras, press R to refresh, and choose "
            "it in lora_name."
        )
    if not IN_COMFYUI:
        return _typed(choice, "LoRA")
    from ..cogvideox.checkpoint.catalogue import find_entry, list_parts

    # Below the folders only; and a workflow that was made on Windows has it with backslashes.
    for name in (choice, choice.replace("\\", "/")):
        for root in _lora_roots():
            path = root / name
            if ".." not in path.parts and path.is_relative_to(root) and os.path.isfile(path):
                return path
    entry = find_entry(list_parts("lora", _lora_roots()), choice)
    if entry is not None:
        # Its name is cut in the list, or has letters that cannot be printed.
        return entry.path
    raise ValueError(
        f"There is no LoRA called {short(repr(choice))} in {_places(_lora_roots())}. Put it there and press R to "
        "refresh, or choose another."
    )


def _typed(choice: str, what: str) -> Path:
    """A path that was typed in, outside ComfyUI.

    Raises:
        ValueError: if nothing is there.
    """
    try:
        path = Path(choice)
        os.stat(path)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"There is no {what} at {short(repr(choice), 400)} ({reason(error)}), so it cannot be loaded. Check the "
            "path."
        ) from error
    return path


def _places(roots: list[Path]) -> str:
    return " or ".join(short(root, 400) for root in roots)


def _lora_roots() -> list[Path]:
    return _roots("loras") + [root / "loras" for root in _roots("CogVideo")]


def download_folder() -> Path:
    """Where downloaded checkpoints go: the first of ComfyUI's CogVideo folders, or ``models`` here."""
    return _roots("CogVideo")[0] if IN_COMFYUI else Path("models")


def tokenizer_folder() -> Path | None:
    """The T5 tokenizer that ComfyUI ships, for text encoders in files of their own."""
    folder = Path(comfy.utils.__file__).parent / "text_encoders" / "t5_tokenizer" if IN_COMFYUI else None
    return folder if folder is not None and folder.is_dir() else None


def _roots(*names: str) -> list[Path]:
    """The folders that ComfyUI registers under these names."""
    if not IN_COMFYUI:
        return []
    known = folder_paths.folder_names_and_paths
    return list(
        dict.fromkeys(Path(path) for name in names if name in known for path in folder_paths.get_folder_paths(name))
    )


#: The graph that is being queued, or was last: ComfyUI validates nodes one by one, and shows none of them the others.
_queued: dict = {}


def watch_queue() -> None:
    """From now on know the graph that is queued, for ``upstream``."""
    server = getattr(PromptServer, "instance", None) if IN_COMFYUI else None
    if server is not None:
        server.add_on_prompt_handler(_remember)


def _remember(data: dict) -> dict:
    # Whatever a script posts; ComfyUI has not looked at it yet.
    prompt = data.get("prompt") if isinstance(data, dict) else None
    _queued.clear()
    if isinstance(prompt, dict):
        _queued.update(
            (key, node)
            for key, node in prompt.items()
            if isinstance(node, dict) and isinstance(node.get("inputs", {}), dict)
        )
    return data


def upstream(node: str, socket: str) -> list[tuple[str, dict]]:
    """The nodes of the graph that is being queued from which a node's socket comes, by their sockets of the same name,
    the nearest first: class and inputs of each. Where another pack's node stands between, the chain ends."""
    found, seen = [], set()
    while node in _queued and node not in seen:
        seen.add(node)
        link = _queued[node].get("inputs", {}).get(socket)
        if not isinstance(link, list) or len(link) != 2 or not isinstance(link[0], str) or link[0] not in _queued:
            break
        node = link[0]
        found.append((_queued[node].get("class_type", ""), _queued[node].get("inputs", {})))
    return found


def is_connected(prompt: dict | None, node: str | None, slot: int) -> bool:
    """Whether something in a graph that is being run takes an output of a node; False where the graph is not known."""
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    return any(
        [node, slot] == link
        for other in nodes
        if isinstance(other, dict)
        for link in (other.get("inputs") or {}).values()
    )


def device() -> torch.device:
    """The device ComfyUI runs models on, or torch's default."""
    return comfy.model_management.get_torch_device() if IN_COMFYUI else hardware().device


def hardware() -> "Hardware":
    """``device``, and the dtypes ComfyUI was started with."""
    from ..cogvideox.precision.hardware import Hardware

    return Hardware.detect(device(), forced_dtypes(comfy.cli_args.args)) if IN_COMFYUI else Hardware.detect()


def forced_dtypes(arguments) -> dict[str, tuple[torch.dtype, str]]:
    """What ComfyUI's own flags ask for: per part, the dtype and the flag. ``arguments`` is ``comfy.cli_args.args``."""
    short = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    flags = {"transformer": "unet", "text_encoder": "text-enc", "vae": "vae"}
    forced: dict[str, tuple[torch.dtype, str]] = {}
    for kind, suffix in flags.items():
        # The general flags come first: ComfyUI turns --force-fp16 into --fp16-unet itself.
        for flag in ("force-fp32", "force-fp16", *(f"{name}-{suffix}" for name in short)):
            if (
                kind not in forced
                and getattr(arguments, flag.replace("-", "_"), False)
                and (kind == "transformer" or flag != "force-fp16")
            ):
                forced[kind] = (short[flag.replace("force-", "").split("-")[0]], f"--{flag}")
    return forced


def encode_with_clip(clip, prompt: str, length: int) -> torch.Tensor:
    """The embeddings that ComfyUI's own T5 gives, as CogVideoX was trained with them: ``length`` tokens, padding
    included, no mask.

    The T5 inside a CLIP is asked directly: what the CLIP's type (cogvideox, sd3, mochi, …) does around it, such as
    other lengths, masks or weighted words, is not what CogVideoX wants.

    Returns:
        float32 ``[1, length, 4096]`` on the CPU.

    Raises:
        ValueError: if the CLIP holds no T5-XXL.
    """
    # Models of one encoder call it by its name, and their tokenizers clip_ and its name.
    model, tokenizer = (
        next(
            (getattr(holder, name) for name in ("t5xxl", "clip_t5xxl") if getattr(holder, name, None) is not None), None
        )
        for holder in (clip.cond_stage_model, clip.tokenizer)
    )
    if model is None or tokenizer is None:
        raise ValueError(
            f"The CLIP that is connected is a {type(clip.cond_stage_model).__name__} without a T5-XXL, and CogVideoX "
            "reads T5-XXL's embeddings only. Load a t5xxl file in CLIPLoader with type cogvideox, or use the "
            "text_encoder of CogVideoX-1.5 Model Loader."
        )
    ids = tokenizer.tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
    clip.cond_stage_model.reset_clip_options()
    clip.load_model()
    clip.cond_stage_model.set_clip_options({"execution_device": clip.patcher.load_device})
    masks = model.enable_attention_masks
    try:
        model.enable_attention_masks = False
        return model.encode([ids])[0].float().cpu()
    finally:
        model.enable_attention_masks = masks


def show(text: str) -> None:
    """Show a text on the node that is running, each line printable, where ComfyUI's page can; the caller logs it too if
    it must not be missed."""
    server, context = _running()
    if hasattr(server, "send_progress_text"):
        server.send_progress_text("\n".join(short(line, _LINE) for line in text.splitlines()), context.node_id)


def _running() -> tuple:
    """ComfyUI's server, and the node and prompt that are being executed; None for both where there is no page to
    tell."""
    context = comfy_execution.utils.get_executing_context() if IN_COMFYUI else None
    server = getattr(PromptServer, "instance", None) if context is not None else None
    return (server, context) if server is not None else (None, None)


def pictures(picture: "Image") -> dict:
    """What a node returns as its ``ui`` to show a picture on it, kept in ComfyUI's temp folder; nothing without
    ComfyUI."""
    if not IN_COMFYUI:
        return {}
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"cogvideox15_{uuid.uuid4().hex}.png"
    picture.save(folder / name, compress_level=1)
    return {"images": [{"filename": name, "subfolder": "", "type": "temp"}]}


def show_pictures(pictures: dict) -> None:
    """Show what ``pictures`` gave on the node that is running, now: for a node that is about to raise an error, and so
    returns nothing."""
    server, context = _running()
    if pictures and server is not None:
        told = {
            "node": context.node_id,
            "display_node": context.node_id,
            "output": pictures,
            "prompt_id": context.prompt_id,
        }
        server.send_sync("executed", told, server.client_id)


def make_room(weights: "Weights", room: int = 0) -> None:
    """Tell ComfyUI that a part is about to run on its device, and needs ``room`` bytes beside its weights: it unloads
    other models for that, and from now on knows of this one, to unload it in its turn when others need room."""
    if IN_COMFYUI:
        comfy.model_management.load_models_gpu(
            [_registered.setdefault(weights, _Registered(weights))], memory_required=room
        )


class _Registered:
    """A part as ComfyUI's list of loaded models has it: what it asks of a ``ModelPatcher``. Lives as long as the part's
    weights."""

    parent = None

    def __init__(self, weights: "Weights"):
        self._weights = weakref.ref(weights)
        self.load_device, self.offload_device, self.clone_base_uuid = weights.device, torch.device("cpu"), uuid.uuid4()

    @property
    def model(self) -> "Weights | None":
        return self._weights()

    def model_size(self) -> int:
        # What is offloaded by blocks or layers is never there as a whole.
        return self.model.nbytes if self.model.memory in ("auto", "gpu") else 0

    def loaded_size(self) -> int:
        return min(self.model.resident, self.model_size())

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def partially_load(self, device, extra_memory=0, force_patch_weights=False) -> int:
        """Nothing: the engine brings the weights when they run, in the way that fits."""
        return 0

    def partially_unload(self, device, memory_to_free=0, **_) -> int:
        freed = self.loaded_size()
        self.detach()
        return freed

    def detach(self, unpatch_all=True) -> None:
        if unpatch_all and self.model is not None:
            self.model.park()

    def is_clone(self, other) -> bool:
        return other is self

    def is_dynamic(self) -> bool:
        return False

    def model_patches_to(self, device) -> None:
        pass

    def model_patches_models(self) -> list:
        return []

    def model_dtype(self) -> None:
        return None

    def lowvram_patch_counter(self) -> int:
        return 0


_registered: "weakref.WeakKeyDictionary[Weights, _Registered]" = weakref.WeakKeyDictionary()


@contextmanager
def saving_latents(samples: torch.Tensor | None = None) -> Iterator[None]:
    """Where memory runs out for good, save ``samples``, or what the error brings, where Load Latent finds it, and say
    so in the error."""
    from ..cogvideox.sentinel import OutOfMemory
    from ..cogvideox.video import write_latent

    try:
        yield
    except OutOfMemory as error:
        latents = samples if error.latents is None else error.latents
        if latents is None:
            raise
        path = write_latent(latents, Path(folder_paths.get_input_directory()) if IN_COMFYUI else Path("."))
        raise RuntimeError(
            f"{error} The latents are not lost: {path.name} can be opened with Load Latent (it is {path})."
        ) from error


def stop_if_cancelled() -> None:
    """Stop the run here if the user pressed Cancel."""
    if IN_COMFYUI:
        comfy.model_management.throw_exception_if_processing_interrupted()


def vae_callbacks() -> dict[str, Callable[..., None]]:
    """What the engine's encode and decode tell, to where a person sees it."""
    return dict(on_chunk=progress(), on_load=progress(), on_heal=show, on_strip=stop_if_cancelled)


def progress() -> Callable[..., None]:
    """A callback ``(done, total, ...)`` that moves the node's progress bar and stops the run if the user pressed
    Cancel."""
    if not IN_COMFYUI:
        return lambda done, total, *_: None
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int, *_) -> None:
        stop_if_cancelled()
        bar.update_absolute(done, total)

    return report


def sampling_progress(fps: int) -> Callable[[int, int, torch.Tensor], None]:
    """``progress`` for the sampler, with a preview of the video so far, at the model's frames a second, where ComfyUI's
    setting asks for one.

    The preview is an animated PNG: pages that show it as an image play it, others show its first frame.
    """
    if not IN_COMFYUI or comfy.cli_args.args.preview_method == comfy.cli_args.LatentPreviewMethod.NoPreviews:
        return progress()
    from ..cogvideox.preview import preview_frames
    from ..cogvideox.variants import TEMPORAL_COMPRESSION

    size, milliseconds = getattr(comfy.cli_args.args, "preview_size", 512), 1000 * TEMPORAL_COMPRESSION // fps
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int, clean: torch.Tensor) -> None:
        stop_if_cancelled()
        frames = preview_frames(clean, size)
        # The server asks the picture to save itself, and knows of one frame only.
        frames[0].save = partial(_save_animation, frames, milliseconds)
        bar.update_absolute(done, total, ("PNG", frames[0], None))

    return report


def _save_animation(frames: "list[Image]", milliseconds: int, file, *_, **__) -> None:
    type(frames[0]).save(
        frames[0], file, "PNG", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, compress_level=1
    )
