"""Compiled blocks give what the blocks give; one serves for all, in every run that follows; and nothing is left on the
model."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from cogvideox.choices import BACKENDS
from cogvideox.handles import open_handles, quantized, with_attention, with_cache, with_compile, with_lora
from cogvideox.modules import attention as attention_module
from cogvideox.modules.cache import Cache
from cogvideox.modules.compiled import Compiled, missing_compiler
from cogvideox.modules.fastest import Fastest
from cogvideox.modules.packed import DynamicWeight, quantize_rows
from cogvideox.precision.hardware import NATIVE, Hardware
from cogvideox.sampling import sample
from tests import layouts
from tests.conftest import CPU
from tests.helpers import inside, offload_what_is_loaded
from tests.reference import draw_prompts
from tests.tiny_checkpoint import LAYERS, build_checkpoint, build_transformer
from tests.told import Told

SHAPE = (1, 16, 4, 4, 6)
#: A device with every kind of product: torch has them all on a CPU.
EVERYTHING = Hardware(CPU.device, "CPU", int8=NATIVE, fp8=NATIVE)


@pytest.fixture(scope="module")
def prompts():
    return draw_prompts(8)


@pytest.fixture
def graphs(use_backend):
    """Blocks are captured as for inductor, and run as they were written; the list has an entry for each time one
    was."""
    captured = []

    def backend(graph, inputs, **_):
        captured.append(graph)
        return graph.forward

    use_backend(backend)
    return captured


@pytest.fixture
def inductor():
    """Inductor itself. Which vector instructions there are is not tried out: that takes longer than the kernels, which
    are plain C++ without them."""
    if missing_compiler(CPU.device) is not None:
        pytest.skip("no C++ compiler")
    with torch._inductor.config.patch("cpp.vec_isa_ok", False):
        yield


@pytest.fixture
def offloads(monkeypatch):
    return partial(offload_what_is_loaded, monkeypatch)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A checkpoint in whose blocks other layers have channels and rows that hardly count, and weights with other
    tails."""

    def change(parts):
        parts["transformer"] = build_transformer(num_layers=LAYERS)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for number, block in enumerate(parts["transformer"].transformer_blocks):
                layers = [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
                for layer in layers:
                    tails = 1 + 0.4 * number
                    drawn = torch.randn(layer.weight.shape, generator=generator)
                    layer.weight.copy_(0.02 * drawn.sign() * drawn.abs() ** tails)
                layers[number].weight[:, 0] *= 1e-4
                layers[-1 - number].weight[0] *= 1e-4

    folder = tmp_path_factory.mktemp("uneven") / "it"
    return build_checkpoint(folder, change=change, stored={"transformer": torch.float32})


def run(model, prompts, compiled=None, said=None, shape=SHAPE, healed=None, **settings):
    settings = dict(seed=1, steps=3) | settings
    said = [] if said is None else said
    return sample(
        model if compiled is None else with_compile(model, compiled),
        *prompts,
        torch.zeros(shape),
        events=Told(said, healed),
        **settings,
    )


class TestSharing:
    @pytest.mark.parametrize("cfg", [1.0, 6.0])
    def test_one_block_is_compiled_for_all_and_for_the_runs_and_models_that_follow(
        self, model, deep, prompts, graphs, cfg
    ):
        plain, said = run(model, prompts, cfg=cfg), []
        assert torch.equal(run(model, prompts, Compiled(), said, cfg=cfg), plain)
        assert len(graphs) == 1
        assert said[-2].startswith("Compiling the transformer's block")
        assert said[-1].startswith("Compiled in ")
        for again in (model, open_handles(deep, "fp32", CPU).model):
            said.clear()
            assert torch.equal(run(again, prompts, Compiled(), said, cfg=cfg), plain)
            assert len(graphs) == 1
            assert not any("ompil" in text for text in said)

    def test_another_size_is_compiled_anew_and_that_is_said(self, model, prompts, graphs):
        run(model, prompts, Compiled())
        count, said = len(graphs), []
        larger = (1, 16, 4, 4, 8)
        ours = run(model, prompts, Compiled(), said, shape=larger)
        assert torch.equal(ours, run(model, prompts, shape=larger))
        assert len(graphs) == count + 1
        assert said[-2].startswith("Compiling the transformer's block")

    @pytest.mark.parametrize("cfg", [6.0, 1.0])
    def test_dynamic_code_serves_for_all_sizes(self, model, prompts, graphs, cfg):
        # Of sizes that are equal by chance torch assumes that they always are.
        small, larger = (1, 16, 4, 6, 10), (1, 16, 4, 8, 14)
        run(model, prompts, Compiled(dynamic=True), shape=small, cfg=cfg)
        assert len(graphs) == 1
        compiled = run(model, prompts, Compiled(dynamic=True), shape=larger, cfg=cfg)
        assert torch.equal(compiled, run(model, prompts, shape=larger, cfg=cfg))
        assert len(graphs) == 1

    @pytest.fixture
    def lora(self, model, tmp_path):
        """``lora(name, blocks)``: the model with a new LoRA beside those blocks."""

        def get(name, blocks):
            tensors = {}
            for block in blocks:
                for layer in ("attn1.to_q", "attn1.to_out.0", "ff.net.2"):
                    layer = f"transformer_blocks.{block}.{layer}"
                    out, inner = model.weights.part.tensors[f"{layer}.weight"].shape
                    tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, inner) * inner**-0.5
                    tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, 2) * 0.2
            save_file(tensors, tmp_path / f"{name}.safetensors")
            return with_lora(model, tmp_path / f"{name}.safetensors")

        return get

    def test_a_lora_is_compiled_in_once_and_another_one_of_its_kind_uses_the_same_code(
        self, model, prompts, lora, graphs
    ):
        first, second = (lora(name, range(LAYERS)) for name in ("first", "second"))
        plain = run(first, prompts)
        assert not torch.equal(plain, run(model, prompts))
        assert torch.equal(run(first, prompts, Compiled()), plain)
        assert len(graphs) == 1
        assert torch.equal(run(second, prompts, Compiled()), run(second, prompts))
        assert len(graphs) == 1

    @pytest.mark.parametrize("dtype", ["fp32", "fp16"])
    def test_code_of_blocks_without_a_lora_is_not_taken_for_those_with_it_nor_the_reverse(
        self, deep, prompts, tmp_path, graphs, dtype
    ):
        """In one process, as a person adds a LoRA and takes it away again."""
        model, models = open_handles(deep, dtype, CPU).model, {}
        for name, blocks in (("of every block", range(LAYERS)), ("of the first", (0,)), ("of the last", (LAYERS - 1,))):
            tensors = {}
            for block in blocks:
                layer = f"transformer.transformer_blocks.{block}.attn1.to_v"
                tensors[f"{layer}.lora_A.weight"] = torch.randn(2, 128) * 128**-0.5
                tensors[f"{layer}.lora_B.weight"] = torch.randn(128, 2)
            save_file(tensors, tmp_path / f"{name}.safetensors")
            models[name] = with_lora(model, tmp_path / f"{name}.safetensors")
        models["none"] = model
        plain = {name: run(each, prompts) for name, each in models.items()}
        for order in (("none", "of every block", "of the first", "of the last", "none"), models, reversed(models)):
            for name in order:
                compiled = run(models[name], prompts, Compiled())
                assert (compiled - plain[name]).norm() < 1e-5 * plain[name].norm(), name
                assert name == "none" or (plain[name] - plain["none"]).norm() > 1e-2 * plain["none"].norm()
        # With one and without: which block it is does not matter. In fp16 LoRAs may be of two kinds, widened and not.
        assert len(graphs) == 2 or (dtype == "fp16" and len(graphs) <= 4)


class TestTogether:
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_every_dtype(self, deep, prompts, graphs, dtype):
        """fp16 is range-safe here."""
        model = open_handles(deep, dtype, CPU).model
        assert torch.equal(run(model, prompts, Compiled()), run(model, prompts))
        assert graphs

    @pytest.mark.parametrize(("packed", "dtype"), [("fp8", "fp16"), ("gguf", "fp32")])
    def test_packed_weights(self, model, prompts, tmp_path, graphs, packed, dtype):
        with model.weights.running() as module:
            path = layouts.write_packed(tmp_path, module.state_dict(), packed)
        packed_model, said = open_handles(path, dtype, CPU).model, []
        assert torch.equal(run(packed_model, prompts, Compiled(), said), run(packed_model, prompts))
        assert graphs, said

    @pytest.mark.parametrize("mode", ["gpu", "offload_blocks"])
    @pytest.mark.parametrize("method", [None, "int8_weight_only", "fp8_weight_only"])
    def test_range_safe_blocks_with_scales_of_other_kinds_are_compiled_once(
        self, uneven, prompts, graphs, offloads, method, mode
    ):
        if mode != "gpu":
            offloads(mode)
        model = open_handles(uneven, "fp16", CPU).model
        model = model if method is None else quantized(model, method)
        plain = run(model, prompts)
        before = {name: value.clone() for name, value in model.weights._module.named_buffers()}
        traces, compiled = inside(model.weights._module), run(model, prompts, Compiled())
        assert len(graphs) == 1
        assert ((compiled - plain).norm() / plain.norm()).item() < 2e-3
        assert inside(model.weights._module) == traces
        after = dict(model.weights._module.named_buffers())
        assert {name for name in before if not torch.equal(before[name], after[name])} == set()
        assert before.keys() == after.keys()
        assert torch.equal(run(model, prompts), plain)

    def test_so_are_those_with_loras_whose_scales_are_of_other_kinds(self, uneven, prompts, graphs, tmp_path):
        model, tensors = open_handles(uneven, "fp16", CPU).model, {}
        for block in range(LAYERS):
            for place, layer in enumerate(("attn1.to_q", "attn1.to_out.0", "ff.net.2")):
                name = f"transformer_blocks.{block}.{layer}"
                out, inner = model.weights.part.tensors[f"{name}.weight"].shape
                down, up = torch.randn(2, inner) * inner**-0.5, torch.randn(out, 2) * 0.2
                if block % 3 == place:
                    down[0], down[:, 0], up[0], up[:, 0] = down[0] * 1e-4, 1e-5, 1e-4, up[:, 0] * 1e-5
                tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        save_file(tensors, tmp_path / "uneven.safetensors")
        model = with_lora(model, tmp_path / "uneven.safetensors")
        plain, compiled = run(model, prompts), run(model, prompts, Compiled())
        assert len(graphs) == 1
        assert ((compiled - plain).norm() / plain.norm()).item() < 2e-3
        graphs.clear()
        for shape in ((1, 16, 4, 6, 10), (1, 16, 4, 8, 14)):
            run(model, prompts, Compiled(dynamic=True), shape=shape)
        assert len(graphs) == 1

    @pytest.mark.parametrize("method", ["teacache", "first_block", "taylorseer"])
    def test_caches_around_the_blocks(self, model, prompts, graphs, method):
        cached = with_cache(model, Cache(method, 0.5, 0.2, 1.0))
        said = []
        assert torch.equal(run(cached, prompts, Compiled(), said, steps=8), run(cached, prompts, steps=8))
        assert graphs
        assert " skipped " in said[-1]
        assert "skipped 0" not in said[-1]

    @pytest.mark.parametrize(
        ("dtype", "method"), [("bf16", "int8_dynamic"), ("fp16", "fp8_dynamic"), ("fp32", "fp8_dynamic")]
    )
    def test_dynamic_quantization_is_captured_whole_and_the_same_up_to_rounding(
        self, deep, prompts, graphs, method, dtype
    ):
        """fp16 is range-safe here. Scales and casts are in the graph of the block, for the compiler to fuse."""
        model, said = quantized(open_handles(deep, dtype, EVERYTHING).model, method), []
        plain = run(model, prompts)
        ours = run(model, prompts, Compiled(), said)
        assert (ours - plain).norm() <= (0.05 if dtype == "bf16" else 1e-5) * plain.norm(), said
        assert not any("failed" in text for text in said)
        (graph,) = graphs
        targets = [str(node.target) for node in graph.graph.nodes]
        assert sum("linalg_vector_norm" in target for target in targets) >= 6
        if method == "fp8_dynamic":
            assert sum("_scaled_mm" in target for target in targets) == 6

    @pytest.mark.parametrize("method", ["int8_dynamic", "fp8_dynamic"])
    def test_a_real_compiler_takes_it_too(self, inductor, method):
        dtype = torch.int8 if method == "int8_dynamic" else torch.float8_e4m3fn
        weight, bias = DynamicWeight(*quantize_rows(torch.randn(64, 32), dtype)), torch.randn(64).bfloat16()
        x = torch.randn(1, 40, 32).bfloat16()
        ours = torch.compile(weight.__call__, fullgraph=True)(x, bias)
        plain = weight(x, bias)
        assert ours.dtype == plain.dtype == torch.bfloat16
        assert (ours.float() - plain.float()).norm() < 0.01 * plain.float().norm()

    @pytest.mark.parametrize("attention", ["sdpa", "fastest", "cudnn", "flash", "flash3", "xformers", "flash_hub"])
    def test_every_exact_attention(self, model, prompts, graphs, monkeypatch, attention):
        """PyTorch's plain kernel stands for those that a card would have."""
        monkeypatch.setattr(attention_module, "_missing", lambda choice, device: None)
        monkeypatch.setattr(attention_module, "_FP32", tuple(BACKENDS))
        monkeypatch.setattr(attention_module, "_EXACT", ("sdpa",))
        monkeypatch.setattr(attention_module, "_fetched", {"flash_hub"})
        if attention not in ("sdpa", "fastest"):
            monkeypatch.setitem(BACKENDS, attention, "_native_math")
        chosen, said = with_attention(model, attention), []
        plain = run(chosen, prompts)
        monkeypatch.setattr(attention_module, "find_fastest", lambda *_: Fastest("sdpa", "timed"))
        ours = run(chosen, prompts, Compiled(), said)
        assert (ours - plain).norm() <= 1e-5 * plain.norm()
        assert graphs, said
        assert not any("failed" in text for text in said)

    @pytest.mark.parametrize("mode", ["offload_blocks", "offload_layers"])
    def test_offloading(self, deep, model, prompts, graphs, offloads, mode):
        said = []
        offloads(mode)
        assert torch.equal(run(open_handles(deep, "fp32", CPU).model, prompts, Compiled(), said), run(model, prompts))
        assert bool(graphs) == (mode == "offload_blocks")
        assert any(
            "runs without compiling: its layers are brought to the card one by one" in text for text in said
        ) == (mode == "offload_layers")


class TestTraces:
    def test_afterwards_the_module_is_as_it_was(self, model, prompts, graphs):
        plain = run(model, prompts)
        module = model.weights._module
        before, limit = inside(module), torch._dynamo.config.recompile_limit
        run(model, prompts, Compiled())
        assert inside(module) == before
        assert torch._dynamo.config.recompile_limit == limit
        count = len(graphs)
        assert torch.equal(run(model, prompts, shape=(1, 16, 2, 4, 6)), run(model, prompts, shape=(1, 16, 2, 4, 6)))
        assert torch.equal(run(model, prompts), plain)
        assert len(graphs) == count

    def test_the_handle_given_is_not_changed_and_shares_its_weights(self, model):
        changed = with_compile(model, Compiled("max-autotune-no-cudagraphs", True))
        assert model.compiled is None
        assert changed.weights is model.weights
        with pytest.raises(ValueError, match="mode of compiling is 'reduce-overhead'"):
            Compiled("reduce-overhead")


class TestFallback:
    @pytest.mark.parametrize("error", [InvalidCxxCompiler, RuntimeError])
    def test_without_a_compiler_the_run_goes_on_and_says_why(self, model, prompts, graphs, monkeypatch, error):
        """A plain RuntimeError is what torch 2.11 raises on Windows."""

        def missing(*_):
            raise error()

        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
        said = []
        assert torch.equal(run(model, prompts, Compiled(), said), run(model, prompts))
        assert not graphs
        assert any("runs without compiling: no C++ compiler is installed" in text for text in said)

    def test_where_attention_is_computed_in_pieces_it_is_said(self, model, prompts, graphs, monkeypatch):
        monkeypatch.setattr(attention_module, "_MOST_SCORES", 1000)
        monkeypatch.setattr(attention_module.internals, "lacks_fused_attention", lambda *_: True)
        said = []
        assert torch.equal(run(model, prompts, Compiled(), said), run(model, prompts))
        assert not graphs
        assert any("runs without compiling: this device has no kernel for attention" in text for text in said)

    def test_without_triton_on_a_card_it_is_said(self, monkeypatch):
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
        assert "triton is not installed" in missing_compiler(torch.device("cuda"))
        assert "cannot compile for" in missing_compiler(torch.device("meta"))

    def test_where_compiling_fails_the_run_goes_on_and_says_why(self, model, prompts, use_backend):
        calls = []

        def backend(graph, inputs, **_):
            calls.append(1)
            raise ValueError("this card is too old")

        use_backend(backend)
        said = []
        assert torch.equal(run(model, prompts, Compiled(), said), run(model, prompts))
        assert calls == [1]
        assert "Compiling failed, so the model runs on without: this card is too old" in said

    def test_memory_that_runs_out_while_compiling_is_no_reason_to_give_up(self, deep, model, prompts, use_backend):
        calls, healed = [], []

        def backend(graph, inputs, **_):
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return graph.forward

        use_backend(backend)
        ours = run(open_handles(deep, "fp32", CPU).model, prompts, Compiled(), cfg=1.0, healed=healed)
        assert torch.equal(ours, run(model, prompts, cfg=1.0))
        assert "step 1 of 3: cpu ran out of memory" in healed[0]
        assert calls == [1, 1]


class TestHealing:
    def test_a_step_that_is_not_finite_is_run_again_as_the_blocks_are_written(self, deep, prompts, use_backend):
        """Code that a compiler got wrong: the blocks themselves give what they should."""

        def backend(graph, inputs, **_):
            return lambda *given: tuple(output * math.nan for output in graph.forward(*given))

        use_backend(backend)
        model, healed = open_handles(deep, "fp32", CPU).model, []
        ours = run(model, prompts, Compiled(), healed=healed)
        assert torch.equal(ours, run(model, prompts))
        assert "run again without compiled code it is finite" in healed[0]


def test_what_inductor_makes_is_within_the_dtypes_rounding(model, prompts, inductor):
    plain, said = run(model, prompts), []
    ours = run(model, prompts, Compiled(), said)
    assert any(text.startswith("Compiled in") for text in said)
    assert not torch.equal(ours, plain)
    assert (ours - plain).norm() < 1e-5 * plain.norm()
