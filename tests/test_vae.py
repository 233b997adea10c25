"""Frames are the reference's frames."""

import pytest
import torch

from cogvideox.handles import open_handles
from cogvideox.vae import decode
from tests.conftest import CPU


def reference(pipeline, latents):
    """``vae.decode`` and ``VideoProcessor``, unmodified, with the VAE's own slicing over videos."""
    with torch.no_grad():
        pipeline.vae.enable_slicing()
        frames = pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample
    images = pipeline.video_processor.postprocess_video(frames, output_type="np")
    return torch.from_numpy(images).flatten(0, 1)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_frames_equal_the_references_bit_for_bit(handles, pipeline, length, batch):
    latents = torch.randn(batch, 16, length, 4, 6)
    images = decode(handles.vae, latents)
    assert torch.equal(images, reference(pipeline, latents))
    assert images.dtype == torch.float32
    assert images.device.type == "cpu"


def test_frames_equal_the_references_in_bf16(tiny):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(tiny, torch_dtype=torch.bfloat16)
    latents = torch.randn(1, 16, 3, 4, 6)
    assert torch.equal(decode(open_handles(tiny, "bf16", CPU).vae, latents), reference(pipeline, latents))


def test_a_clip_of_the_contract_has_16n_plus_1_frames(handles):
    assert decode(handles.vae, torch.randn(1, 16, 5, 2, 2)).shape == (17, 16, 16, 3)


def test_progress_is_told_for_every_chunk_and_can_stop_the_decode(handles):
    seen = []
    decode(handles.vae, torch.randn(2, 16, 5, 2, 2), on_chunk=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 10), (5, 10), (8, 10), (10, 10)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(handles.vae, torch.randn(1, 16, 5, 2, 2), on_chunk=stop)


def test_a_latent_of_another_model_is_refused(handles):
    with pytest.raises(ValueError, match="4 channels"):
        decode(handles.vae, torch.zeros(1, 4, 3, 8, 8))
