"""Describe the CogVideoX family: what each variant was trained in and which frames and sizes it was trained for.

Figures: the model cards of CogVideoX1.5-5B, CogVideoX1.5-5B-I2V, CogVideoX-5b, CogVideoX-5b-I2V and CogVideoX-2b, and
the official repository zai-org/CogVideo (Apache-2.0); of CogVideoX-Fun-V1.5-5b-InP aigc-apps/VideoX-Fun (Apache-2.0),
of VOID Netflix/void-model (Apache-2.0).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from .words import short

TRANSFORMER_CLASS = "CogVideoXTransformer3DModel"
#: part -> (what to call it, the class in its config.json)
PARTS = {
    "transformer": ("transformer", TRANSFORMER_CLASS),
    "text_encoder": ("text encoder", "T5EncoderModel"),
    "vae": ("VAE", "AutoencoderKLCogVideoX"),
}
LATENT_CHANNELS = 16
#: Pixels per latent cell in space, frames per latent frame in time (the CogVideoX VAE, all variants).
SPATIAL_COMPRESSION = 8
TEMPORAL_COMPRESSION = 4
#: Pixels per transformer token in space: 8 of the VAE times a patch of 2 (every released CogVideoX).
SIZE_STEP = 16
#: Timesteps of the noise schedule that every released model was trained with.
TRAINED_STEPS = 1000
#: ``ofs`` of the reference's image-to-video pipeline: what 1.5's image-to-video models are told besides the timestep.
OFS = 2.0
#: Tokens of the text encoder when a config does not say (all released models: 226).
DEFAULT_TEXT_TOKENS = 226
#: ``scaling_factor`` of the releases' VAEs, by the dtype that their transformers were trained in. It belongs to those:
#: the VAE itself is one for all.
LATENT_SCALES: Mapping[str, float] = {"bf16": 0.7, "fp16": 1.15258426}
#: Seconds that TeaCache's authors publish (https://github.com/ali-vilab/TeaCache, TeaCache4CogVideoX1.5) for 50 steps
#: of 81 frames of 1360x768 on one H100, by threshold; 0 is without it. Of text to video, and of image to video.
TEACACHE_SECONDS: Mapping[float, int] = {0: 465, 0.1: 322, 0.2: 260, 0.3: 204}
TEACACHE_SECONDS_I2V: Mapping[float, int] = {0: 475, 0.1: 316, 0.2: 239, 0.3: 204}
#: What a transformer reads beside the noise: nothing; the latent of a start image; a mask and the latent of a masked
#: video; the latents of a mask and of a video.
NOTHING, START_IMAGE, INPAINT, VOID = "nothing", "start_image", "inpaint", "void"
#: The channels of each, which follow the noise's own.
CONDITIONING_CHANNELS = {
    NOTHING: 0,
    START_IMAGE: LATENT_CHANNELS,
    INPAINT: 1 + LATENT_CHANNELS,
    VOID: 2 * LATENT_CHANNELS,
}
#: Descendants whose inputs this pack does not make, by input channels: what they are.
_FOREIGN_INPUTS = {
    33: "a CogVideoX-Fun InP model of CogVideoX 1.0, whose input is noise, a mask and a masked video",
    48: "a video-editing model of CogVideoX 1.0, whose input is noise and two more latent videos",
    64: "a model whose input is noise and three more latent videos",
}


def rest_of(in_pairs: bool) -> int:
    """Return the frames that a clip has besides whole steps of its length: the first, and where latent frames come
    ``in_pairs`` those that make a pair with it."""
    return 1 + TEMPORAL_COMPRESSION if in_pairs else 1


@dataclass(frozen=True)
class Variant:
    """What a CogVideoX transformer is, read from its architecture.

    Attributes:
        name: the released model it has the shape of, or the family and "custom size".
        trained: the dtype its weights were trained in, ``bf16`` or ``fp16``: the one in which its activations are known
            to be finite.
        reads: what it takes beside the noise, a key of ``CONDITIONING_CHANNELS``.
        frame_step: a clip has ``frame_step * N + 1`` frames, or ``frame_step * N + 5`` where ``in_pairs``.
        max_frames: the longest clip of the model card, in frames.
        sizes: a text saying which sizes (pixels) the model card gives.
        fps: frames per second of the training clips.
    """

    name: str
    trained: str
    reads: str
    frame_step: int
    max_frames: int
    default_frames: int
    default_size: tuple[int, int]
    sizes: str
    fps: int

    @property
    def image_to_video(self) -> bool:
        """Whether it takes the latent of a start image beside the noise (32 input channels)."""
        return self.reads == START_IMAGE

    @property
    def in_pairs(self) -> bool:
        """Whether latent frames come in pairs, as in CogVideoX-Fun-V1.5 and VOID: their number is even, or 1, and none
        is put in front to make it so; the VAE decodes the first alone and then pair by pair, ``4 T - 3`` frames for any
        ``T``."""
        return self.reads in (INPAINT, VOID)

    @property
    def rest(self) -> int:
        """Frames that a clip has besides whole ``frame_step``s."""
        return rest_of(self.in_pairs)

    @property
    def is_released(self) -> bool:
        """Whether it has the shape of a released model, at full size."""
        return "custom size" not in self.name

    @property
    def trained_dtype(self) -> "torch.dtype":
        """``trained`` as torch has it, which is imported only here: checks of configs need the name alone."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.trained]

    @property
    def latent_scale(self) -> float:
        """``scaling_factor`` of the VAE it was trained with."""
        return LATENT_SCALES[self.trained]

    @property
    def inverts_image_latents(self) -> bool:
        """``invert_scale_latents``: 1.5-5B-I2V was trained with start images whose latents were divided by the
        scale."""
        return self.image_to_video and self.frame_step == 16

    @property
    def scheduler_config(self) -> dict:
        """The noise schedule it was trained with, as ``scheduler_config.json`` of the releases has it."""
        return {
            "_class_name": "CogVideoXDDIMScheduler",
            "num_train_timesteps": TRAINED_STEPS,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "set_alpha_to_one": True,
            "clip_sample": False,
            "timestep_spacing": "trailing",
            "snr_shift_scale": 1.0 if self.trained == "bf16" else 3.0,
        }

    def outside_model_card(self, width: int, height: int, frames: int) -> str | None:
        """Say what of a clip of ``frames`` frames of ``width`` x ``height`` pixels the model was not trained for, or
        None."""
        said = []
        if frames % self.frame_step != self.rest and frames != 1:
            said.append(f"{frames} frames (the model card gives {self.frame_step}N+{self.rest})")
        if frames > self.max_frames:
            said.append(f"{frames} frames (the model card goes up to {self.max_frames})")
        if not self._trained_size(width, height):
            said.append(f"{width}x{height} (the model card gives {self.sizes})")
        if not said:
            return None
        return f"{self.name} was not trained for {' nor for '.join(said)}: it will run, but the picture may suffer."

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """Return the trained size nearest in shape to a picture of ``width`` x ``height``: 1.5's image-to-video model
        and CogVideoX-Fun were trained in several shapes."""
        if self.reads == INPAINT:
            area = self.default_size[0] * self.default_size[1]
            ratio = min(4.0, max(0.25, width / height))
            return round((area * ratio) ** 0.5 / 16) * 16, round((area / ratio) ** 0.5 / 16) * 16
        if not self.inverts_image_latents:
            return self.default_size
        long = min(1360, max(768, round(768 * max(width, height) / min(width, height) / 16) * 16))
        return (long, 768) if width >= height else (768, long)

    def _trained_size(self, width: int, height: int) -> bool:
        if self.frame_step == 16 and self.image_to_video:
            short, long = sorted((width, height))
            return short == 768 and long <= 1360 and long % 16 == 0
        if self.reads == INPAINT:
            # Its buckets of 512 and 1024 have areas a little beside these: 672x384, 1344x768.
            return 0.97 * 512**2 <= width * height <= 1.03 * 1024**2
        return (width, height) == self.default_size


#: Descendants of CogVideoX-1.5, by what they read: Fun's default is that of VideoX-Fun's node, VOID's figures are those
#: of its ``quadmask_cogvideox.py``.
_DESCENDANTS = {
    INPAINT: Variant(
        "CogVideoX-Fun-V1.5-5b-InP", "bf16", INPAINT, 8, 85, 85, (1008, 576), "areas of 512x512 to 1024x1024", 8
    ),
    VOID: Variant("VOID", "bf16", VOID, 8, 85, 85, (672, 384), "672x384", 12),
}
_SIZES_1_5 = {False: "1360x768", True: "a short side of 768 and a long side of 768 to 1360, a multiple of 16"}


def identify(config: Mapping) -> Variant:
    """Name the variant from a transformer's ``config.json`` (already known to be a CogVideoX one).

    ``patch_size_t`` marks the 1.5 family at any size; without it, rotary positions mark the bf16-trained 5b line and
    sin-cos positions the fp16-trained 2b line.
    """
    given = config.get("in_channels", LATENT_CHANNELS)
    reads = next((kind for kind, more in CONDITIONING_CHANNELS.items() if given == LATENT_CHANNELS + more), NOTHING)
    image = reads == START_IMAGE
    shape = (config.get("num_layers", 30), config.get("num_attention_heads", 30))
    suffix = "-I2V" if image else ""
    if config.get("patch_size_t"):
        line, full, dtype = "CogVideoX1.5", ("-5B", (42, 48)), "bf16"
    elif config.get("use_rotary_positional_embeddings"):
        line, full, dtype = "CogVideoX", ("-5b", (42, 48)), "bf16"
    else:
        line, full, dtype = "CogVideoX", ("-2b", (30, 30)), "fp16"
    size, full_shape = full
    known = _DESCENDANTS.get(reads) if line == "CogVideoX1.5" else None
    if shape == full_shape:
        name = f"{line}{size}{suffix}" if known is None else known.name
    else:
        line = line if line.endswith("1.5") else f"{line}{size}"
        line = line if known is None else known.name
        name = f"{line}{suffix} (custom size: {short(shape[0], 12)} layers x {short(shape[1], 12)} heads)"
    if known is not None:
        return replace(known, name=name)
    if line == "CogVideoX1.5":
        return Variant(name, dtype, reads, 16, 161, 81, (1360, 768), _SIZES_1_5[image], 16)
    return Variant(name, dtype, reads, 8, 49, 49, (720, 480), "720x480", 8)


def foreign_inputs(config: Mapping) -> str | None:
    """Say what a transformer is whose inputs are neither those of text to video nor those of image to video, and what
    to do; else None."""
    channels, out = config.get("in_channels", LATENT_CHANNELS), config.get("out_channels", LATENT_CHANNELS)
    is_15, sizes = bool(config.get("patch_size_t")), set(CONDITIONING_CHANNELS.values())
    if channels == 2 * LATENT_CHANNELS and not (is_15 or config.get("use_learned_positional_embeddings")):
        what = (
            f"takes {channels} input channels without the learned positions that CogVideoX-5b-I2V has: it is a "
            "CogVideoX-Fun Control or Pose model, whose input is noise and a control video"
        )
    elif channels not in (LATENT_CHANNELS, 2 * LATENT_CHANNELS) and not (is_15 and channels - LATENT_CHANNELS in sizes):
        named = _FOREIGN_INPUTS.get(channels) if isinstance(channels, int) else None
        known = f"it is {named}" if named else "it is another model's descendant, whose input is not known here"
        what = f"takes {short(channels)} input channels: {known}"
    elif out != LATENT_CHANNELS:
        what = (
            f"gives {short(out)} channels, and CogVideoX's video VAE reads {LATENT_CHANNELS}: it is another model's "
            "descendant"
        )
    else:
        return None
    return (
        f"{what}. This pack runs text to video ({LATENT_CHANNELS} channels) and image to video "
        f"({2 * LATENT_CHANNELS}), and of the descendants of CogVideoX-1.5 CogVideoX-Fun-V1.5-InP "
        f"({LATENT_CHANNELS + CONDITIONING_CHANNELS[INPAINT]}) and VOID "
        f"({LATENT_CHANNELS + CONDITIONING_CHANNELS[VOID]}). Choose one of those."
    )


def full_config(config: Mapping) -> Mapping:
    """Fill a transformer's config with the defaults of its class, as old releases leave fields out."""
    return {name: config.get(name, default) for name, default in _defaults().items()}


@functools.cache
def _defaults() -> dict[str, Any]:
    """Return the defaults of the transformer's class; a run asks for them a dozen times."""
    import inspect

    from diffusers import CogVideoXTransformer3DModel

    parameters = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}
