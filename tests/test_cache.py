"""Step caches skip the share of the work they are told to, as diffusers' own hooks do, and leave nothing behind."""

import functools
import gc
import math
import re

import diffusers
import pytest
import torch
from diffusers import hooks
from safetensors.torch import save_file

from cogvideox import sampling as sampling_module
from cogvideox import weights as weights_module
from cogvideox.choices import CACHES
from cogvideox.dtypes import FP32
from cogvideox.handles import open_handles, with_cache, with_compile, with_lora
from cogvideox.memory import LiveBytes, plan_memory
from cogvideox.modules import cache as cache_module
from cogvideox.modules.cache import Cache
from cogvideox.modules.compiled import Compiled
from cogvideox.modules.joint import JointAttention
from cogvideox.precision.hardware import Hardware
from cogvideox.sampling import sample
from tests import layouts
from tests.conftest import CPU
from tests.helpers import inside, offload_what_is_loaded
from tests.reference import draw_beside, draw_prompts, reference_latents
from tests.tiny_checkpoint import LAYERS
from tests.told import Told

STEPS, SHAPE = 8, (1, 16, 4, 4, 6)
EMPTY = torch.zeros(SHAPE)
#: The first block of a random model changes by about so much between two of a few steps.
THRESHOLDS = {"ddim": 0.42, "dpm": 1.01}


@pytest.fixture(scope="module")
def prompts():
    return draw_prompts(8)


def run(model, prompts, cache=None, said=None, healed=None, step=None, **settings):
    """Latents of a run with a cache, and (block evaluations skipped, of how many)."""
    settings = dict(seed=1, steps=STEPS) | settings
    said = [] if said is None else said
    result = sample(
        model if cache is None else with_cache(model, cache),
        *prompts,
        EMPTY,
        events=Told(said, healed, step),
        **settings,
    )
    found = re.search(r"skipped (?:the attention of )?(\d+) of (\d+) block evaluations", said[-1])
    return result, found and tuple(map(int, found.groups()))


@pytest.fixture(scope="module")
def plain(model, prompts):
    """The latents without a cache."""
    return run(model, prompts)[0]


@pytest.fixture(scope="module")
def cached(model, prompts):
    """``cached(method)``: latents and counts with a cache in the most of a run."""
    return functools.cache(lambda method: run(model, prompts, Cache(method, 0.5, 0.2, 1.0)))


class TestReference:
    @pytest.fixture(scope="class")
    def pipeline(self, deep):
        pipe = diffusers.CogVideoXPipeline.from_pretrained(deep, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
    @pytest.mark.parametrize("method", [method for method in CACHES if method != "teacache"])
    def test_every_other_step_skipped_is_the_pipeline_with_diffusers_own_hook(
        self, pipeline, model, prompts, monkeypatch, method, scheduler
    ):
        # A fixed threshold, as diffusers has it.
        monkeypatch.setattr(cache_module, "_GAIN", 0.0)
        monkeypatch.setattr(cache_module, "_FIRST_THRESHOLD", THRESHOLDS[scheduler])
        timestep = dict(current_timestep_callback=lambda: pipeline.current_timestep)
        always = (-1, 1001)
        config = {
            "first_block": lambda: hooks.FirstBlockCacheConfig(threshold=THRESHOLDS[scheduler]),
            "taylorseer": lambda: hooks.TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=1, use_lite_mode=True, taylor_factors_dtype=torch.float32
            ),
            "pab": lambda: hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=always, **timestep
            ),
            "faster_cache": lambda: hooks.FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=always,
                unconditional_batch_skip_range=2,
                unconditional_batch_timestep_skip_range=always,
                low_frequency_weight_update_timestep_range=(99, 641),
                attention_weight_callback=lambda _: 0.3,
                tensor_format="BFCHW",
                **timestep,
            ),
        }[method]()
        pipeline.transformer.enable_cache(config)
        try:
            expected = reference_latents(pipeline, prompts, SHAPE, scheduler=scheduler, steps=STEPS)
        finally:
            pipeline.transformer.disable_cache()
        ours, (skipped, _) = run(model, prompts, Cache(method, 0.5, 0.0, 1.0), scheduler=scheduler)
        assert 0 < skipped < STEPS * LAYERS
        assert torch.equal(ours, expected)


class TestStrength:
    @pytest.mark.parametrize("method", CACHES)
    def test_it_is_the_share_skipped_between_start_and_end(self, model, prompts, method, monkeypatch):
        """Counted by the attention itself, too: with every method a block that is skipped, or whose attention is, does
        not run it."""
        real, calls = JointAttention.__call__, []

        @functools.wraps(real)
        def counted(*given, **more):
            calls.append(1)
            return real(*given, **more)

        monkeypatch.setattr(JointAttention, "__call__", counted)
        shares, steps = [], 20
        for strength in (0.2, 0.4, 0.6, 0.8):
            calls.clear()
            _, (skipped, total) = run(model, prompts, Cache(method, strength, 0.2, 0.8), steps=steps)
            assert total == steps * LAYERS
            assert total - skipped == len(calls)
            shares.append(skipped / (12 * LAYERS))
            # 12 steps are within; first_block chooses them by itself, and always runs one block of four.
            away = 2.5 / 12 if method == "first_block" else 1 / 12
            most = (LAYERS - 1) / LAYERS if method == "first_block" else 1.0
            assert abs(shares[-1] - min(strength, most)) <= away
        assert shares == sorted(set(shares))

    @pytest.mark.parametrize("method", CACHES)
    @pytest.mark.parametrize("unchanged", [Cache(strength=0.0), Cache(strength=1.0, start=0.5, end=0.5)])
    def test_at_0_or_in_no_range_nothing_is_skipped_and_nothing_changes(self, model, prompts, plain, method, unchanged):
        cache, said = Cache(method, unchanged.strength, unchanged.start, unchanged.end), []
        ours, counted = run(model, prompts, cache, said)
        assert torch.equal(ours, plain)
        assert counted == (0, STEPS * LAYERS) if cache.strength else "nothing is skipped" in said[-1]

    @pytest.fixture(scope="class")
    def steps(self, model, prompts):
        """``steps(cache)``: the predicted clean latents of each step."""

        @functools.cache
        def steps(cache):
            latents = []
            run(model, prompts, cache, step=lambda done, total, clean: latents.append(clean))
            return latents

        return steps

    @pytest.mark.parametrize("method", CACHES)
    def test_outside_start_and_end_every_step_is_evaluated_in_full(self, steps, method):
        equal = [torch.equal(*pair) for pair in zip(steps(None), steps(Cache(method, 1.0, 0.5, 1.0)), strict=True)]
        # first_block may take a step or two until it skips.
        assert equal[:4] == [True] * 4
        assert not equal[-1]

    @pytest.mark.parametrize("method", CACHES)
    def test_its_steps_are_those_of_the_run(self, model, prompts, method):
        """Of 8 steps, denoise 0.5 runs the last four."""
        video = torch.randn(SHAPE)
        said = []
        sample(
            with_cache(model, Cache(method, 1.0, 0.5, 1.0)),
            *prompts,
            video,
            seed=1,
            steps=8,
            denoise=0.5,
            events=Told(said),
        )
        # first_block runs its first block, and teacache the last step.
        skipped = {"first_block": 2 * (LAYERS - 1), "teacache": LAYERS}.get(method, 2 * LAYERS)
        assert f"{skipped} of {4 * LAYERS} block" in said[-1]

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (dict(method="magcache"), "method is 'magcache'.*teacache"),
            (dict(strength=1.5), "strength is 1.5, but it is a share"),
            (dict(start=math.nan), "start is nan"),
            (dict(start=0.8, end=0.2), "start is 0.8 and its end 0.2"),
        ],
    )
    def test_what_it_cannot_run_with_is_refused(self, values, said):
        with pytest.raises(ValueError, match=said):
            Cache(**values)


class TestTraces:
    @pytest.mark.parametrize("method", CACHES)
    def test_afterwards_the_module_is_as_it_was_and_a_second_run_equals_the_first(self, model, prompts, plain, method):
        module = model.weights._module
        before, weights = inside(module), {name: value.clone() for name, value in module.state_dict().items()}
        first, counted = run(model, prompts, Cache(method))
        assert model.weights._module is module
        assert inside(module) == before
        assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
        again, counted_again = run(model, prompts, Cache(method))
        assert torch.equal(again, first)
        assert counted_again == counted
        assert counted[0] > 0
        assert not torch.equal(first, plain)
        assert torch.equal(run(model, prompts)[0], plain)

    @pytest.mark.parametrize("method", CACHES)
    def test_an_interrupted_run_leaves_nothing_either(self, model, prompts, plain, method):
        before = inside(model.weights._module)

        def stop(done, *_):
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(model, prompts, Cache(method, 0.5, 0.0, 1.0), step=stop)
        assert inside(model.weights._module) == before
        assert torch.equal(run(model, prompts)[0], plain)

    def test_the_handle_given_is_not_changed_and_shares_its_weights(self, model):
        cached = with_cache(model, Cache())
        assert model.cache is None
        assert cached.weights is model.weights
        with pytest.raises(ValueError, match=r"has a cache already \(teacache\)"):
            with_cache(cached, Cache("pab"))

    def test_one_that_skips_nothing_changes_nothing_before_another_or_behind_it(self, model):
        off, on = Cache("pab", 0.0), Cache()
        assert with_cache(with_cache(model, off), on).cache == on
        assert with_cache(with_cache(model, on), off).cache == on


class TestTogether:
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    @pytest.mark.parametrize("method", CACHES)
    def test_every_dtype(self, deep, prompts, cached, method, dtype):
        """fp16 is range-safe here."""
        expected, counted = cached(method)
        ours, ours_counted = run(open_handles(deep, dtype, CPU).model, prompts, Cache(method, 0.5, 0.2, 1.0))
        assert ours_counted == counted
        assert (ours - expected).norm() < 0.02 * expected.norm()

    @pytest.fixture(scope="class")
    def packed(self, model, prompts, tmp_path_factory):
        """``packed(kind)``: the model with packed weights, and its latents without a cache."""

        @functools.cache
        def packed(kind):
            with model.weights.running() as module:
                path = layouts.write_packed(tmp_path_factory.mktemp("packed"), module.state_dict(), kind)
            own = open_handles(path, "fp32", CPU).model
            return own, run(own, prompts)[0]

        return packed

    @pytest.mark.parametrize("method", CACHES)
    @pytest.mark.parametrize("kind", ["fp8", "gguf"])
    def test_packed_weights(self, packed, prompts, method, kind):
        model, plain = packed(kind)
        ours, (skipped, _) = run(model, prompts, Cache(method))
        assert skipped > 0
        assert 0 < (ours - plain).norm() < 0.2 * plain.norm()

    @pytest.fixture(scope="class")
    def other(self, checkpoints):
        """``other(variant)``: what that model is run with, and its latents without a cache."""

        @functools.cache
        def other(variant):
            model = open_handles(checkpoints(variant), "fp32", CPU).model
            prompts, image = draw_prompts(226 if variant == "2b" else 8), draw_beside(variant, SHAPE)
            return model, prompts, image, run(model, prompts, image_latents=image)[0]

        return other

    @pytest.mark.parametrize("method", CACHES)
    @pytest.mark.parametrize("variant", ["1.5-i2v", "fun-inp", "void", "2b"])
    def test_the_other_models(self, other, method, variant):
        model, prompts, image, plain = other(variant)
        ours, (skipped, _) = run(model, prompts, Cache(method), image_latents=image)
        assert skipped > 0
        assert 0 < (ours - plain).norm() < 0.2 * plain.norm()

    @pytest.fixture(scope="class")
    def changed(self, model, prompts, tmp_path_factory):
        """The model with a LoRA of every layer, and its latents without a cache."""
        path, tensors = tmp_path_factory.mktemp("lora") / "lora.safetensors", {}
        for name, stored in model.weights.part.tensors.items():
            if name.endswith(".weight") and len(stored.shape) == 2:
                layer = f"transformer.{name.removesuffix('.weight')}"
                tensors[f"{layer}.lora_A.weight"] = torch.randn(2, stored.shape[1]) * stored.shape[1] ** -0.5
                tensors[f"{layer}.lora_B.weight"] = torch.randn(stored.shape[0], 2) * 0.2
        save_file(tensors, path)
        changed = with_lora(model, path)
        return changed, run(changed, prompts)[0]

    @pytest.mark.parametrize("method", CACHES)
    def test_a_lora_of_every_layer(self, changed, prompts, plain, method):
        """It is part of what is cached: where nothing is skipped, nothing changes."""
        model, expected = changed
        assert not torch.equal(expected, plain)
        assert torch.equal(run(model, prompts, Cache(method, 1.0, 0.5, 0.5))[0], expected)
        ours, (skipped, _) = run(model, prompts, Cache(method))
        assert skipped > 0
        assert (ours - expected).norm() < 0.2 * expected.norm()

    @pytest.fixture(scope="class")
    def unguided(self, model, prompts):
        return run(model, prompts, cfg=1.0)[0]

    @pytest.mark.parametrize("method", CACHES)
    def test_without_guidance(self, model, prompts, unguided, method):
        plain = unguided
        ours, (skipped, total) = run(model, prompts, Cache(method), cfg=1.0)
        assert total == STEPS * LAYERS
        assert skipped > 0
        assert 0 < (ours - plain).norm() < 0.2 * plain.norm()

    @pytest.mark.parametrize("method", CACHES)
    def test_prompts_of_unequal_length_have_a_cache_each(self, model, prompts, monkeypatch, method):
        """They run one after the other. Where only the positive is let count, the run is the one with the positive
        alone."""
        monkeypatch.setattr(cache_module, "_GAIN", 0.0)
        monkeypatch.setattr(cache_module, "_FIRST_THRESHOLD", THRESHOLDS["ddim"])
        cache = Cache(method, 0.5, 0.0, 1.0)
        alone, (skipped, total) = run(model, prompts, cache, cfg=1.0)
        monkeypatch.setattr(sampling_module, "guide", lambda unconditional, conditional, scale: conditional)
        both, counted = run(model, (prompts[0], torch.cat(prompts, dim=1)), cache)
        assert torch.equal(both, alone)
        assert counted[1] == 2 * total
        assert counted[0] > skipped > 0

    @pytest.mark.parametrize("method", CACHES)
    @pytest.mark.parametrize(
        ("mode", "notes_order"), [("offload_blocks", False), ("offload_blocks", True), ("offload_layers", False)]
    )
    def test_offloading(self, offloads, cached, prompts, deep, method, mode, notes_order):
        """From the host to the host. With streams, diffusers notes the layers' order in the first forward and takes
        hooks off then."""
        expected, counted = cached(method)
        notes = offloads(mode, notes_order)
        offloaded = open_handles(deep, "fp32", CPU).model
        left = []
        for _ in range(2):
            ours, ours_counted = run(offloaded, prompts, Cache(method, 0.5, 0.2, 1.0))
            assert torch.equal(ours, expected)
            assert ours_counted == counted
            left.append(inside(offloaded.weights._module))
        # Noted once, and those hooks are not brought back.
        assert [len(hook.execution_order) for hook in notes] == [LAYERS] * notes_order
        before = inside(weights_module.load_module(offloaded.weights.part, FP32, CPU.device))
        assert left[0] == left[1]
        assert {place for place in left[0] if place[1] in ("forward", "_diffusers_hook")} == {
            place for place in before if place[1] in ("forward", "_diffusers_hook")
        }

    @pytest.fixture
    def offloads(self, monkeypatch):
        from diffusers.hooks.group_offloading import LazyPrefetchGroupOffloadingHook

        def offload(mode, notes_order):
            notes = []

            def note_order(module):
                if notes_order:
                    notes.append(LazyPrefetchGroupOffloadingHook())
                    module._diffusers_hook.register_hook(notes[-1], "lazy_prefetch_group_offloading")

            offload_what_is_loaded(monkeypatch, mode, note_order)
            return notes

        return offload


class TestHealing:
    @pytest.mark.parametrize("method", CACHES)
    def test_a_step_done_again_is_evaluated_in_full_from_an_empty_cache(self, deep, prompts, monkeypatch, method):
        """The transformer's own result is spoilt once, at a step that skips; what was cached in that step must not be
        read again."""
        model, said, healed = open_handles(deep, "fp32", CPU).model, [], []
        cache = Cache(method, 1.0, 0.5, 1.0)
        run(model, prompts, cache, said)
        before = said[-1]
        calls = []

        def spoil(_module, _inputs, output):
            calls.append(1)
            return (output[0] * math.nan,) if len(calls) == 6 else None

        with model.weights.running() as module:
            watch = module.register_forward_hook(spoil)
        result, (skipped, _) = run(model, prompts, cache, healed=healed)
        watch.remove()
        assert result.isfinite().all()
        assert re.search(r"step 6 of 8.* run again without the cache it is finite\. The run goes on", healed[0])
        part = LAYERS - 1 if method == "first_block" else LAYERS
        # teacache runs the last step.
        steps = 3 if method == "teacache" else 4
        assert f"{steps * part} of" in before
        assert skipped == (steps - 1) * part

    @pytest.mark.parametrize("method", CACHES)
    def test_a_run_healed_in_another_dtype_goes_on_with_a_cache(self, deep, prompts, monkeypatch, method):
        real, healed = weights_module.load_module, []

        def load(part, precision, *given):
            module, calls = real(part, precision, *given), []

            def spoil(_module, _inputs, output):
                calls.append(1)
                return (output[0] * math.nan,) if precision != FP32 and len(calls) >= 4 else None

            module.register_forward_hook(spoil)
            return module

        monkeypatch.setattr(weights_module, "load_module", load)
        result, (skipped, total) = run(
            open_handles(deep, "bf16", CPU).model, prompts, Cache(method, 1.0, 0.25, 1.0), healed=healed
        )
        assert result.isfinite().all()
        assert "Going on from here in fp32" in healed[0]
        # Two steps before it may skip, one that does, the one that is done again in full, and four, of which teacache
        # runs the last.
        part = LAYERS - 1 if method == "first_block" else LAYERS
        assert (skipped, total) == ((4 if method == "teacache" else 5) * part, STEPS * LAYERS)


class TestMemory:
    @pytest.fixture(scope="class")
    def taken(self, model, prompts):
        """``taken(cfg, cache)``: bytes at most in a run, and the plan of it."""

        @functools.cache
        def taken(cfg, cache=None):
            with model.weights.running():
                gc.collect()
            # Without a cache the second step is like all that follow.
            with LiveBytes() as measured:
                run(model, prompts, cache, cfg=cfg, steps=2 if cache is None else 4)
            planned = model if cache is None else with_cache(model, cache)
            return measured.peak, plan_memory(planned, SHAPE, cfg > 1, tokens=8)

        return taken

    @pytest.mark.parametrize(("method", "cfg"), [*((method, 6.0) for method in CACHES), ("faster_cache", 1.0)])
    def test_the_plan_knows_what_a_cache_holds(self, taken, method, cfg):
        (peak, plan), (plain_peak, plain) = taken(cfg, Cache(method, 0.5, 0.0, 1.0)), taken(cfg)
        assert plan.needed["gpu"] - plain.needed["gpu"] == plan.cache
        # A few percent of what tiny models take is beside it.
        assert 0.45 * plan.cache <= peak - plain_peak <= 1.1 * plan.cache

    def test_what_it_holds_is_said(self, model):
        assert ", cache " in plan_memory(with_cache(model, Cache("pab")), SHAPE).text


class TestCombinations:
    @pytest.mark.parametrize("method", ["pab", "faster_cache"])
    def test_caches_within_blocks_do_not_go_with_compiling_in_either_order(self, model, method):
        with pytest.raises(ValueError, match=f"cache {method} and compiling do not work together"):
            with_compile(with_cache(model, Cache(method)), Compiled())
        with pytest.raises(ValueError, match=f"cache {method} and compiling do not work together"):
            with_cache(with_compile(model, Compiled()), Cache(method))

    def test_an_old_diffusers_does_not_load_layers_that_were_skipped(self, deep, monkeypatch):
        card = Hardware(torch.device("meta"), "a card")
        model = open_handles(deep, "fp32", card, memory="offload_layers").model
        monkeypatch.setattr("cogvideox.combinations.is_at_least", lambda name, version: False)
        with pytest.raises(ValueError, match=r"teacache and memory offload_layers do not work together with diffusers"):
            with_cache(model, Cache())
        with_cache(model, Cache("taylorseer"))

    @pytest.mark.parametrize("method", CACHES)
    def test_where_memory_auto_comes_to_that_the_run_goes_without_the_cache(
        self, deep, prompts, plain, monkeypatch, method
    ):
        offload_what_is_loaded(monkeypatch, "offload_layers")
        monkeypatch.setattr("cogvideox.combinations.is_at_least", lambda name, version: False)
        said = []
        ours, _ = run(open_handles(deep, "fp32", CPU).model, prompts, Cache(method), said)
        refused = any(f"runs without the cache {method}: its layers" in text for text in said)
        assert refused == torch.equal(ours, plain) == (method != "taylorseer")

    def test_compiling_does_not_go_with_layers_brought_one_by_one(self, deep):
        card = Hardware(torch.device("meta"), "a card")
        with pytest.raises(ValueError, match="Compiling and memory offload_layers do not work together"):
            with_compile(open_handles(deep, "fp32", card, memory="offload_layers").model, Compiled())
