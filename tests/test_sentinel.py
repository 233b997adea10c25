"""No value that is not finite survives: faults are put into chosen modules at chosen times, and the run heals or names
them."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from cogvideox import finite
from cogvideox import sentinel as sentinel_module
from cogvideox import weights as weights_module
from cogvideox.black_frames import BlackVideoError, check_black_frames, enforce
from cogvideox.dtypes import FP32, RANGE_SAFE_FP16, Precision
from cogvideox.geometry import empty_latent
from cogvideox.handles import open_handles
from cogvideox.sampling import sample
from cogvideox.sentinel import NonFiniteError, Sentinel
from cogvideox.text import encode_prompt
from cogvideox.vae import decode
from tests.conftest import CPU
from tests.reference import draw_beside
from tests.tiny_checkpoint import build_checkpoint
from tests.told import Told

STEPS = 5
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def fault(monkeypatch):
    """``fault(kind, module, when, value)``: every module of that kind loaded from now on puts ``value`` into the output
    of its submodule ``module`` where ``when(call, precision)`` says so; calls are counted from 1 over all loads.
    Returns the list of precisions it was called in."""
    real, calls = weights_module.load_module, []

    def inject(kind, name, when, value=NAN):
        def load(part, precision, *rest):
            module = real(part, precision, *rest)

            def spoil(_module, _args, output):
                calls.append(precision.name)
                if not when(len(calls), precision):
                    return output
                first = output[0] if isinstance(output, tuple) else output
                first = first.clone()
                first.view(-1)[-3] = value
                return (first, *output[1:]) if isinstance(output, tuple) else first

            if part.kind == kind:
                module.get_submodule(name).register_forward_hook(spoil)
            return module

        monkeypatch.setattr(weights_module, "load_module", load)
        return calls

    return inject


def run(opened, prompts, variant="1.5", **settings):
    latent = empty_latent(80, 48, 17)
    if variant in ("fun-inp", "void"):
        latent = empty_latent(80, 48, 13, 1, 8, in_pairs=True)
        beside = draw_beside(variant, latent.shape, torch.Generator().manual_seed(2))
        settings = {"image_latents": beside, "scheduler": "ddim_origin"} | settings
    settings = {"seed": 1, "steps": STEPS, "cfg": 6.0} | settings
    return sample(opened.model, *prompts, latent, **settings)


def hooks_of(weights):
    with weights.running() as module:
        return sum(len(child._forward_hooks) for child in module.modules())


@pytest.mark.parametrize(
    ("variant", "scheduler"), [("1.5", "ddim"), ("1.5", "dpm"), ("fun-inp", "ddim_origin"), ("void", "ddim")]
)
def test_a_passing_fault_leaves_no_trace_in_the_result(checkpoints, prompts, fault, variant, scheduler):
    how = {"variant": variant, "scheduler": scheduler}
    expected = run(open_handles(checkpoints(variant), "bf16", CPU), prompts, **how)
    calls = fault("transformer", "transformer_blocks.1", lambda call, _: call == 3)
    said, steps = [], []
    healed = open_handles(checkpoints(variant), "bf16", CPU)
    result = run(healed, prompts, **how, events=Told(heals=said, step=lambda done, *_: steps.append(done)))
    assert torch.equal(result, expected)
    assert calls == ["bf16"] * (STEPS + 1)
    assert steps == list(range(1, STEPS + 1))
    (told,) = said
    assert "step 3 of 5" in told
    assert "passing fault" in told
    assert hooks_of(healed.model.weights) == 1  # the fault's own


@pytest.mark.parametrize("variant", ["1.5", "fun-inp", "void"])
def test_a_lasting_fault_of_one_dtype_is_healed_from_the_last_finite_latents(
    checkpoints, prompts, fault, caplog, variant
):
    bf16 = Precision(torch.bfloat16)
    calls = fault(
        "transformer", "transformer_blocks.1.ff.net.2", lambda call, precision: call >= 3 and precision == bf16
    )
    said, clean = [], []
    opened = open_handles(checkpoints(variant), "bf16", CPU)
    events = Told(heals=said, step=lambda done, total, predicted: clean.append(predicted.dtype))
    result = run(opened, prompts, variant, events=events)
    assert result.isfinite().all()
    # Two steps, the third and its probe, and the third again and the rest: no finished step is done twice.
    assert calls == ["bf16"] * 4 + ["fp32"] * 3
    assert len(clean) == STEPS
    (told,) = said
    assert "step 3 of 5" in told
    assert "transformer_blocks.1.ff.net.2 (Linear) in bf16" in told
    assert "Going on from here in fp32" in told
    assert told in caplog.text
    truth = run(open_handles(checkpoints(variant), "fp32", CPU), prompts, variant)
    assert (result - truth).norm() / truth.norm() < 0.05
    # The handle is as it was: it can be used again, in any order.
    assert opened.model.weights.precision == bf16


@pytest.mark.parametrize("second", [None, CPU])
def test_what_was_not_finite_has_made_way_before_another_is_loaded(tiny, prompts, monkeypatch, second):
    real, held, there = weights_module.load_module, [], []

    def load(*given):
        there.append(sum(any(tensor() is not None for tensor in module) for module in held))
        module = real(*given)
        held.append([weakref.ref(tensor) for tensor in module.parameters()])
        return module

    monkeypatch.setattr(weights_module, "load_module", load)
    model = replace(open_handles(tiny, "fp16", CPU, on_mismatch="warn").model, second=second)
    gc.disable()
    try:
        sample(model, *(1e6 * prompt for prompt in prompts), empty_latent(80, 48, 17), seed=1, steps=2)
    finally:
        gc.enable()
    # The copy on a second device stays.
    assert there == ([0, 0] if second is None else [0, 1, 1])


def test_the_largest_value_before_the_fault_is_told(tiny, prompts, fault):
    fault("transformer", "proj_out", lambda call, precision: True)
    with pytest.raises(
        NonFiniteError, match=r"proj_out \(Linear\) in fp32; the largest magnitude before, in its input, was [0-9.]+;?"
    ):
        run(open_handles(tiny, "fp32", CPU), prompts)


def test_stop_raises_at_that_step_with_the_same_facts(tiny, prompts, fault):
    fault("transformer", "transformer_blocks.0", lambda call, _: call >= 2)
    steps = []
    with pytest.raises(
        NonFiniteError, match=r"step 2 of 5: .* in bf16 .*transformer_blocks\.0 \(CogVideoXBlock\)"
    ) as caught:
        run(
            open_handles(tiny, "bf16", CPU),
            prompts,
            on_nan="stop",
            events=Told(step=lambda done, *_: steps.append(done)),
        )
    assert steps == [1]
    assert "on_nan is stop" in str(caught.value)


def test_where_nothing_helps_the_error_says_that_every_way_was_tried(tiny, prompts, fault):
    calls = fault("transformer", "transformer_blocks.0", lambda call, _: True, INF)
    with pytest.raises(NonFiniteError, match="no safer precision left"):
        run(open_handles(tiny, "fp16", CPU), prompts)
    assert calls == ["range-safe fp16", "range-safe fp16", "bf16", "fp32"]


def test_weights_that_are_not_finite_are_named_as_the_cause(tmp_path, prompts):
    def damage(parts):
        with torch.no_grad():
            parts["transformer"].transformer_blocks[1].attn1.to_v.weight[2, 3] = NAN

    opened = open_handles(build_checkpoint(tmp_path / "damaged", change=damage), "bf16", CPU)
    with pytest.raises(
        NonFiniteError,
        match=r"weights of transformer_blocks\.1\.attn1\.to_v \(Linear\) themselves hold NaN.*download it again",
    ):
        run(opened, prompts)
    opened = open_handles(tmp_path / "damaged", "fp16", CPU)
    with pytest.raises(NonFiniteError, match=r"to_v \(RangeSafeLinear\) themselves"):
        run(opened, prompts)


def test_weights_that_only_fp16_cannot_hold_are_not_called_damaged(tmp_path, prompts):
    def enlarge(parts):
        with torch.no_grad():
            parts["transformer"].transformer_blocks[1].attn1.to_v.weight[2, 3] = 1e5

    opened = open_handles(build_checkpoint(tmp_path / "large", change=enlarge), "fp16", CPU, on_mismatch="warn")
    said = []
    run(opened, prompts, events=Told(heals=said))
    assert "weights of transformer_blocks.1.attn1.to_v (Linear) pass 65504" in said[0]


def test_inf_from_t5_is_healed(tiny, fault):
    expected = encode_prompt(open_handles(tiny, "fp32", CPU).text_encoder, "a panda").embeddings
    calls = fault("text_encoder", "encoder.block.1", lambda _, precision: precision.dtype == torch.bfloat16, INF)
    said = []
    encoded = encode_prompt(open_handles(tiny, "bf16", CPU).text_encoder, "a panda", events=Told(heals=said))
    assert torch.equal(encoded.embeddings, expected)
    assert calls == ["bf16", "bf16", "fp32"]
    assert "encoding the prompt: the text encoder in bf16" in said[0]
    with pytest.raises(NonFiniteError, match=r"encoder\.block\.1"):
        encode_prompt(open_handles(tiny, "bf16", CPU).text_encoder, "a panda", on_nan="stop")


def test_a_chunk_of_frames_that_is_not_finite_is_decoded_again_in_fp32(tiny, fault):
    latents = torch.randn(1, 16, 7, 2, 2)
    in_bf16 = decode(open_handles(tiny, "bf16", CPU).vae, latents)
    in_fp32 = decode(open_handles(tiny, "fp32", CPU).vae, latents)
    calls = fault("vae", "decoder.mid_block", lambda call, precision: call >= 2 and precision != FP32)
    said, chunks = [], []
    images = decode(
        open_handles(tiny, "bf16", CPU).vae,
        latents,
        events=Told(heals=said, progress=lambda done, _: chunks.append(done), of="decoding"),
    )
    # A chunk that is done again needs the one before it for what its convolutions remember.
    assert calls == ["bf16"] * 4 + ["fp32"] * 3
    assert chunks == [3, 5, 7]
    assert torch.equal(images[:9], in_bf16[:9])
    assert (images[9:] - in_fp32[9:]).abs().max() < 0.05
    assert "frames from 9 of 25: the VAE in bf16" in said[0]
    with pytest.raises(NonFiniteError, match=r"decoder\.mid_block"):
        decode(open_handles(tiny, "bf16", CPU).vae, latents, on_nan="stop")


def test_a_passing_fault_in_the_vae_leaves_no_trace(tiny, fault):
    latents = torch.randn(2, 16, 5, 2, 2)
    expected = decode(open_handles(tiny, "bf16", CPU).vae, latents)
    fault("vae", "decoder", lambda call, _: call == 3)
    assert torch.equal(decode(open_handles(tiny, "bf16", CPU).vae, latents), expected)


def test_inputs_that_are_not_finite_are_refused_before_weights_are_read(tiny, prompts):
    opened = open_handles(tiny, "fp32", CPU)
    bad = prompts[0].clone()
    bad[0, 5] = INF
    with pytest.raises(ValueError, match=r"positive conditioning holds 32 values that are NaN or Inf.*text encoder"):
        run(opened, (bad, prompts[1]))
    latent = torch.randn(1, 16, 3, 4, 6)
    latent[0, 0, 0, 0, 0] = NAN
    with pytest.raises(ValueError, match="The latent holds 1 values"):
        decode(opened.vae, latent)
    with pytest.raises(ValueError, match="The latent holds 1 values"):
        sample(opened.model, *prompts, latent, seed=0, denoise=0.5)
    assert not opened.model.weights.is_loaded
    assert not opened.vae.weights.is_loaded


class TestInputsThatTheRunsDtypeCannotHold:
    """Finite, and beyond 65504: what is healed begins with them as they were given."""

    def sampled(self, folder, dtype, loud, **given):
        torch.manual_seed(4)
        prompts = torch.randn(2, 1, 226, 32)
        if loud == "prompt":
            prompts[0, 0, 3, 4] = 1e5
        if loud == "negative prompt":
            prompts[1, 0, 3, 4] = -1e5
        if loud == "latent":
            given = {"denoise": 0.5}
        latent = torch.randn(1, 16, 2, 4, 4) * (7e5 if loud == "latent" else 0)
        if loud == "image":
            given = {"image_latents": torch.randn(1, 16, 2, 4, 4) * 7e4}
        said = []
        opened = open_handles(folder, dtype, CPU, on_mismatch="warn")
        latents = sample(opened.model, *prompts, latent, seed=1, steps=4, **given, events=Told(heals=said))
        return latents, said

    @pytest.mark.parametrize(
        ("variant", "loud"), [("2b", "prompt"), ("2b", "negative prompt"), ("2b", "latent"), ("1.5-i2v", "image")]
    )
    def test_the_run_is_healed_and_gives_the_fp32_video(self, checkpoints, variant, loud):
        truth, _ = self.sampled(checkpoints(variant), "fp32", loud)
        made, said = self.sampled(checkpoints(variant), "fp16", loud)
        assert (made - truth).norm() / truth.norm() < 0.01
        assert len(said) == 1
        assert "Going on from here in range-safe fp16" in said[0]

    def test_what_fp32_cannot_hold_is_refused_before_weights_are_read(self, tiny, prompts):
        opened = open_handles(tiny, "fp32", CPU)
        bad = prompts[0].double()
        bad[0, 5, 6] = 1e300
        with pytest.raises(ValueError, match="positive conditioning holds 1 values"):
            run(opened, (bad, prompts[1]))
        assert not opened.model.weights.is_loaded

    def test_a_prompt_without_tokens_holds_nothing_that_is_too_large(self, tiny, prompts):
        assert run(open_handles(tiny, "fp32", CPU), [prompt[:, :0] for prompt in prompts]).isfinite().all()


def test_an_error_after_healing_does_not_advise_to_heal(tiny, prompts, fault):
    fault("transformer", "transformer_blocks.0", lambda call, _: True, INF)
    with pytest.raises(NonFiniteError, match="check the inputs and the weights") as caught:
        run(open_handles(tiny, "fp16", CPU, on_mismatch="warn"), prompts)
    assert "on_nan to heal" not in str(caught.value)
    with pytest.raises(NonFiniteError, match="Set on_nan to heal"):
        run(open_handles(tiny, "fp16", CPU, on_mismatch="warn"), prompts, on_nan="stop")


def test_an_interruption_while_healing_is_not_swallowed(tiny, prompts, fault):
    fault("transformer", "transformer_blocks.0", lambda call, precision: precision != FP32)

    def cancel(done, total):
        raise KeyboardInterrupt

    opened = open_handles(tiny, "bf16", CPU)
    with opened.model.weights.running() as _, pytest.raises(KeyboardInterrupt):
        run(opened, prompts, events=Told(progress=cancel, of="loading"))


def test_an_unknown_on_nan_is_refused(tiny):
    with pytest.raises(ValueError, match="'ignore'"):
        Sentinel(open_handles(tiny, "fp32", CPU).vae.weights, "ignore")


class TestFromPromptToFramesWithWeightsThatOverflowFp16:
    """The promise, end to end: a model whose residual streams pass 1e5, in fp16."""

    def video(self, opened, **settings):
        # Of the padding behind a prompt's end a few tokens are enough.
        prompts = [
            encode_prompt(opened.text_encoder, prompt, **settings).embeddings[:, :32]
            for prompt in ("a panda plays the guitar", "")
        ]
        latents = sample(opened.model, *prompts, empty_latent(48, 32, 17), seed=3, steps=3, **settings)
        return decode(opened.vae, latents, **settings)

    def test_fp16_passes_the_black_frame_check_and_is_the_fp32_video(self, loud):
        opened = open_handles(loud, "fp16", CPU)
        assert opened.model.weights.precision == opened.text_encoder.weights.precision == RANGE_SAFE_FP16
        said = []
        images = self.video(opened, events=Told(heals=said))
        enforce(check_black_frames(images), "stop")
        assert said == []
        truth = self.video(open_handles(loud, "fp32", CPU))
        assert (images - truth).norm() / truth.norm() < 5e-3

    def test_with_the_protection_off_it_is_black(self, loud, monkeypatch):
        for module in (sentinel_module, finite):
            monkeypatch.setattr(module, "is_finite", lambda result: True)
        images = self.video(open_handles(loud, "fp16", CPU, on_mismatch="warn"))
        assert images.isnan().any()
        with pytest.raises(BlackVideoError, match="NaN or Inf"):
            enforce(check_black_frames(images), "stop")

    def test_plain_fp16_is_healed_on_the_way(self, loud):
        opened = open_handles(loud, "fp16", CPU, on_mismatch="warn")
        assert opened.model.weights.precision == Precision(torch.float16)
        said = []
        images = self.video(opened, events=Told(heals=said))
        enforce(check_black_frames(images), "stop")
        assert len(said) == 3  # two prompts, one run
        assert (
            "step 1 of 3: the transformer in fp16 gave NaN or Inf; the first module whose output was not finite is "
            "transformer_blocks" in said[2]
        )
        assert "Going on from here in range-safe fp16" in said[2]
