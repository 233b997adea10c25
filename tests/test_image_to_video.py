"""Image to video and video to video make the unmodified pipelines' latents, bit for bit, and say what does not fit."""

import shutil

import pytest
import torch
from einops import rearrange

from cogvideox import memory
from cogvideox.geometry import empty_latent
from cogvideox.handles import open_handles
from cogvideox.sampling import sample
from cogvideox.vae import encode, image_latents
from cogvideox.weights import placements
from tests.conftest import CPU
from tests.reference import reference_latents
from tests.tiny_checkpoint import build_checkpoint
from tests.told import Told

STEPS = 3


def picture(width, height, frames=1, seed=2):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def i2v(checkpoints):
    """``i2v(variant)``: our handles and the unmodified pipeline."""
    from diffusers import CogVideoXImageToVideoPipeline

    built = {}

    def get(variant):
        if variant not in built:
            pipeline = CogVideoXImageToVideoPipeline.from_pretrained(checkpoints(variant), torch_dtype=torch.float32)
            pipeline.set_progress_bar_config(disable=True)
            built[variant] = open_handles(checkpoints(variant), "fp32", CPU), pipeline
        return built[variant]

    return get


def reference(pipeline, prompts, start, shape, *, steps=STEPS, **settings):
    """The unmodified pipeline's latents, from the same latent of the start image."""
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video as module

    dtype, (batch, *_, height, width) = pipeline.transformer.dtype, shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "retrieve_latents", lambda output, generator=None: start[:, :, :1].to(dtype))
        return reference_latents(
            pipeline, prompts, shape, steps=steps, image=torch.zeros(batch, 3, height * 8, width * 8), **settings
        )


SHAPES = {
    "odd": (1, 16, 5, 6, 10),
    "even": (1, 16, 4, 10, 6),
    "batch": (2, 16, 3, 6, 8),
    "one frame": (1, 16, 1, 6, 10),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cfg", [1.0, 6.0])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_latents_equal_the_image_to_video_pipelines_bit_for_bit(i2v, prompts, scheduler, cfg, shape):
    handles, pipeline = i2v("1.5-i2v")
    image = picture(shape[4] * 8, shape[3] * 8)
    start = image_latents(handles.vae, image, 4 * (shape[2] - 1) + 1)
    ours = sample(
        handles.model,
        *prompts,
        torch.zeros(shape),
        image_latents=start,
        seed=1,
        steps=STEPS,
        cfg=cfg,
        scheduler=scheduler,
    )
    assert torch.equal(ours, reference(pipeline, prompts, start, shape, cfg=cfg, scheduler=scheduler))


def test_bf16_equals_the_pipeline_in_bf16(checkpoints, prompts):
    from diffusers import CogVideoXImageToVideoPipeline

    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(checkpoints("1.5-i2v"), torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    handles = open_handles(checkpoints("1.5-i2v"), "bf16", CPU)
    shape = SHAPES["odd"]
    start = image_latents(handles.vae, picture(80, 48), 17)
    ours = sample(handles.model, *prompts, torch.zeros(shape), image_latents=start, seed=1, steps=STEPS)
    assert torch.equal(ours, reference(pipeline, prompts, start, shape))


def test_the_learned_positions_of_5b_equal_their_pipeline_too_and_take_one_size(i2v, long_prompts):
    handles, pipeline = i2v("5b-i2v")
    shape = (1, 16, 2, 60, 90)
    start = image_latents(handles.vae, picture(80, 48), 5).repeat(1, 1, 1, 10, 9)
    ours = sample(handles.model, *long_prompts, torch.zeros(shape), image_latents=start, seed=1, steps=1)
    assert torch.equal(ours, reference(pipeline, long_prompts, start, shape, steps=1))
    small = torch.zeros(1, 16, 3, 6, 10)
    with pytest.raises(ValueError, match="learned positions for 720x480 only, and the latent is 80x48"):
        sample(handles.model, *long_prompts, small, image_latents=small, seed=1, steps=1)


def test_the_images_latent_is_divided_by_the_scale_only_where_the_model_was_trained_so(i2v, checkpoints, tmp_path):
    assert i2v("1.5-i2v")[0].model.image_latent_scale == 1 / 0.7
    assert i2v("5b-i2v")[0].model.image_latent_scale == 0.7
    # Folders that share one VAE between transformers hold the flag of only one of them.
    folder = tmp_path / "shared"
    build_checkpoint(folder, "1.5")
    (folder / "transformer").rename(folder / "transformer_T2V")
    shutil.copytree(checkpoints("1.5-i2v") / "transformer", folder / "transformer_I2V")
    assert open_handles(folder / "transformer_I2V", "fp32", CPU).model.image_latent_scale == 1 / 0.7


def test_an_end_image_is_the_last_latent_and_is_said_to_be_untrained(i2v, prompts, caplog):
    handles, _ = i2v("1.5-i2v")
    start, end = picture(80, 48), picture(80, 48, seed=9)
    latents = image_latents(handles.vae, start, 17, end)
    assert torch.equal(latents[:, :, :1], encode(handles.vae, start))
    assert torch.equal(latents[:, :, -1:], encode(handles.vae, end))
    assert not latents[:, :, 1:-1].any()
    said = []
    with_end = sample(
        handles.model, *prompts, torch.zeros_like(latents), image_latents=latents, seed=1, steps=1, events=Told(said)
    )
    latents[:, :, -1] = 0
    without = sample(handles.model, *prompts, torch.zeros_like(latents), image_latents=latents, seed=1, steps=1)
    assert not torch.equal(with_end, without)
    assert any("trained with a start image only" in text for text in said)
    assert caplog.text.count("trained with a start image only") == 1
    with pytest.raises(ValueError, match="end where it starts"):
        image_latents(handles.vae, start, 1, end)


def test_latents_of_another_models_node_are_said_to_be_that(i2v, prompts, caplog):
    """WanImageToVideo fills all frames: with the image, and with encoded grey."""
    handles, _ = i2v("1.5-i2v")
    image = torch.zeros(1, 16, 5, 6, 10)
    for frames, said in ((slice(0, 1), False), (slice(0, 5), True)):
        image[:, :, frames] = 1.0
        caplog.clear()
        run(handles, prompts, torch.zeros_like(image), image)
        assert ("between the first and the last frame" in caplog.text) == said
        assert "An end image is connected" not in caplog.text


def test_an_end_image_is_welcome_to_a_checkpoint_made_for_it(checkpoints, prompts, tmp_path, caplog):
    folder = tmp_path / "CogVideoX1.5-5B-Interpolation"
    folder.symlink_to(checkpoints("1.5-i2v"))
    handles = open_handles(folder, "fp32", CPU)
    latents = image_latents(handles.vae, picture(80, 48), 17, picture(80, 48))
    sample(handles.model, *prompts, torch.zeros_like(latents), image_latents=latents, seed=1, steps=1)
    assert "start image only" not in caplog.text


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 25, 33])
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_encoding_equals_the_references_posterior_mode(checkpoints, frames, dtype, limit):
    from diffusers import AutoencoderKLCogVideoX

    handles = open_handles(checkpoints("1.5"), dtype, CPU)
    theirs = AutoencoderKLCogVideoX.from_pretrained(
        checkpoints("1.5") / "vae", torch_dtype=handles.vae.weights.precision.dtype
    )
    clip = picture(32, 16, frames)
    with torch.no_grad():
        expected = theirs.encode(
            (2.0 * rearrange(clip, "f h w c -> 1 c f h w") - 1.0).to(theirs.dtype)
        ).latent_dist.mode()
    assert (encode(handles.vae, clip) - expected.float()).norm() < limit * expected.float().norm()


def test_a_video_goes_to_video_as_the_pipeline_does_from_its_pixels(handles, pipeline, prompts, monkeypatch):
    """33 frames: 9 latent ones, which the sampler pads; the reference does not pad here, so the clip is 29 frames, 8
    latent ones."""
    from diffusers import CogVideoXVideoToVideoPipeline
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_video2video as module

    original = module.retrieve_latents
    monkeypatch.setattr(module, "retrieve_latents", lambda output, generator=None: original(output, None, "argmax"))
    clip = picture(80, 48, 29)
    ours = sample(handles.model, *prompts, encode(handles.vae, clip), seed=1, steps=STEPS, denoise=0.7)
    theirs = CogVideoXVideoToVideoPipeline(**pipeline.components)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        video=list(clip.permute(0, 3, 1, 2)),
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        height=48,
        width=80,
        num_inference_steps=STEPS,
        strength=0.7,
        guidance_scale=6.0,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="latent",
    ).frames
    expected = rearrange(1 / 0.7 * expected, "b t c h w -> b c t h w")
    # The latents pass through ComfyUI's unscaled convention, times 0.7 and back.
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_joined_prompts_run_and_a_prompt_joined_with_nothing_is_itself(handles, prompts):
    latent = torch.zeros(1, 16, 4, 6, 10)
    joined = torch.cat([prompts[0], prompts[0][:, :100]], dim=1)
    result = sample(handles.model, joined, prompts[1], latent, seed=1, steps=2)
    plain = sample(handles.model, *prompts, latent, seed=1, steps=2)
    assert result.isfinite().all()
    assert not torch.equal(result, plain)
    # Run one after the other and in one batch, prompts give the same.
    both = sample(handles.model, joined, torch.cat([prompts[1], prompts[1][:, :100]], dim=1), latent, seed=1, steps=2)
    assert both.isfinite().all()


def test_prompts_one_by_one_give_what_one_batch_gives(handles, prompts, monkeypatch):
    latent = torch.zeros(1, 16, 4, 6, 10)
    batched = sample(handles.model, *prompts, latent, seed=1, steps=2)
    monkeypatch.setattr(memory, "placements", lambda batched: placements([False]))
    apart = sample(handles.model, *prompts, latent, seed=1, steps=2)
    assert (apart - batched).norm() / batched.norm() < 1e-5


def test_joined_prompts_are_refused_by_models_with_a_position_per_token(checkpoints, prompts):
    model = open_handles(checkpoints("2b"), "fp32", CPU).model
    with pytest.raises(ValueError, match="positions for exactly 226"):
        sample(
            model,
            torch.cat([prompts[0]] * 2, dim=1),
            prompts[1],
            empty_latent(80, 48, 9, frame_step=8),
            seed=1,
            steps=1,
        )


def run(handles, prompts, latent, image):
    return sample(handles.model, *prompts, latent, image_latents=image, seed=1, steps=1)


def test_what_does_not_fit_is_refused_before_any_weight_is_read(checkpoints, prompts):
    i2v, t2v = (open_handles(checkpoints(variant), "fp32", CPU) for variant in ("1.5-i2v", "1.5"))
    latent = torch.zeros(1, 16, 5, 6, 10)
    for handles, image, said in (
        (i2v, None, "no start image is connected"),
        (t2v, latent, "text-to-video model and a start image is connected"),
        (i2v, torch.zeros(1, 16, 5, 6, 8), "the start image would not cover the video"),
        (i2v, torch.zeros(1, 16, 4, 6, 10), "the start image would not cover the video"),
        (i2v, torch.zeros(3, 16, 5, 6, 10), "the start image would not cover the video"),
        (i2v, torch.full_like(latent, torch.nan), "start image's latent holds 4,800 values that are NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            run(handles, prompts, latent, image)
        assert not handles.model.weights.is_loaded


def test_a_clip_of_another_length_than_the_vae_reads_is_refused(handles):
    with pytest.raises(ValueError, match="Cut it to 17"):
        encode(handles.vae, picture(32, 32, 18))
