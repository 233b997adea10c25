"""What only a card can show: this pack on a GPU against unmodified diffusers there, its memory modes, plans and ways
out of too little memory.

Skipped where there is no CUDA device. ``COGVIDEOX_TEST_DEVICE`` names another device, the CPU too.
"""

import gc
import os
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

import cogvideox.memory as memory_module
import cogvideox.vae as vae_module
from cogvideox.choices import CACHES, MODES, QUANTIZE
from cogvideox.handles import open_handles, quantized, with_attention, with_cache, with_compile, with_lora
from cogvideox.memory import plan_memory
from cogvideox.modules.attention import available
from cogvideox.modules.cache import Cache
from cogvideox.modules.compiled import Compiled, missing_compiler
from cogvideox.precision.hardware import Hardware
from cogvideox.sampling import sample
from cogvideox.text import encode_prompt
from cogvideox.vae import decode, encode
from cogvideox.warped_noise import MovingNoise
from cogvideox.weights import free_bytes, placements
from tests import layouts
from tests.reference import draw_beside, error, reference_latents
from tests.tiny_checkpoint import build_checkpoint, build_transformer, build_vae
from tests.told import Told

DEVICE = torch.device(os.environ.get("COGVIDEOX_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(),
    reason="needs an NVIDIA card: run pytest tests/test_device.py on one",
)
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="only CUDA counts memory and synchronisations")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Relative L2 that the order of sums may cost.
ROUNDING = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}
SHAPE = (1, 16, 5, 24, 40)
#: Of a video whose activations are seen beside the weights.
LARGE = (1, 16, 9, 60, 90)


@pytest.fixture(scope="module")
def prompts(long_prompts):
    return long_prompts


@pytest.fixture(scope="module")
def hardware():
    return Hardware.detect(DEVICE)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A transformer whose weights (0.4 GB in bf16) and activations are seen in the memory of a card."""

    def change(parts):
        torch.manual_seed(0)
        parts["transformer"] = build_transformer("1.5", num_attention_heads=16, num_layers=12, time_embed_dim=128)
        parts["vae"] = build_vae((32, 32, 32, 64), 32)

    return build_checkpoint(tmp_path_factory.mktemp("wide") / "wide", change=change)


def run(model, prompts, shape=SHAPE, steps=4, seed=1, **settings):
    return sample(model, *prompts, torch.zeros(shape), seed=seed, steps=steps, **settings)


def collect():
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def taken_by(work):
    """Bytes that ``work()`` took at most on the card, beside what was there."""
    collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def write_lora(path, module, inside, outside):
    generator = torch.Generator().manual_seed(1)
    halves = {
        "A": torch.randn(4, inside, generator=generator) / inside**0.5,
        "B": torch.randn(outside, 4, generator=generator),
    }
    save_file(
        {f"transformer.transformer_blocks.0.{module}.lora_{half}.weight": tensor for half, tensor in halves.items()},
        path,
    )
    return path


@contextmanager
def at_most(more):
    """Let torch take ``more`` bytes than it holds, and no others."""
    collect()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class TestSampling:
    @pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_is_diffusers_on_the_same_device(self, tiny, prompts, hardware, dtype, scheduler):
        from diffusers import CogVideoXPipeline

        pipeline = CogVideoXPipeline.from_pretrained(tiny, torch_dtype=DTYPES[dtype]).to(DEVICE)
        pipeline.set_progress_bar_config(disable=True)
        expected = reference_latents(
            pipeline, [prompt.to(DEVICE) for prompt in prompts], SHAPE, scheduler=scheduler
        ).cpu()
        ours = run(open_handles(tiny, dtype, hardware, "warn").model, prompts, scheduler=scheduler)
        print(f"{dtype} {scheduler}: equal {torch.equal(ours, expected)}, relative L2 {error(ours, expected):.1e}")
        assert error(ours, expected) < ROUNDING[dtype]

    @pytest.mark.parametrize("variant", ["1.5-i2v", "fun-inp", "void", "5b", "2b"])
    def test_every_variant_gives_what_it_gives_on_the_host(self, checkpoints, prompts, hardware, variant):
        shape = (*SHAPE[:2], 6 if variant in ("fun-inp", "void") else SHAPE[2], *SHAPE[3:])
        image = draw_beside(variant, shape, torch.Generator().manual_seed(3))
        ours, host = (
            run(open_handles(checkpoints(variant), "fp32", where).model, prompts, shape, image_latents=image)
            for where in (hardware, Hardware.detect("cpu"))
        )
        assert error(ours, host) < 1e-3

    @needs_cuda
    def test_a_step_waits_for_the_device_once(self, tiny, prompts, hardware):
        model = open_handles(tiny, "bf16", hardware).model
        run(model, prompts)

        def waits(steps):
            always = torch.is_warn_always_enabled()
            torch.set_warn_always(True)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    run(model, prompts, steps=steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                torch.set_warn_always(always)
            return sum("synchroniz" in str(warning.message) for warning in caught)

        assert waits(9) - waits(4) == 5


class TestPrecision:
    def test_range_safe_fp16_is_the_fp32_video_where_plain_fp16_is_healed(self, loud, prompts, hardware):
        exact = run(open_handles(loud, "fp32", hardware).model, prompts)
        safe, bf16 = (run(open_handles(loud, dtype, hardware).model, prompts) for dtype in ("fp16", "bf16"))
        healed, said = open_handles(loud, "fp16", hardware, "warn"), []
        plain = run(healed.model, prompts, events=Told(heals=said))
        print(
            f"range-safe {error(safe, exact):.1e}, bf16 {error(bf16, exact):.1e}, healed {error(plain, exact):.1e}: "
            f"{said}"
        )
        assert error(bf16, exact) < 0.15
        assert max(error(safe, exact), error(plain, exact)) < 2 * error(bf16, exact)
        assert said

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_prompts_are_encoded_as_on_the_host(self, loud, hardware, dtype):
        there, here = (
            encode_prompt(open_handles(loud, dtype, where).text_encoder, "a panda plays the guitar").embeddings
            for where in (hardware, Hardware.detect("cpu"))
        )
        assert error(there, here) < 10 * ROUNDING[dtype]


class TestMemory:
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    @pytest.mark.parametrize("mode", MODES[1:])
    def test_every_mode_gives_the_same_and_leaves_nothing_behind(self, wide, prompts, hardware, mode, dtype):
        expected = run(open_handles(wide, dtype, hardware).model, prompts)
        collect()
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        model = open_handles(wide, dtype, hardware, memory=mode).model
        assert torch.equal(run(model, prompts), expected)
        assert torch.equal(run(model, prompts), expected)
        del model
        collect()
        if DEVICE.type == "cuda":
            assert torch.cuda.memory_allocated() - before < 1 << 20

    @needs_cuda
    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("mode", MODES)
    def test_the_plan_is_what_a_run_takes(self, wide, prompts, hardware, mode, dtype):
        model = open_handles(wide, dtype, hardware, memory=mode).model
        plan = plan_memory(model, LARGE)
        # What cuBLAS works in is not of the run.
        run(model, prompts, steps=1)
        taken = model.weights.resident + taken_by(lambda: run(model, prompts, LARGE, steps=2))
        print(
            f"{dtype} {mode}: planned {plan.needed[mode] / 1e6:.0f} MB, taken {taken / 1e6:.0f} MB "
            f"({taken / plan.needed[mode]:.2f})"
        )
        assert 0.7 * plan.needed[mode] < taken < 1.1 * plan.needed[mode]

    @needs_cuda
    def test_where_memory_runs_out_a_smaller_way_gives_the_same(self, wide, prompts, hardware, monkeypatch):
        expected = run(open_handles(wide, "bf16", hardware).model, prompts, LARGE)
        plan = plan_memory(open_handles(wide, "bf16", hardware).model, LARGE)
        # So that it is found out, and not foreseen.
        monkeypatch.setattr(memory_module, "plan_memory", lambda *_: plan)
        said = []
        with at_most(0.5 * plan.needed["gpu"]):
            ours = run(open_handles(wide, "bf16", hardware).model, prompts, LARGE, events=Told(heals=said))
        print("\n".join(said))
        assert said
        assert error(ours, expected) < ROUNDING["bf16"]

    @needs_cuda
    def test_where_it_is_known_to_be_too_little_the_smaller_way_is_taken_at_once(
        self, wide, prompts, hardware, monkeypatch
    ):
        told, healed = [], []
        model = open_handles(wide, "bf16", hardware).model
        expected, plan = run(model, prompts, LARGE), plan_memory(model, LARGE)
        collect()
        room = plan.bytes_of(placements((True, False))[-1]) * 1.3 + 50e6
        monkeypatch.setattr("cogvideox.weights.free_bytes", lambda device: int(room))
        model.weights.release()
        with at_most(room):
            ours = run(model, prompts, LARGE, events=Told(told, healed))
        print(told, healed)
        assert told
        assert not healed
        assert error(ours, expected) < ROUNDING["bf16"]

    @needs_cuda
    def test_nothing_stays_on_the_card(self, wide, hardware):
        collect()
        before, opened = torch.cuda.memory_allocated(), open_handles(wide, "bf16", hardware)
        prompt = encode_prompt(opened.text_encoder, "a panda").embeddings
        images = decode(opened.vae, run(opened.model, (prompt, prompt)))
        assert images.isfinite().all()
        assert torch.cuda.memory_allocated() > before
        del opened
        collect()
        assert torch.cuda.memory_allocated() - before < 1 << 20
        assert free_bytes(DEVICE) > 0


class TestSpeedups:
    @pytest.fixture(scope="class")
    def model(self, wide, hardware):
        return open_handles(wide, "bf16", hardware).model

    @pytest.fixture(scope="class")
    def expected(self, model, prompts):
        return run(model, prompts)

    def test_every_attention_that_is_offered_runs(self, model, prompts, expected):
        # Kernels of the hub would be downloaded.
        for choice in (choice for choice in available(DEVICE) if not choice.endswith("_hub")):
            found = error(run(with_attention(model, choice), prompts), expected)
            print(f"attention {choice}: {found:.1e}")
            assert found < (0.2 if choice == "sage" else ROUNDING["bf16"])

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("method", CACHES)
    def test_every_cache_runs_in_every_mode(self, wide, prompts, hardware, expected, method, mode):
        notes = []
        model = with_cache(open_handles(wide, "bf16", hardware, memory=mode).model, Cache(method))
        ours = run(model, prompts, steps=10, events=Told(notes))
        print(notes[-1])
        assert ours.isfinite().all()
        assert "skipped" in notes[-1]
        assert torch.equal(run(open_handles(wide, "bf16", hardware, memory=mode).model, prompts), expected)

    @pytest.mark.parametrize("method", QUANTIZE)
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_every_quantization_runs_in_every_mode(self, wide, prompts, hardware, method, dtype):
        exact = run(open_handles(wide, dtype, hardware).model, prompts)
        results = [
            run(quantized(open_handles(wide, dtype, hardware, memory=mode).model, method), prompts) for mode in MODES
        ]
        print(f"{method} {dtype}: {error(results[0], exact):.1e}")
        assert error(results[0], exact) < 0.2
        assert all(torch.equal(result, results[0]) for result in results)

    @pytest.mark.skipif(
        DEVICE.type == "cuda" and torch.cuda.is_available() and missing_compiler(DEVICE) is not None,
        reason="no compiler",
    )
    @pytest.mark.parametrize(
        "case",
        [
            "bf16",
            "fp16",
            "fp32",
            "dynamic",
            "offload_blocks",
            "teacache",
            "first_block",
            "int8_weight_only",
            "int8_dynamic",
            "fp8_dynamic",
            "lora",
        ],
    )
    def test_compiled_it_is_the_same_up_to_rounding(self, wide, prompts, hardware, tmp_path, case):
        dtype = case if case in DTYPES else "bf16"
        model = open_handles(wide, dtype, hardware, memory=case if case in MODES else "auto").model
        if case in QUANTIZE:
            model = quantized(model, case)
        elif case in CACHES:
            model = with_cache(model, Cache(case, strength=0.5))
        elif case == "lora":
            model = with_lora(model, write_lora(tmp_path / "l.safetensors", "attn1.to_q", 1024, 1024))
        notes = []
        ours = run(with_compile(model, Compiled(dynamic=case == "dynamic")), prompts, events=Told(notes))
        found = error(ours, run(model, prompts))
        print(f"compiled {case}: {found:.1e} {notes}")
        # What was compiled for the case before serves a LoRA too.
        assert case == "lora" or any("Compiled in" in note for note in notes)
        assert found < (0.3 if case in CACHES else 0.1 if case in QUANTIZE else ROUNDING[dtype])


class TestLayouts:
    @pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("mode", MODES)
    def test_fp8_files_stay_fp8_on_the_card(self, tmp_path, prompts, hardware, stored, mode):
        folder, modules = layouts.build_modules(tmp_path / "it")
        state = {
            n: t.to(stored) if t.ndim == 2 and "blocks" in n else t
            for n, t in modules["transformer"].state_dict().items()
        }
        file = layouts.write_file(tmp_path / "fp8.safetensors", state)
        there, here = (
            run(
                open_handles(
                    file, "bf16", where, memory=m, text_encoder=folder / "text_encoder", vae=folder / "vae"
                ).model,
                prompts,
            )
            for where, m in ((hardware, mode), (Hardware.detect("cpu"), "gpu"))
        )
        assert error(there, here) < ROUNDING["bf16"]

    @pytest.mark.parametrize("mode", MODES)
    def test_gguf_runs(self, tmp_path, wide, prompts, hardware, mode):
        from diffusers import CogVideoXTransformer3DModel

        state = CogVideoXTransformer3DModel.from_pretrained(wide / "transformer").state_dict()
        file = layouts.write_gguf(tmp_path / "model.gguf", state, "Q8_0")
        there = run(open_handles(file, "bf16", hardware, memory=mode).model, prompts)
        assert error(there, run(open_handles(wide, "bf16", hardware).model, prompts)) < 0.1

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_a_lora_runs_in_every_mode(self, tmp_path, wide, prompts, hardware, mode, dtype):
        lora, results = write_lora(tmp_path / "l.safetensors", "ff.net.2", 4096, 1024), {}
        for memory in ("gpu", mode):
            model = open_handles(wide, dtype, hardware, memory=memory).model
            results[memory] = run(with_lora(model, lora), prompts)
        assert torch.equal(results[mode], results["gpu"])
        assert error(results[mode], run(model, prompts)) > 1e-3


def test_noise_is_moved_as_on_the_host_and_the_same_each_time():
    found = []
    for device in ("cpu", DEVICE, DEVICE):
        generator = torch.Generator().manual_seed(1)
        moving = MovingNoise(4, 256, 384, lambda *shape, g=generator, d=device: torch.randn(shape, generator=g).to(d))
        for seed in range(4):
            flow = 3 * torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(seed))
            moving.move(flow.to(device))
        found.append(moving.shrunk())
    assert torch.equal(found[1], found[2])
    assert error(found[1], found[0]) < 0.1


class TestVAE:
    @pytest.fixture(scope="class")
    def latent(self):
        return torch.randn(1, 16, 5, 24, 40, generator=torch.Generator().manual_seed(4))

    def expected(self, folder, latent, dtype):
        from diffusers import AutoencoderKLCogVideoX
        from diffusers.video_processor import VideoProcessor

        vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=DTYPES[dtype]).to(DEVICE)
        with torch.no_grad():
            frames = vae.decode(latent.to(DEVICE, DTYPES[dtype])).sample
        return VideoProcessor().postprocess_video(frames, "pt")[0].permute(0, 2, 3, 1).float().cpu()

    @pytest.mark.parametrize("budget", [None, 30 << 20])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_frames_are_those_of_diffusers(self, wide, hardware, latent, dtype, budget):
        ours, theirs = (
            decode(open_handles(wide, dtype, hardware).vae, latent, budget=budget),
            self.expected(wide, latent, dtype),
        )
        print(f"VAE {dtype} {budget}: {error(ours, theirs):.1e}, at most {(ours - theirs).abs().max():.1e}")
        # Convolutions in fp32 are of TF32 on a card, in diffusers as here.
        assert error(ours, theirs) < {"fp32": 1e-3, "bf16": 3e-2, "fp16": 4e-3}[dtype]

    def test_frames_are_encoded_as_diffusers_does(self, wide, hardware):
        from diffusers import AutoencoderKLCogVideoX

        images = torch.rand(17, 96, 160, 3, generator=torch.Generator().manual_seed(2))
        vae = AutoencoderKLCogVideoX.from_pretrained(wide / "vae").to(DEVICE)
        with torch.no_grad():
            expected = vae.encode((images.permute(3, 0, 1, 2)[None] * 2 - 1).to(DEVICE)).latent_dist.mode().cpu()
        assert error(encode(open_handles(wide, "fp32", hardware).vae, images), expected) < 2e-3

    @needs_cuda
    @pytest.mark.parametrize("budget", [400 << 20, 150 << 20])
    def test_it_keeps_to_its_budget(self, wide, hardware, budget):
        latent, vae = torch.randn(1, 16, 5, *LARGE[3:]), open_handles(wide, "bf16", hardware).vae
        decode(vae, latent[..., :24, :24])
        taken = taken_by(lambda: decode(vae, latent, budget=budget))
        print(f"VAE budget {budget >> 20} MiB: {taken >> 20} MiB taken")
        assert taken < 1.25 * budget

    @needs_cuda
    def test_where_memory_runs_out_it_goes_on_with_less(self, wide, hardware, monkeypatch):
        latent, vae, said = torch.randn(1, 16, 5, *LARGE[3:]), open_handles(wide, "bf16", hardware).vae, []
        expected = decode(vae, latent)
        # What it is told is free is not.
        monkeypatch.setattr(vae_module, "free_bytes", lambda device: 16 << 30)
        with at_most(200 << 20):
            ours = decode(vae, latent, events=Told(heals=said))
        print("\n".join(said))
        assert said
        assert error(ours, expected) < ROUNDING["bf16"]
