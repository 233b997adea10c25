"""int8 and fp8 made while loading: where, how far off, how large; with every dtype, memory mode and LoRA, and gone
without a trace."""

import copy
import gc
import re
import weakref
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import cogvideox.loading as loading_module
import cogvideox.modules.packed as packed_module
import cogvideox.weights as weights_module
from cogvideox.checkpoint.layout import open_part
from cogvideox.choices import QUANTIZE
from cogvideox.dtypes import FP32, RANGE_SAFE_FP16, Precision
from cogvideox.handles import open_handles, quantized, with_lora
from cogvideox.loading import load_module
from cogvideox.lora import applied, open_lora
from cogvideox.memory import LiveBytes, plan_memory
from cogvideox.modules.packed import LARGEST, DynamicWeight, PackedLinear, PackedWeight, quantize_rows
from cogvideox.modules.quantize import METHODS, Quantizer
from cogvideox.modules.range_safe import RangeSafeLinear, scale_tokens
from cogvideox.precision.hardware import NATIVE, Hardware, cuda_support
from cogvideox.sampling import sample
from cogvideox.text import encode_prompt
from tests import layouts, loud_models
from tests.card import CARD, CardWithoutFloat64
from tests.helpers import run_generate
from tests.memory import left_behind
from tests.reference import error
from tests.reference import run_module as run
from tests.tiny_checkpoint import build_transformer
from tests.told import Told

HOST = torch.device("cpu")
BF16 = Precision(torch.bfloat16)
#: A device with every kind of product: torch has them all on a CPU, fp8's slowly.
CPU = Hardware(HOST, "CPU", int8=NATIVE, fp8=NATIVE)
PRECISIONS = pytest.mark.parametrize("precision", [FP32, BF16, RANGE_SAFE_FP16], ids=["fp32", "bf16", "range-safe"])
EVERY = pytest.mark.parametrize("method", QUANTIZE)
#: One that is widened and one that is not: what differs between int8 and fp8 is in no sum of bytes and no hook.
TWO = pytest.mark.parametrize("method", ["int8_weight_only", "fp8_dynamic"])
DTYPES = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
BLOCK = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
T5_BLOCK = ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o")
T5_BLOCK += ("1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo")
LAYERS = {
    "transformer": {f"transformer_blocks.{number}.{layer}" for number in range(2) for layer in BLOCK},
    "text_encoder": {f"encoder.block.{number}.layer.{layer}" for number in range(2) for layer in T5_BLOCK},
}


def load(part, precision, method):
    return load_module(part, precision, HOST, None, Quantizer(METHODS[method], part.kind, precision, HOST))


def widened(module):
    """Names of the quantized layers -> their weights in float64."""
    layers = {
        name: layer.packed for name, layer in module.named_modules() if getattr(layer, "packed", None) is not None
    }
    return {name: packed.data.double() * packed.scale.double() for name, packed in layers.items()}


@EVERY
def test_a_device_without_float64_quantizes_to_the_same(method):
    weight = torch.randn(48, 32)
    there, here = (Quantizer(METHODS[method], "transformer", FP32, device) for device in (CARD, HOST))
    with CardWithoutFloat64():
        packed = there.quantize("x.weight", weight, CARD)
    expected = here.quantize("x.weight", weight, HOST)
    assert torch.equal(packed.data.numbers.float(), expected.data.float())
    assert torch.equal(packed.scale.numbers, expected.scale)
    assert there.losses == here.losses


@pytest.fixture(scope="module")
def unmodified(tiny):
    """``unmodified(weights, dtype)``: diffusers' own module, with some of its weights replaced."""
    from diffusers import CogVideoXTransformer3DModel

    loaded = CogVideoXTransformer3DModel.from_pretrained(tiny / "transformer", torch_dtype=torch.float64)

    def get(weights, dtype=torch.float64):
        module = copy.deepcopy(loaded).to(dtype)
        for name, weight in weights.items():
            module.get_submodule(name).weight.data = weight.to(dtype)
        return module

    return get


@pytest.fixture(scope="module")
def exact(unmodified, inputs):
    """What the model gives in float64."""
    return run(unmodified({}), inputs, torch.float64)


class TestRounding:
    @given(
        st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4), min_size=1, max_size=6)
    )
    @settings(max_examples=80, deadline=None)
    def test_int8_is_off_by_half_a_scale_at_most(self, rows):
        rows = torch.tensor(rows)
        quantized, scale = quantize_rows(rows, torch.int8)
        off = (rows.double() - quantized.double() * scale.double()).abs()
        assert (off <= scale.double() * (0.5 + 1e-4)).all()
        assert quantized.min() >= -127

    @given(
        st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4), min_size=1, max_size=6)
    )
    @settings(max_examples=80, deadline=None)
    def test_fp8_is_off_by_a_16th_of_each_number_or_the_smallest_step(self, rows):
        rows = torch.tensor(rows)
        quantized, scale = quantize_rows(rows, torch.float8_e4m3fn)
        off = (rows.double() - quantized.double() * scale.double()).abs()
        assert (off <= torch.maximum(rows.double().abs() / 16, scale.double() * 2.0**-10) * (1 + 1e-4)).all()

    @DTYPES
    def test_the_whole_range_is_used_and_zeros_stay_zeros(self, dtype):
        quantized, scale = quantize_rows(torch.tensor([[0.0, 0.0], [-3.0, 1.5]]), dtype)
        assert quantized.float().tolist()[0] == [0, 0]
        assert quantized.float()[1, 0] == -LARGEST[dtype]
        assert scale.isfinite().all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @DTYPES
    def test_a_token_that_is_not_finite_comes_out_so_everywhere_and_no_other(self, dtype, value):
        x = torch.randn(3, 32)
        x[1, 5] = value
        y = DynamicWeight(*quantize_rows(torch.randn(16, 32), dtype))(x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


class TestDynamicProduct:
    """Against exact integer arithmetic, or float64, with the same numbers."""

    @pytest.mark.parametrize("shape", [(1, 3, 64), (2, 20, 64), (40, 64)])
    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled tokens"])
    @DTYPES
    def test_it_is_the_exact_product_of_the_quantized_numbers(self, dtype, scaled, shape):
        weight, x, bias = torch.randn(48, 64), torch.randn(shape) * 100, torch.randn(48)
        layer = DynamicWeight(*quantize_rows(weight, dtype))
        given, token_scale = scale_tokens(x) if scaled else (x, None)
        tokens, scales = quantize_rows(given.flatten(0, -2), dtype)
        sums = tokens.double() @ layer.data.double().t()
        if dtype == torch.int8:
            assert torch.equal(layer._sums(tokens).double(), sums)
        expected = (
            sums * scales * layer.scale.double().t() * (token_scale.flatten(0, -2).double() if scaled else 1) + bias
        )
        ours = layer(given, bias, token_scale)
        assert ours.dtype == torch.float32
        assert ours.shape == (*shape[:-1], 48)
        assert error(ours.flatten(0, -2), expected) < 1e-6

    @pytest.mark.parametrize("tokens", [10, 11, 33])
    @DTYPES
    def test_tokens_go_through_in_pieces_and_each_is_its_own(self, dtype, tokens, monkeypatch):
        layer, x = DynamicWeight(*quantize_rows(torch.randn(32, 64), dtype)), torch.randn(1, tokens, 64)
        whole = layer(x)
        monkeypatch.setattr(packed_module, "_TOKENS", 10)
        assert torch.equal(layer(x), whole)
        assert torch.equal(layer(x[:, 3:4]), whole[:, 3:4])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_it_gives_what_it_is_given(self, dtype):
        layer = DynamicWeight(*quantize_rows(torch.randn(32, 64), torch.int8))
        assert layer(torch.randn(5, 64, dtype=dtype), torch.randn(32, dtype=dtype)).dtype == dtype

    @DTYPES
    def test_no_sum_overflows_at_the_widest_layer(self, dtype):
        """All 12,288 channels at their largest."""
        layer = DynamicWeight(*quantize_rows(torch.full((16, 12288), 1e30), dtype))
        assert layer(torch.full((1, 12288), 1e3)).allclose(torch.tensor(12288e33), rtol=1e-5)

    def test_the_card_is_asked_that_the_weight_will_run_on(self, monkeypatch):
        """Beside another, and while the weight waits in the host's memory."""
        monkeypatch.setattr(torch.version, "hip", None)
        found = {None: (8, 9), torch.device("cuda:0"): (8, 9), torch.device("cuda:1"): (9, 0)}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found[device])
        data, scale = quantize_rows(torch.randn(16, 32), torch.float8_e4m3fn)
        for device, inside in (("cuda:0", False), ("cuda:1", True), ("cpu", True)):
            weight = METHODS["fp8_dynamic"].pack(data, scale, torch.device(device))
            assert weight._scales_inside == inside


class TestLayers:
    @PRECISIONS
    @EVERY
    def test_attention_and_feed_forward_are_quantized_and_all_else_is_bit_for_bit_as_without(
        self, checkpoints, method, precision
    ):
        part = open_part(checkpoints("1.5-i2v") / "transformer", "transformer")
        module, plain = load(part, precision, method), load_module(part, precision, HOST)
        kind = DynamicWeight if METHODS[method].dynamic else PackedWeight
        assert {
            name for name, layer in module.named_modules() if isinstance(getattr(layer, "packed", None), kind)
        } == LAYERS["transformer"]
        self.check_the_rest(module, plain, LAYERS["transformer"])

    @pytest.mark.parametrize(
        "precision", [FP32, BF16, RANGE_SAFE_FP16, Precision(torch.float16)], ids=lambda precision: precision.name
    )
    def test_t5_too_less_what_transformers_keeps_in_fp32(self, tiny, precision):
        part = open_part(tiny / "text_encoder", "text_encoder")
        module, plain = load(part, precision, "int8_weight_only"), load_module(part, precision, HOST)
        wanted = {
            name
            for name in LAYERS["text_encoder"]
            if not (name.endswith("wo") and precision == Precision(torch.float16))
        }
        assert set(widened(module)) == wanted
        self.check_the_rest(module, plain, wanted)

    def check_the_rest(self, module, plain, layers):
        rest = {name for name in plain.state_dict() if name.rpartition(".")[0] not in layers or name.endswith("bias")}
        mine = module.state_dict()
        assert all(
            torch.equal(mine[name], plain.state_dict()[name]) and mine[name].dtype == plain.state_dict()[name].dtype
            for name in rest
        )
        assert {name.removesuffix(".packed.data") for name in set(mine) - rest} == layers

    @EVERY
    def test_loading_it_twice_gives_the_same_bits(self, part, method):
        first, second = (load(part, BF16, method).state_dict() for _ in range(2))
        assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)

    def test_the_released_model_has_252_of_them(self):
        names = [
            f"transformer_blocks.{number}.{layer}.weight"
            for number in range(42)
            for layer in (*BLOCK, "norm1.linear", "norm2.linear")
        ]
        quantizer = Quantizer(METHODS["int8_dynamic"], "transformer", BF16, HOST)
        assert sum(map(quantizer.takes, names)) == 252


class TestResult:
    @pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("method", ["int8_weight_only", "fp8_weight_only"])
    def test_weight_only_is_the_unmodified_module_with_rounded_weights_bit_for_bit(
        self, unmodified, part, inputs, method, precision
    ):
        module = load(part, precision, method)
        weights = {
            name: layer.packed.scaled(precision.dtype)
            for name, layer in module.named_modules()
            if isinstance(layer, PackedLinear)
        }
        reference = unmodified(weights, precision.dtype)
        assert torch.equal(run(module, inputs, precision.dtype), run(reference, inputs, precision.dtype))

    @pytest.mark.parametrize("method", ["int8_weight_only", "fp8_weight_only"])
    def test_range_safe_weight_only_too_within_fp16s_rounding(self, unmodified, part, inputs, method):
        module = load(part, RANGE_SAFE_FP16, method)
        expected = run(unmodified(widened(load(part, FP32, method))), inputs, torch.float64)
        assert error(run(module, inputs), expected) < 3e-3

    @PRECISIONS
    @pytest.mark.parametrize(("method", "limit"), zip(QUANTIZE, (2e-3, 1e-2, 1e-2, 3e-2), strict=True))
    def test_each_stays_near_the_model_in_float64(self, exact, part, inputs, method, limit, precision):
        plain = error(run(load_module(part, precision, HOST), inputs, precision.activations), exact)
        ours = error(run(load(part, precision, method), inputs, precision.activations), exact)
        assert ours < limit + plain
        if precision == FP32:
            assert ours > 10 * plain

    @pytest.mark.parametrize("loud", ["loud_inner", "loud_values", "outlier_channels", "loud_stream"])
    def test_range_safe_fp16_stays_range_safe(self, tmp_path, inputs, loud):
        """Activations far beyond fp16's range: as near to float64 as the same method is in fp32."""
        torch.manual_seed(0)
        module = build_transformer()
        getattr(loud_models, loud)(module, *([] if loud == "outlier_channels" else [1e6])).save_pretrained(tmp_path)
        part, expected = open_part(tmp_path, "transformer"), run(module.double(), inputs, torch.float64)
        for method in ("int8_weight_only", "int8_dynamic", "fp8_dynamic"):
            ours, fp32 = (
                error(run(load(part, precision, method), inputs), expected) for precision in (RANGE_SAFE_FP16, FP32)
            )
            assert ours < 1.2 * fp32 + 3e-3

    @PRECISIONS
    @TWO
    def test_a_lora_is_added_as_it_is_to_the_widened_weights(
        self, unmodified, part, inputs, tmp_path, method, precision
    ):
        names = [
            "transformer_blocks.0.attn1.to_q",
            "transformer_blocks.1.ff.net.2",
            "transformer_blocks.0.norm1.linear",
        ]
        shapes = {name: part.tensors[f"{name}.weight"].shape for name in names}
        halves = {
            name: (torch.randn(3, shape[1]) * shape[1] ** -0.5, torch.randn(shape[0], 3) * 2)
            for name, shape in shapes.items()
        }
        save_file(
            {f"{name}.lora_{half}.weight": halves[name]["AB".index(half)] for name in names for half in "AB"},
            tmp_path / "lora.safetensors",
        )
        lora, module = open_lora(tmp_path / "lora.safetensors", part, 0.8), load(part, precision, method)
        base = run(module, inputs, precision.activations)
        with applied([lora], module, precision):
            ours = run(module, inputs, precision.activations)
        weights = widened(load(part, FP32, method))
        plain = unmodified({})
        merged = {
            name: weights.get(name, plain.get_submodule(name).weight) + 0.8 * up.double() @ down.double()
            for name, (down, up) in halves.items()
        }
        expected = run(unmodified(weights | merged), inputs, torch.float64)
        without = run(unmodified(weights), inputs, torch.float64)
        limit = {"fp32": 1e-5, "bf16": 3e-2}.get(precision.name, 3e-3) + (0.03 if METHODS[method].dynamic else 0)
        assert error(ours, expected) < limit < error(expected, without)
        assert torch.equal(run(module, inputs, precision.activations), base)


class TestMemory:
    @pytest.mark.parametrize("kind", ["model", "text_encoder"])
    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
    @TWO
    def test_the_bytes_told_are_those_it_takes(self, tiny, method, dtype, kind):
        weights = quantized(getattr(open_handles(tiny, dtype, CPU), kind), method).weights
        told = weights.nbytes
        assert not weights.is_loaded
        with weights.running():
            # Beside what is counted, range-safe fp16 keeps norms and biases in fp32.
            assert weights.resident == pytest.approx(told, rel=0.02 if dtype == "fp16" else 1e-6)

    @EVERY
    def test_a_layer_takes_a_byte_a_weight_and_a_scale_a_row(self, tiny, method):
        model = open_handles(tiny, "bf16", CPU).model
        shapes = [model.weights.part.tensors[f"{name}.weight"].shape for name in LAYERS["transformer"]]
        saved = sum(2 * prod(shape) - prod(shape) - 4 * shape[0] for shape in shapes)
        assert model.weights.nbytes - quantized(model, method).weights.nbytes == saved

    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
    @TWO
    def test_the_plan_is_within_15_percent(self, tiny, prompts, method, dtype):
        model, latent = quantized(open_handles(tiny, dtype, CPU).model, method), torch.zeros(1, 16, 4, 16, 16)
        with model.weights.running():
            gc.collect()
        with LiveBytes() as measured:
            sample(model, *prompts, latent, seed=1, steps=1)
        assert plan_memory(model, latent.shape, tokens=8).activations == pytest.approx(measured.peak, rel=0.15)

    @PRECISIONS
    @EVERY
    def test_loading_takes_the_quantized_weights_and_a_layer(self, part, monkeypatch, method, precision):
        mode = LiveBytes()

        def uncounted(work):
            # Shapes without memory, and pages of the file.
            def call(*given):
                mode.paused = True
                try:
                    return work(*given)
                finally:
                    mode.paused = False

            return call

        for name in ("empty_module", "make_range_safe"):
            monkeypatch.setattr(loading_module, name, uncounted(getattr(loading_module, name)))
        monkeypatch.setattr(loading_module._MappedFiles, "_map", uncounted(loading_module._MappedFiles._map))
        with mode:
            module = load(part, precision, method)
        weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        widest = max(prod(tensor.shape) for tensor in part.tensors.values())
        # A piece in fp32, what it is divided into, and what is left of it.
        assert weights <= mode.peak < weights + 3.5 * 4 * widest

    @PRECISIONS
    @TWO
    @pytest.mark.parametrize("mode", ["offload_blocks", "offload_layers"])
    def test_offloading_brings_everything_and_changes_nothing(self, part, inputs, monkeypatch, method, precision, mode):
        """diffusers' group offloading: from the host to the host, as there is no other device here."""
        offloaded = load(part, precision, method)
        try:
            weights_module._offload(offloaded, mode, HOST)
        except AttributeError as problem:
            pytest.skip(f"this diffusers cannot offload without an accelerator ({problem})")
        expected = run(load(part, precision, method), inputs, precision.activations)
        assert left_behind(offloaded, lambda: run(offloaded, inputs, precision.activations), monkeypatch) == []
        assert torch.equal(run(offloaded, inputs, precision.activations), expected)

    @pytest.mark.parametrize("memory", ["offload_blocks", "offload_layers", "cpu"])
    def test_each_mode_makes_the_same_latents(self, tiny, prompts, memory):
        latent = torch.zeros(1, 16, 4, 6, 10)
        expected, ours = (
            sample(
                quantized(open_handles(tiny, "fp32", CPU, memory=how).model, "int8_dynamic"),
                *prompts,
                latent,
                seed=1,
                steps=1,
                cfg=1.0,
            )
            for how in ("auto", memory)
        )
        assert torch.equal(ours, expected)


class TestHandles:
    def test_both_branches_of_a_graph_run_and_neither_disturbs_the_other(self, tiny, prompts, tmp_path):
        name = "transformer_blocks.0.attn1.to_q"
        save_file(
            {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)},
            tmp_path / "lora.safetensors",
        )
        model, latent = open_handles(tiny, "fp32", CPU).model, torch.zeros(1, 16, 4, 6, 10)

        def make(model):
            return sample(model, *prompts, latent, seed=1, steps=1, cfg=1.0)

        plain = make(model)
        module = model.weights._module
        small, other = (
            quantized(model, "int8_weight_only"),
            quantized(with_lora(model, tmp_path / "lora.safetensors"), "int8_weight_only"),
        )
        assert small.weights is other.weights is not model.weights
        assert other.loras
        first = make(small)
        assert error(make(other), first) > 1e-3
        assert 0 < error(first, plain) < 1e-2
        assert torch.equal(make(small), first)
        assert model.weights._module is module
        assert torch.equal(make(model), plain)
        assert torch.equal(make(model), make(open_handles(tiny, "fp32", CPU).model))

    def test_nothing_is_left_when_the_node_is_gone(self, tiny):
        model = open_handles(tiny, "fp32", CPU).model
        small = quantized(model, "fp8_weight_only")
        with small.weights.running():
            gone = weakref.ref(small.weights)
        del small
        gc.collect()
        assert gone() is None
        assert not model.weights.is_loaded
        assert model.weights.method is None

    def test_measuring_loads_it_once_and_any_mode_can_follow(self, tiny, monkeypatch):
        loads, real = [], weights_module.load_module
        monkeypatch.setattr(weights_module, "load_module", lambda *given: loads.append(1) or real(*given))
        for mode in ("gpu", "offload_blocks"):
            weights = quantized(open_handles(tiny, "fp32", CPU).model, "int8_weight_only").weights
            weights.quantization_text()
            with weights.running(mode=mode):
                pass
            weights.quantization_text()
        assert len(loads) == 2

    @EVERY
    def test_what_is_measured_is_the_relative_l2_error(self, tiny, part, method):
        module = load_module(part, FP32, HOST)
        plain = {name: module.get_submodule(name).weight.double() for name in LAYERS["transformer"]}
        text = quantized(open_handles(tiny, "bf16", CPU).model, method).weights.quantization_text()
        rounded = widened(load(part, FP32, method))
        each = {name: error(rounded[name], plain[name]) for name in plain}
        whole = error(
            torch.cat([rounded[name].flatten() for name in plain]), torch.cat([plain[name].flatten() for name in plain])
        )
        worst = max(each, key=each.get)
        assert text.startswith(
            f"transformer: {method}, 1.33 MB -> 0.94 MB in bf16; 12 layers; relative error of their weights "
            f"{whole:.2%} ("
        )
        assert text.endswith(f"(largest {each[worst]:.2%}: {worst})")

    @EVERY
    def test_a_prompt_is_encoded_nearly_as_before(self, tiny, method):
        plain = open_handles(tiny, "fp32", CPU).text_encoder
        small = quantized(plain, method)
        assert not small.weights.method.dynamic
        assert 0 < error(encode_prompt(small, "a panda").embeddings, encode_prompt(plain, "a panda").embeddings) < 0.05

    @TWO
    def test_a_result_that_is_not_finite_is_healed_with_quantized_weights_and_whole_activations(
        self, tiny, prompts, monkeypatch, method
    ):
        real, said, ran = weights_module.load_module, [], []

        def spoiled(part, precision, *rest):
            module = real(part, precision, *rest)
            ran.append((precision, rest[-1].method.name))
            if precision != FP32:
                module.proj_out.register_forward_hook(lambda _m, _a, output: output * float("nan"))
            return module

        latent = torch.zeros(1, 16, 4, 6, 10)
        calm = quantized(open_handles(tiny, "fp32", CPU).model, METHODS[method].weight_only.name)
        expected = sample(calm, *prompts, latent, seed=1, steps=1, cfg=1.0)
        monkeypatch.setattr(weights_module, "load_module", spoiled)
        ours = sample(
            quantized(open_handles(tiny, "bf16", CPU).model, method),
            *prompts,
            latent,
            seed=1,
            steps=1,
            cfg=1.0,
            events=Told(heals=said),
        )
        assert "Going on from here in fp32" in said[-1]
        assert ran[0] == (BF16, method)
        assert ran[-1] == (FP32, METHODS[method].weight_only.name)
        # The noise and the prompt were rounded to bf16.
        assert error(ours, expected) < 1e-2


class TestRefusals:
    @pytest.mark.parametrize("layout", ["fp8", "gguf"])
    def test_a_quantized_copy(self, tmp_path, tiny, part, layout):
        state = load_module(part, FP32, HOST).state_dict()
        file, what = layouts.write_packed(tmp_path, state, layout), {"gguf": "GGUF Q8_0", "fp8": "fp8 (e4m3fn)"}[layout]
        with pytest.raises(ValueError, match=re.escape(f"is a quantized copy already ({what})")):
            quantized(open_handles(file, "bf16", CPU).model, "int8_weight_only")

    def test_a_second_time(self, tiny):
        with pytest.raises(ValueError, match=r"The transformer is quantized already \(int8_weight_only\)"):
            quantized(quantized(open_handles(tiny, "bf16", CPU).model, "int8_weight_only"), "fp8_weight_only")

    def test_an_unknown_method(self, tiny):
        with pytest.raises(ValueError, match="The method is 'int4', which is not known here"):
            quantized(open_handles(tiny, "bf16", CPU).model, "int4")

    def test_products_that_the_device_has_not(self, tiny):
        old = Hardware(HOST, "Tesla V100", **cuda_support("Tesla V100", (7, 0)))
        for method in ("int8_dynamic", "fp8_dynamic"):
            eight = method.split("_")[0]
            with pytest.raises(
                ValueError, match=f"Tesla V100 has no matrix products of {eight} .* Choose int8_weight_only"
            ):
                quantized(open_handles(tiny, "auto", old).model, method)
            # T5 has none of them.
            assert (
                quantized(open_handles(tiny, "auto", old).text_encoder, method).weights.method.name
                == f"{eight}_weight_only"
            )
        quantized(open_handles(tiny, "auto", old).model, "fp8_weight_only")

    def test_fp8_where_there_is_no_such_dtype(self, tiny):
        apple = Hardware(torch.device("mps"), "Apple GPU (MPS)")
        with pytest.raises(ValueError, match="keeps weights in fp8, and Apple GPU"):
            quantized(open_handles(tiny, "bf16", apple).model, "fp8_weight_only")
        assert quantized(open_handles(tiny, "bf16", apple).model, "int8_weight_only")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @EVERY
    def test_damaged_weights_are_told_at_once(self, method, bad):
        weight = torch.randn(32, 64)
        weight[7, 3] = bad
        with pytest.raises(
            ValueError, match=r"ff.net.2.weight of the transformer holds NaN or Inf, .* download it again"
        ):
            Quantizer(METHODS[method], "transformer", FP32, HOST).quantize(
                "transformer_blocks.1.ff.net.2.weight", weight, HOST
            )


class TestSurface:
    def test_the_node_gives_both_and_its_report(self, pack, tiny):
        nodes = pack.NODE_CLASS_MAPPINGS
        model, text_encoder, _, _ = nodes["CogVideoX15ModelLoader"]().run(model=str(tiny), dtype="fp32", memory="cpu")
        small, small_t5, report = nodes["CogVideoX15Quantize"]().run(
            model=model, method="int8_dynamic", text_encoder=text_encoder
        )
        lines = report.splitlines()
        assert lines[0].startswith(
            "transformer: int8_dynamic, 2.65 MB -> 1.48 MB in fp32; 12 layers; relative error of their weights 0."
        )
        assert lines[1].startswith("text encoder: int8_weight_only, ")
        assert small.weights.is_loaded
        assert small_t5.weights.is_loaded
        assert model.weights.method is None
        only, none, report = nodes["CogVideoX15Quantize"]().run(model=model, method="int8_weight_only")
        assert none is None
        assert len(report.splitlines()) == 1
        assert only.weights.method.name == "int8_weight_only"
        with pytest.raises(ValueError, match="CogVideoX-1.5 Quantize gives one only if its own is connected"):
            nodes["CogVideoX15TextEncode"]().run(text_encoder=none, prompt="a panda")

    def test_the_node_refuses_what_the_card_cannot_when_the_graph_is_queued(self, pack, monkeypatch):
        import sys

        node, host = pack.NODE_CLASS_MAPPINGS["CogVideoX15Quantize"], sys.modules[f"{pack.__name__}.nodes.host"]
        monkeypatch.setattr(host, "hardware", lambda: Hardware(HOST, "Tesla T4", **cuda_support("Tesla T4", (7, 5))))
        assert node.VALIDATE_INPUTS("int8_dynamic") is True
        assert "Tesla T4 has no matrix products of fp8" in node.VALIDATE_INPUTS("fp8_dynamic")
        assert "The method is 'int4', which is not known here" in node.VALIDATE_INPUTS("int4")
        # Linked to another node's output.
        assert node.VALIDATE_INPUTS(None) is True

    def test_the_command_line_too(self, tiny, tmp_path, capsys, monkeypatch):
        import cogvideox.vae

        monkeypatch.setattr(cogvideox.vae, "decode", lambda *_, **__: torch.rand(17, 48, 80, 3))
        what = (
            "--prompt",
            "a panda",
            "--model",
            tiny,
            "--width",
            80,
            "--height",
            48,
            "--frames",
            17,
            "--steps",
            1,
            "--cfg",
            1,
        )
        how = (
            "--dtype",
            "fp32",
            "--device",
            "cpu",
            "--quantize",
            "int8_dynamic",
            "--quantize-text-encoder",
            "int8_weight_only",
        )
        code, said, _ = run_generate(capsys, *what, *how, "--output", tmp_path / "out.mp4")
        assert code == 0
        assert re.search(
            r"text encoder: int8_weight_only, .*\ntransformer: int8_dynamic, .*relative error of their weights", said
        )


def test_a_layer_that_is_not_widened_needs_no_row_scales_of_its_own():
    layer = RangeSafeLinear(64, 32, bias=True)
    layer.load_packed(DynamicWeight(*quantize_rows(torch.randn(32, 64), torch.int8)))
    assert layer.row_scale is None
