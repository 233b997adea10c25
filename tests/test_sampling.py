"""The sampler makes the reference pipeline's latents, bit for bit, and refuses what it cannot run."""

import dataclasses
import math
import re
from contextlib import nullcontext

import pytest
import torch
from einops import rearrange

from cogvideox import sampling as sampling_module
from cogvideox import weights as weights_module
from cogvideox.choices import CACHES
from cogvideox.dtypes import FP32
from cogvideox.geometry import empty_latent, padding_frames
from cogvideox.handles import open_handles, with_cache
from cogvideox.modules.cache import Cache
from cogvideox.sampling import sample
from cogvideox.schedulers import NoiseInFp32, make_scheduler, schedule_timesteps
from cogvideox.variants import full_config
from tests.conftest import CPU
from tests.reference import error, reference_latents
from tests.tiny_checkpoint import TEXT_WIDTH
from tests.told import Told

STEPS = 4


def reference(pipeline, prompts, shape, *, dynamic_cfg=False, steps=STEPS, **settings):
    return reference_latents(pipeline, prompts, shape, use_dynamic_cfg=dynamic_cfg, steps=steps, **settings)


SHAPES = {
    "odd": (1, 16, 5, 6, 10),
    "even": (1, 16, 4, 6, 10),
    "square": (1, 16, 3, 8, 8),
    "batch": (2, 16, 3, 6, 8),
    "tall": (1, 16, 2, 12, 6),
    "one frame": (1, 16, 1, 6, 10),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("cfg", "dynamic_cfg"), [(1.0, False), (6.0, False), (6.0, True)], ids=["unguided", "fixed", "dynamic"]
)
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_latents_equal_the_pipelines_bit_for_bit(handles, pipeline, prompts, scheduler, cfg, dynamic_cfg, shape):
    settings = dict(scheduler=scheduler, cfg=cfg, dynamic_cfg=dynamic_cfg)
    ours = sample(handles.model, *prompts, torch.zeros(shape), seed=1, steps=STEPS, **settings)
    assert torch.equal(ours, reference(pipeline, prompts, shape, **settings))
    assert ours.shape == shape


@pytest.mark.parametrize("variant", ["5b", "2b"])
def test_the_1_0_models_equal_their_pipeline_too(checkpoints, long_prompts, variant):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(checkpoints(variant), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    shape, model = (1, 16, 3, 6, 10), open_handles(checkpoints(variant), "fp32", CPU).model
    ours = sample(model, *long_prompts, torch.zeros(shape), seed=1, steps=2)
    assert torch.equal(ours, reference(pipeline, long_prompts, shape, steps=2))


def torch_draws_alike() -> bool:
    """Whether torch draws the same numbers in 16 bits as in fp32: 2.13 does, 2.11 and before do not."""
    fine, coarse = (
        torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return torch.equal(fine.bfloat16(), coarse)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_bf16_equals_the_pipeline_in_bf16_given_the_same_noise(tiny, prompts, scheduler):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(tiny, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    ours = sample(
        open_handles(tiny, "bf16", CPU).model,
        *prompts,
        torch.zeros(SHAPES["odd"]),
        seed=1,
        steps=STEPS,
        scheduler=scheduler,
    )
    with nullcontext() if torch_draws_alike() else NoiseInFp32():
        assert torch.equal(ours, reference(pipeline, prompts, SHAPES["odd"], scheduler=scheduler))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_seed_is_one_noise_in_every_dtype_whatever_torch_draws(monkeypatch, dtype):
    real = torch.randn

    def as_of_old(*shape, dtype=torch.float32, **more):
        """torch 2.11 and before: other numbers in 16 bits."""
        return real(*shape, dtype=torch.float32, **more).to(dtype) * (1 if dtype == torch.float32 else -1)

    def draw(dtype):
        return sampling_module.draw_noise(torch.empty(2, 3, 16, 2, 2, dtype=dtype), torch.Generator().manual_seed(5))

    fine = draw(torch.float32)
    monkeypatch.setattr(torch, "randn", as_of_old)
    assert draw(dtype).dtype == dtype
    assert torch.equal(draw(dtype), fine.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, None])
def test_so_is_the_noise_that_a_scheduler_draws_in_a_step(dtype):
    from diffusers.utils.torch_utils import randn_tensor

    fine = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(5))
    with NoiseInFp32():
        drawn = randn_tensor((2, 16, 3), generator=torch.Generator().manual_seed(5), dtype=dtype)
    assert drawn.dtype == (dtype or torch.float32)
    assert torch.equal(drawn, fine.to(dtype or torch.float32))


def test_so_one_seed_is_one_video_in_every_dtype(tiny, prompts):
    """``dpm`` draws noise at every step."""
    settings = dict(seed=1, steps=2, scheduler="dpm")
    fine, *others = (
        sample(open_handles(tiny, dtype, CPU).model, *prompts, torch.zeros(SHAPES["one frame"]), **settings)
        for dtype in ("fp32", "bf16", "fp16")
    )
    assert max(error(other, fine) for other in others) < 0.05


@pytest.mark.parametrize("heals", [False, True])
def test_prompts_are_cast_and_projected_once_for_a_dtype_and_not_at_every_step(tiny, prompts, monkeypatch, heals):
    projected, real = [], torch.nn.Linear.forward

    def forward(self, given):
        if given.shape[-1] == TEXT_WIDTH:
            projected.append((id(given), given.dtype))
            kept.append(given)
        return real(self, given)

    kept = []
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    load = weights_module.load_module

    def spoilt(part, precision, *rest):
        module = load(part, precision, *rest)
        if heals:
            module.register_forward_hook(lambda _m, _i, out: (out[0] * float("nan"),) if precision != FP32 else None)
        return module

    monkeypatch.setattr(weights_module, "load_module", spoilt)
    sample(open_handles(tiny, "bf16", CPU).model, *prompts, torch.zeros(SHAPES["one frame"]), seed=1, steps=3)
    assert [dtype for _, dtype in projected] == [torch.bfloat16, torch.float32] if heals else [torch.bfloat16]


@pytest.mark.parametrize(("steps", "trained"), [(61, 1000), (103, 1000), (999, 1000), (50, 1000), (1, 1000), (31, 100)])
def test_a_schedule_has_as_many_steps_as_are_asked_for_and_ends_at_no_timestep_below_0(steps, trained):
    """diffusers' trailing schedule of 61 steps has 62, and the last would undo the video."""
    config = dict(timestep_spacing="trailing", num_train_timesteps=trained, prediction_type="v_prediction")
    timesteps = schedule_timesteps(make_scheduler(config, "ddim"), steps, 1.0)
    assert len(timesteps) == steps
    assert timesteps[0] == trained - 1
    assert timesteps.min() >= 0
    assert (timesteps.diff() < 0).all()
    half = schedule_timesteps(make_scheduler(config, "ddim"), steps, 0.5) if steps > 1 else timesteps
    assert torch.equal(half, timesteps[steps - len(half) :])


def test_a_schedule_that_passes_its_last_timestep_is_refused():
    scheduler = make_scheduler(dict(timestep_spacing="leading", steps_offset=30), "ddim")
    with pytest.raises(
        ValueError, match="cannot be run in 50 steps: with its steps_offset of 30 they would pass the 1000 timesteps"
    ):
        schedule_timesteps(scheduler, 50, 1.0)


@pytest.mark.parametrize("denoise", [0.5, 0.75])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_denoise_below_1_equals_the_video_to_video_pipeline(pipeline, handles, prompts, scheduler, denoise):
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXVideoToVideoPipeline

    # 8 latent frames: the pipeline counts given latents as if they were pixels, and wants the quarter of them to be
    # even too.
    start = torch.randn(1, 16, 8, 6, 10, generator=torch.Generator().manual_seed(3))
    ours = sample(handles.model, *prompts, start, seed=1, steps=STEPS, denoise=denoise, scheduler=scheduler)
    classes = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
    v2v = CogVideoXVideoToVideoPipeline(**pipeline.components)
    v2v.scheduler = classes[scheduler].from_config(pipeline.scheduler.config)
    v2v.set_progress_bar_config(disable=True)
    # The pipeline wants pixels or latents that are noisy already: add the noise its `prepare_latents` would add.
    v2v.scheduler.set_timesteps(STEPS)
    generator = torch.Generator("cpu").manual_seed(1)
    scaled = 0.7 * rearrange(start, "b c t h w -> b t c h w")
    noise = torch.randn(scaled.shape, generator=generator)
    first = v2v.get_timesteps(STEPS, v2v.scheduler.timesteps, denoise, "cpu")[0][:1]
    expected = v2v(
        latents=v2v.scheduler.add_noise(scaled, noise, first),
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        height=48,
        width=80,
        num_inference_steps=STEPS,
        strength=denoise,
        guidance_scale=6.0,
        generator=generator,
        output_type="latent",
    ).frames
    assert torch.equal(ours, rearrange(1 / 0.7 * expected, "b t c h w -> b c t h w"))


def test_denoise_below_1_keeps_the_frame_count_of_an_odd_clip_and_stays_near_it(handles, prompts):
    start = torch.randn(SHAPES["odd"], generator=torch.Generator().manual_seed(3))
    ours = sample(handles.model, *prompts, start, seed=1, steps=20, denoise=0.05)
    assert ours.shape == start.shape
    assert (ours - start).norm() < 0.6 * start.norm()


def test_denoise_of_an_empty_latent_starts_from_noise_and_says_so(handles, prompts, caplog):
    empty = torch.zeros(SHAPES["even"])
    ours = sample(handles.model, *prompts, empty, seed=1, steps=2, denoise=0.5)
    assert torch.equal(ours, sample(handles.model, *prompts, empty, seed=1, steps=2))
    assert "there is no video to start from" in caplog.text


def test_the_same_seed_gives_the_same_video_and_another_does_not(handles, prompts):
    run = [
        sample(handles.model, *prompts, torch.zeros(SHAPES["even"]), seed=seed, steps=2, scheduler="dpm")
        for seed in (7, 7, 8)
    ]
    assert torch.equal(run[0], run[1])
    assert not torch.equal(run[0], run[2])


def test_the_largest_seed_of_the_widget_works(handles, prompts):
    largest, zero = (
        sample(handles.model, *prompts, torch.zeros(SHAPES["one frame"]), seed=seed, steps=1)
        for seed in (0xFFFFFFFFFFFFFFFF, 0)
    )
    assert largest.isfinite().all()
    assert not torch.equal(largest, zero)


def test_guidance_1_needs_and_reads_no_negative_prompt(handles, prompts):
    shape = torch.zeros(SHAPES["even"])
    without = sample(handles.model, prompts[0], None, shape, seed=1, steps=2, cfg=1.0)
    assert torch.equal(without, sample(handles.model, *prompts, shape, seed=1, steps=2, cfg=1.0))
    with pytest.raises(ValueError, match="needs a negative prompt"):
        sample(handles.model, prompts[0], None, shape, seed=1, steps=2, cfg=6.0)


def test_progress_is_told_at_every_step_with_the_predicted_video(handles, prompts):
    seen = []
    sample(
        handles.model,
        *prompts,
        torch.zeros(SHAPES["odd"]),
        seed=1,
        steps=3,
        events=Told(step=lambda done, total, clean: seen.append((done, total, clean.shape))),
    )
    assert seen == [(step, 3, (1, 16, 5, 6, 10)) for step in (1, 2, 3)]


def test_a_run_can_be_interrupted_between_steps_and_the_model_used_again(handles, prompts):
    class Cancelled(Exception):
        pass

    def cancel(done, *_):
        if done == 2:
            raise Cancelled

    before = sample(handles.model, *prompts, torch.zeros(SHAPES["even"]), seed=1, steps=3)
    with pytest.raises(Cancelled):
        sample(handles.model, *prompts, torch.zeros(SHAPES["even"]), seed=1, steps=3, events=Told(step=cancel))
    assert torch.equal(before, sample(handles.model, *prompts, torch.zeros(SHAPES["even"]), seed=1, steps=3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_given_noise_takes_the_place_of_what_the_seed_draws(handles, prompts, shape, denoise):
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(SHAPES[shape], generator=generator) if denoise < 1 else torch.zeros(SHAPES[shape])
    batch, channels, length, *size = start.shape
    settings = dict(seed=5, steps=5, denoise=denoise)
    expected = sample(handles.model, *prompts, start, **settings)
    padding = padding_frames(length, full_config(handles.model.weights.config))
    drawn = torch.randn(batch, length + padding, channels, *size, generator=torch.Generator().manual_seed(5))
    noise = rearrange(drawn[:, padding:], "b t c h w -> b c t h w")
    assert torch.equal(sample(handles.model, *prompts, start, noise=noise, **settings), expected)
    assert not torch.equal(sample(handles.model, *prompts, start, noise=-noise, **settings), expected)


@pytest.mark.parametrize("shape", [(3, 16, 4, 6, 8), (3, 16, 3, 6, 10)])
def test_a_video_of_a_batch_is_the_one_that_it_was_in_the_batch(handles, prompts, shape):
    """As ComfyUI notes it, where a video was taken out of a latent."""
    given = dict(seed=5, steps=2)
    whole = sample(handles.model, *prompts, torch.zeros(shape), **given)
    for index in ([1], [2], [2, 0]):
        latents = torch.zeros(len(index), *shape[1:])
        found = sample(handles.model, *prompts, latents, batch_index=index, **given)
        assert torch.allclose(found, whole[index], atol=1e-5)
        assert not torch.allclose(found, sample(handles.model, *prompts, latents, **given), atol=1e-2)
    assert torch.equal(sample(handles.model, *prompts, torch.zeros(shape), batch_index=[0, 1, 2], **given), whole)
    for index in ([0, 1], [-1, 0, 1], [0, 1, 10**9]):
        with pytest.raises(ValueError, match="batch_index is .*holds 3 videos"):
            sample(handles.model, *prompts, torch.zeros(shape), batch_index=index, **given)


def test_noise_that_does_not_fit_is_refused(handles, prompts):
    latent = torch.zeros(SHAPES["even"])
    with pytest.raises(ValueError, match="The noise has the shape"):
        sample(handles.model, *prompts, latent, seed=1, steps=1, noise=latent[:, :, 1:])
    noise = latent.clone()
    noise[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="The noise holds 1 values"):
        sample(handles.model, *prompts, latent, seed=1, steps=1, noise=noise)
    with pytest.raises(ValueError, match="The noise is zero throughout, as an empty latent is"):
        sample(handles.model, *prompts, latent, seed=1, steps=1, noise=latent)


def inpainting(scheduler_class, mask, video, noise):
    """A scheduler of the reference that keeps a part of the video by the rule of core's ``KSamplerX0Inpaint``: what
    goes into a step is mixed with the video at its noise level, and the predicted clean video with the video."""

    class Inpainting(scheduler_class):
        def mixed(self, latents, timestep):
            signal = self.alphas_cumprod[timestep]
            return latents * mask + (signal**0.5 * video + (1 - signal) ** 0.5 * noise) * (1 - mask)

        def scale_model_input(self, latents, timestep):
            return torch.cat([self.mixed(half, timestep) for half in latents.chunk(2)])

        def step(self, prediction, *given, generator=None, **more):
            # The two schedulers differ in what they are told: (timestep, latents), or with what came before.
            place = 0 if len(given) == 2 else 1
            timestep, latents = given[place], self.mixed(given[-1], given[place])
            signal = self.alphas_cumprod[timestep]
            clean = signal**0.5 * latents - (1 - signal) ** 0.5 * prediction
            clean = clean * mask + video * (1 - mask)
            held = (signal**0.5 * latents - clean) / (1 - signal) ** 0.5
            return super().step(held, *given[:-1], latents, generator=generator, **more)

    return Inpainting


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("shape", ["odd", "even", "batch"])
def test_a_noise_mask_keeps_the_video_as_core_samplers_do(handles, pipeline, prompts, monkeypatch, shape, scheduler):
    import diffusers

    shape, generator = SHAPES[shape], torch.Generator().manual_seed(3)
    video = torch.randn(shape, generator=generator)
    mask = torch.rand(1, 1, *shape[2:], generator=generator) * (torch.rand(shape[2:], generator=generator) > 0.3)
    mask[..., : shape[4] // 2] = 0
    ours = sample(handles.model, *prompts, video, noise_mask=mask, seed=1, steps=STEPS, scheduler=scheduler)
    padding = padding_frames(shape[2], full_config(handles.model.weights.config))

    def inside(latents):
        latents = rearrange(latents, "b c t h w -> b t c h w")
        return torch.cat([latents[:, :1]] * padding + [latents], dim=1)

    scaled = inside(video) * handles.model.latent_scale
    noise = torch.randn(scaled.shape, generator=torch.Generator().manual_seed(1))
    name = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}[scheduler]
    monkeypatch.setattr(diffusers, name, inpainting(getattr(diffusers, name), inside(mask), scaled, noise))
    expected = reference(pipeline, prompts, shape, scheduler=scheduler)
    assert error(ours, expected) < 1e-5
    kept = (mask == 0).expand(shape)
    assert torch.equal(ours[kept], video[kept])
    assert not torch.allclose(ours[~kept], video[~kept], atol=0.1)


def test_a_mask_is_fitted_to_the_latents_as_core_fits_it(handles, prompts):
    """One frame of any size for all frames, a clip's frames, and none that is to be kept."""
    shape = SHAPES["even"]
    video = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    settings = dict(seed=1, steps=1, cfg=1.0)
    plain = sample(handles.model, *prompts, video, **settings)
    assert torch.equal(sample(handles.model, *prompts, video, noise_mask=torch.ones(1, 1, 9, 9), **settings), plain)
    half = torch.ones(48, 80)
    half[:, :40] = 0
    for mask in (half, half[None], half.expand(13, 1, 48, 80), half.expand(1, 1, 4, 48, 80)):
        ours = sample(handles.model, *prompts, video, noise_mask=mask, **settings)
        assert torch.equal(ours[..., :5], video[..., :5])
        assert not torch.equal(ours[..., 5:], video[..., 5:])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.full((1, 8, 8), 2.0), "values from 2 to 2"),
        (torch.full((1, 8, 8), math.nan), "NaN or Inf"),
        (torch.ones(8), "has the shape [8]"),
        (torch.ones(1, 3, 8, 8), "has the shape [1, 3, 8, 8]"),
        (torch.ones(3, 1, 2, 8, 8), "a batch of 1"),
        ("x", "The noise mask"),
    ],
)
def test_what_is_no_mask_is_refused(handles, prompts, mask, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        sample(handles.model, *prompts, torch.ones(SHAPES["even"]), noise_mask=mask, seed=1, steps=1)


def test_a_mask_on_an_empty_latent_is_said_and_passed_by(handles, prompts):
    events, settings = Told(), dict(seed=1, steps=1)
    empty = torch.zeros(SHAPES["even"])
    ours = sample(handles.model, *prompts, empty, noise_mask=torch.zeros(1, 8, 8), events=events, **settings)
    assert torch.equal(ours, sample(handles.model, *prompts, empty, **settings))
    assert any("no video to keep" in note for note in events.notes)


def test_sizes_beyond_the_rotary_grid_warn_and_run(handles, prompts, caplog):
    """The reference stops with a shape error above 96 x 170 latent cells; the positions simply go on."""
    config = {**handles.model.weights.config, "sample_height": 8, "sample_width": 8}
    small = dataclasses.replace(handles.model, weights=_WithConfig(handles.model.weights, config))
    ours = sample(small, *prompts, torch.zeros(1, 16, 2, 12, 10), seed=1, steps=2)
    assert torch.equal(ours, sample(handles.model, *prompts, torch.zeros(1, 16, 2, 12, 10), seed=1, steps=2))
    assert "was not trained for 5 frames (the model card gives 16N+1) nor for 80x96" in caplog.text


class _WithConfig:
    """Weights whose config says something else."""

    def __init__(self, weights, config):
        self._weights, self.config = weights, config

    def __getattr__(self, name):
        return getattr(self._weights, name)


def run(handles, **changes):
    settings = (
        dict(prompts=(torch.zeros(1, 226, TEXT_WIDTH),) * 2, latents=torch.zeros(SHAPES["even"]), seed=1, steps=1)
        | changes
    )
    return sample(handles.model, *settings.pop("prompts"), **settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(steps=1001), "steps is 1001"),
        (dict(denoise=0.0, latents=torch.ones(SHAPES["even"])), "leaves no step to run"),
        (dict(denoise=1.5), "denoise is 1.5"),
        (dict(scheduler="euler"), "'euler'"),
        (dict(latents=torch.zeros(1, 16, 6, 10)), "4 dimensions"),
        (dict(latents=torch.zeros(1, 4, 3, 6, 10)), "4 channels"),
        (dict(latents=torch.zeros(1, 16, 3, 7, 10)), "multiples of 16"),
        (dict(prompts=(torch.zeros(1, 226, 768),) * 2), r"reads \[batch, tokens, 32\]"),
        (dict(prompts=(torch.zeros(226, 32),) * 2), r"shape \[226, 32\]"),
        (dict(prompts=(torch.zeros(3, 226, 32),) * 2), "3 prompts and the latent 1 videos"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(handles, changes, said):
    with pytest.raises(ValueError, match=said):
        run(handles, **changes)


def test_an_image_to_video_checkpoint_is_refused_for_text_to_video_before_its_weights_are_read(checkpoints, prompts):
    model = open_handles(checkpoints("1.5-i2v"), "fp32", CPU).model
    with pytest.raises(ValueError, match="image-to-video model") as caught:
        sample(model, *prompts, empty_latent(80, 48, 17), seed=1, steps=1)
    assert "CogVideoX1.5-5B" in str(caught.value)
    assert not model.weights.is_loaded


class TestGuidanceInAPartOfTheSteps:
    """Against a plain loop around diffusers' own transformer and scheduler."""

    SHAPE, STEPS = (1, 16, 4, 6, 8), 10

    def expected(self, pipeline, prompts, scheduler, guided):
        """The latents where the steps of ``guided`` run as the pipeline's guided ones, and the others as its
        unguided."""
        own, generator = make_scheduler(pipeline.scheduler.config, scheduler), torch.Generator("cpu").manual_seed(1)
        own.set_timesteps(self.STEPS)
        latents = torch.randn((1, 4, 16, 6, 8), generator=generator)
        module, before = pipeline.transformer, None
        rotary = pipeline._prepare_rotary_positional_embeddings(48, 64, 4, torch.device("cpu"))
        with torch.no_grad():
            for index, timestep in enumerate(own.timesteps):
                given = [prompts[1], prompts[0]] if index in guided else [prompts[0]]
                predicted = module(
                    torch.cat([latents] * len(given)),
                    encoder_hidden_states=torch.cat(given),
                    timestep=timestep.expand(len(given)),
                    image_rotary_emb=rotary,
                    return_dict=False,
                )[0]
                if index in guided:
                    negative, positive = predicted.chunk(2)
                    predicted = negative + 6.0 * (positive - negative)
                if scheduler == "ddim":
                    latents = own.step(predicted, timestep, latents, return_dict=False)[0]
                else:
                    earlier = own.timesteps[index - 1] if index else None
                    latents, before = own.step(
                        predicted, before, timestep, earlier, latents, generator=generator, return_dict=False
                    )
        return rearrange(1 / pipeline.vae_scaling_factor_image * latents, "b t c h w -> b c t h w")

    @pytest.mark.parametrize(
        ("start", "end", "guided"),
        [(0.0, 0.8, range(8)), (0.3, 1.0, range(3, 10)), (0.25, 0.65, range(3, 7)), (0.0, 1.0, range(10))],
    )
    @pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
    def test_steps_are_the_guided_ones_inside_and_the_unguided_ones_outside(
        self, handles, pipeline, prompts, scheduler, start, end, guided
    ):
        ours = sample(
            *(handles.model, *prompts, torch.zeros(self.SHAPE)),
            **dict(seed=1, steps=self.STEPS, scheduler=scheduler, cfg_start=start, cfg_end=end),
        )
        assert torch.equal(ours, self.expected(pipeline, prompts, scheduler, guided))

    def test_an_unguided_step_computes_one_video(self, handles, prompts):
        sizes = []
        with handles.model.weights.running() as module:
            watch = module.register_forward_pre_hook(
                lambda _, __, given: sizes.append(len(given["hidden_states"])), with_kwargs=True
            )
        sample(handles.model, *prompts, torch.zeros(self.SHAPE), seed=1, steps=10, cfg_start=0.1, cfg_end=0.8)
        watch.remove()
        assert sizes == [1, *[2] * 7, 1, 1]

    @pytest.mark.parametrize(("steps", "start", "end"), [(4, 0.3, 0.45), (20, 0.96, 1.0), (1, 0.01, 1.0)])
    def test_a_part_in_which_no_step_begins_is_refused(self, handles, prompts, steps, start, end):
        """As is one that has no length: nobody asks for guidance in order not to have it."""
        given = (handles.model, *prompts, torch.zeros(self.SHAPE))
        with pytest.raises(ValueError, match=f"none of {steps} steps lies between them.* Set cfg_end higher"):
            sample(*given, seed=1, steps=steps, cfg_start=start, cfg_end=end)
        unguided = sample(*given, seed=1, steps=1, cfg=1.0)
        for shares in (dict(cfg_start=0.5), dict(cfg_end=0.0), dict(cfg_start=0.8, cfg_end=0.2)):
            assert torch.equal(sample(*given, seed=1, steps=1, cfg=1.0, **shares), unguided)

    @pytest.mark.parametrize("method", CACHES)
    def test_a_cache_begins_anew_where_the_guidance_changes(self, model, prompts, method):
        """What it kept of another batch is not read: with nothing to skip but the first step after each change, nothing
        is skipped."""
        whole = dict(seed=1, steps=10, cfg_start=0.2, cfg_end=0.8)
        given = (*prompts, torch.zeros(self.SHAPE))
        plain = sample(model, *given, **whole)
        for start, end in ((0.2, 0.3), (0.8, 0.9)):
            cached = sample(with_cache(model, Cache(method, 1.0, start, end)), *given, **whole)
            assert torch.equal(cached, plain)
        said = []
        sample(with_cache(model, Cache(method, 1.0, 0.1, 1.0)), *given, events=Told(said), **whole)
        skipped, total = map(int, re.search(r"skipped .*?(\d+) of (\d+) block", said[-1]).groups())
        assert 0 < skipped < total

    @pytest.mark.parametrize(
        ("shares", "said"),
        [((0.8, 0.2), "no step would be guided"), ((0.5, 0.5), "no step"), ((-0.1, 1.0), "cfg_start is -0.1")],
    )
    def test_what_guides_nothing_is_refused(self, handles, prompts, shares, said):
        with pytest.raises(ValueError, match=said):
            sample(
                *(handles.model, *prompts, torch.zeros(self.SHAPE)),
                **dict(seed=1, steps=4, cfg_start=shares[0], cfg_end=shares[1]),
            )
