"""Context windows equal VOID's temporal multidiffusion, and the plain run where a clip fits in one.

With the environment variable VOID_PATH at a checkout of https://github.com/Netflix/void-model its own pipeline is run
too. ``RECORDED`` came from ``VOID_PATH=… python -m tests.test_windows``.
"""

import gc
import os
import sys
from itertools import pairwise, product
from math import prod
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange

from cogvideox import sampling as sampling_module
from cogvideox.choices import CACHES
from cogvideox.dtypes import FP32
from cogvideox.geometry import rotary_embedding
from cogvideox.handles import open_handles, with_cache, with_windows
from cogvideox.memory import LiveBytes, memory_text, plan_memory
from cogvideox.modules.cache import Cache
from cogvideox.requests import outside_training
from cogvideox.sampling import Prompts, Run, sample
from cogvideox.schedulers import make_scheduler, schedule_timesteps
from cogvideox.variants import CONDITIONING_CHANNELS, full_config
from cogvideox.weights import Placement
from cogvideox.windows import Canvas, Windows, spans
from tests.conftest import CPU
from tests.reference import draw_prompts, error
from tests.tiny_checkpoint import build_scheduler, build_transformer, build_vae
from tests.told import Told

#: Windows of six latent frames that share two.
SMALL = Windows(21, 2)
STEPS, CFG = 3, 6.0
# fmt: off
#: Channels beside the noise -> values of the reference's latents [1, 12, 16, 4, 6] in windows of ``SMALL``, three a
#: frame.
RECORDED: dict[int, list[float]] = {
    0: [
        0.5016654, 1.010994, 1.987988,
        0.4651443, 1.034597, -0.3828172,
        -0.2124383, 0.2501326, -0.8675306,
        -0.4978408, -0.350455, -0.6268283,
        0.5264021, -0.1715539, 0.6270168,
        2.003059, 0.5073673, 0.3872839,
        1.622649, 0.5978056, -1.682145,
        2.108112, 1.428059, -1.056882,
        -0.6107942, 1.400754, -0.4393938,
        -1.50706, 0.2817074, -0.302517,
        -1.025443, 0.2405277, 0.404007,
        0.1150932, 0.4216241, 0.007253468,
    ],
    32: [
        -0.8775442, 0.4973075, 0.7475463,
        0.4428479, 1.620214, -0.6156346,
        -0.6423926, -1.259983, 0.1978639,
        -1.411736, -0.5557441, -1.416458,
        -1.192087, -0.1968101, -0.7167029,
        0.4739722, 0.2484174, -0.1593682,
        0.8789332, -0.3333219, -1.045579,
        0.4467815, 0.7166866, 0.09717871,
        1.379412, 1.587828, -0.2482408,
        -1.440437, 0.2188882, -0.332615,
        0.3211339, -1.940757, -0.2134755,
        -1.358067, 1.288148, 0.2420777,
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def prompts():
    return draw_prompts(8)


def ranges(found):
    return [(span.start, span.stop) for span in found]


class TestSpans:
    PAIRS = {"patch_size_t": 2}

    def test_they_are_those_of_197_frames_in_void(self):
        assert ranges(spans(Windows(85, 4), 50, self.PAIRS)) == [(0, 22), (18, 40), (36, 50)]

    def test_a_window_has_as_many_latent_frames_as_a_clip_of_its_length_with_its_padding(self):
        assert ranges(spans(Windows(), 41, self.PAIRS)) == [(0, 42)]
        assert ranges(spans(Windows(), 79, self.PAIRS)) == [(0, 42), (38, 80)]
        assert ranges(spans(Windows(49, 3), 23, {"patch_size_t": None})) == [(0, 13), (10, 23)]

    @pytest.mark.parametrize("overlap", [0, 2, 4, 20])
    @pytest.mark.parametrize("length", [22, 23, 40, 41, 57, 100])
    def test_all_are_whole_pairs_and_each_shares_the_overlap_with_the_next(self, length, overlap):
        found = ranges(spans(Windows(81, overlap), length, self.PAIRS))
        assert found[0][0] == 0
        assert found[-1][1] == length + length % 2
        assert all(start % 2 == stop % 2 == 0 and overlap < stop - start <= 22 for start, stop in found)
        assert all(before[1] - after[0] == overlap for before, after in pairwise(found))

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ((80, 4), r"is 80 frames.* Set it to 77 or 81; 161 is the longest"),
            ((1, 0), r"is 1 frames.* Set it to 5 or 9"),
            ((21, 6), r"is 6 latent frames, and a window of 21 frames has 6: .* from 0 to 5; 4 is usual"),
            ((13, 4), r"a window of 13 frames has 4: .* from 0 to 3\.$"),
            ((21, -1), r"is -1 latent frames"),
            ((21, 2, "pyramid"), r"is 'pyramid', which is not known here.* linear"),
        ],
    )
    def test_what_is_no_window_is_refused(self, settings, said):
        with pytest.raises(ValueError, match=said):
            Windows(*settings)

    def test_an_overlap_that_cuts_a_pair_is_refused_by_the_model_that_reads_pairs(self, handles, checkpoints):
        with pytest.raises(ValueError, match="in groups of 2, .* Set it to 2 or 4"):
            with_windows(handles.model, Windows(21, 3))
        # Only what is no refusal again.
        with pytest.raises(ValueError, match=r"in groups of 2, .* Set it to 0\.$"):
            with_windows(handles.model, Windows(5, 1))
        assert with_windows(open_handles(checkpoints("5b"), "fp32", CPU).model, Windows(21, 3)).windows.overlap == 3


def plain(transformer, scheduler, prompts, noise, size, shared, beside=None, cfg=CFG):
    """Temporal multidiffusion written down plainly around an unmodified transformer and scheduler, in fp32:
    ``[1, T, C, h, w]`` to the same."""
    scheduler.set_timesteps(STEPS)
    config, latents, total = transformer.config, noise, noise.shape[1]
    embeddings = torch.cat([prompts[1], prompts[0]])
    for timestep in scheduler.timesteps:
        canvas, heap, start, stop = torch.zeros_like(latents), torch.zeros(1, total, 1, 1, 1), 0, 0
        while stop < total:
            stop = min(start + size, total)
            part, weights = latents[:, start:stop], torch.ones(1, stop - start, 1, 1, 1)
            given = part if beside is None else torch.cat([part, beside[:, start:stop]], dim=2)
            with torch.no_grad():
                predicted = transformer(
                    hidden_states=torch.cat([given] * 2),
                    encoder_hidden_states=embeddings,
                    timestep=timestep.expand(2),
                    ofs=None if config.ofs_embed_dim is None else torch.full((1,), 2.0),
                    image_rotary_emb=rotary_embedding(
                        config, stop - start, noise.shape[3], noise.shape[4], noise.device
                    ),
                    return_dict=False,
                )[0]
            without, following = predicted.chunk(2)
            part = scheduler.step(without + cfg * (following - without), timestep, part, return_dict=False)[0]
            if start > 0 and shared:
                weights[:, :shared] = torch.linspace(0, 1, shared + 2)[1:-1].reshape(1, -1, 1, 1, 1)
            if stop < total and shared:
                weights[:, -shared:] = torch.linspace(1, 0, shared + 2)[1:-1].reshape(1, -1, 1, 1, 1)
            canvas[:, start:stop] += part * weights
            heap[:, start:stop] += weights
            start = stop - shared
        latents = canvas / heap
    return latents


def load(folder):
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


class TestReference:
    @pytest.mark.parametrize(
        ("variant", "length"),
        # Of the descendants' latent frames there is an even number.
        [*product(["1.5", "1.5-i2v", "5b", "2b"], [12, 9]), ("fun-inp", 12), ("void", 12)],
    )
    def test_it_is_the_scheme_written_down_plainly_bit_for_bit(self, checkpoints, variant, length):
        # 2b has positions for so many tokens.
        prompts = draw_prompts(226 if variant == "2b" else 8)
        model = open_handles(checkpoints(variant), "fp32", CPU).model
        image, beside, padding = None, None, length % 2 if variant.startswith("1.5") else 0
        if variant == "1.5-i2v":
            image = torch.zeros(1, 16, length, 4, 6)
            image[:, :, :1] = torch.randn(1, 16, 1, 4, 6)
            # The image once, in front of all: the second window reads zeros.
            beside = model.image_latent_scale * rearrange(image, "b c t h w -> b t c h w")
            beside = torch.cat([beside[:, :1], torch.zeros_like(beside[:, :padding]), beside[:, 1:]], dim=1)
        if model.variant.in_pairs:
            # A mask and a video stand for the whole clip: each window reads its part.
            image = torch.randn(1, CONDITIONING_CHANNELS[model.variant.reads], length, 4, 6)
            beside = model.image_latent_scale * rearrange(image, "b c t h w -> b t c h w")
        noise = torch.randn(1, length + padding, 16, 4, 6, generator=torch.Generator().manual_seed(1))
        expected = plain(
            load(checkpoints(variant) / "transformer"), build_scheduler(variant), prompts, noise, 6, 2, beside
        )
        ours = sample(
            with_windows(model, SMALL),
            *prompts,
            torch.zeros(1, 16, length, 4, 6),
            image_latents=image,
            seed=1,
            steps=STEPS,
        )
        expected = rearrange(1 / model.latent_scale * expected[:, padding:], "b t c h w -> b c t h w")
        assert torch.equal(ours, expected)

    @pytest.mark.parametrize("channels", [0, 32])
    def test_it_is_what_voids_pipeline_was_recorded_to_make(self, prompts, channels):
        assert error(some(ours_beside(prompts, channels)).flatten(), torch.tensor(RECORDED[channels])) < 1e-5

    @pytest.mark.skipif("VOID_PATH" not in os.environ, reason="needs a checkout of VOID")
    @pytest.mark.parametrize("channels", [0, 32])
    def test_it_is_voids_pipeline_bit_for_bit(self, prompts, channels):
        assert torch.equal(ours_beside(prompts, channels), voids(prompts, channels))


def beside_of(channels):
    """A transformer that reads so many channels beside the noise, and what it reads there: ``[1, 12, channels, 4,
    6]``."""
    torch.manual_seed(3)
    transformer = build_transformer("1.5", in_channels=16 + channels).eval()
    return transformer, torch.randn(1, 12, channels, 4, 6) if channels else None


def ours_beside(prompts, channels):
    """The loop's own latents, whatever the checkpoint's kind: ``[1, 12, 16, 4, 6]``."""
    transformer, beside = beside_of(channels)
    config, scheduler = full_config(transformer.config), make_scheduler(build_scheduler().config, "ddim")
    windows = spans(SMALL, 12, config)
    run = Run(
        SimpleNamespace(run=lambda work, _: work(transformer, FP32), placement=Placement("gpu")),
        scheduler,
        schedule_timesteps(scheduler, STEPS, 1.0),
        Prompts([prompts[1], prompts[0]]),
        image=beside,
        ofs=None,
        rotary={length: rotary_embedding(config, length, 4, 6, CPU.device) for length in (4, 6)},
        cfg=CFG,
        guided=range(STEPS),
        dynamic_cfg=False,
        generator=torch.Generator(),
        speedups=SimpleNamespace(begin=lambda *_: None),
        padding=0,
        windows=windows,
        overlap=2,
    )
    noise = torch.randn(1, 12, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return run.denoise(noise, Told())


def some(latents):
    """Values from all over, three of each frame."""
    return latents.flatten(2)[0, :, 7::150]


def voids(prompts, channels):
    """What the reference's own pipeline makes of the same."""
    if os.environ["VOID_PATH"] not in sys.path:
        sys.path.append(os.environ["VOID_PATH"])
    from videox_fun.models import CogVideoXTransformer3DModel
    from videox_fun.pipeline import CogVideoXFunInpaintPipeline

    ours, beside = beside_of(channels)
    transformer = CogVideoXTransformer3DModel.from_config(dict(ours.config) | {"add_noise_in_inpaint_model": False})
    transformer.load_state_dict(ours.state_dict())
    pipe = CogVideoXFunInpaintPipeline(None, None, build_vae(), transformer.eval(), build_scheduler())
    pipe.set_progress_bar_config(disable=True)
    given = dict(mask_video=torch.zeros(1, 1, 45, 32, 48))
    if beside is not None:
        # Both are given encoded: what the pipeline encodes is tested elsewhere.
        mask, video = (rearrange(part, "b t c h w -> b c t h w") for part in beside.chunk(2, dim=2))
        pipe.prepare_mask_latents = lambda *_, **__: (mask, video)
        given |= dict(use_vae_mask=True)
    return pipe(
        height=32,
        width=48,
        video=torch.zeros(1, 3, 45, 32, 48),
        num_frames=21,
        temporal_multidiffusion_stride=8,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        return_dict=True,
        **given,
    ).videos


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("length", [5, 6])
def test_a_clip_no_longer_than_a_window_is_the_plain_run(handles, prompts, scheduler, length):
    said, empty, how = [], torch.zeros(1, 16, length, 4, 6), dict(seed=1, steps=STEPS, scheduler=scheduler)
    ours = sample(with_windows(handles.model, SMALL), *prompts, empty, events=Told(said), **how)
    assert torch.equal(ours, sample(handles.model, *prompts, empty, **how))
    assert not any("window" in sentence for sentence in said)


class TestWindowsThatShareNothingAreClipsOfTheirOwn:
    """Each window is then the run of its part alone, whatever else the run is told."""

    def both(self, model, prompts, **how):
        """The latents in two windows, and those of two runs of a half."""
        generator = torch.Generator().manual_seed(4)
        video = how.pop("video", torch.zeros(1, 16, 12, 4, 6))
        mask = how.pop("mask", None)
        noise = torch.randn(1, 16, 12, 4, 6, generator=generator)
        how = dict(seed=1, steps=5) | how
        whole = sample(with_windows(model, Windows(21, 0)), *prompts, video, noise=noise, noise_mask=mask, **how)
        halves = [
            sample(
                model,
                *prompts,
                video[:, :, part],
                noise=noise[:, :, part],
                noise_mask=None if mask is None else mask[:, :, part],
                **how,
            )
            for part in (slice(0, 6), slice(6, 12))
        ]
        return whole, torch.cat(halves, dim=2)

    @pytest.mark.parametrize("method", CACHES)
    def test_with_a_cache_each(self, model, prompts, method):
        ours, expected = self.both(with_cache(model, Cache(method, 0.5, 0.0, 1.0)), prompts)
        assert torch.equal(ours, expected)

    @pytest.mark.parametrize("method", CACHES)
    def test_with_a_cache_each_where_guidance_ends_on_the_way_and_its_halves_run_one_by_one(
        self, model, prompts, monkeypatch, method
    ):
        monkeypatch.setattr(sampling_module, "choose_placements", lambda *_: (Placement("gpu", False),))
        ours, expected = self.both(with_cache(model, Cache(method, 0.5, 0.0, 1.0)), prompts, cfg_end=0.5)
        assert torch.equal(ours, expected)

    def test_from_a_video_of_which_a_mask_keeps_a_part(self, handles, prompts):
        video = torch.randn(1, 16, 12, 4, 6, generator=torch.Generator().manual_seed(8))
        mask = torch.zeros(1, 1, 12, 4, 6)
        mask[:, :, 3:10, :, 3:] = 1.0
        ours, expected = self.both(handles.model, prompts, video=video, mask=mask, denoise=0.7, dynamic_cfg=True)
        assert torch.equal(ours, expected)
        assert torch.equal(ours[:, :, :3], video[:, :, :3])


class TestFaults:
    def hurt(self, monkeypatch, at):
        """Have the transformer give NaN at calls of these numbers."""
        from diffusers import CogVideoXTransformer3DModel

        real, calls = CogVideoXTransformer3DModel.forward, []

        def forward(self, *args, **kwargs):
            calls.append(kwargs["hidden_states"].shape[1])
            made = real(self, *args, **kwargs)
            return (made[0] * float("nan"),) if len(calls) in at else made

        monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", forward)
        return calls

    def test_a_window_that_is_not_finite_is_made_again_alone(self, handles, prompts, monkeypatch):
        model, empty = with_windows(handles.model, SMALL), torch.zeros(1, 16, 12, 4, 6)
        expected, heals = sample(model, *prompts, empty, seed=1, steps=2), []
        calls = self.hurt(monkeypatch, at=[2])
        assert torch.equal(sample(model, *prompts, empty, seed=1, steps=2, events=Told(heals=heals)), expected)
        assert calls == [6, 6, 6, 4, 6, 6, 4]
        assert len(heals) == 1
        assert heals[0].startswith("step 1 of 2, window 2 of 3: ")

    @pytest.mark.parametrize("method", CACHES)
    def test_a_window_made_again_has_nothing_cached_and_the_run_goes_on(self, model, prompts, monkeypatch, method):
        model, empty = (
            with_cache(with_windows(model, SMALL), Cache(method, 0.5, 0.0, 1.0)),
            torch.zeros(1, 16, 12, 4, 6),
        )
        heals: list[str] = []
        expected = sample(model, *prompts, empty, seed=1, steps=4)
        self.hurt(monkeypatch, at=[5])
        made = sample(model, *prompts, empty, seed=1, steps=4, events=Told(heals=heals))
        assert len(heals) == 1
        assert 0 < error(made, expected) < 1


def test_progress_counts_windows_and_shows_the_whole_clip(handles, prompts):
    seen: list[tuple] = []
    step = lambda done, total, clean: seen.append((done, total, clean))  # noqa: E731
    said: list[str] = []
    sample(
        with_windows(handles.model, SMALL),
        *prompts,
        torch.zeros(1, 16, 11, 4, 6),
        seed=1,
        steps=2,
        events=Told(said, step=step),
    )
    assert [done for done, _, _ in seen] == list(range(1, 7))
    assert all(total == 6 and clean.shape == (1, 16, 11, 4, 6) for _, total, clean in seen)
    # Of the first step, what no window has reached is grey; of the second it is what the first made.
    assert not seen[0][2][:, :, 5:].any()
    assert torch.equal(seen[3][2][:, :, 5:], seen[2][2][:, :, 5:])
    assert not torch.equal(seen[3][2][:, :, :5], seen[2][2][:, :, :5])
    assert "The clip of 41 frames is made in 3 windows of 21 frames that share 8" in " ".join(said)


def test_a_canvas_weighs_what_windows_share_in_a_line():
    canvas = Canvas(torch.zeros(1, 8, 1, 1, 1), 2)
    canvas.add(slice(0, 5), torch.full((1, 5, 1, 1, 1), 3.0))
    canvas.add(slice(3, 8), torch.full((1, 5, 1, 1, 1), 6.0))
    torch.testing.assert_close(canvas.blended().flatten(), torch.tensor([3.0, 3, 3, 4, 5, 6, 6, 6]))


class TestPlan:
    def test_it_is_within_15_percent_of_what_a_run_takes(self, tiny):
        model, shape = with_windows(open_handles(tiny, "bf16", CPU).model, Windows(21, 2)), (1, 16, 12, 16, 16)
        latent = torch.zeros(shape)
        with model.weights.running():
            gc.collect()
        with LiveBytes() as measured:
            sample(model, *draw_prompts(8), latent, seed=1, steps=1)
        assert plan_memory(model, shape, tokens=8).activations == pytest.approx(measured.peak, rel=0.15)

    def test_a_clip_takes_what_a_window_takes_and_a_cache_for_each(self, model):
        windows, cache = Windows(), Cache("teacache")
        window, clip = (1, 16, 42, 96, 170), (1, 16, 118, 96, 170)
        own = plan_memory(with_cache(model, cache), window)
        long = plan_memory(with_cache(with_windows(model, windows), cache), clip)
        assert own.activations < long.activations < own.activations + 32 * prod(clip)
        assert long.cache == 3 * own.cache
        assert plan_memory(with_windows(model, windows), window) == plan_memory(model, window)

    def test_it_says_so(self, model):
        said = memory_text(with_windows(model, Windows()), (1, 16, 118, 96, 170))
        assert said.startswith("memory to sample 1360x768, 469 frames in 3 windows of 161: ")


def test_what_a_window_is_longer_than_was_trained_is_said_and_not_what_the_clip_is(model):
    clip = torch.zeros(1, 16, 79, 96, 170)
    assert "313 frames (the model card goes up to 161)" in outside_training(model, clip, None)[0]
    said = outside_training(with_windows(model, Windows()), clip, None)
    assert len(said) == 1
    assert said[0].startswith("The clip of 313 frames is made in 2 windows of 161 frames that share 16: ")
    assert (
        "177 frames (the model card goes up to 161)"
        in outside_training(with_windows(model, Windows(177)), clip, None)[1]
    )


def test_a_scheduler_that_draws_noise_is_refused_with_the_reason(handles, prompts):
    with pytest.raises(
        ValueError, match=r"in 3 context windows, and the scheduler dpm adds noise .* Set scheduler to ddim"
    ):
        sample(
            with_windows(handles.model, SMALL), *prompts, torch.zeros(1, 16, 12, 4, 6), seed=1, steps=2, scheduler="dpm"
        )


if __name__ == "__main__":
    for beside in (0, 32):
        values = some(voids(draw_prompts(8), beside))
        print(beside, [float(f"{value:.7g}") for value in values.flatten().tolist()])
