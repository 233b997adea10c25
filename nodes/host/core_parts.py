"""Our text encoder and VAE as core's CLIP and VAE, and the patcher by which core's memory management knows a part.

Core's classes do what core asks of them; what they would compute is computed by the engine.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.sd import VAE as CoreVAE
from einops import rearrange
from torch import nn

from ...cogvideox.variants import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from ...cogvideox.words import short
from .language import said
from .memory import whole_bytes
from .page import failures_shown
from .progress import NodeEvents, saving_latents

if TYPE_CHECKING:
    from ...cogvideox.handles import VAE, TextEncoder
    from ...cogvideox.weights import Weights

#: What core's own text encoders and VAEs have inside, and ours as well, but in the engine.
_INSIDE = ("t5xxl", "transformer", "encode", "encoder", "decode", "decoder")
#: What to use instead of a node that works on a model's weights themselves.
OURS = "Make the change on our model, before CogVideoX-1.5 to ComfyUI, or take the node away."


def _made_for_others(name: str) -> str:
    """Say that a node looks for what other models have."""
    return (
        f"This node asks for '{short(name)}', which CogVideoX does not have: it is made for other models, as FreeU is "
        "for UNets. Take it away."
    )


class Known(dict):
    """What core's nodes may read by name: a name of other models is refused in words."""

    @failures_shown()
    def __missing__(self, name):
        raise ValueError(_made_for_others(str(name)))


class StandIn(nn.Module):
    """What core has in the place of a module of its own: an attribute that it lacks, as any object may, is one that
    other models' have."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Of this class, as some only look whether it is there.
            raise AttributeError(said(_made_for_others(name))) from None


class PartPatcher(ModelPatcher):
    """A part in core's hands: core sees its true size and may unload it, and the engine brings its weights when they
    run, in the way that fits. ``model`` is a module without weights that has them as ``weights``."""

    @property
    def weights(self) -> "Weights":
        return self.model.weights

    def is_clone(self, other: Any) -> bool:
        # The pack's own nodes enter the same weights in core's list, and they are there once.
        return getattr(other, "weights", None) is self.weights or getattr(other, "model", None) is self.weights

    def model_size(self) -> int:
        return whole_bytes(self.weights)

    def loaded_size(self) -> int:
        return min(self.weights.resident, self.model_size())

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False) -> int:
        """Put the patches of objects (``model_sampling``) in place, and no weights."""
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
        return 0

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
        freed = self.loaded_size()
        self.weights.park()
        return freed

    def detach(self, unpatch_all=True):
        self.eject_model()
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.weights.park()
        return self.model

    @failures_shown()
    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        """Refuse: hooks write other weights into the model between two calls of it."""
        raise ValueError(f"LoRA hooks change the model's weights between steps, and these stay as they are. {OURS}")

    @failures_shown()
    def get_key_patches(self, filter_prefix=None):
        """Refuse: merging reads the weights."""
        raise ValueError(
            f"Merging models reads their weights, and these are in the engine's own storage. {OURS} CogVideoX-1.5 LoRA "
            "Loader adds a LoRA without merging."
        )

    @failures_shown()
    def model_state_dict_for_saving(self, model=None, prefix=""):
        """Refuse: there would be no weights in the file."""
        raise ValueError(
            "This model's weights cannot be saved from here: the file they came from is the one to keep, and the file "
            "that would be written would hold none. Take the saving node away."
        )

    @failures_shown()
    def set_model_compute_dtype(self, dtype):
        """Refuse any but the model's own, which is None: the precision is the engine's."""
        if dtype is not None:
            raise ValueError(
                f"The model runs in {self.weights.precision.name}. Choose dtype in CogVideoX-1.5 Model Loader."
            )


class _Stage(StandIn):
    """A part's module in core's eyes: none of its own weights, and none that core could move."""

    def __init__(self, handle: Any):
        super().__init__()
        #: Read by ``given``: a node of ours that gets core's object takes the handle.
        self.cogvideox15 = handle

    def __getattr__(self, name: str) -> Any:
        if name in _INSIDE:
            raise AttributeError(
                said(
                    f"This node works inside of a text encoder or VAE ('{name}'), and only the engine may work on "
                    "those. Take it away."
                )
            )
        return super().__getattr__(name)

    @property
    def weights(self) -> "Weights":
        return self.cogvideox15.weights


class _TextStage(_Stage):
    """What core's ``CLIP`` calls to encode."""

    def reset_clip_options(self) -> None:
        pass

    @failures_shown()
    def set_clip_options(self, options: dict) -> None:
        if options.get("layer") is not None:
            raise ValueError(
                "CogVideoX was trained with the last layer of T5, and CLIP Set Last Layer asks for another. Take it "
                "away."
            )

    @failures_shown()
    def encode_token_weights(self, tokens: dict) -> tuple[torch.Tensor, None]:
        from ...cogvideox.text import encode_prompt

        encoded = encode_prompt(self.cogvideox15, tokens["t5xxl"], events=NodeEvents())
        for note in encoded.notes:
            NodeEvents().note(note)
        return encoded.embeddings, None


class _Tokenizer:
    """What core's ``CLIP`` calls to tokenize: the prompt is passed on as it is, as the engine knows T5's tokens, and
    CogVideoX knows no weights of words."""

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict:
        return Known(t5xxl=text)

    def state_dict(self) -> dict:
        return {}


def to_clip(handle: "TextEncoder") -> CLIP:
    """Make core's CLIP of a text encoder: its embeddings are those of CogVideoX-1.5 Text Encode, bit for bit."""
    clip = CLIP(no_init=True)
    clip.cond_stage_model, clip.tokenizer = _TextStage(handle), _Tokenizer()
    clip.patcher = PartPatcher(clip.cond_stage_model, handle.weights.device, torch.device("cpu"))
    clip.patcher.is_clip = True
    clip.layer_idx, clip.use_clip_schedule, clip.apply_hooks_to_conds, clip.tokenizer_options = None, False, None, {}
    return clip


class BridgedVAE(CoreVAE):
    """Core's VAE whose work the engine does: untiled and exact in the memory there is, whichever call is made."""

    def __init__(self, handle: "VAE"):
        self._handle = handle
        self.first_stage_model = _Stage(handle)
        self.device, self.output_device = handle.weights.device, torch.device("cpu")
        self.patcher = PartPatcher(self.first_stage_model, self.device, torch.device("cpu"))
        self.vae_dtype = handle.weights.precision.dtype
        self.working_dtypes = [self.vae_dtype]
        # As core's own CogVideoX has them (comfy/sd.py).
        cells, frames = SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
        self.upscale_ratio = (lambda length: max(0, length * frames - (frames - 1)), cells, cells)
        self.downscale_ratio = (lambda length: max(0, math.floor((length + frames - 1) / frames)), cells, cells)
        self.upscale_index_formula = self.downscale_index_formula = (frames, cells, cells)
        self.latent_channels, self.latent_dim, self.output_channels = LATENT_CHANNELS, 3, 3
        self.pad_channel_value = self.extra_1d_channel = self.format_encoded = None
        self.not_video = self.disable_offload = self.handles_tiling = False
        self.crop_input, self.audio_sample_rate, self.size = True, 44100, None
        self.process_input, self.process_output = (lambda image: image), (lambda image: image)
        self.memory_used_decode = self.memory_used_encode = lambda *_: self._room()

    def _room(self) -> int:
        from ...cogvideox.memory import WANTED_BYTES

        return WANTED_BYTES

    def _make_room(self) -> None:
        model_management.load_models_gpu([self.patcher], memory_required=self._room())

    def model_size(self) -> int:
        return self._handle.weights.nbytes

    @failures_shown()
    def decode(self, samples_in, vae_options=None):
        """Decode ``[B, 16, T, H/8, W/8]`` to ``[B, F, H, W, 3]``, as CogVideoX-1.5 VAE Decode does."""
        from ...cogvideox.vae import decode

        self._make_room()
        with saving_latents(samples_in):
            frames = decode(self._handle, samples_in, events=NodeEvents())
        return rearrange(frames, "(b f) h w c -> b f h w c", b=samples_in.shape[0])

    def decode_tiled(self, samples, **_):
        """Decode as ``decode`` does: nothing is tiled, as tiles would show."""
        return self.decode(samples)

    @failures_shown()
    def encode(self, pixel_samples):
        """Encode a clip ``[F, H, W, 3]``, or several ``[B, F, H, W, 3]``, to ``[B, 16, T, H/8, W/8]``, as CogVideoX-1.5
        VAE Encode does. What the VAE cannot read of it, more than 4N+1 frames or sides beyond multiples of 16, is cut,
        and said on the node."""
        from ...cogvideox.geometry import latent_frames, pixel_frames
        from ...cogvideox.pictures import check_images, fit_grid
        from ...cogvideox.vae import encode

        self._make_room()
        clips = pixel_samples if pixel_samples.ndim == 5 else pixel_samples[None]
        latents, notes = [], []
        for clip in clips:
            images, cropped = fit_grid(check_images(clip[..., :3], "pixels"))
            fitting = pixel_frames(latent_frames(len(images)))
            notes += [note for note in (cropped,) if note]
            if fitting != len(images):
                notes.append(f"The clip has {len(images)} frames and the VAE reads 4N+1: it was cut to {fitting}.")
            latents.append(encode(self._handle, images[:fitting], events=NodeEvents()))
        for note in dict.fromkeys(notes):
            NodeEvents().note(note)
        return torch.cat(latents)

    def encode_tiled(self, pixel_samples, **_):
        """Encode as ``encode`` does: nothing is tiled."""
        return self.encode(pixel_samples)

    def get_sd(self):
        return self.patcher.model_state_dict_for_saving()
