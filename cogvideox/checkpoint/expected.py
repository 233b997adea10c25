"""The name and shape of every tensor that a part's module has, by its config.

The rules say what the modules of diffusers (``CogVideoXTransformer3DModel``, ``AutoencoderKLCogVideoX``) and
transformers (``T5EncoderModel``) have in their state dicts: a test holds them equal to the modules.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from ..variants import LATENT_CHANNELS, TEMPORAL_COMPRESSION
from ..words import short

Shape = tuple[int, ...]
#: Names of one and the same tensor in a part's module: any of them on disk is enough.
TIED = {"text_encoder": (("shared.weight", "encoder.embed_tokens.weight"),)}
#: The largest number of a config that is believed, as in ``configs``: ten times the largest size of a released part,
#: and a count of things that are numbered.
_LARGEST, _MOST = 1 << 20, 1000
#: Feed-forward layers of diffusers that come in pairs, one of them a gate.
_GATED = ("geglu", "swiglu")
_PLAIN = ("gelu", "gelu-approximate", "geglu-approximate", "linear-silu")


def expected_tensors(kind: str, config: Mapping, origin: str = "its config.json") -> dict[str, Shape]:
    """The name and shape of every tensor that a part's module has, by the part's config; tied tensors by all of their
    names.

    Raises:
        ValueError: if the config says something that no module can be made of.
    """
    rules = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}[kind]
    return dict(rules(_Fields(config, origin)))


class _Fields:
    """A config's fields, as the module's class takes them."""

    def __init__(self, config: Mapping, origin: str):
        self._config, self._origin = config, origin

    def number(self, name: str, default: int | None = None, also: str | None = None, most: int = _LARGEST) -> int:
        """A whole number of at least 1; ``also`` is another name that transformers knows it by."""
        if also is not None and also in self._config and name not in self._config:
            name = also
        value = self._config.get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.odd(name, f"a whole number from 1 to {most:,}")
        return value

    def optional(self, name: str) -> int | None:
        """A whole number of at least 1, or none."""
        return None if self._config.get(name) is None else self.number(name)

    def numbers(self, name: str, default: tuple[int, ...]) -> list[int]:
        """A list of whole numbers of at least 1."""
        value = self._config.get(name, default)
        if (
            not isinstance(value, list | tuple)
            or not 1 <= len(value) <= _MOST
            or not all(type(n) is int and 1 <= n <= _LARGEST for n in value)
        ):
            raise self.odd(name, "a list of whole numbers of at least 1")
        return list(value)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._config.get(name, default))

    def get(self, name: str, default: object) -> object:
        return self._config.get(name, default)

    def odd(self, name: str, wanted: str) -> ValueError:
        value = short(repr(self._config[name])) if name in self._config else "not there"
        origin = self._origin[0].upper() + self._origin[1:]
        return ValueError(
            f"{origin} cannot be used: {name} is {value}, and should be {wanted}, so the model cannot be built. "
            "Download config.json again from the repository of the weights."
        )


_Tensors = Iterator[tuple[str, Shape]]


def _linear(name: str, out: int, inside: int, bias: bool = True) -> _Tensors:
    yield f"{name}.weight", (out, inside)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, width: int, affine: bool = True) -> _Tensors:
    """A norm with a weight and a bias for each channel."""
    if affine:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)


def _conv(name: str, out: int, inside: int, *kernel: int, bias: bool = True) -> _Tensors:
    yield f"{name}.weight", (out, inside, *kernel)
    if bias:
        yield f"{name}.bias", (out,)


def _transformer(fields: _Fields) -> _Tensors:
    head = fields.number("attention_head_dim", 64)
    width = fields.number("num_attention_heads", 30) * head
    channels, out = fields.number("in_channels", LATENT_CHANNELS), fields.number("out_channels", LATENT_CHANNELS)
    time, text = fields.number("time_embed_dim", 512), fields.number("text_embed_dim", 4096)
    patch, patch_t = fields.number("patch_size", 2), fields.optional("patch_size_t")
    affine, biases = fields.flag("norm_elementwise_affine", True), fields.flag("attention_bias", True)
    activation = fields.get("activation_fn", "gelu-approximate")
    if activation not in (*_GATED, *_PLAIN):
        raise fields.odd("activation_fn", f"one of {', '.join((*_GATED, *_PLAIN))}")
    inner = 4 * width * (2 if activation in _GATED else 1)
    if patch_t is None:
        yield from _conv("patch_embed.proj", width, channels, patch, patch, bias=fields.flag("patch_bias", True))
    else:
        yield from _linear("patch_embed.proj", width, channels * patch * patch * patch_t)
    yield from _linear("patch_embed.text_proj", width, text)
    if fields.flag("use_learned_positional_embeddings", False):
        if not fields.flag("use_rotary_positional_embeddings", False):
            raise fields.odd("use_rotary_positional_embeddings", "true where use_learned_positional_embeddings is")
        rows, columns = (
            fields.number(f"sample_{side}", default) // patch for side, default in (("height", 60), ("width", 90))
        )
        frames = (fields.number("sample_frames", 49) - 1) // fields.number(
            "temporal_compression_ratio", TEMPORAL_COMPRESSION
        ) + 1
        yield (
            "patch_embed.pos_embedding",
            (1, fields.number("max_text_seq_length", 226) + rows * columns * frames, width),
        )
    yield from _linear("time_embedding.linear_1", time, width)
    yield from _linear("time_embedding.linear_2", time, time)
    # diffusers reads zero as none, too.
    ofs = fields.number("ofs_embed_dim") if fields.flag("ofs_embed_dim", False) else 0
    if ofs:
        yield from _linear("ofs_embedding.linear_1", ofs, ofs)
        yield from _linear("ofs_embedding.linear_2", ofs, ofs)
    for number in range(fields.number("num_layers", 30, most=_MOST)):
        block = f"transformer_blocks.{number}"
        for norm in ("norm1", "norm2"):
            yield from _linear(f"{block}.{norm}.linear", 6 * width, time)
            yield from _norm(f"{block}.{norm}.norm", width, affine)
        for projection in "qkv":
            yield from _linear(f"{block}.attn1.to_{projection}", width, width, biases)
        for projection in "qk":
            yield from _norm(f"{block}.attn1.norm_{projection}", head)
        yield from _linear(f"{block}.attn1.to_out.0", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", inner, width)
        yield from _linear(f"{block}.ff.net.2", width, 4 * width)
    yield from _norm("norm_final", width, affine)
    yield from _linear("norm_out.linear", 2 * width, time)
    yield from _norm("norm_out.norm", width, affine)
    yield from _linear("proj_out", patch * patch * (patch_t or 1) * out, width)


def _text_encoder(fields: _Fields) -> _Tensors:
    width, tokens, inner = (
        fields.number("d_model", 512, "hidden_size"),
        fields.number("vocab_size", 32128),
        fields.number("d_ff", 2048),
    )
    heads = fields.number("num_heads", 8, "num_attention_heads")
    inside = heads * fields.number("d_kv", 64, "head_dim")
    ways_in = ("wi_0", "wi_1") if str(fields.get("feed_forward_proj", "relu")).startswith("gated-") else ("wi",)
    for name in TIED["text_encoder"][0]:
        yield name, (tokens, width)
    for number in range(fields.number("num_layers", 6, "num_hidden_layers", most=_MOST)):
        attention, feed_forward = (f"encoder.block.{number}.layer.{layer}" for layer in range(2))
        for projection in "qkv":
            yield f"{attention}.SelfAttention.{projection}.weight", (inside, width)
        yield f"{attention}.SelfAttention.o.weight", (width, inside)
        if number == 0:
            yield (
                f"{attention}.SelfAttention.relative_attention_bias.weight",
                (fields.number("relative_attention_num_buckets", 32), heads),
            )
        yield f"{attention}.layer_norm.weight", (width,)
        for way in ways_in:
            yield f"{feed_forward}.DenseReluDense.{way}.weight", (inner, width)
        yield f"{feed_forward}.DenseReluDense.wo.weight", (width, inner)
        yield f"{feed_forward}.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)


def _vae(fields: _Fields) -> _Tensors:
    widths, latent = (
        fields.numbers("block_out_channels", (128, 256, 256, 512)),
        fields.number("latent_channels", LATENT_CHANNELS),
    )
    layers, groups = fields.number("layers_per_block", 3, most=_MOST), fields.number("norm_num_groups", 32)
    into, out = fields.number("in_channels", 3), fields.number("out_channels", 3)
    for name, kind in (("down_block_types", "CogVideoXDownBlock3D"), ("up_block_types", "CogVideoXUpBlock3D")):
        # The class's own default is four.
        types = fields.get(name, [kind] * 4)
        if not isinstance(types, list | tuple) or list(types) != [kind] * len(widths):
            raise fields.odd(name, f"{kind} once for each of the {len(widths)} block_out_channels")
    if any(width % groups for width in widths):
        raise fields.odd("norm_num_groups", f"a number that divides block_out_channels ({short(widths)})")

    def spatial(name: str, width: int) -> _Tensors:
        """A norm of the decoder, which the latent scales and shifts."""
        yield from _norm(f"{name}.norm_layer", width)
        yield from _conv(f"{name}.conv_y.conv", width, latent, 1, 1, 1)
        yield from _conv(f"{name}.conv_b.conv", width, latent, 1, 1, 1)

    def resnet(name: str, inside: int, outside: int, norm) -> _Tensors:
        yield from norm(f"{name}.norm1", inside)
        yield from norm(f"{name}.norm2", outside)
        yield from _conv(f"{name}.conv1.conv", outside, inside, 3, 3, 3)
        yield from _conv(f"{name}.conv2.conv", outside, outside, 3, 3, 3)
        if inside != outside:
            yield from _conv(f"{name}.conv_shortcut", outside, inside, 1, 1, 1)

    def half(name: str, ends: tuple[int, int], widths: list[int], layers: int, direction: str, norm) -> _Tensors:
        """Encoder or decoder: their blocks are numbered in the order they run."""
        mid = widths[-1] if direction == "down" else widths[0]
        yield from _conv(f"{name}.conv_in.conv", widths[0], ends[0], 3, 3, 3)
        for level, (before, width) in enumerate(pairwise([widths[0], *widths])):
            block = f"{name}.{direction}_blocks.{level}"
            for number in range(layers):
                yield from resnet(f"{block}.resnets.{number}", width if number else before, width, norm)
            if level < len(widths) - 1:
                yield from _conv(f"{block}.{direction}samplers.0.conv", width, width, 3, 3)
        for number in range(2):
            yield from resnet(f"{name}.mid_block.resnets.{number}", mid, mid, norm)
        yield from norm(f"{name}.norm_out", widths[-1])
        yield from _conv(f"{name}.conv_out.conv", ends[1], widths[-1], 3, 3, 3)

    yield from half("encoder", (into, 2 * latent), widths, layers, "down", _norm)
    yield from half("decoder", (latent, out), widths[::-1], layers + 1, "up", spatial)
    if fields.flag("use_quant_conv", False):
        yield from _conv("quant_conv", 2 * out, 2 * out, 1, 1, 1)
    if fields.flag("use_post_quant_conv", False):
        yield from _conv("post_quant_conv", out, out, 1, 1, 1)
