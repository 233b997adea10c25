"""What the nodes know of ComfyUI: its model folders, its page, its memory, its CLIP and its progress bar.

Nothing else in the pack imports ComfyUI. Without ComfyUI each function answers with plain torch, so that every node
also runs in a script and in a test.
"""

from .clip import encode_with_clip
from .core import to_core, watched
from .folders import (
    bring_example_clip,
    checkpoint_path,
    checkpoints,
    download_folder,
    embedding_file,
    lora_path,
    loras,
    part_path,
    parts,
    tokenizer_folder,
)
from .given import own_text_encoder, own_vae
from .language import said, watch_language
from .memory import device, forced_dtypes, hardware, make_room
from .page import (
    failures_shown,
    is_connected,
    names_in_urls,
    offer,
    pictures,
    running_node,
    serve_files,
    show,
    show_pictures,
    tell,
    watch_queue,
)
from .progress import NodeEvents, saving_latents

__all__ = [
    "NodeEvents",
    "bring_example_clip",
    "checkpoint_path",
    "checkpoints",
    "device",
    "download_folder",
    "embedding_file",
    "encode_with_clip",
    "failures_shown",
    "forced_dtypes",
    "hardware",
    "is_connected",
    "lora_path",
    "loras",
    "make_room",
    "names_in_urls",
    "offer",
    "own_text_encoder",
    "own_vae",
    "part_path",
    "parts",
    "pictures",
    "running_node",
    "said",
    "saving_latents",
    "serve_files",
    "show",
    "show_pictures",
    "tell",
    "to_core",
    "tokenizer_folder",
    "watch_language",
    "watch_queue",
    "watched",
]
