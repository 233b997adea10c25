"""CogVideoX-1.5 VAE Encode: frames to latents."""

from . import host
from .base import VAE, Node


class VAEEncode(Node):
    DISPLAY_NAME = "CogVideoX-1.5 VAE Encode"
    DESCRIPTION = (
        "Turns a video's frames into latents with the checkpoint's own VAE, for the sampler with denoise below 1 "
        "(video to video). A clip that is not 16N+1 frames long is cut, or its last frame repeated, and one whose "
        "sides are not multiples of 16 is cropped; both are said on the node."
    )
    SEARCH_ALIASES = [
        "CogVideo ImageEncode",
        "cogvideo encode",
        "cogvideox vae encode",
        "video to video",
        "v2v",
        "image to latent",
        "视频生视频",
    ]
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The clip's latents, for the sampler's latent_image.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "The frames of one video. CogVideoX-1.5 was trained at 1360x768 and 16 frames a second."
                        )
                    },
                ),
                "vae": VAE,
            }
        }

    def execute(self, images, vae):
        from ..cogvideox.memory import WANTED_BYTES
        from ..cogvideox.pictures import check_images, fit_grid, fit_length
        from ..cogvideox.vae import encode

        vae = host.own_vae(vae)
        images, cropped = fit_grid(check_images(images, "images"))
        images, cut = fit_length(images, vae.frame_step, vae.in_pairs)
        notes = [note for note in (cropped, cut) if note]
        if notes:
            host.tell("\n".join(notes), warns=True)
        host.make_room(vae.weights, WANTED_BYTES)
        return ({"samples": encode(vae, images, events=host.NodeEvents())},)
