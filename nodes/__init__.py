"""The nodes that a person sees in the graph, one file each."""

from . import host, queued
from .attention import Attention
from .black_frame_check import BlackFrameCheck
from .cache import Cache
from .compile import Compile
from .context_windows import ContextWindows
from .downloader import Downloader
from .empty_latent import EmptyLatent
from .extend import Extend
from .image_to_video import ImageToVideo
from .inpaint import Inpaint
from .join_clips import JoinClips
from .lora_loader import LoraLoader
from .model_check import ModelCheck
from .model_loader import ModelLoader
from .quantize import Quantize
from .sampler import Sampler
from .second_gpu import SecondGPU
from .super_resolution import SuperResolution
from .text_encode import TextEncode
from .to_comfyui import ToComfyUI
from .vae_decode import VAEDecode
from .vae_encode import VAEEncode
from .void import Void

_NODES = {
    "CogVideoX15ModelLoader": ModelLoader,
    "CogVideoX15TextEncode": TextEncode,
    "CogVideoX15EmptyLatent": EmptyLatent,
    "CogVideoX15ImageToVideo": ImageToVideo,
    "CogVideoX15VAEEncode": VAEEncode,
    "CogVideoX15LoraLoader": LoraLoader,
    "CogVideoX15Sampler": Sampler,
    "CogVideoX15VAEDecode": VAEDecode,
    "CogVideoX15BlackFrameCheck": BlackFrameCheck,
    "CogVideoX15Downloader": Downloader,
    "CogVideoX15Attention": Attention,
    "CogVideoX15Cache": Cache,
    "CogVideoX15Compile": Compile,
    "CogVideoX15Quantize": Quantize,
    "CogVideoX15ToComfyUI": ToComfyUI,
    "CogVideoX15ModelCheck": ModelCheck,
    "CogVideoX15ContextWindows": ContextWindows,
    "CogVideoX15Extend": Extend,
    "CogVideoX15JoinClips": JoinClips,
    "CogVideoX15SecondGPU": SecondGPU,
    "CogVideoX15SuperResolution": SuperResolution,
    "CogVideoX15Inpaint": Inpaint,
    "CogVideoX15Void": Void,
}
NODE_CLASS_MAPPINGS = dict(_NODES)
NODE_DISPLAY_NAME_MAPPINGS = {node_id: node.DISPLAY_NAME for node_id, node in _NODES.items()}
#: Nodes of ComfyUI-CogVideoXWrapper and VideoX-Fun that one of ours stands in for: its inputs by ours, and its widgets.
_REPLACED = [
    (
        "CogVideoTextEncode",
        "CogVideoX15TextEncode",
        {"text_encoder": "clip", "prompt": "prompt"},
        ["prompt", "strength", "force_offload"],
    ),
    (
        "CogVideoDecode",
        "CogVideoX15VAEDecode",
        {"vae": "vae", "samples": "samples"},
        [
            "enable_vae_tiling",
            "tile_sample_min_height",
            "tile_sample_min_width",
            "tile_overlap_factor_height",
            "tile_overlap_factor_width",
            "auto_tile_size",
        ],
    ),
    (
        "LoadCogVideoXFunModel",
        "CogVideoX15ModelLoader",
        {"model": "model", "dtype": "precision"},
        ["model", "model_type", "GPU_memory_mode", "precision"],
    ),
    (
        "LoadCogVideoXFunLora",
        "CogVideoX15LoraLoader",
        {"model": "cogvideoxfun_model", "lora_name": "lora_name", "strength": "strength_model"},
        ["lora_name", "strength_model", "lora_cache"],
    ),
]
host.serve_files()
host.watch_language()
host.bring_example_clip()
host.offer(_REPLACED)
queued.watch(_NODES)
