"""What a config may say: one small table for each kind, looked at when a checkpoint is opened, before anything is built
or run with a number of it.

The fields are those of diffusers' ``CogVideoXTransformer3DModel``, ``AutoencoderKLCogVideoX`` and CogVideoX schedulers,
and those of transformers' ``T5Config`` that shape its encoder. What is left out takes the class's default, as old
releases leave fields out; a field that is not in a table is not used, whatever it says.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..variants import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, TRAINED_STEPS
from ..words import short
from .headers import StoredTensor

#: Most tokens of a table of positions, which is computed when a transformer without rotary positions is built (2b:
#: 17,550).
_MAX_POSITIONS = 1 << 16
#: The VAE halves height and width once at each level but the last.
_LEVELS = SPATIAL_COMPRESSION.bit_length()
#: The share of the signal that is left at the last timestep, at least: beyond that, fp32 has no numbers for the steps
#: between.
_LEAST_SIGNAL = 1e-30


@dataclass(frozen=True)
class _Field:
    """What one field may be.

    Attributes:
        kind: ``whole`` (numbers), ``number``, ``flag`` or ``text``.
        low, high: the least and the largest number.
        one_of: all that it may be, if not empty.
        null: whether it may be null.
        many: whether it is a list of such; as an int, of exactly so many.
        bound: what the weights themselves limit it by: ``sizes`` (no larger than the largest side of a tensor) or
            ``count`` (no more than tensors).
        multiple: what a whole number is to be divisible by.
    """

    kind: str
    low: float = -math.inf
    high: float = math.inf
    one_of: tuple = ()
    null: bool = False
    many: bool | int = False
    bound: str = ""
    multiple: int = 1

    def allows(self, value: Any, limit: float = math.inf) -> bool:
        if value is None:
            return self.null
        if self.many:
            right = isinstance(value, list) and (self.many is True or len(value) == self.many)
            return right and all(self._allows_one(entry, limit) for entry in value)
        return self._allows_one(value, limit)

    def _allows_one(self, value: Any, limit: float) -> bool:
        # By the exact type: true is an int in Python, and no number in a config.
        if type(value) not in {"whole": (int,), "number": (int, float), "flag": (bool,), "text": (str,)}[self.kind]:
            return False
        if self.one_of:
            return value in self.one_of
        # Comparisons alone, which hold for integers of any length, and never for NaN.
        return self.kind in ("flag", "text") or (
            self.low <= value <= min(self.high, limit) and (self.multiple == 1 or value % self.multiple == 0)
        )

    def text(self, limit: float = math.inf) -> str:
        """What it may be, in words."""
        if self.one_of:
            one = " or ".join(repr(choice) if isinstance(choice, str) else str(choice) for choice in self.one_of)
        elif self.kind in ("flag", "text"):
            one = {"flag": "true or false", "text": "a text"}[self.kind]
        else:
            span = f"{self.low:g} to {min(self.high, limit):,.15g}"
            one = f"a whole number from {span}" if self.kind == "whole" else f"a number from {span}"
            one = f"{one}, a multiple of {self.multiple}" if self.multiple > 1 else one
        lists: Mapping[bool | int, str] = {False: one, True: f"a list, each {one}"}
        said = lists.get(self.many, f"a list of {self.many}, each {one}")
        return f"{said}, or null" if self.null else said


def _whole(low: int, high: int, **more) -> _Field:
    return _Field("whole", low, high, **more)


def _number(low: float, high: float, **more) -> _Field:
    return _Field("number", low, high, **more)


def _size(multiple: int = 1, **more) -> _Field:
    """A width: some tensor has it as a side."""
    return _Field("whole", multiple, 1 << 20, bound="sizes", multiple=multiple, **more)


def _choice(*choices, **more) -> _Field:
    return _Field("text" if isinstance(choices[0], str) else "whole", one_of=choices, **more)


_FLAG = _Field("flag")
#: Layers of which each has tensors of its own.
_LAYERS = _Field("whole", 1, 1000, bound="count")
_EPSILON, _SHARE = _number(1e-12, 0.1), _number(0, 1)
_ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")

_TRANSFORMER = {
    "num_attention_heads": _size(),
    # Rotary positions share it out among time, height and width, in pairs of channels.
    "attention_head_dim": _size(16),
    "in_channels": _size(),
    "out_channels": _choice(LATENT_CHANNELS),
    "flip_sin_to_cos": _FLAG,
    "freq_shift": _number(0, 1),
    "time_embed_dim": _size(),
    "ofs_embed_dim": _size(2, null=True),
    "text_embed_dim": _size(),
    "num_layers": _LAYERS,
    "dropout": _SHARE,
    "attention_bias": _FLAG,
    "sample_width": _whole(2, 4096),
    "sample_height": _whole(2, 4096),
    "sample_frames": _whole(1, 4096),
    "patch_size": _whole(1, 8),
    "patch_size_t": _whole(1, 8, null=True),
    "temporal_compression_ratio": _choice(TEMPORAL_COMPRESSION),
    "max_text_seq_length": _whole(1, 4096),
    "activation_fn": _choice("gelu-approximate", "gelu"),
    "timestep_activation_fn": _choice(*_ACTIVATIONS),
    "norm_elementwise_affine": _FLAG,
    "norm_eps": _EPSILON,
    "spatial_interpolation_scale": _number(1e-3, 1e3),
    "temporal_interpolation_scale": _number(1e-3, 1e3),
    "use_rotary_positional_embeddings": _FLAG,
    "use_learned_positional_embeddings": _FLAG,
    "patch_bias": _FLAG,
}
_TEXT_ENCODER = {
    "vocab_size": _size(),
    "d_model": _size(),
    "d_kv": _size(),
    "d_ff": _size(),
    "num_layers": _LAYERS,
    "num_heads": _size(),
    "relative_attention_num_buckets": _size(4),
    "relative_attention_max_distance": _whole(2, 1 << 20),
    "dropout_rate": _SHARE,
    "layer_norm_epsilon": _EPSILON,
    # T5 v1.1's.
    "feed_forward_proj": _choice("gated-gelu"),
}
_VAE = {
    "in_channels": _choice(3),
    "out_channels": _choice(3),
    "down_block_types": _choice("CogVideoXDownBlock3D", many=_LEVELS),
    "up_block_types": _choice("CogVideoXUpBlock3D", many=_LEVELS),
    "block_out_channels": _size(many=_LEVELS),
    "latent_channels": _choice(LATENT_CHANNELS),
    "layers_per_block": _Field("whole", 1, 100, bound="count"),
    "act_fn": _choice(*_ACTIVATIONS),
    "norm_eps": _EPSILON,
    "norm_num_groups": _size(),
    "temporal_compression_ratio": _choice(TEMPORAL_COMPRESSION),
    "sample_height": _whole(2, 1 << 20),
    "sample_width": _whole(2, 1 << 20),
    # 0.7 and 1.15258426 in the releases; null, as if left out, is that of the release the transformer belongs to.
    "scaling_factor": _number(1e-2, 1e2, null=True),
    "use_quant_conv": _FLAG,
    "use_post_quant_conv": _FLAG,
    "invert_scale_latents": _Field("flag", null=True),
}
_SCHEDULER = {
    "num_train_timesteps": _whole(10, 10 * TRAINED_STEPS),
    "beta_start": _number(1e-6, 0.5),
    "beta_end": _number(1e-6, 0.999),
    "beta_schedule": _choice("scaled_linear", "linear", "squaredcos_cap_v2"),
    "trained_betas": _number(1e-6, 0.999, null=True, many=True),
    "set_alpha_to_one": _FLAG,
    "steps_offset": _whole(0, 10 * TRAINED_STEPS),
    "prediction_type": _choice("v_prediction", "epsilon", "sample"),
    "timestep_spacing": _choice("trailing", "leading", "linspace"),
    "rescale_betas_zero_snr": _FLAG,
    "snr_shift_scale": _number(1e-2, 1e2),
}
#: kind -> (what to call it, its fields)
_TABLES: Mapping[str, tuple[str, Mapping[str, _Field]]] = {
    "transformer": ("transformer", _TRANSFORMER),
    "text_encoder": ("text encoder", _TEXT_ENCODER),
    "vae": ("VAE", _VAE),
    "scheduler": ("noise schedule", _SCHEDULER),
}


def known_fields(kind: str, config: Mapping) -> dict:
    """What of a config is used: the fields of its table. Null, where it is allowed, stands for the default."""
    return {name: config[name] for name in _TABLES[kind][1] if config.get(name) is not None}


def check_config(kind: str, config: Mapping, file: Path, tensors: Mapping[str, StoredTensor] | None = None) -> None:
    """Refuse a config that cannot be that of a CogVideoX part: a field of another type, no number, or out of all
    proportion.

    Args:
        kind: ``transformer``, ``text_encoder``, ``vae`` or ``scheduler``.
        tensors: the weights that it describes: no size in it is larger than their largest, and no layer is without a
            tensor.

    Raises:
        ValueError: naming the file, the field, what it says and what it may be.
    """
    name, table = _TABLES[kind]
    for field, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(file, name, f'"{short(field)}" is {value}, which is no number')
    largest = {"": math.inf, "sizes": math.inf, "count": math.inf}
    if tensors:
        largest |= {
            "sizes": max((side for tensor in tensors.values() for side in tensor.shape), default=1),
            "count": len(tensors),
        }
    for field, rule in table.items():
        if field in config and not rule.allows(config[field], largest[rule.bound]):
            beside = rule.low <= largest[rule.bound] < rule.high
            can = f"{rule.text(largest[rule.bound])} beside these weights" if beside else rule.text()
            raise _wrong(file, name, f'"{field}" is {_shown(config[field])}, and it can only be {can}')
    odd = _RULES[kind](config)
    if odd:
        raise _wrong(file, name, odd)


def _wrong(file: Path, name: str, what: str) -> ValueError:
    return ValueError(
        f"{short(file, 400)}: {what}. The {name} it describes cannot be built, or would not be the one that was "
        "trained. Download this file again from the repository that the weights come from."
    )


def _shown(value: object) -> str:
    """A value as JSON has it, short, with the word for its type where that may be what is wrong."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 64:
        # Python prints no number of more than 4,300 digits.
        return f"a number of about {int(value.bit_length() * math.log10(2))} digits"
    shown = short(value if isinstance(value, list | dict) else repr(value))
    kinds: Mapping[type, str] = {str: f"the text {shown}", list: f"the list {shown}", dict: f"the object {shown}"}
    return kinds.get(type(value), shown)


def _odd_transformer(config: Mapping) -> str:
    rotary = config.get("use_rotary_positional_embeddings", False)
    if config.get("use_learned_positional_embeddings", False) and not rotary:
        return (
            '"use_learned_positional_embeddings" is true without "use_rotary_positional_embeddings", which no '
            "CogVideoX is built with"
        )
    patch = config.get("patch_size", 2)
    sides = {"sample_height": 60, "sample_width": 90}
    height, width = (config.get(side, default) // patch for side, default in sides.items())
    if not (height and width):
        return f'"sample_height" or "sample_width" is smaller than "patch_size" ({patch})'
    if not rotary or config.get("use_learned_positional_embeddings", False):
        frames = (config.get("sample_frames", 49) - 1) // TEMPORAL_COMPRESSION + 1
        if height * width * frames > _MAX_POSITIONS:
            return (
                f'"sample_height", "sample_width", "sample_frames" make {height * width * frames:,} positions, and the '
                "released models have 17,550"
            )
    return ""


def _odd_text_encoder(config: Mapping) -> str:
    buckets, distance = (
        config.get("relative_attention_num_buckets", 32),
        config.get("relative_attention_max_distance", 128),
    )
    if distance <= buckets // 4:
        return (
            f'"relative_attention_max_distance" is {distance}, and with {buckets} buckets it must be more than '
            f"{buckets // 4}"
        )
    return ""


def _odd_vae(config: Mapping) -> str:
    groups, channels = config.get("norm_num_groups", 32), config.get("block_out_channels", [128, 256, 256, 512])
    if any(count % groups for count in channels):
        return (
            f'"block_out_channels" is {short(channels)}, and "norm_num_groups", {groups}, does not divide each of them'
        )
    return ""


def _odd_scheduler(config: Mapping) -> str:
    name = config.get("_class_name")
    if isinstance(name, str) and "Flow" in name:
        return f'"_class_name" is {short(name)}, a schedule of flow matching, and CogVideoX\'s are of diffusion'
    count, betas = config.get("num_train_timesteps", TRAINED_STEPS), config.get("trained_betas")
    start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
    if betas is not None and len(betas) != count:
        return f'"trained_betas" has {len(betas)} numbers, and "num_train_timesteps" is {count}'
    if betas is None and start > end:
        return f'"beta_start", {start:g}, is larger than "beta_end", {end:g}'
    if config.get("prediction_type", "epsilon") == "epsilon" and config.get("rescale_betas_zero_snr", False):
        # The first step would be divided by the signal that is left, which is none.
        return (
            '"prediction_type" is epsilon with "rescale_betas_zero_snr", which ends in NaN at the first step. '
            "CogVideoX predicts v"
        )
    schedule = config.get("beta_schedule", "scaled_linear")
    if betas is None and schedule != "squaredcos_cap_v2":
        # To the power that the schedule is linear in.
        power = 2 if schedule == "scaled_linear" else 1
        low, high = start ** (1 / power), end ** (1 / power)
        betas = [(low + (high - low) * step / (count - 1)) ** power for step in range(count)]
    if betas is not None and sum(map(math.log1p, (-beta for beta in betas))) < math.log(_LEAST_SIGNAL):
        said = (
            f'"trained_betas" is {short(betas)}'
            if config.get("trained_betas")
            else f'"beta_start" is {start:g} and "beta_end" {end:g}'
        )
        return (
            f"{said}, so no signal is left long before the last of {count} timesteps, and the steps between would be "
            "NaN"
        )
    return ""


_RULES: Mapping[str, Callable[[Mapping], str]] = {
    "transformer": _odd_transformer,
    "text_encoder": _odd_text_encoder,
    "vae": _odd_vae,
    "scheduler": _odd_scheduler,
}
