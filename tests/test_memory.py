"""What a run takes is known before it; every mode makes the same video; and where memory runs out, no finished step is
lost."""

import gc
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import cogvideox.loading as loading_module
import cogvideox.lora as lora_module
import cogvideox.memory as memory_module
import cogvideox.modules.attention as attention_module
import cogvideox.modules.range_safe as range_safe_module
import cogvideox.sampling as sampling_module
import cogvideox.tensors as tensors_module
import cogvideox.weights as weights_module
from cogvideox.checkpoint.layout import open_part
from cogvideox.choices import CACHES
from cogvideox.dtypes import FP32, RANGE_SAFE_FP16, Precision
from cogvideox.handles import open_handles, with_cache, with_lora, with_windows
from cogvideox.loading import load_module
from cogvideox.lora import applied, open_lora
from cogvideox.memory import LiveBytes, MemoryPlan, check_host_room, choose_placements, memory_text, plan_memory
from cogvideox.modules.cache import Cache
from cogvideox.modules.fastest import Shape
from cogvideox.precision.hardware import Hardware
from cogvideox.sampling import sample
from cogvideox.sentinel import OutOfMemory, Sentinel
from cogvideox.tensors import free_host_bytes
from cogvideox.text import encode_prompt
from cogvideox.video import write_latent
from cogvideox.weights import Placement, placements
from cogvideox.windows import Windows
from tests import layouts
from tests.conftest import CPU
from tests.memory import left_behind
from tests.reference import draw_beside, draw_prompts
from tests.tiny_checkpoint import TEXT_WIDTH, build_checkpoint
from tests.told import Told

GB = 10**9


class TestPlan:
    @pytest.mark.parametrize(("shape", "cfg"), [((1, 16, 4, 24, 40), 6.0), ((2, 16, 5, 20, 24), 1.0)])
    @pytest.mark.parametrize(
        ("variant", "dtype"),
        [
            ("1.5", "fp32"),
            ("1.5", "bf16"),
            ("1.5", "fp16"),
            ("1.5-i2v", "bf16"),
            ("fun-inp", "bf16"),
            ("void", "fp32"),
            ("5b", "fp32"),
            ("2b", "fp16"),
        ],
    )
    def test_it_is_within_15_percent_of_what_a_run_takes(self, checkpoints, variant, dtype, shape, cfg):
        model = open_handles(checkpoints(variant), dtype, CPU).model
        if variant in ("fun-inp", "void"):
            shape = (*shape[:2], shape[2] + shape[2] % 2, *shape[3:])
        image = draw_beside(variant, shape)
        latent = torch.zeros(shape)
        how = dict(image_latents=image, seed=1, steps=1, cfg=cfg)
        tokens = 226 if variant == "2b" else 8
        with model.weights.running():
            gc.collect()
        with LiveBytes() as measured:
            sample(model, *draw_prompts(tokens), latent, **how)
        plan = plan_memory(model, shape, cfg > 1, tokens)
        assert plan.activations == pytest.approx(measured.peak, rel=0.15)
        assert plan.weights == pytest.approx(
            sum(tensor.nbytes for tensor in model.weights._module.parameters()), rel=0.15
        )

    @pytest.mark.parametrize(("variant", "dtype"), [("1.5", "bf16"), ("1.5-i2v", "fp16"), ("void", "bf16")])
    def test_with_the_halves_of_guidance_one_after_the_other_too(
        self, checkpoints, long_prompts, monkeypatch, variant, dtype
    ):
        monkeypatch.setattr(memory_module, "placements", lambda batched: placements([False]))
        shape = (1, 16, 6 if variant == "void" else 5, 20, 24)
        model = open_handles(checkpoints(variant), dtype, CPU).model
        how = dict(image_latents=draw_beside(variant, shape), seed=1, steps=1)
        with model.weights.running():
            gc.collect()
        with LiveBytes() as measured:
            sample(model, *long_prompts, torch.zeros(shape), **how)
        plan = plan_memory(model, shape)
        assert plan.halved == pytest.approx(measured.peak, rel=0.15)
        # What VOID reads beside the noise is there once in any case.
        assert plan.halved < (0.65 if variant == "void" else 0.6) * plan.activations
        assert (
            plan.bytes_of(Placement("gpu")) - plan.bytes_of(Placement("gpu", False)) == plan.activations - plan.halved
        )
        assert plan_memory(model, shape, guided=False).halved is None

    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    def test_so_it_is_where_the_device_has_no_kernel_for_attention_that_goes_without_scores(
        self, tiny, prompts, monkeypatch, dtype
    ):
        monkeypatch.setattr(attention_module, "_MOST_SCORES", 1 << 22)
        shape, model = (1, 16, 5, 24, 40), open_handles(tiny, dtype, CPU).model
        how = dict(seed=1, steps=1)
        with model.weights.running():
            gc.collect()
        expected = sample(model, *prompts, torch.zeros(shape), **how)
        with sdpa_kernel(SDPBackend.MATH):
            with LiveBytes() as measured:
                ours = sample(model, *prompts, torch.zeros(shape), **how)
            plan = plan_memory(model, shape, True, 8)
        assert plan.activations == pytest.approx(measured.peak, rel=0.15)
        assert (ours - expected).norm() / expected.norm() < (1e-5 if dtype == "fp32" else 2e-2)

    def test_copies_that_diffusers_gives_to_cudnn_count(self, tiny):
        shape, model = (1, 16, 5, 24, 40), open_handles(tiny, "bf16", CPU).model
        more, less = (plan_memory(replace(model, attention=name), shape, False, 8) for name in ("cudnn", "sdpa"))
        held = 3 * (8 + 3 * 12 * 20) * 128 * 2
        assert attention_module.bytes_beside("cudnn", Shape(1, 728, 2, 64), torch.bfloat16, CPU.device) == held
        assert less.activations < more.activations <= less.activations + held

    def test_nothing_is_read_or_loaded_for_it(self, tiny):
        model = open_handles(tiny, "bf16", CPU).model
        plan = plan_memory(model, (1, 16, 21, 96, 170))
        assert not model.weights.is_loaded
        assert plan.needed["gpu"] >= plan.needed["offload_blocks"] > plan.needed["offload_layers"] > plan.activations

    def test_a_lora_counts(self, tiny, tmp_path):
        name = "transformer.transformer_blocks.0.attn1.to_out.0"
        save_file(
            {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)},
            tmp_path / "lora.safetensors",
        )
        model = open_handles(tiny, "bf16", CPU).model
        more = plan_memory(with_lora(model, tmp_path / "lora.safetensors"), (1, 16, 4, 6, 10))
        assert more.needed["gpu"] - plan_memory(model, (1, 16, 4, 6, 10)).needed["gpu"] == 2 * 2 * 128 * 2
        # As it runs, not as it is stored; one that does nothing is not read.
        nothing = plan_memory(with_lora(model, tmp_path / "lora.safetensors", 0.0), (1, 16, 4, 6, 10))
        assert (more.loras, nothing.loras) == (2 * 2 * 128 * 2, 0)

    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("uneven", [False, True])
    def test_with_loras_it_is_as_close(self, tiny, prompts, tmp_path, monkeypatch, dtype, uneven):
        monkeypatch.setattr(range_safe_module, "_FEED_FORWARD_TOKENS", 50)
        monkeypatch.setattr(lora_module, "_TOKENS", 50)
        model, shape, state = open_handles(tiny, dtype, CPU).model, (1, 16, 5, 24, 40), {}
        for name, stored in model.weights.part.tensors.items():
            if "transformer_blocks" in name and len(stored.shape) == 2:
                down, up = torch.randn(2, stored.shape[1]), torch.randn(stored.shape[0], 2) / 1000
                # Then they have scales of their own for each column.
                down[:, ::7] *= 3e4 if uneven else 1
                layer = f"transformer.{name.removesuffix('.weight')}"
                state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        save_file(state, tmp_path / "lora.safetensors")
        changed = with_lora(model, tmp_path / "lora.safetensors", 1e-4)
        with model.weights.running():
            gc.collect()
        with LiveBytes() as without:
            sample(model, *prompts, torch.zeros(shape), seed=1, steps=1)
        with LiveBytes() as measured:
            sample(changed, *prompts, torch.zeros(shape), seed=1, steps=1)
        plan = plan_memory(changed, shape, True, 8)
        assert measured.peak < 1.03 * without.peak + plan.loras
        assert plan.activations + plan.loras == pytest.approx(measured.peak, rel=0.15)

    @pytest.mark.parametrize(("dtype", "wide"), [("bf16", 2), ("fp32", 4), ("fp16", 6)])
    def test_of_packed_weights_one_layer_is_widened_at_a_time(self, tiny, tmp_path, dtype, wide):
        shape = (1, 16, 4, 6, 10)
        packed = build_checkpoint(tmp_path / "fp8", stored={"transformer": torch.float8_e4m3fn})
        model, plain = (open_handles(path, dtype, CPU).model for path in (packed, tiny))
        largest = max(torch.Size(stored.shape).numel() for stored in model.weights.part.tensors.values())
        more, less = plan_memory(model, shape), plan_memory(plain, shape)
        assert more.activations - less.activations == more.halved - less.halved == wide * largest

    def test_it_is_said_with_what_the_halves_of_guidance_save(self):
        plan = MemoryPlan(13 * GB, 7 * GB, 0, {"gpu": 20 * GB}, 30 * GB, cache=2 * GB, halved=4 * GB)
        assert plan.text == (
            "gpu 20.0 GB, each 3.0 GB less with the halves of guidance one by one (weights 13.0 GB, activations 7.0 "
            "GB, cache 2.0 GB); 30.0 GB free"
        )
        assert (
            replace(plan, halved=None, free=None, cache=0).text == "gpu 20.0 GB (weights 13.0 GB, activations 7.0 GB)"
        )

    def test_windows_are_said_of_a_clip_that_has_several(self, tiny):
        model = with_windows(open_handles(tiny, "bf16", CPU).model, Windows(17, 2))
        assert memory_text(model, (1, 16, 5, 6, 10)).startswith("memory to sample 80x48, 17 frames: ")
        assert memory_text(model, (1, 16, 9, 6, 10)).startswith(
            "memory to sample 80x48, 33 frames in 2 windows of 17: "
        )

    @pytest.mark.parametrize(("batch", "what"), [(1, "a video"), (3, "3 videos")])
    def test_what_no_memory_holds_is_refused_with_what_it_would_take(self, tiny, batch, what):
        model = open_handles(tiny, "fp32", CPU).model
        # Latents; of each token two tables of 64 numbers, and six times the two heads of each video.
        nbytes = 4 * batch * 16 * 6 * 10**10 + 3 * (10**5 // 2) ** 2 * 4 * (2 * 64 + 6 * batch * 2 * 64)
        said = f"A step of {what} of 800000x800000 pixels and 21 frames would take {nbytes / 10**12:,.1f} TB of memory"
        with pytest.raises(ValueError, match=said):
            check_host_room(model, (batch, 16, 6, 10**5, 10**5))

    @pytest.mark.parametrize(
        ("free", "mode"),
        [(None, "gpu"), (20, "gpu"), (19, "offload_blocks"), (8, "offload_blocks"), (7, "offload_layers")],
    )
    def test_auto_is_the_fastest_that_fits(self, free, mode):
        needed = {"gpu": 20 * GB, "offload_blocks": 8 * GB, "offload_layers": 7 * GB}
        assert MemoryPlan(13 * GB, 7 * GB, 0, needed, free and free * GB).fastest() == Placement(mode)

    @pytest.mark.parametrize(
        ("free", "placement"),
        [
            (20, Placement("gpu")),
            (19, Placement("gpu", False)),
            (16, Placement("offload_blocks")),
            (7, Placement("offload_blocks", False)),
            (4, Placement("offload_layers", False)),
        ],
    )
    def test_halves_of_guidance_one_after_the_other_come_before_the_next_mode(self, free, placement):
        needed = {"gpu": 20 * GB, "offload_blocks": 8 * GB, "offload_layers": 7 * GB}
        plan = MemoryPlan(13 * GB, 7 * GB, 0, needed, free * GB, halved=4 * GB)
        assert plan.fastest(placements((True, False))) == placement

    def test_where_nothing_fits_it_says_what_each_would_take(self):
        needed = {"gpu": 20 * GB, "offload_blocks": 8 * GB, "offload_layers": 7 * GB}
        with pytest.raises(
            ValueError,
            match=r"needs 7.0 GB .* 5.0 GB are free \(gpu 20.0 GB, offload_blocks 8.0 GB, offload_layers 7.0 GB\)",
        ):
            MemoryPlan(13 * GB, 7 * GB, 0, needed, 5 * GB).fastest()

    def test_a_run_that_does_not_fit_as_a_whole_runs_in_the_next_mode_and_says_so(
        self, card, tiny, prompts, monkeypatch
    ):
        model, latent, said = open_handles(tiny, "fp32", CPU).model, torch.zeros(1, 16, 4, 6, 10), []
        expected = sample(open_handles(tiny, "fp32", CPU).model, *prompts, latent, seed=1, steps=2)
        monkeypatch.setattr(MemoryPlan, "fastest", lambda plan, among: Placement("offload_blocks"))
        monkeypatch.setattr(weights_module, "free_bytes", lambda device: 0)
        ours = sample(model, *prompts, latent, seed=1, steps=2, events=Told(said))
        assert torch.equal(ours, expected)
        assert any("runs in offload_blocks" in text for text in said)
        assert offloaded(model.weights) == "blocks"

    @pytest.mark.parametrize(
        ("memory", "free", "placement", "said"),
        [
            (
                "auto",
                -1,
                Placement("gpu", False),
                "halves of guidance run one after the other, as the card has no room",
            ),
            (
                "offload_blocks",
                0,
                Placement("offload_blocks", False),
                "halves of guidance run one after the other, as the card has no room",
            ),
            ("gpu", 0, Placement("gpu", False), "halves of guidance run one after the other, as the card has no room"),
            ("offload_blocks", 1 << 40, Placement("offload_blocks"), ""),
        ],
    )
    def test_so_are_the_halves_of_guidance_also_in_a_mode_that_was_chosen(
        self, tiny, monkeypatch, memory, free, placement, said
    ):
        notes, latent = [], torch.zeros(1, 16, 4, 6, 10)
        model = open_handles(tiny, "fp32", CPU, memory=memory).model
        limit = plan_memory(model, latent.shape).needed["gpu"] + free if free < 0 else free
        monkeypatch.setattr(weights_module.Weights, "free", limit)
        found = choose_placements(model, latent, True, True, 226, Told(notes))
        assert found == placements((True, False))[placements((True, False)).index(placement) :]
        assert bool(notes) == bool(said)
        assert said in "".join(notes)

    def test_what_other_parts_hold_on_the_device_counts_as_free(self, tiny, monkeypatch):
        """They make way when the transformer runs."""
        monkeypatch.setattr(weights_module, "free_bytes", lambda device: 1000)
        opened = open_handles(tiny, "fp32", CPU)
        before = opened.model.weights.free
        with opened.text_encoder.weights.running():
            pass
        assert opened.model.weights.free - before == opened.text_encoder.weights.resident > 0

    @pytest.mark.parametrize("kind", ["cuda", "xpu"])
    def test_a_card_is_asked_what_is_free_and_what_torch_keeps_there_is_too(self, monkeypatch, kind):
        backend, device = getattr(torch, kind), torch.device(kind)
        for name, answer in {
            "mem_get_info": (3 * GB, 8 * GB),
            "memory_reserved": GB,
            "memory_allocated": GB // 2,
        }.items():
            monkeypatch.setattr(backend, name, lambda device, answer=answer: answer)
        assert weights_module.free_bytes(device) == int(3.5 * GB * weights_module._SHARE)

        def refuse(device):
            raise RuntimeError("The device doesn't support querying the available free memory.")

        monkeypatch.setattr(backend, "mem_get_info", refuse)
        assert weights_module.free_bytes(device) is None

    def test_an_unknown_mode_is_refused(self, tiny):
        with pytest.raises(ValueError, match="memory is 'disk'"):
            open_handles(tiny, "bf16", CPU, memory="disk")


@pytest.fixture(scope="module")
def offloading():
    """diffusers' group offloading, which in 0.36 does not start without an accelerator."""
    try:
        weights_module._offload(torch.nn.Sequential(torch.nn.Linear(2, 2)), "offload_layers", torch.device("cpu"))
    except AttributeError as error:
        pytest.skip(f"this diffusers cannot offload without an accelerator ({error})")


@pytest.fixture
def card(offloading, monkeypatch):
    """The host's memory counts as a card's too, so that what is offloaded is offloaded: to the host itself, as there is
    no other device here."""
    monkeypatch.setattr(weights_module, "_is_host", lambda device: False)


def offloaded(weights) -> str:
    """What diffusers brings to the device when it is about to run: ``blocks``, ``layers`` or nothing; seen on the
    module itself."""
    hooked = {name for name, child in weights._module.named_modules() if hasattr(child, "_diffusers_hook")}
    blocks = {name for name, child in weights._module.named_modules() if type(child).__name__ == "CogVideoXBlock"}
    layers = {name for name, child in weights._module.named_modules() if isinstance(child, torch.nn.Linear)}
    return "layers" if layers and layers <= hooked else "blocks" if blocks and blocks <= hooked else ", ".join(hooked)


class TestModes:
    @pytest.mark.parametrize(
        ("memory", "brought"),
        [("gpu", ""), ("offload_blocks", "blocks"), ("offload_layers", "layers"), ("auto", ""), ("cpu", "")],
    )
    def test_each_makes_the_same_latents(self, card, tiny, prompts, memory, brought):
        latent = torch.zeros(1, 16, 4, 6, 10)
        expected = sample(open_handles(tiny, "fp32", CPU).model, *prompts, latent, seed=1, steps=2)
        model = open_handles(tiny, "fp32", CPU, memory=memory).model
        assert torch.equal(sample(model, *prompts, latent, seed=1, steps=2), expected)
        assert offloaded(model.weights) == brought
        # It can be used again, and its hooks are put on once.
        assert torch.equal(sample(model, *prompts, latent, seed=1, steps=2), expected)

    @pytest.mark.parametrize(("memory", "brought"), [("gpu", ""), ("offload_layers", "layers")])
    def test_so_does_the_text_encoder(self, card, tiny, memory, brought):
        expected = encode_prompt(open_handles(tiny, "fp32", CPU).text_encoder, "a panda").embeddings
        encoder = open_handles(tiny, "fp32", CPU, memory=memory).text_encoder
        assert torch.equal(encode_prompt(encoder, "a panda").embeddings, expected)
        assert offloaded(encoder.weights) == brought

    def test_on_the_host_nothing_is_offloaded(self, tiny, prompts):
        model = open_handles(tiny, "fp32", CPU, memory="offload_layers").model
        sample(model, *prompts, torch.zeros(1, 16, 1, 6, 10), seed=1, steps=1)
        assert offloaded(model.weights) == ""

    @pytest.mark.parametrize("mode", ["gpu", "offload_blocks", "offload_layers"])
    def test_what_is_offloaded_waits_in_the_hosts_memory(self, tiny, monkeypatch, mode):
        """The meta device stands for a card; diffusers brings nothing to it."""
        asked, card = [], torch.device("meta")
        monkeypatch.setattr(weights_module, "_offload", lambda module, mode, device: asked.append((mode, device)))
        weights = open_handles(tiny, "fp32", Hardware(card, "a card")).model.weights
        with weights.running(mode=mode) as module:
            assert asked == ([] if mode == "gpu" else [(mode, card)])
            assert {parameter.device.type for parameter in module.parameters()} == {"meta" if mode == "gpu" else "cpu"}
            assert weights.resident == (weights.nbytes if mode == "gpu" else 0)

    def test_a_part_that_runs_makes_no_way_for_another_that_is_called_within(self, tiny, monkeypatch):
        """The meta device stands for a card, from which nothing can be moved."""
        monkeypatch.setattr(weights_module, "free_bytes", lambda device: 1000)
        first, second = (
            open_handles(tiny, "fp32", Hardware(torch.device("meta"), "a card")).model.weights for _ in "12"
        )
        with first.running(mode="gpu") as module:
            assert first.free == 1000 + first.nbytes
            assert second.free == 1000
            with second.running(mode="gpu"):
                first.park()
                assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
        assert second.free == 1000 + first.nbytes + second.nbytes
        with pytest.raises(NotImplementedError, match="meta"):
            first.park()

    @pytest.mark.parametrize("mode", ["offload_blocks", "offload_layers"])
    @pytest.mark.parametrize(
        "precision", [FP32, Precision(torch.bfloat16), RANGE_SAFE_FP16], ids=["fp32", "bf16", "range-safe"]
    )
    @pytest.mark.parametrize("stored", ["plain", "fp8"])
    def test_offloading_hooks_leave_every_kind_of_layer_right_loras_too(
        self, offloading, tiny, tmp_path, monkeypatch, mode, precision, stored
    ):
        """diffusers' group offloading, applied for good: from the host to the host, as there is no other device
        here."""
        part = open_part(tiny / "transformer", "transformer")
        if stored == "fp8":
            state = load_module(part, FP32, torch.device("cpu")).state_dict()
            part = open_part(layouts.write_packed(tmp_path, state, stored), "transformer")
        name = "transformer.transformer_blocks.0.attn1.to_q"
        save_file(
            {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)},
            tmp_path / "lora.safetensors",
        )
        lora, device = open_lora(tmp_path / "lora.safetensors", part), torch.device("cpu")
        inputs = dict(
            hidden_states=torch.randn(1, 2, 16, 6, 10, dtype=precision.activations),
            encoder_hidden_states=torch.randn(1, 8, TEXT_WIDTH, dtype=precision.activations),
            timestep=torch.tensor([500]),
            return_dict=False,
        )
        plain, offloaded = (load_module(part, precision, device) for _ in range(2))
        weights_module._offload(offloaded, mode, device)
        with torch.no_grad():
            assert left_behind(offloaded, lambda: offloaded(**inputs), monkeypatch) == []
            for _ in range(2):
                results = []
                for module in (plain, offloaded):
                    with applied([lora], module, precision, device):
                        results.append(module(**inputs)[0])
                assert torch.equal(*results)

    def test_t5_too(self, offloading, tiny):
        weights = open_handles(tiny, "fp32", CPU).text_encoder.weights
        ids = torch.tensor([[5, 6, 7, 1, 0, 0]])
        with weights.running() as module, torch.no_grad():
            expected = module(ids)[0]
        offloaded = load_module(weights.part, FP32, torch.device("cpu"))
        weights_module._offload(offloaded, "offload_blocks", torch.device("cpu"))
        with torch.no_grad():
            assert torch.equal(offloaded(ids)[0], expected)


class TestHost:
    """The computer's own memory, which parts that wait for their turn take."""

    @pytest.fixture
    def opened(self, tiny):
        return open_handles(tiny, "fp16", CPU)

    @pytest.mark.parametrize(("free", "stays"), [(1 << 40, True), (1000, False)])
    def test_a_part_that_waits_makes_way_where_the_next_has_no_room_beside_it(
        self, opened, prompts, monkeypatch, free, stays
    ):
        said, latent = [], torch.zeros(1, 16, 4, 6, 10)
        expected = sample(open_handles(opened.checkpoint.path, "fp16", CPU).model, *prompts, latent, seed=1, steps=2)
        encode_prompt(opened.text_encoder, "a panda")
        monkeypatch.setattr(weights_module, "free_host_bytes", lambda: free)
        ours = sample(opened.model, *prompts, latent, seed=1, steps=2, events=Told(said))
        assert torch.equal(ours, expected)
        assert opened.text_encoder.weights.is_loaded == stays
        assert any("The transformer takes" in text and "0.0 MB are free" in text for text in said) != stays
        # It is read again when it runs.
        assert encode_prompt(opened.text_encoder, "a panda").embeddings.isfinite().all()

    @pytest.mark.parametrize("how", ["released", "makes way", "in another mode", "of handles that are gone"])
    def test_what_is_freed_is_gone_at_once(self, tiny, prompts, monkeypatch, how):
        opened = open_handles(tiny, "fp16", CPU)
        weights = opened.model.weights
        sample(opened.model, *prompts, torch.zeros(1, 16, 4, 6, 10), seed=1, steps=2)
        held = [weakref.ref(tensor) for tensor in weights._module.parameters()]
        gc.disable()
        try:
            if how == "released":
                weights.release()
            elif how == "makes way":
                monkeypatch.setattr(weights_module, "free_host_bytes", lambda: 1000)
                encode_prompt(opened.text_encoder, "a panda")
            elif how == "in another mode":
                weights._mode = "offload_blocks"
                with weights.running(mode="gpu"):
                    pass
            del opened, weights
            assert not any(tensor() is not None for tensor in held)
        finally:
            gc.enable()

    def test_what_there_is_of_one_that_had_no_room_is_gone_before_it_is_loaded_otherwise(self, tiny, monkeypatch):
        real, held, there = loading_module.empty_module, [], []

        def begin(part):
            there.append(sum(module() is not None for module in held))
            begun = real(part)
            held.extend(weakref.ref(module) for module in begun[0].modules())
            return begun

        def progress(*_):
            if len(there) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(loading_module, "empty_module", begin)
        events, weights = Told(), open_handles(tiny, "fp16", CPU).model.weights
        monkeypatch.setattr(events, "counter", lambda *_: progress)
        gc.disable()
        try:
            with Sentinel(weights, events=events, placements=[Placement("gpu"), Placement("offload_layers")]):
                pass
        finally:
            gc.enable()
        assert there == [0, 0]

    def test_one_that_runs_stays(self, opened, monkeypatch):
        monkeypatch.setattr(weights_module, "free_host_bytes", lambda: 1000)
        with opened.model.weights.running() as module:
            encode_prompt(opened.text_encoder, "a panda")
            assert opened.model.weights._module is module
        opened.text_encoder.weights.release()
        with opened.text_encoder.weights.running():
            assert not opened.model.weights.is_loaded

    @pytest.mark.parametrize(("need", "stays"), [(0, True), (1 << 30, False)])
    def test_on_a_card_it_is_freed_where_it_and_what_it_makes_way_for_have_no_room(
        self, opened, monkeypatch, need, stays
    ):
        weights = opened.text_encoder.weights
        with weights.running():
            pass
        monkeypatch.setattr(weights_module, "_is_host", lambda device: False)
        monkeypatch.setattr(weights_module, "free_host_bytes", lambda: 2 << 30)
        weights.park(beside=need)
        assert weights.is_loaded == stays

    def test_on_a_card_what_waits_in_the_hosts_memory_already_stays_there(self, opened, monkeypatch):
        weights = opened.text_encoder.weights
        with weights.running():
            pass
        monkeypatch.setattr(weights, "hardware", Hardware(torch.device("cuda"), "card"))
        monkeypatch.setattr(weights_module, "free_host_bytes", lambda: 1000)
        weights_module.make_room(torch.device("cuda"))
        assert weights.is_loaded
        assert not weights.is_stuck

    @pytest.mark.parametrize(
        ("dtype", "device", "taken"), [("bf16", "cpu", 0), ("fp32", "cpu", 1), ("bf16", "mps", 1), ("fp32", "cuda", 0)]
    )
    def test_what_runs_as_it_is_stored_takes_none_but_on_apples_gpu(self, tiny, dtype, device, taken):
        weights = open_handles(tiny, dtype, CPU).model.weights
        assert weights._host_bytes(torch.device(device)) == taken * weights.nbytes

    @pytest.mark.parametrize(
        ("folder", "limit", "taken", "total"),
        [
            ("", "memory.max", "memory.current", ""),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ],
    )
    def test_the_limit_of_a_container_counts(self, tmp_path, monkeypatch, folder, limit, taken, total):
        group = tmp_path / folder
        group.mkdir(exist_ok=True)
        (group / limit).write_text("3000\n")
        (group / taken).write_text("2900\n")
        (group / "memory.stat").write_text(f"anon 2500\n{total}inactive_file 300\n{total}active_file 100\n")
        assert free_host_bytes() > 3000
        monkeypatch.setattr(tensors_module, "_CGROUPS", tmp_path)
        assert free_host_bytes() == 500
        (group / limit).write_text("max\n")
        assert free_host_bytes() > 3000


class TestOutOfMemory:
    @pytest.fixture
    def full(self, monkeypatch):
        """``full(kind, when)``: memory runs out when a part is called, where ``when(call)`` says so; calls count from 1
        over all loads."""
        real, calls = weights_module.load_module, []

        def inject(kind, when):
            def load(part, *arguments):
                module = real(part, *arguments)

                def fail(*_):
                    calls.append(1)
                    if when(len(calls)):
                        raise torch.OutOfMemoryError("CUDA out of memory.")

                if part.kind == kind:
                    module.register_forward_pre_hook(fail)
                return module

            monkeypatch.setattr(weights_module, "load_module", load)
            return calls

        return inject

    @pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
    @pytest.mark.parametrize("call", [1, 3])
    def test_a_step_is_repeated_in_the_next_mode_and_the_video_is_the_same(
        self, card, tiny, prompts, full, call, scheduler
    ):
        latent, said, steps = torch.zeros(1, 16, 4, 6, 10), [], []
        settings = dict(seed=1, steps=4, scheduler=scheduler, cfg=1.0)
        expected = sample(open_handles(tiny, "fp32", CPU).model, *prompts, latent, **settings)
        calls = full("transformer", lambda number: number == call)
        model = open_handles(tiny, "fp32", CPU).model
        ours = sample(
            model, *prompts, latent, **settings, events=Told(heals=said, step=lambda done, *_: steps.append(done))
        )
        assert torch.equal(ours, expected)
        assert steps == [1, 2, 3, 4]
        assert len(calls) == 5
        assert offloaded(model.weights) == "blocks"
        assert said == [
            f"step {call} of 4: cpu ran out of memory with the transformer in gpu. Going on from here in "
            "offload_blocks; no finished step is lost."
        ]

    @pytest.mark.parametrize("cache", [None, *CACHES])
    def test_where_there_is_guidance_its_halves_run_one_after_the_other_first(self, deep, prompts, full, cache):
        latent, said, steps, loads = torch.zeros(1, 16, 4, 6, 10), [], [], []
        settings = dict(seed=1, steps=4)

        def opened():
            model = open_handles(deep, "fp32", CPU).model
            return model if cache is None else with_cache(model, Cache(cache, 0.5, 0.0, 1.0))

        expected = sample(opened(), *prompts, latent, **settings)
        calls = full("transformer", lambda number: number == 3)
        events = Told(
            heals=said,
            step=lambda done, *_: steps.append(done),
            progress=lambda *_: loads.append(len(steps)),
            of="loading",
        )
        ours = sample(opened(), *prompts, latent, **settings, events=events)
        # The cache begins anew with the step that is repeated.
        assert (ours - expected).norm() / expected.norm() < (1e-5 if cache is None else 0.3)
        assert steps == [1, 2, 3, 4]
        assert set(loads) == {0}
        assert len(calls) == 3 + 2 * 2
        assert said == [
            "step 3 of 4: cpu ran out of memory with the transformer in gpu. Going on from here in gpu with the "
            "halves of guidance one after the other; no finished step is lost."
        ]

    def test_a_model_that_does_not_even_load_is_loaded_in_the_next_mode(self, tiny, prompts, monkeypatch):
        latent, said, real, calls = torch.zeros(1, 16, 4, 6, 10), [], weights_module.load_module, []
        expected = sample(open_handles(tiny, "fp32", CPU).model, *prompts, latent, seed=1, steps=2)

        def load(*arguments):
            calls.append(1)
            if len(calls) <= 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(*arguments)

        monkeypatch.setattr(weights_module, "load_module", load)
        ours = sample(open_handles(tiny, "fp32", CPU).model, *prompts, latent, seed=1, steps=2, events=Told(heals=said))
        assert torch.equal(ours, expected)
        assert [text.split("Going on from here in ")[1].split(";")[0] for text in said] == [
            "gpu with the halves of guidance one after the other",
            "offload_blocks",
        ]
        calls.clear()
        monkeypatch.setattr(weights_module, "load_module", lambda *_: load(calls.clear()))
        with pytest.raises(OutOfMemory, match="loading: cpu ran out of memory even in the mode that takes the least"):
            sample(open_handles(tiny, "fp32", CPU).model, *prompts, latent, seed=1, steps=2)

    def test_where_the_smallest_fails_too_the_finished_latents_come_with_the_error(self, tiny, prompts, full):
        latent = torch.zeros(1, 16, 4, 6, 10)
        full("transformer", lambda number: number > 2)
        model = open_handles(tiny, "fp32", CPU).model
        with pytest.raises(
            OutOfMemory,
            match=r"step 3 of 4: cpu ran out of memory even in the mode that takes the least "
            r"\(offload_layers with the halves of guidance one after the other\)",
        ) as caught:
            sample(model, *prompts, latent, seed=1, steps=4)
        assert caught.value.latents.shape == latent.shape
        assert caught.value.latents.any()

    def test_the_text_encoder_steps_down_too(self, card, tiny, full):
        expected = encode_prompt(open_handles(tiny, "fp32", CPU).text_encoder, "a panda").embeddings
        said = []
        full("text_encoder", lambda number: number == 1)
        encoder = open_handles(tiny, "fp32", CPU).text_encoder
        assert torch.equal(encode_prompt(encoder, "a panda", events=Told(heals=said)).embeddings, expected)
        assert offloaded(encoder.weights)
        assert "with the text encoder in gpu" in said[0]

    def test_the_nodes_save_the_latents_and_say_where(self, pack, tiny, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def run(node, **inputs):
            return pack.NODE_CLASS_MAPPINGS[f"CogVideoX15{node}"]().run(**inputs)

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        model, _, vae, _ = run("ModelLoader", model=str(tiny), dtype="fp32")
        prompt, empty, latent = (
            [[torch.randn(1, 226, 32), {}]],
            {"samples": torch.zeros(1, 16, 3, 4, 4)},
            {"samples": torch.randn(1, 16, 3, 4, 4)},
        )
        settings = dict(seed=1, steps=3, cfg=1.0, scheduler="ddim", denoise=1.0)
        run("Sampler", model=model, positive=prompt, negative=prompt, latent_image=empty, **settings)
        run("VAEDecode", samples=latent, vae=vae)
        # The pack has an engine of its own.
        engine = {name: sys.modules[f"{pack.__name__}.cogvideox.{name}"] for name in ("sampling", "modules.strips")}
        real, calls = engine["sampling"].advance, []
        monkeypatch.setattr(
            engine["sampling"], "advance", lambda *given: fail() if len(calls) == 2 else calls.append(1) or real(*given)
        )
        with pytest.raises(
            RuntimeError, match=r"step 3 of 3.* CogVideoX_unfinished_00001.latent can be opened with Load Latent"
        ):
            run("Sampler", model=model, positive=prompt, negative=prompt, latent_image=empty, **settings)
        assert load_file(tmp_path / "CogVideoX_unfinished_00001.latent")["latent_tensor"].shape == (1, 16, 3, 4, 4)
        monkeypatch.setattr(engine["modules.strips"].Strips, "_tick", fail)
        with pytest.raises(RuntimeError, match=r"CogVideoX_unfinished_00002.latent can be opened with Load Latent"):
            run("VAEDecode", samples=latent, vae=vae)
        saved = load_file(tmp_path / "CogVideoX_unfinished_00002.latent")
        assert torch.equal(saved["latent_tensor"], latent["samples"])
        assert "latent_format_version_0" in saved

    @pytest.mark.parametrize(
        ("there", "said"),
        [
            (("input", "output", "temp"), r"can be opened with Load Latent \(it is .*input"),
            (("output", "temp"), r"they are in .*output.CogVideoX_unfinished_00001.latent\. Move that file to"),
            (("temp",), r"they are in .*temp.CogVideoX_unfinished_00001.latent\. Move that file to"),
            ((), r"The latents could not be kept either \(.*input.* cannot be written .*output.*temp"),
        ],
    )
    def test_where_comfyuis_input_folder_cannot_be_written_they_go_elsewhere(
        self, pack, tmp_path, monkeypatch, there, said
    ):
        host, error = (sys.modules[f"{pack.__name__}.{name}"] for name in ("nodes.host", "cogvideox.sentinel"))
        for name in ("input", "output", "temp"):
            # A file where a folder should be: nothing can be written below, whoever runs this.
            (tmp_path / name).mkdir() if name in there else (tmp_path / name).write_bytes(b"")
        names = {
            f"get_{name}_directory": lambda name=name: str(tmp_path / name) for name in ("input", "output", "temp")
        }
        monkeypatch.setattr(host.comfyui, "IN_COMFYUI", True)
        monkeypatch.setattr(host.comfyui, "folder_paths", SimpleNamespace(**names), raising=False)
        with (
            pytest.raises(RuntimeError, match=r"^step 40 of 50: cuda:0 ran out of memory\. .*" + said),
            host.saving_latents(torch.zeros(1, 16, 3, 4, 4)),
        ):
            raise error.OutOfMemory("step 40 of 50: cuda:0 ran out of memory.")
        assert len(list(tmp_path.rglob("*.latent"))) == min(1, len(there))

    def test_a_saved_latent_never_overwrites_another(self, tmp_path):
        paths = [write_latent(torch.zeros(1, 16, 1, 2, 2), tmp_path) for _ in range(3)]
        assert len(set(paths)) == 3


def test_a_smaller_placement_may_join_the_halves_of_guidance_again(tiny, prompts, monkeypatch):
    from diffusers import CogVideoXTransformer3DModel

    model, how = open_handles(tiny, "fp32", CPU).model, dict(seed=1, steps=2)
    expected = sample(model, *prompts, torch.zeros(1, 16, 4, 6, 10), **how)
    real, calls = CogVideoXTransformer3DModel.forward, []

    def forward(self, *args, **kwargs):
        calls.append(len(kwargs["hidden_states"]))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", forward)
    monkeypatch.setattr(
        sampling_module, "choose_placements", lambda *_: (Placement("gpu", False), Placement("offload_blocks", True))
    )
    assert torch.equal(sample(model, *prompts, torch.zeros(1, 16, 4, 6, 10), **how), expected)
    assert calls == [1, 2, 2]
