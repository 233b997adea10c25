"""Frames and latents are the reference's, whatever memory there is for them, and no run is lost to a full card."""

import gc

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

import cogvideox.modules.strips as strips_module
from benchmarks.vae_decode import build as build_released
from cogvideox.handles import open_handles
from cogvideox.modules import fewer_products
from cogvideox.modules.strips import Strips
from cogvideox.vae import chunk_lengths, decode, encode
from tests.conftest import CPU
from tests.memory import count_strips
from tests.reference import error
from tests.tiny_checkpoint import build_vae
from tests.told import Told


def reference(pipeline, latents):
    """``vae.decode`` and ``VideoProcessor``, unmodified, with the VAE's own slicing over videos."""
    with torch.no_grad():
        pipeline.vae.enable_slicing()
        frames = pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample
    images = pipeline.video_processor.postprocess_video(frames, output_type="np")
    return torch.from_numpy(images).flatten(0, 1)


@pytest.mark.parametrize(("length", "batch"), [(1, 1), (2, 1), (3, 2), (4, 1), (5, 2), (8, 1)])
def test_frames_equal_the_references(handles, pipeline, length, batch):
    latents = torch.randn(batch, 16, length, 4, 6)
    images = decode(handles.vae, latents)
    assert error(images, reference(pipeline, latents)) < 1e-5
    assert images.dtype == torch.float32
    assert images.device.type == "cpu"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits_they_are_no_farther_from_fp32_than_the_references(tiny, pipeline, dtype):
    from diffusers import CogVideoXPipeline

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    theirs = CogVideoXPipeline.from_pretrained(tiny, torch_dtype=half)
    ours = open_handles(tiny, dtype, CPU, on_mismatch="warn").vae
    assert ours.weights.precision.dtype == half
    # Over many clips: a single one's error is that of a few hundred roundings, and varies by a fifth either way.
    errors = {"decode": [0.0, 0.0], "encode": [0.0, 0.0]}
    for seed in range(9):
        generator = torch.Generator().manual_seed(seed)
        latents, clip = torch.randn(1, 16, 3, 2, 2, generator=generator), torch.rand(9, 16, 32, 3, generator=generator)
        pixels = 2.0 * rearrange(clip, "f h w c -> 1 c f h w") - 1.0
        with torch.no_grad():
            truth, coarse = (vae.encode(pixels.to(vae.dtype)).latent_dist.mode() for vae in (pipeline.vae, theirs.vae))
        for way, fine, results in (
            ("decode", reference(pipeline, latents), (decode(ours, latents), reference(theirs, latents))),
            ("encode", truth, (encode(ours, clip), coarse)),
        ):
            for side, result in enumerate(results):
                errors[way][side] += error(result, fine) ** 2
    for mine, reference_error in errors.values():
        assert mine**0.5 < 1.05 * reference_error**0.5


@settings(max_examples=8, deadline=None)
@given(
    length=st.integers(1, 5),
    height=st.integers(1, 4),
    width=st.integers(1, 3),
    strip=st.sampled_from([1, 10_000, 50_000, 1 << 30]),
    budget=st.sampled_from([None, 0, 100_000, 1_000_000]),
    least=st.sampled_from([0, 1000, 1 << 60]),
    seed=st.integers(0, 9),
)
def test_any_size_in_any_strips_and_any_budget_is_the_reference(
    pipeline, length, height, width, strip, budget, least, seed
):
    generator = torch.Generator().manual_seed(seed)
    vae = pipeline.vae
    latent = torch.randn(1, 16, length, 2 * height, 2 * width, generator=generator)
    frames = torch.rand(1, 3, 4 * length - 3, 16 * height, 16 * width, generator=generator) * 2 - 1
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(strips_module, "_STRIP_BYTES", {"cpu": strip})
        patch.setattr(strips_module, "_MIN_STRIP_BYTES", 1)
        patch.setattr(strips_module, "_ONEDNN_SIZE", 0)
        patch.setattr(fewer_products, "_LEAST_SIZE", least)
        for step, given_, expected, chunk in (
            (Strips.decode, latent, vae.decode(latent).sample, vae.num_latent_frames_batch_size),
            (Strips.encode, frames, vae.encode(frames).latent_dist.parameters, vae.num_sample_frames_batch_size),
        ):
            strips = Strips(vae, torch.float32, torch.device("cpu"), budget)
            ours = torch.cat(
                [step(strips, piece) for piece in given_.split(chunk_lengths(given_.shape[2], chunk), dim=2)], dim=2
            )
            assert ours.shape == expected.shape
            assert error(ours, expected) < 1e-5


def test_a_mean_far_from_zero_does_not_cost_precision(pipeline, monkeypatch):
    """Statistics gathered strip by strip, where sums of squares would cancel."""
    import copy

    vae = copy.deepcopy(pipeline.vae)
    vae.decoder.conv_in.conv.bias.data += 300
    latent = torch.randn(1, 16, 3, 8, 6)
    monkeypatch.setattr(strips_module, "_STRIP_BYTES", {"cpu": 20_000})
    monkeypatch.setattr(strips_module, "_ONEDNN_SIZE", 0)
    with torch.no_grad():
        truth = vae.double().decode(latent.double()).sample
        expected = vae.float().decode(latent).sample
        ours = Strips(vae, torch.float32, torch.device("cpu")).decode(latent)
    assert error(ours, truth) < 3 * error(expected, truth) + 1e-6


def test_a_clip_of_the_contract_has_16n_plus_1_frames(handles):
    assert decode(handles.vae, torch.randn(1, 16, 5, 2, 2)).shape == (17, 16, 16, 3)


def test_progress_is_told_for_every_chunk_and_can_stop_the_decode(handles):
    seen = []
    decode(
        handles.vae,
        torch.randn(2, 16, 5, 2, 2),
        events=Told(progress=lambda done, total: seen.append((done, total)), of="decoding"),
    )
    assert seen == [(3, 10), (5, 10), (8, 10), (10, 10)]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(handles.vae, torch.randn(1, 16, 5, 2, 2), events=Told(progress=stop, of="decoding"))


def test_it_can_be_stopped_between_strips_and_the_vae_used_again(handles):
    latents, strips = torch.randn(1, 16, 3, 2, 2), []
    expected = decode(handles.vae, latents, events=Told(check=lambda: strips.append(1)))
    assert len(strips) > 20

    def stop():
        strips.pop()
        if len(strips) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(handles.vae, latents, events=Told(check=stop))
    assert torch.equal(decode(handles.vae, latents), expected)


def test_nothing_of_a_run_outlives_it(handles):
    """What the convolutions kept of earlier frames is gone, on whatever device, when the frames are there."""

    def alive():
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) is Strips]

    before = len(alive())
    images = decode(handles.vae, torch.randn(1, 16, 3, 4, 6))
    encode(handles.vae, images)
    with pytest.raises(KeyboardInterrupt):
        decode(handles.vae, torch.randn(1, 16, 3, 4, 6), events=Told(progress=_interrupt, of="decoding"))
    assert len(alive()) == before


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_latent_of_another_model_is_refused(handles):
    with pytest.raises(ValueError, match="4 channels"):
        decode(handles.vae, torch.zeros(1, 4, 3, 8, 8))


class TestMemory:
    @pytest.fixture(scope="class")
    def vae(self):
        return build_vae((32, 64, 64, 128), 32).eval()

    @pytest.mark.parametrize("budget", [None, 8_000_000, 0])
    @pytest.mark.parametrize("step", [Strips.decode, Strips.encode])
    def test_what_shapes_alone_say_is_what_a_real_run_takes(self, vae, monkeypatch, step, budget):
        monkeypatch.setattr(strips_module, "_STRIP_BYTES", {"cpu": 4 << 20, "other": 4 << 20})
        monkeypatch.setattr(strips_module, "_MIN_STRIP_BYTES", 2 << 20)
        monkeypatch.setattr(strips_module, "_ONEDNN_SIZE", 0)
        given_ = torch.randn(1, 16, 5, 6, 4) if step is Strips.decode else torch.rand(1, 3, 17, 48, 32)
        chunks = [3, 2] if step is Strips.decode else [9, 8]
        real = count_strips(vae, given_, budget, chunks, step)
        said = count_strips(build_vae((32, 64, 64, 128), 32).to("meta"), given_.to("meta"), budget, chunks, step)
        assert said == pytest.approx(real, rel=0.03)

    def test_a_budget_is_kept(self, vae):
        latent = torch.empty(1, 16, 5, 20, 30, device="meta")
        meta = build_vae((32, 64, 64, 128), 32).to("meta")
        free = count_strips(meta, latent, None, [3, 2])
        for budget, chunks in ((free // 2, [3, 2]), (free // 6, [3])):
            assert count_strips(meta, latent[:, :, : sum(chunks)], budget, chunks) <= budget

    def test_81_frames_of_1360_x_768_fit_into_6_gb(self):
        """The released VAE's shapes, in bf16: without a limit it takes many times that."""
        vae = build_released("meta", torch.bfloat16)
        latent = torch.empty(1, 16, 5, 96, 170, dtype=torch.bfloat16, device="meta")
        assert count_strips(vae, latent[:, :, :3], None, [3]) > 12e9
        assert count_strips(vae, latent, 6_000_000_000, [3, 2]) < 6e9


class TestOutOfMemory:
    @pytest.fixture
    def full(self, monkeypatch):
        """``full(when)``: memory runs out in the strips for which ``when(strip, budget)`` says so; strips are counted
        from 1 over all chunks."""
        real, count = Strips._tick, [0]

        def inject(when):
            def tick(self):
                count[0] += 1
                if when(count[0], self._budget):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                real(self)

            monkeypatch.setattr(Strips, "_tick", tick)

        return inject

    @pytest.mark.parametrize("strip", [1, 20, 26, 45])
    def test_a_chunk_is_done_again_in_half_the_memory_and_the_frames_are_the_same(self, handles, full, strip):
        latents, said, chunks = torch.randn(1, 16, 5, 4, 4), [], []
        expected = decode(handles.vae, latents)
        full(lambda count, budget: count == strip)
        images = decode(
            handles.vae, latents, events=Told(heals=said, progress=lambda done, _: chunks.append(done), of="decoding")
        )
        assert error(images, expected) < 1e-5
        assert chunks == [3, 5]
        assert len(said) == 1
        assert "ran out of memory. Going on from here with at most 8.59 GB" in said[0]

    def test_encoding_too(self, handles, full):
        clip = torch.rand(17, 32, 32, 3)
        expected = encode(handles.vae, clip)
        full(lambda count, budget: budget is None or budget > 1 << 30)
        assert error(encode(handles.vae, clip), expected) < 1e-5

    def test_where_nothing_helps_it_says_so(self, handles, full):
        full(lambda count, budget: True)
        with pytest.raises(RuntimeError, match="even with the smallest strips"):
            decode(handles.vae, torch.randn(1, 16, 1, 2, 2))


def test_a_clip_in_8_bits_gives_the_latents_of_its_floats_and_no_second_clip_is_kept(handles, monkeypatch):
    import cogvideox.vae as module

    clip = torch.randint(0, 256, (17, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kept, real = [], module._Chunks.run
    monkeypatch.setattr(
        module._Chunks, "run", lambda self, index, piece, where: kept.append(piece) or real(self, index, piece, where)
    )
    assert torch.equal(encode(handles.vae, clip), encode(handles.vae, clip.float() / 255))
    storage = clip.untyped_storage().data_ptr()
    assert all(piece.untyped_storage().data_ptr() == storage for piece in kept[: len(kept) // 2])
