"""CogVideoX-1.5 Super-Resolution: a clip made larger by DOVE or SparkVSR."""

import logging

from ..cogvideox.choices import AUTO, SUPER_RESOLUTION, check_choice
from ..cogvideox.words import short
from . import host
from .base import VAE, Node
from .queued import UNKNOWN

logger = logging.getLogger(__name__)


class SuperResolution(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Super-Resolution"
    DESCRIPTION = (
        "Makes a clip larger and clearer in one step of a checkpoint that was trained for it: DOVE, or SparkVSR, which "
        "can also be shown some frames as they should be. Any size and length; as the authors' own scripts do it, and "
        "in pieces only where the memory does not hold all at once."
    )
    SEARCH_ALIASES = [
        "upscale video",
        "video super resolution",
        "vsr",
        "dove",
        "sparkvsr",
        "restore",
        "enhance",
        "cogvideo upscale",
        "放大视频",
        "视频放大",
        "高清",
    ]
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("The larger frames, for CogVideoX-1.5 Black Frame Check and Create Video.",)

    FIELD = "kind"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("COGVIDEOX_MODEL", {"tooltip": "DOVE's or SparkVSR's transformer, from the model loader."}),
                "vae": VAE,
                "images": ("IMAGE", {"tooltip": "The frames of one clip, of any size and length."}),
                "scale": (
                    "INT",
                    {
                        "default": 4,
                        "min": 1,
                        "max": 8,
                        "tooltip": (
                            "How many times as wide and high the clip becomes. The models were trained with 4; 1 only "
                            "makes it clearer."
                        ),
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 42,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "control_after_generate": True,
                        "tooltip": (
                            "Draws the sample of the VAE's posterior that the step starts from. The authors' scripts "
                            "use 42."
                        ),
                    },
                ),
            },
            "optional": {
                "text_encoder": (
                    "COGVIDEOX_TEXT_ENCODER,CLIP",
                    {
                        "tooltip": (
                            "Encodes the empty prompt. Its embedding is kept in models/CogVideo/prompt_embeddings: "
                            "from then on this can be left unconnected, which spares loading T5."
                        )
                    },
                ),
                "references": (
                    "IMAGE",
                    {"tooltip": "SparkVSR only: some frames of the clip as they should be, of any size."},
                ),
                "reference_frames": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": (
                            "Which frames of the clip the references are, counted from 0, each 4 or more after the one "
                            "before: 0, 24, 48."
                        ),
                    },
                ),
                "kind": (
                    list(SUPER_RESOLUTION),
                    {
                        "default": AUTO,
                        "tooltip": (
                            "What the checkpoint is. auto: DOVE with 16 input channels; SparkVSR with 32, if its name "
                            "says so, as image-to-video models have 32 too."
                        ),
                    },
                ),
                "reference_guidance": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 20.0,
                        "step": 0.1,
                        "round": 0.01,
                        "advanced": True,
                        "tooltip": (
                            "SparkVSR only: how strictly the references are followed. 1 is as trained; other values "
                            "take twice the time."
                        ),
                    },
                ),
            },
        }

    @classmethod
    def checks(cls, scale=None, reference_frames=None, kind=None, reference_guidance=None):
        from ..cogvideox.super_resolution import check_reference_guidance, check_scale, read_reference_frames

        return [
            ("scale", check_scale, scale),
            ("reference_frames", read_reference_frames, reference_frames),
            ("kind", check_choice, "kind", kind, SUPER_RESOLUTION),
            ("reference_guidance", check_reference_guidance, reference_guidance),
        ]

    @classmethod
    def foresee(cls, model, kind=AUTO, text_encoder=None, references=None, reference_frames="", **_):
        from ..cogvideox.super_resolution import check_references, find_kind

        if UNKNOWN in (model, kind):
            return None
        found = find_kind(model, kind)
        if reference_frames is not UNKNOWN:
            check_references(found, None if references is not None else 0, reference_frames)
        if text_encoder is None:
            _stored(model)
        return None

    def execute(
        self,
        model,
        vae,
        images,
        scale=4,
        seed=42,
        text_encoder=None,
        references=None,
        reference_frames="",
        kind=AUTO,
        reference_guidance=1.0,
    ):
        from ..cogvideox.memory import WANTED_BYTES
        from ..cogvideox.pictures import check_images
        from ..cogvideox.super_resolution import check_enlarged, check_references, check_scale, find_kind, upscale

        # Before T5 is loaded.
        images = check_images(images, "images")
        references = None if references is None else check_images(references, "references")
        found = find_kind(model, kind)
        check_references(found, 0 if references is None else len(references), reference_frames, len(images))
        check_scale(scale)
        frames, height, width = images.shape[:3]
        check_enlarged(found, frames, height, width, scale)
        vae = host.own_vae(vae)
        embeddings = _stored(model) if text_encoder is None else _kept(text_encoder, model)
        for weights in (vae.weights, model.weights):
            host.make_room(weights, WANTED_BYTES)
        with host.saving_latents():
            larger = upscale(
                model,
                vae,
                images,
                embeddings,
                scale=scale,
                seed=seed,
                kind=found,
                references=references,
                reference_frames=reference_frames,
                reference_guidance=reference_guidance,
                events=host.NodeEvents(),
            )
        return (larger,)


def _width(model):
    from ..cogvideox.variants import full_config

    return full_config(model.weights.config)["text_embed_dim"]


def _stored(model):
    """Read the empty prompt's embedding for a model from its file.

    Raises:
        ValueError: if there is none, or it is another model's.
    """
    from ..cogvideox.text import empty_prompt_files, read_embeddings

    width = _width(model)
    own, *others = (host.embedding_file(name) for name in empty_prompt_files(width))
    found = next((path for path in (own, *others) if path.is_file()), None)
    if found is None:
        raise ValueError(
            "No text encoder is connected, and the empty prompt's embedding, which the step needs, is not kept yet: "
            f"there is no {short(own, 400)}. Connect the text_encoder of the model loader once, which writes it."
        )
    return read_embeddings(found, width)


def _kept(text_encoder, model):
    """Encode the empty prompt, and keep its embedding in a file unless one is there, or none can be written."""
    from ..cogvideox.text import check_width, empty_prompt_files, write_embeddings
    from .text_encode import embeddings_of

    embeddings = embeddings_of(text_encoder, "")
    check_width(embeddings, _width(model))
    path = host.embedding_file(empty_prompt_files(embeddings.shape[2])[0])
    if not path.exists():
        try:
            write_embeddings(embeddings, path)
        except ValueError as error:
            # It is made, and only the next run would be spared loading T5.
            host.NodeEvents().note(str(error))
            return embeddings
        logger.info("%s", _where_kept(short(path, 400)))
        # On the node the folder as people call it: a whole path would be cut within its words.
        host.show(_where_kept("/".join(path.parts[-3:-1])))
    return embeddings


def _where_kept(path: str) -> str:
    return (
        f"The empty prompt's embedding is now in {path}: text_encoder can be left unconnected, and T5 is not loaded "
        "then."
    )
