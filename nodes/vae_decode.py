"""CogVideoX-1.5 VAE Decode: latents to frames."""

from . import host
from .base import IN_PAIRS, VAE, Node


class VAEDecode(Node):
    DISPLAY_NAME = "CogVideoX-1.5 VAE Decode"
    DESCRIPTION = (
        "Turns the finished latents into frames with the checkpoint's own VAE, exactly as diffusers does untiled, in "
        "as much memory as is free: without seams, as nothing is tiled, and without running out. Can be cancelled at "
        "any time."
    )
    SEARCH_ALIASES = [
        "CogVideo Decode",
        "cogvideo decode",
        "cogvideox vae",
        "latent to image",
        "decode video",
        "解码视频",
    ]
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("The video's frames, for CogVideoX-1.5 Black Frame Check and Create Video.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The sampler's latents."}),
                "vae": VAE,
            }
        }

    def execute(self, samples, vae):
        from ..cogvideox.memory import WANTED_BYTES
        from ..cogvideox.vae import decode

        vae = host.own_vae(vae)
        host.make_room(vae.weights, WANTED_BYTES)
        with host.saving_latents(samples["samples"]):
            in_pairs = samples.get(IN_PAIRS)
            return (decode(vae, samples["samples"], events=host.NodeEvents(), in_pairs=in_pairs),)
