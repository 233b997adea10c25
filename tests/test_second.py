"""A second copy of the transformer evaluates one half of guidance: the same numbers, and where it cannot, one does."""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import cogvideox.sampling
import cogvideox.second
import cogvideox.weights
from cogvideox.handles import (
    open_handles,
    other_devices,
    quantized,
    with_attention,
    with_cache,
    with_compile,
    with_lora,
    with_second,
    with_windows,
)
from cogvideox.memory import choose_mode, plan_memory
from cogvideox.modules.cache import Cache
from cogvideox.modules.compiled import Compiled
from cogvideox.precision.hardware import Hardware, cuda_support
from cogvideox.sampling import sample
from cogvideox.windows import Windows
from tests.conftest import CPU
from tests.reference import draw_prompts
from tests.test_ranks import Told, halves_apart


def run(model, **more):
    """Four steps; in context windows, in one of six latent frames and one of four."""
    how = dict(seed=1, steps=4, events=Told()) | more
    return sample(model, *draw_prompts(8), torch.zeros(1, 16, 3 if model.windows is None else 8, 6, 10), **how)


def alone(model, **more):
    with halves_apart():
        return run(model, **more)


@pytest.fixture(scope="module")
def models(deep, tmp_path_factory):
    plain = open_handles(deep, "fp32", CPU).model
    name = "transformer.transformer_blocks.0.attn1.to_out.0"
    lora = {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)}
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(lora, file)
    return {
        "plain": plain,
        "lora": with_lora(plain, file, 2.0),
        "quantized": quantized(plain, "int8_weight_only"),
        "range-safe": open_handles(deep, "fp16", CPU).model,
        "teacache": with_cache(plain, Cache("teacache", 0.5, 0.0, 1.0)),
        "taylorseer": with_cache(plain, Cache("taylorseer", 0.5, 0.0, 1.0)),
        "pab": with_cache(plain, Cache("pab", 0.5, 0.0, 1.0)),
        "windows": with_windows(plain, Windows(21, 2)),
        "windows, cached": with_windows(with_cache(plain, Cache("taylorseer", 0.5, 0.0, 1.0)), Windows(21, 2)),
        "windows, teacache": with_windows(with_cache(plain, Cache("teacache", 0.5, 0.0, 1.0)), Windows(21, 2)),
    }


@pytest.mark.parametrize(
    "name",
    ["plain", "lora", "quantized", "range-safe", "teacache", "taylorseer", "pab", "windows", "windows, cached"],
)
def test_two_devices_make_the_video_of_one(models, name):
    calls = []

    class Counted(cogvideox.weights.Weights):
        @contextmanager
        def running(self, *given):
            with super().running(*given) as module:
                hook = module.register_forward_hook(lambda *_: calls.append(id(module)))
                yield module
                hook.remove()

    model = with_second(models[name], "cpu")
    copy = model.weights.copy_on(model.second)
    copy.__class__ = Counted
    assert torch.equal(run(model), alone(models[name]))
    # The conditional half, at each step of each window.
    assert len(calls) == (8 if "windows" in name else 4)
    if name == "plain":
        more = dict(scheduler="dpm", cfg_start=0.5)
        assert torch.equal(run(model, **more), alone(models[name], **more))
        assert len(calls) == 6


class TestWhereOneHasToDo:
    @pytest.mark.parametrize(("name", "when"), [("plain", "step 2 of 4"), ("windows", "step 1 of 4, window 2 of 2")])
    def test_a_step_that_is_not_finite_is_done_again_on_one(self, models, name, when):
        model, events, calls = with_second(models[name], "cpu"), Told(), []

        def spoil(module, given, output):
            calls.append(1)
            return (output[0] * torch.nan,) if len(calls) == 2 else None

        copy = model.weights.copy_on(model.second)
        with copy.running() as module:
            hook = module.register_forward_hook(spoil)
        try:
            assert torch.equal(run(model, events=events), alone(models[name]))
        finally:
            hook.remove()
        assert len(calls) == (8 if name == "windows" else 4)
        assert sum(when in note and "passing fault" in note for note in events.notes) == 1, events.notes

    @pytest.mark.parametrize("name", ["taylorseer", "pab", "teacache", "windows, cached", "windows, teacache"])
    @pytest.mark.parametrize("at", [3, 6])
    def test_after_such_a_step_both_halves_skip_the_same_steps(self, models, monkeypatch, name, at):
        model, made, calls = with_second(models[name], "cpu"), [], []
        real = cogvideox.sampling.make_speedups
        monkeypatch.setattr(cogvideox.sampling, "make_speedups", lambda *given: made.append(real(*given)) or made[-1])

        def spoil(module, given, output):
            calls.append(1)
            return (output[0] * torch.nan,) if len(calls) == at else None

        with model.weights.copy_on(model.second).running() as module:
            hook = module.register_forward_hook(spoil)
        try:
            run(model, steps=8)
        finally:
            hook.remove()
        first, second = (speedups._cache for speedups in made)
        count = 2 if "windows" in name else 1
        # The copy sits out the step that is done again, and has nothing cached then, so neither reuses anything.
        healed = divmod(at - 1, count)
        assert second.total[healed] == 0
        following = healed[0] + 1, healed[1]
        assert first.ran[following] == first.total[following] > 0
        skipped = [{turn for turn, ran in half.ran.items() if ran < half.total[turn]} for half in (first, second)]
        assert skipped[0] == skipped[1] != set()

    @pytest.mark.parametrize(("name", "when"), [("plain", 0), ("plain", 3), ("teacache", 2)])
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
    def test_memory_that_runs_out_on_the_second_costs_nothing_but_time(self, models, monkeypatch, name, when, error):
        model, events, calls = with_second(models[name], "cpu"), Told(), []
        copy = model.weights.copy_on(model.second)
        copy.release()
        load = cogvideox.weights.load_module

        def fail(module, given):
            calls.append(1)
            if len(calls) == when:
                raise error("CUDA error: out of memory")

        def loaded(*given):
            if not when:
                raise error("CUDA error: out of memory")
            module = load(*given)
            module.register_forward_pre_hook(fail)
            return module

        with monkeypatch.context() as patch:
            with model.weights.running():
                patch.setattr(cogvideox.weights, "load_module", loaded)
            ours = run(model, events=events)
        # A step that is begun anew has nothing cached.
        assert torch.equal(ours, alone(models[name])) or (name == "teacache" and ours.isfinite().all())
        assert [note for note in events.notes if "second copy" in note] == [
            "cpu ran out of memory with the second copy of the transformer, so one device evaluates both halves of "
            "guidance, which takes longer. No finished step is lost. Close other programs that use that card."
        ]
        assert not copy.is_loaded

    @pytest.mark.parametrize("when", ["loading", "running"])
    def test_the_copys_memory_is_free_before_its_cache_is_emptied(self, models, monkeypatch, when):
        model, held, alive = with_second(models["plain"], "cpu"), [], []
        copy = model.weights.copy_on(model.second)
        copy.release()
        load = cogvideox.weights.load_module

        def fail(*_):
            raise torch.OutOfMemoryError("full")

        def loaded(*given):
            module = load(*given)
            held.append(weakref.ref(module))
            if when == "running":
                module.transformer_blocks[1].register_forward_pre_hook(fail)
            return module

        def emptied(device):
            gc.collect()
            alive.extend(module() is not None for module in held)

        with model.weights.running():
            pass
        monkeypatch.setattr(cogvideox.weights, "load_module", loaded)
        monkeypatch.setattr(cogvideox.second, "empty_cache", emptied)
        if when == "loading":
            # The weights are there, and what is prepared with them has no room; the first device prepares after it.
            real, calls = cogvideox.sampling.applied, []
            monkeypatch.setattr(
                cogvideox.sampling, "applied", lambda *given: real(*given) if calls else fail(calls.append(1))
            )
        run(model)
        assert alive == [False]

    def test_none_and_no_guidance_take_one(self, models):
        assert with_second(with_second(models["plain"], "cpu"), "none").second is None
        model = with_second(models["plain"], "cpu")
        model.weights.copy_on(model.second).release()
        assert torch.equal(run(model, cfg=1.0), run(models["plain"], cfg=1.0))
        assert not model.weights.copy_on(model.second).is_loaded


class TestWhatIsRefused:
    def test_a_device_that_is_not_there(self, models, monkeypatch):
        with pytest.raises(ValueError, match="second device is cuda:1, and the model runs on cpu: .*here: none"):
            with_second(models["plain"], "cuda:1")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        assert other_devices(torch.device("cuda", 1)) == ("cuda:0", "cuda:2", "none")
        assert other_devices(torch.device("cuda")) == ("cuda:1", "cuda:2", "none")
        assert other_devices(torch.device("cpu")) == ("none",)

    def test_what_runs_in_both_at_once(self, models):
        with pytest.raises(ValueError, match="Compiling and a second GPU"):
            with_compile(with_second(models["plain"], "cpu"), Compiled())
        with pytest.raises(ValueError, match="cache first_block and a second GPU"):
            with_second(with_cache(models["plain"], Cache("first_block")), "cpu")
        with pytest.raises(ValueError, match="cache faster_cache and a second GPU .*predicts one half"):
            with_cache(with_second(models["plain"], "cpu"), Cache("faster_cache"))
        for method in ("first_block", "faster_cache"):
            with_second(with_cache(models["plain"], Cache(method, 0.0)), "cpu")

    def test_a_card_with_another_bf16(self, deep, monkeypatch):
        native = Hardware(torch.device("cpu"), "CPU", bf16="native")
        model = open_handles(deep, "bf16", native).model
        monkeypatch.setattr(Hardware, "detect", lambda *_: Hardware(torch.device("cpu"), "CPU", bf16="emulated"))
        with pytest.raises(ValueError, match="the halves of guidance would differ"):
            with_second(model, "cpu")

    @pytest.mark.parametrize(
        ("choose", "said"),
        [
            (lambda model: quantized(model, "fp8_dynamic"), "has no matrix products of fp8"),
            (lambda model: with_attention(model, "cudnn"), "does not support this card .compute capability 7.5."),
        ],
        ids=["quantize", "attention"],
    )
    def test_what_the_second_card_lacks_in_either_order(self, deep, monkeypatch, choose, said):
        """An RTX 4090, and an RTX 2080 Ti in fp16."""
        names = {"cuda:0": ("NVIDIA GeForce RTX 4090", (8, 9)), "cuda:1": ("NVIDIA GeForce RTX 2080 Ti", (7, 5))}
        cards = {name: Hardware(torch.device(name), card, **cuda_support(card, c)) for name, (card, c) in names.items()}
        monkeypatch.setattr(Hardware, "detect", lambda name, forced: cards[name])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: names[str(device)][1])
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "hip", None)
        model = open_handles(deep, "fp16", cards["cuda:0"]).model
        told = rf"second copy on cuda:1 \(NVIDIA GeForce RTX 2080 Ti\) cannot run as the first does\. .*{said}"
        with pytest.raises(ValueError, match=told):
            with_second(choose(model), "cuda:1")
        with pytest.raises(ValueError, match=told):
            choose(with_second(model, "cuda:1"))
        monkeypatch.setitem(cards, "cuda:1", replace(cards["cuda:0"], device=torch.device("cuda:1")))
        monkeypatch.setitem(names, "cuda:1", names["cuda:0"])
        assert with_second(choose(model), "cuda:1").second == choose(with_second(model, "cuda:1")).second


def test_only_what_is_on_one_device_makes_way(handles, monkeypatch):
    parked = []
    first, other = (
        cogvideox.weights.Weights(handles.checkpoint, kind, handles.model.weights.precision, CPU)
        for kind in ("transformer", "vae")
    )
    second = cogvideox.weights.Weights(handles.checkpoint, "vae", handles.model.weights.precision, CPU)
    for weights, device in ((first, "cuda:0"), (other, "cuda:1"), (second, "cuda:0")):
        monkeypatch.setattr(weights, "hardware", Hardware(torch.device(device), "card"))
        monkeypatch.setattr(weights, "park", lambda weights=weights, **_: parked.append(weights))
    monkeypatch.setattr(cogvideox.weights, "_loaded", {first, other, second})
    cogvideox.weights.make_room(first.device, first)
    assert parked == [second]


class TestWhatACopyHolds:
    @pytest.fixture
    def pair(self, deep):
        """A model of its own, and its copy, both loaded."""
        model = with_second(open_handles(deep, "fp32", CPU).model, "cpu")
        run(model)
        return model.weights, model.weights.copy_on(model.second)

    def test_it_goes_with_the_first(self, pair):
        first, copy = pair
        assert first.is_loaded
        assert copy.is_loaded
        first.release()
        assert not first.is_loaded
        assert not copy.is_loaded

    def test_it_is_parked_with_the_first_but_not_to_make_room_on_the_firsts_device(self, pair, monkeypatch):
        first, copy = pair
        moved = []
        for weights, device in ((first, "cuda:0"), (copy, "cuda:1")):
            monkeypatch.setattr(weights, "hardware", Hardware(torch.device(device), "card"))
            monkeypatch.setattr(weights._module, "to", lambda target, device=device: moved.append((device, target)))
        cogvideox.weights.make_room(torch.device("cuda:0"))
        assert moved == [("cuda:0", "cpu")]
        moved.clear()
        first.park()
        assert moved == [("cuda:0", "cpu"), ("cuda:1", "cpu")]

    def test_what_the_host_cannot_hold_is_freed_instead_of_parked(self, pair, monkeypatch):
        first, copy = pair
        monkeypatch.setattr(cogvideox.weights, "_is_host", lambda device: False)
        first.park()
        assert first.is_loaded
        monkeypatch.setattr(cogvideox.weights, "free_host_bytes", lambda: 1000)
        first.park()
        assert not first.is_loaded
        assert not copy.is_loaded

    def test_it_runs_in_the_mode_that_its_part_of_the_run_fits_in(self, deep, monkeypatch):
        model = with_second(open_handles(deep, "fp32", CPU).model, "cpu")
        copy = replace(model, weights=model.weights.copy_on(model.second), second=None)
        shape, free = (1, 16, 21, 60, 90), [0]
        plan = plan_memory(copy, shape, False, 8)
        monkeypatch.setattr(cogvideox.weights.Weights, "free", property(lambda weights: free[0]))
        for mode in ("gpu", "offload_blocks", "offload_layers"):
            free[0] = plan.needed[mode]
            assert choose_mode(copy, shape, 8) == mode
        # None fits: what takes the least is tried.
        free[0] = 1000
        assert choose_mode(copy, shape, 8) == "offload_layers"
        monkeypatch.setattr(copy.weights, "memory", "offload_blocks")
        assert choose_mode(copy, shape, 8) == "offload_blocks"

    def test_it_is_loaded_in_that_mode(self, deep, monkeypatch):
        model, modes = with_second(open_handles(deep, "fp32", CPU).model, "cpu"), []
        copy = model.weights.copy_on(model.second)
        real = copy.running
        monkeypatch.setattr(
            cogvideox.sampling, "choose_mode", lambda *given: modes.append(given[1:]) or "offload_blocks"
        )
        monkeypatch.setattr(copy, "running", lambda events, mode: modes.append(mode) or real(events, mode))
        run(model)
        assert modes == [((1, 16, 3, 6, 10), 8), "offload_blocks"]
