"""What a person sees in the graph: one file a node."""

from .black_frame_check import BlackFrameCheck
from .downloader import Downloader
from .empty_latent import EmptyLatent
from .model_loader import ModelLoader
from .sampler import Sampler
from .text_encode import TextEncode
from .vae_decode import VAEDecode

_NODES = {
    "CogVideoX15ModelLoader": ModelLoader,
    "CogVideoX15TextEncode": TextEncode,
    "CogVideoX15EmptyLatent": EmptyLatent,
    "CogVideoX15Sampler": Sampler,
    "CogVideoX15VAEDecode": VAEDecode,
    "CogVideoX15BlackFrameCheck": BlackFrameCheck,
    "CogVideoX15Downloader": Downloader,
}
NODE_CLASS_MAPPINGS = dict(_NODES)
NODE_DISPLAY_NAME_MAPPINGS = {node_id: node.DISPLAY_NAME for node_id, node in _NODES.items()}
