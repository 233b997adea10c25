"""Range-safe fp16: no overflow for any weights, closer to fp32 than bf16 is."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvideox.geometry import rotary_embedding
from cogvideox.modules.range_safe import RangeSafeLinear, is_range_safe, make_range_safe
from tests.card import CARD, CardWithoutFloat64
from tests.loud_models import loud_inner, loud_norms, loud_stream, loud_t5, loud_values, outlier_channels
from tests.reference import error
from tests.tiny_checkpoint import TEXT_WIDTH, build_text_encoder, build_transformer


def inputs(model, frames=4, height=6, width=10):
    torch.manual_seed(1)
    config = model.config
    # 2b has a position for each of 226 tokens.
    tokens = 64 if config.use_rotary_positional_embeddings else 226
    return dict(
        hidden_states=torch.randn(2, frames, config.in_channels, height, width),
        encoder_hidden_states=torch.randn(2, tokens, TEXT_WIDTH),
        timestep=torch.tensor([500, 500]),
        ofs=torch.tensor([2.0]) if config.ofs_embed_dim else None,
        image_rotary_emb=rotary_embedding(config, frames, height, width, torch.device("cpu")),
        return_dict=False,
    )


@torch.no_grad()
def run(model, dtype=torch.float32, frames=4):
    values = inputs(model, frames)
    cast = {key: value.to(dtype) if key.endswith("states") else value for key, value in values.items()}
    return model(**cast)[0].float()


@torch.no_grad()
def encode(model):
    return model(torch.arange(64)[None] % 200)[0].float()


def peak(model, runner, where=lambda name: True):
    """The largest magnitude that any module's output has in fp32."""
    seen = []
    hooks = [
        module.register_forward_hook(
            lambda _m, _a, out: seen.extend(
                t.abs().max().item() for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)
            )
        )
        for name, module in model.named_modules()
        if where(name)
    ]
    runner(model)
    for hook in hooks:
        hook.remove()
    return max(seen)


def transformer(variant="1.5", seed=0, **changes):
    torch.manual_seed(seed)
    return build_transformer(variant, **changes).eval()


LOUD = {
    "residual stream beyond 1e5": lambda: loud_stream(transformer(), 3e5),
    "residual stream beyond 1e7": lambda: loud_stream(transformer(), 3e7),
    "inner activations beyond 1e6": lambda: loud_inner(transformer(), 3e6),
    "outlier channels and rows": lambda: outlier_channels(transformer()),
    "attention values beyond 1e5": lambda: loud_values(transformer(), 1e6),
    "q norm beyond fp16": lambda: loud_norms(transformer()),
}
PEAKS = {
    "residual stream beyond 1e5": (1e5, lambda name: name.startswith("transformer_blocks.") and name.count(".") == 1),
    "residual stream beyond 1e7": (1e7, lambda name: name.startswith("transformer_blocks.") and name.count(".") == 1),
    "inner activations beyond 1e6": (1e6, lambda name: name.endswith("ff.net.0")),
    "outlier channels and rows": (65504, lambda name: name.endswith("ff.net.2")),
    "attention values beyond 1e5": (1e5, lambda name: name.endswith("to_v")),
    "q norm beyond fp16": (65504, lambda name: name.endswith("norm_q")),
}


@pytest.mark.parametrize("name", LOUD)
def test_where_plain_fp16_gives_nan_it_is_finite_and_closer_to_fp32_than_bf16(name):
    model = LOUD[name]()
    truth = run(model)
    least, where = PEAKS[name]
    assert peak(model, run, where) > least
    assert not run(copy.deepcopy(model).half(), torch.float16).isfinite().all()
    ours = error(run(make_range_safe(copy.deepcopy(model))), truth)
    assert ours < 2e-3
    assert ours < error(run(copy.deepcopy(model).bfloat16(), torch.bfloat16), truth)


@pytest.mark.parametrize("variant", ["1.5", "1.5-i2v", "fun-inp", "void", "5b", "2b"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_models_of_every_variant_and_storage(variant, stored):
    model = transformer(variant).to(stored)
    truth = run(copy.deepcopy(model).float())
    bf16 = error(run(copy.deepcopy(model).bfloat16(), torch.bfloat16), truth)
    safe = make_range_safe(model)
    assert is_range_safe(safe)
    assert error(run(safe), truth) < min(2e-3, bf16)


def test_attention_is_safe_whichever_kernel_runs_it():
    model = loud_values(loud_norms(transformer()), 1e6)
    truth = run(model)
    safe = make_range_safe(copy.deepcopy(model))
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            assert error(run(safe), truth) < 2e-3


def test_long_clips_go_through_the_feed_forward_in_pieces(monkeypatch):
    from cogvideox.modules import range_safe

    safe = make_range_safe(transformer())
    whole = run(safe)
    monkeypatch.setattr(range_safe, "_FEED_FORWARD_TOKENS", 50)
    assert torch.allclose(run(safe), whole, atol=1e-5)


def test_a_non_finite_input_is_not_hidden():
    safe = RangeSafeLinear.like(nn.Linear(8, 4))
    safe.load_weight(torch.randn(4, 8), torch.device("cpu"))
    safe.bias.data.zero_()
    for bad in (float("nan"), float("inf")):
        x = torch.ones(3, 8)
        x[1, 2] = bad
        y = safe(x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("stream", "inner"), [(3e5, 1.0), (1.0, 3e3), (3e7, 3e4)])
def test_t5_where_plain_fp16_gives_nan(stream, inner):
    torch.manual_seed(2)
    model = loud_t5(build_text_encoder(layers=3).eval(), stream, inner)
    truth = encode(model)
    assert peak(model, encode, lambda name: "layer.1" in name or name.endswith("wo")) > 1e6
    ours = error(encode(make_range_safe(copy.deepcopy(model))), truth)
    assert not encode(copy.deepcopy(model).half()).isfinite().all()
    assert ours < 2e-3
    assert ours < error(encode(copy.deepcopy(model).bfloat16()), truth)


def test_ordinary_t5():
    torch.manual_seed(0)
    model = build_text_encoder(layers=3).eval()
    truth = encode(model)
    bf16 = error(encode(copy.deepcopy(model).bfloat16()), truth)
    assert error(encode(make_range_safe(model)), truth) < min(2e-3, bf16)


@pytest.mark.parametrize("largest", [1.0, 3e38])
def test_a_device_without_float64_scales_weights_to_the_same(largest):
    weight = torch.rand(48, 32) * largest
    weight[:, :4] /= 2**12
    layers = RangeSafeLinear(32, 48, bias=False), RangeSafeLinear(32, 48, bias=False)
    with CardWithoutFloat64():
        layers[0].load_weight(weight, CARD)
    layers[1].load_weight(weight, torch.device("cpu"))
    for name in ("scaled_weight", "row_scale", "column_scale"):
        assert torch.equal(getattr(layers[0], name).numbers, getattr(layers[1], name))


def test_weights_take_no_more_room_than_fp16s():
    model = transformer(num_attention_heads=8)
    half = 2 * sum(p.numel() for p in model.parameters())
    safe = make_range_safe(model)
    assert sum(t.nbytes for t in (*safe.parameters(), *safe.buffers())) < 1.02 * half


def test_copies_and_moves_keep_working():
    safe = make_range_safe(transformer())
    expected = run(safe)
    again = copy.deepcopy(safe).to("cpu")
    del safe
    assert torch.equal(run(again), expected)


magnitudes = st.floats(-35, 35)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(magnitudes, min_size=1, max_size=5),
    tokens=st.lists(magnitudes, min_size=1, max_size=4),
    size=st.integers(1, 300),
)
@settings(max_examples=200, deadline=None)
def test_a_linear_of_any_weights_on_any_tokens_is_finite_and_within_its_bound(seed, rows, tokens, size):
    """Rows from 1e-35 to 1e35 and tokens from 1e-35 to 1e35, as long as the result is a number fp32 has."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(rows), size, generator=generator).double() * 10.0 ** torch.tensor(rows).double()[:, None]
    x = torch.randn(len(tokens), size, generator=generator).double() * 10.0 ** torch.tensor(tokens).double()[:, None]
    weight, x = weight.float().double(), x.float().double()
    bound = x.abs().amax(-1, keepdim=True) * weight.abs().sum(-1)
    in_range = (bound.amax(-1, keepdim=True) < 1e37).expand(bound.shape)
    keep = in_range & (bound > 1e-30) & (weight.abs().sum(-1) > 1e-15) & (x.abs().amax(-1, keepdim=True) > 1e-15)
    linear = RangeSafeLinear(size, len(rows), bias=False)
    linear.load_weight(weight.float(), torch.device("cpu"))
    result = linear(x.float()).double()
    assert result[in_range].isfinite().all()
    # fp16's rounding of input, weight and output: each at most 2^-11 of Hölder's bound.
    assert ((result - x @ weight.T).abs() <= 2.0**-9 * bound)[keep].all()


@given(seed=st.integers(0, 2**32 - 1), outlier=st.floats(0, 30), size=st.integers(2, 200))
@settings(max_examples=100, deadline=None)
def test_weights_beyond_fp16_and_outlier_channels(seed, outlier, size):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, size, generator=generator)
    weight[0] *= 10.0**outlier
    weight[:, 0] *= 1e5
    x = torch.randn(5, size, generator=generator)
    x[:, -1] *= 1e4
    linear = RangeSafeLinear(size, 6, bias=False)
    linear.load_weight(weight, torch.device("cpu"))
    truth = x.double() @ weight.double().T
    bound = x.abs().double().amax(-1, keepdim=True) * weight.abs().double().sum(-1)
    result = linear(x)
    assert result.isfinite().all()
    assert ((result.double() - truth).abs() <= 2.0**-9 * bound).all()
