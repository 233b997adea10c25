"""Run by ComfyUI's interpreter in its checkout: CogVideoX-1.5 to ComfyUI under core's own samplers and nodes, held
against our sampler and against core's own model, on tiny random weights in fp32.

Arguments beside those of ``inside``: the sections to run, functions of this file.
"""

import dataclasses
import gc
import importlib
import statistics
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from inside import ROOT, arguments, load, pack, tiny  # isort: skip # It comes first: it makes the others importable.

import comfy.controlnet
import comfy.k_diffusion.sampling
import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_context_windows,
    nodes_custom_sampler,
    nodes_easycache,
    nodes_model_advanced,
    nodes_slg,
    nodes_torch_compile,
    nodes_video_model,
    nodes_void,
)
from safetensors.torch import load_file, save_file

import nodes

loud_models = load("loud_models", ROOT / "tests" / "loud_models.py")
handles, choices, sampling, sentinel, lora, weights, cache, vae, text, naming = (
    importlib.import_module(f"pack.cogvideox.{name}")
    for name in (
        "handles",
        "choices",
        "sampling",
        "sentinel",
        "lora",
        "weights",
        "modules.cache",
        "vae",
        "text",
        "checkpoint.naming",
    )
)
bridge, page, progress = (importlib.import_module(f"pack.nodes.host.{name}") for name in ("bridge", "page", "progress"))
FOLDER = Path(tempfile.mkdtemp())
NODES = pack.NODE_CLASS_MAPPINGS


def build(name, variant="1.5", change=None, dtype="fp32", **options):
    """The handles of a tiny checkpoint, stored in fp32."""
    folder = FOLDER / name
    if not folder.exists():
        tiny.build_checkpoint(folder, variant, change=change, stored={"transformer": torch.float32})
    return handles.open_handles(folder, dtype, **options)


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def prompts(width=32, tokens=(226, 226)):
    return [random(1, count, width, seed=index) for index, count in enumerate(tokens)]


def run(
    model, latents, noise, *, given=None, sampler="ddim", scheduler="simple", steps=5, cfg=6.0, extra=None, **options
):
    """What KSampler gives."""
    positive, negative = ([[prompt, dict(extra or {})]] for prompt in given or prompts())
    options = dict(disable_pbar=True, seed=7) | options
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latents, **options)


def ours(model, latents, noise, given=None, **options):
    return sampling.sample(model, *(given or prompts()), latents, noise=noise, seed=7, **dict(steps=5) | options)


def empty(length, batch=1, height=12, width=20):
    return torch.zeros(batch, 16, length, height, width)


def refused(words, work, kinds=(ValueError, RuntimeError)):
    """Assert that ``work`` is refused with a plain error whose sentence has ``words`` in it, and is on the node that
    runs, unless it is what a look for an attribute raises."""
    said, shown, before = None, [], (page.running_node, page.show)
    page.running_node, page.show = lambda: "5", lambda text, *_: shown.append(text)
    try:
        work()
    except kinds as error:
        said = error
    finally:
        page.running_node, page.show = before
    assert type(said) in kinds, (words, said)
    assert words in str(said), str(said)
    assert isinstance(said, AttributeError) or str(said) in shown[-1:], (words, shown)
    print(f"refused: {words}", flush=True)


def of(node, *args, **kwargs):
    """The first output of one of core's nodes."""
    return node.execute(*args, **kwargs).result[0]


def near(what, found, wanted, most, least=0.0):
    error = relative(found, wanted)
    print(f"{what}: relative L2 {error:.1e}", flush=True)
    assert least <= error <= most, (what, error)


# --- what is sampled ---


def parity():
    """KSampler's ddim on the simple schedule is our sampler's ddim."""
    for variant in ("1.5", "1.5-i2v", "2b", "5b"):
        model = build(variant, variant).model
        for length in (4, 5):
            latents = empty(length)
            noise, image = random(*latents.shape), None
            if "i2v" in variant:
                image = torch.cat([random(1, 16, 1, 12, 20, seed=9), empty(length - 1)], dim=2)
            # Of unequal length where the model takes that.
            given = prompts(tokens=(226, 113) if variant != "2b" else (226, 226))
            wanted = ours(model, latents, noise, given, image_latents=image)
            extra = {} if image is None else {"concat_latent_image": image}
            found = run(bridge.to_model(model), latents, noise, given=given, extra=extra)
            near(f"{variant}, {length} latent frames", found, wanted, 2e-4)
    model, latents = build("1.5").model, random(2, 16, 5, 12, 20, seed=4)
    noise = random(*latents.shape)
    near(
        "two videos, from a video at 0.4",
        run(bridge.to_model(model), latents, noise, steps=10, denoise=0.4),
        # Core's denoise stretches the schedule: 10 steps at 0.4 are the last of 25.
        ours(model, latents, noise, steps=25, denoise=0.4),
        2e-4,
    )
    mask = torch.ones(1, 1, 5, 12, 20)
    mask[:, :, :2] = 0
    kept = run(bridge.to_model(model), latents[:1], noise[:1], noise_mask=mask)
    near("what a noise mask keeps", kept[:, :, :2], latents[:1, :, :2], 1e-6)


def core_model(folder, dtype=torch.float32):
    """Core's own model on the weights of a checkpoint, computed in ``dtype`` as on a card that has no other of 16
    bits."""
    management.should_use_fp16 = lambda *_, **__: dtype == torch.float16
    management.should_use_bf16 = lambda *_, **__: False
    state = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        state |= load_file(file)
    file = folder / "core.safetensors"
    save_file({naming.comfy_name(name): tensor.clone() for name, tensor in state.items()}, file)
    model = comfy.sd.load_diffusion_model(str(file), model_options={"dtype": dtype})
    # It tells the scale by the number of heads, and these are two.
    model.model.latent_format.scale_factor = 0.7
    return model


def core():
    """With core's parameterisation, and only then, it is core's own model."""
    model = bridge.to_model(build("1.5").model)
    theirs = core_model(FOLDER / "1.5")
    model.add_object_patch("model_sampling", theirs.model.model_sampling)
    for sampler in ("euler", "dpmpp_2m", "uni_pc", "ddim"):
        for length in (4, 6):
            latents = empty(length)
            noise = random(*latents.shape)
            wanted = run(theirs, latents, noise, sampler=sampler)
            near(
                f"core's parameterisation, {sampler}, {length}",
                run(model, latents, noise, sampler=sampler),
                wanted,
                1e-5,
            )
    latents = empty(4)
    noise = random(*latents.shape)
    plain = build("1.5").model
    near("core's own model and the reference", run(theirs, latents, noise), ours(plain, latents, noise), 2.0, 0.5)
    (repaired,) = nodes_model_advanced.ModelSamplingDiscrete().patch(theirs, "v_prediction", True)
    near(
        "core's own model with ModelSamplingDiscrete", run(repaired, latents, noise), ours(plain, latents, noise), 2e-4
    )


def loud():
    """In fp16 a loud model is finite here, and NaN in core."""
    change = lambda parts: loud_models.loud_stream(parts["transformer"], 3e4, gate=4.0)  # noqa: E731
    whole, half = build("loud", change=change), build("loud", dtype="fp16")
    latents = empty(4)
    noise = random(*latents.shape)
    wanted = run(bridge.to_model(whole.model), latents, noise)
    found = run(bridge.to_model(half.model), latents, noise)
    assert half.model.weights.precision.range_safe
    near("loud, range-safe fp16", found, wanted, 1e-2)
    assert not run(core_model(FOLDER / "loud", torch.float16), latents, noise).isfinite().all()
    # Plain fp16, as the user insisted: healed within the run, and told.
    plain = build("loud", dtype="fp16", on_mismatch="warn").model
    told = heard()
    with told:
        near("loud, plain fp16, healed", run(bridge.to_model(plain), latents, noise), wanted, 1e-2)
    assert sum("gave NaN or Inf" in text for text in told.texts) == 1, told.texts


class heard:
    """What is told while a run goes on: a context manager."""

    def __enter__(self):
        self.texts, self._before = [], progress.NodeEvents.note
        progress.NodeEvents.note = lambda events, text, level=0: self.texts.append(text)
        return self

    def __exit__(self, *_):
        progress.NodeEvents.note = self._before


# --- core's nodes ---


def core_nodes():
    """Each node of the table in the docs runs, and does something, or is refused in words."""
    model = bridge.to_model(build("1.5").model)
    latents = empty(4)
    noise = random(*latents.shape)
    plain = run(model, latents, noise)
    length = 9
    long, long_noise = empty(length), random(1, 16, length, 12, 20)
    for fix in (True, False):
        windows = of(
            nodes_context_windows.ContextWindowsManualNode, model, 4, 2, "standard_static", 1, False, "pyramid", 2,
            False, causal_window_fix=fix,
        )  # fmt: skip
        found = run(windows, long, long_noise)
        assert found.shape == long.shape
        near(f"context windows, fix {fix}", found, run(model, long, long_noise), 2.0, 1e-3)
    counted = count_calls()
    with counted:
        found = run(of(nodes_easycache.EasyCacheNode, model, 5.0, 0.15, 0.95, False), latents, noise, steps=10)
    print(f"EasyCache: {counted.calls} of 10 calls", flush=True)
    assert counted.calls < 10
    apg = of(nodes_apg.APG, model, 1.0, 5.0, 0.0)
    zero = of(nodes_cfg.CFGZeroStar, model)
    (rescaled,) = nodes_model_advanced.RescaleCFG().patch(model, 0.7)
    skip = of(nodes_slg.SkipLayerGuidanceDiT, model, 3.0, 0.0, 1.0, "0", "", 0.0)
    simple = of(nodes_slg.SkipLayerGuidanceDiTSimple, model, 0.0, 1.0, "1", "")
    for name, patched in {
        "APG": apg,
        "CFGZeroStar": zero,
        "RescaleCFG": rescaled,
        "SLG": skip,
        "SLG simple": simple,
    }.items():
        near(name, run(patched, latents, noise), plain, 5.0, 1e-4)
    (discrete,) = nodes_model_advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)
    near("ModelSamplingDiscrete", run(discrete, latents, noise), plain, 1e-3)
    (as_it_is,) = nodes_model_advanced.ModelComputeDtype().patch(model, "default")
    near("ModelComputeDtype, default", run(as_it_is, latents, noise), plain, 0.0)
    refused("The model runs in fp32", lambda: nodes_model_advanced.ModelComputeDtype().patch(model, "fp16"))
    # A patch of one branch is gone in the other.
    near("after all of them", run(model, latents, noise), plain, 0.0)
    refused("VOID's sampler", lambda: custom(model, latents, noise, of(nodes_void.VOIDSampler)))
    lazy = of(nodes_easycache.LazyCacheNode, model, 0.2, 0.15, 0.95, False)
    refused("LazyCache", lambda: run(lazy, latents, noise))
    from comfy_extras import (
        nodes_attention_multiply,
        nodes_eps,
        nodes_freelunch,
        nodes_lt,
        nodes_model_merging,
        nodes_nag,
        nodes_pag,
        nodes_rope,
    )

    refused("cannot be saved", lambda: nodes_model_merging.ModelSave().save(model, "x"))
    refused("cannot be saved", lambda: nodes_model_merging.CheckpointSave().save(model, None, None, "x"))
    refused("Merging models", lambda: nodes_model_merging.ModelMergeSimple().merge(model, model, 0.5))
    nag = of(nodes_nag.NAGuidance, model, 5.0, 0.5, 1.5)
    refused("NAG, PAG", lambda: run(nag, latents, noise))
    perturbed = of(nodes_pag.PerturbedAttentionGuidance, model, 3.0)
    refused("PAG, STG and their like", lambda: run(perturbed, latents, noise))
    for node, *given in ((nodes_lt.LTXVSpatioTemporalGuidance, 3.0, "0"), (nodes_lt.LTXVModalityGuidance, 3.0)):
        apart = of(node, model, *given, 0.0, 1.0)
        refused("change nothing", lambda apart=apart: run(apart, latents, noise))
    turned = of(nodes_rope.ScaleROPE, model, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    refused("rotary positions", lambda: run(turned, latents, noise))
    sd3 = nodes_model_advanced.ModelSamplingSD3().patch(model, 3.0)[0]
    for kind in ("eps", "lcm", "x0", "img_to_img"):
        other = nodes_model_advanced.ModelSamplingDiscrete().patch(model, kind, False)[0]
        refused("CogVideoX predicts v", lambda other=other: run(other, latents, noise))
    refused("CogVideoX predicts v", lambda: run(sd3, latents, noise))
    edm, continuous = nodes_model_advanced.ModelSamplingContinuousEDM(), nodes_model_advanced.ModelSamplingContinuousV()
    for kind in ("edm", "edm_playground_v2.5", "eps"):
        other = edm.patch(model, kind, 120.0, 0.002)[0]
        refused("CogVideoX predicts v", lambda other=other: run(other, latents, noise))
    # Those that predict v, and tell the model other timesteps than the noise is of.
    for node, *given in (
        (edm, "v_prediction", 120.0, 0.002),
        (continuous, "v_prediction", 500.0, 0.03),
        (nodes_model_advanced.ModelSamplingDiscrete(), "v_prediction", False),
    ):
        other = node.patch(model, *given)[0]
        refused("another noise schedule", lambda other=other: run(other, latents, noise))
    shifted = bridge.to_model(build("2b", "2b").model)
    (zero_snr,) = nodes_model_advanced.ModelSamplingDiscrete().patch(shifted, "v_prediction", True)
    refused("another noise schedule", lambda: run(zero_snr, latents, noise))
    scaled = of(nodes_eps.EpsilonScaling, model, 1.005)
    refused("Epsilon Scaling", lambda: run(scaled, latents, noise))
    cached = of(nodes_easycache.EasyCacheNode, windows, 0.2, 0.15, 0.95, False)
    refused("another window", lambda: run(cached, long, long_noise))
    # What looks for other models' parts.
    for node, *given in ((nodes_freelunch.FreeU, 1.1, 1.2, 0.9, 0.2), (nodes_freelunch.FreeU_V2, 1.3, 1.4, 0.9, 0.2)):
        refused("made for other models", lambda node=node, given=given: of(node, model, *given))
    refused(
        "made for other models", lambda: nodes_model_advanced.ModelNoiseScale().patch(model, 1.0), (AttributeError,)
    )
    refused("made for other models", lambda: model.model.diffusion_model.forward_video, (AttributeError,))
    assert not hasattr(model.model.diffusion_model, "forward_video")
    attention = lambda: of(nodes_attention_multiply.UNetSelfAttentionMultiply, model, 2.0, 1.0, 1.0, 1.0)  # noqa: E731
    refused("scales the model's own weights", attention)
    control = {"control": comfy.controlnet.ControlBase(), "control_apply_to_uncond": True}
    refused("A ControlNet", lambda: run(model, latents, noise, extra=control))
    for dimension in (0, 1, 3, 4):
        along = of(
            nodes_context_windows.ContextWindowsManualNode, model, 4, 2, "standard_static", 1, False, "pyramid",
            dimension, False,
        )  # fmt: skip
        refused("Set dim to 2", lambda along=along: run(along, long, long_noise))
    told = heard()
    with told:
        run(model, latents, noise, scheduler="ddim_uniform")
    assert any("ddim_uniform is none" in text for text in told.texts), told.texts
    image = {"concat_latent_image": empty(4)}
    refused("is a text-to-video model", lambda: run(model, latents, noise, extra=image))
    refused(
        "no start image is connected", lambda: run(bridge.to_model(build("1.5-i2v", "1.5-i2v").model), latents, noise)
    )
    refused("made by another model's text encoder", lambda: run(model, latents, noise, given=prompts(width=64)))


def custom(model, latents, noise, sampler):
    guider = comfy.samplers.CFGGuider(model)
    positive, negative = ([[prompt, {}]] for prompt in prompts())
    guider.set_conds(positive, negative)
    guider.set_cfg(6.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 5)
    return guider.sample(noise, latents, sampler, sigmas, seed=7, disable_pbar=True)


class count_calls:
    """Count the calls of the transformer: a context manager."""

    def __enter__(self):
        from diffusers import CogVideoXTransformer3DModel as kind

        self.calls, self._kind, self._before = 0, kind, kind.forward

        def counted(module, *args, **kwargs):
            self.calls += 1
            return self._before(module, *args, **kwargs)

        kind.forward = counted
        return self

    def __exit__(self, *_):
        self._kind.forward = self._before


def conditionings():
    """Parts of a picture, parts of a batch, parts of a run and a second model work, or are said in words."""
    opened = build("1.5")
    model, prompt, negative = bridge.to_model(opened.model), *([[prompt, {}]] for prompt in prompts())
    latents = empty(5)
    noise = random(*latents.shape)

    def limited(node, **options):
        return getattr(node, node.FUNCTION)(conditioning=negative, strength=1.0, **options)[0]

    def sampled(extra, length=5):
        given = prompt + extra, negative
        latents = empty(length)
        return comfy.sample.sample(
            model, random(*latents.shape), 2, 6.0, "ddim", "simple", *given, latents, seed=7, disable_pbar=True
        )

    share = limited(nodes.ConditioningSetAreaPercentage(), width=0.5, height=1.0, x=0.25, y=0.0)
    refused("Set Area with Percentage for Video", lambda: sampled(share))
    mask = torch.rand(1, 96, 160)
    bounds = limited(nodes.ConditioningSetMask(), mask=mask, set_cond_area="mask bounds")
    refused("Choose default for set_cond_area", lambda: sampled(bounds))
    many = limited(nodes.ConditioningSetMask(), mask=mask.expand(17, -1, -1), set_cond_area="default")
    refused("Use a mask of one picture", lambda: sampled(many))
    volume = nodes_video_model.ConditioningSetAreaPercentageVideo()
    for works in (
        limited(volume, width=0.5, height=1.0, temporal=0.5, x=0.25, y=0.0, z=0.0),
        limited(nodes.ConditioningSetArea(), width=80, height=96, x=0, y=0),
        # Of an odd number of cells, in which nothing is a patch.
        limited(nodes.ConditioningSetArea(), width=72, height=56, x=8, y=8),
        limited(nodes.ConditioningSetArea(), width=8, height=8, x=0, y=0),
        limited(nodes.ConditioningSetMask(), mask=mask, set_cond_area="default"),
    ):
        assert sampled(works).isfinite().all()
    masked = limited(nodes.ConditioningSetMask(), mask=mask.expand(4, -1, -1), set_cond_area="default")
    assert sampled(masked, length=4).isfinite().all()

    # A video of a batch, alone: from its own noise, padding included.
    for length in (4, 5):
        batch = empty(length, 3)
        together = run(model, batch, comfy.sample.prepare_noise(batch, 7), steps=3)
        alone = run(model, batch[2:], comfy.sample.prepare_noise(batch[2:], 7, [2]), steps=3)
        near(f"the third of a batch, {length} latent frames", alone, together[2:], 1e-4)
        # As --fp16-intermediates has latents.
        half = batch[2:].half()
        alone = run(model, half, comfy.sample.prepare_noise(half, 7, [2]), steps=3)
        near(f"the third of a batch, {length} latent frames in fp16", alone, together[2:], 1e-3)

    # In two runs: only the frame in front is lost, and that is said.
    for length, words in ((4, 0), (5, 1)):
        latents = empty(length)
        noise, told = random(*latents.shape), heard()
        whole = run(model, latents, noise, steps=4)
        half = run(model, latents, noise, steps=4, last_step=2)
        with told:
            other = run(model, half, torch.zeros_like(noise), steps=4, start_step=2, disable_noise=True)
        near(f"in two runs, {length} latent frames", other[:, :, 1:], whole[:, :, 1:], 1e-2)
        assert sum("otherwise than in one run" in text for text in told.texts) == words, told.texts

    # Two models in one guider.
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    halves = {f"{layer}.lora_A.weight": random(4, 128) / 30, f"{layer}.lora_B.weight": random(128, 4)}
    save_file(halves, FOLDER / "second.safetensors")
    with_lora = bridge.to_model(handles.with_lora(opened.model, FOLDER / "second.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(model, None, halves, 1.0, 0)
    apart = bridge.to_model(build("1.5").model)

    def dual(first, second, steps=2, cfg=6.0, given=(prompt, negative), latents=latents, noise=noise):
        guider = nodes_custom_sampler.Guider_DualModel(first, second)
        guider.set_conds(*given)
        guider.set_cfg(cfg)
        sigmas = comfy.samplers.calculate_sigmas(first.get_model_object("model_sampling"), "simple", steps)
        ddim = comfy.samplers.sampler_object("ddim")
        return guider.sample(noise, latents, ddim, sigmas, seed=7, disable_pbar=True)

    plain = run(model, latents, noise, steps=2)
    near("one model twice", dual(model, model.clone()), plain, 1e-4)
    near("two models", dual(model, apart), plain, 1e-4)
    near("bridged twice", dual(model, bridge.to_model(opened.model)), plain, 1e-4)
    near("a LoRA in the first of two", dual(with_lora, apart), run(with_lora, latents, noise, steps=2), 1.0, 1e-4)
    near("a LoRA in both", dual(patched, patched), run(patched, latents, noise, steps=2), 1e-4)
    near("a LoRA in the second, ours and core's", dual(apart, with_lora), dual(apart, patched), 1e-4)
    near("a LoRA in the second", dual(apart, with_lora), plain, 1.0, 1e-4)
    for first, second in ((with_lora, model), (model, with_lora), (patched, model), (model, patched)):
        refused("what belongs to one would act in both", lambda pair=(first, second): dual(*pair))

    # The second is looked at as the first is.
    (shifted,) = nodes_model_advanced.ModelSamplingSD3().patch(apart, 3.0)
    refused("such as ModelSamplingSD3", lambda: dual(model, shifted))
    refused("Give it a model of the same release", lambda: dual(model, bridge.to_model(build("2b", "2b").model)))
    of_images = bridge.to_model(build("1.5-i2v", "1.5-i2v").model)
    refused("no start image is connected", lambda: dual(model, of_images))
    image = torch.cat([random(1, 16, 1, 12, 20, seed=9), empty(4)], dim=2)
    alike, unlike = ([[entries[0][0], {"concat_latent_image": image}]] for entries in (prompt, negative))
    for pair, one_side in (((of_images, model), (alike, negative)), ((model, of_images), (prompt, unlike))):
        both = dual(*pair, given=(alike, unlike))
        near("of the two one reads images", dual(*pair, given=one_side), both, 0.0)
    # Behind core's own, which has no wrappers of ours.
    own, even, drawn = core_model(FOLDER / "1.5"), empty(4), random(1, 16, 4, 12, 20)
    (own,) = nodes_model_advanced.ModelSamplingDiscrete().patch(own, "v_prediction", True)
    other, _ = comfy.sd.load_lora_for_models(apart, None, halves, 1.0, 0)
    found, wanted = (dual(first, other, latents=even, noise=drawn) for first in (own, model))
    near("a LoRA in the second, behind core's own model", found, wanted, 1e-4)

    # Each has its own cache, which counts the steps of the whole run.
    cached, also = (
        handles.with_cache(of_one, cache.Cache("taylorseer", 0.5, 0.2, 1.0))
        for of_one in (opened.model, build("1.5").model)
    )
    wanted, told = run(bridge.to_model(cached), latents, noise, steps=4), heard()
    with told:
        for name, other in (("bridged twice", cached), ("two models", also)):
            near(f"{name}, with caches", dual(bridge.to_model(cached), bridge.to_model(other), steps=4), wanted, 1e-4)
    assert [text for text in told.texts if "skipped" in text] == [
        f"TaylorSeer skipped {count} block evaluations (25%)." for count in ("4 of 16", "2 of 8", "2 of 8")
    ], told.texts
    unused = bridge.to_model(build("1.5").model)
    near(
        "a second model that cfg does not ask for",
        dual(model, unused, cfg=1.0),
        run(model, latents, noise, steps=2, cfg=1.0),
        1e-4,
    )
    assert not unused.weights.is_loaded


def compiling():
    """Core's node asks for compiling, and the pack's own compiles, block by block."""
    model = bridge.to_model(build("1.5").model)
    latents = empty(4)
    noise = random(*latents.shape)
    told = heard()
    with told:
        found = run(of(nodes_torch_compile.TorchCompileModel, model, "inductor"), latents, noise, steps=2)
    near("TorchCompileModel", found, run(model, latents, noise, steps=2), 1e-3)
    assert any("Compiling the transformer's block" in text or "without compiling" in text for text in told.texts)


# --- LoRAs ---


def loras():
    """LoRAs of core's loaders are ours, whatever they call the layers, and in every storage that can have them."""
    opened = build("1.5")
    latents = empty(4)
    noise = random(*latents.shape)
    layers = [f"transformer_blocks.{block}.attn1.{name}" for block in range(2) for name in ("to_q", "to_out.0")]
    halves = {
        layer: (random(4, 128, seed=index) / 30, random(128, 4, seed=index + 50) / 5)
        for index, layer in enumerate(layers)
    }

    def write(name, spell, down="lora_A.weight", up="lora_B.weight", alpha=None):
        tensors = {}
        for layer, (first, second) in halves.items():
            tensors |= {f"{spell(layer)}.{down}": first, f"{spell(layer)}.{up}": second}
            if alpha is not None:
                tensors[f"{spell(layer)}.alpha"] = torch.tensor(alpha)
        save_file(tensors, FOLDER / f"{name}.safetensors")
        return tensors

    diffusers = write("diffusers", lambda layer: f"transformer.{layer}")
    kohya = ("lora_down.weight", "lora_up.weight", 4.0)
    spelled = {
        "transformer.": diffusers,
        "bare": write("bare", lambda layer: layer),
        "diffusion_model.": write("generic", lambda layer: f"diffusion_model.{layer}"),
        "core's names": write("core", lambda layer: f"diffusion_model.{naming.comfy_name(layer)}"),
        "kohya": write("kohya", lambda layer: f"lora_unet_{layer.replace('.', '_')}", *kohya),
    }
    for dtype in ("fp32", "fp16"):
        base = build("1.5", dtype=dtype).model
        plain = run(bridge.to_model(base), latents, noise)
        changed = handles.with_lora(base, FOLDER / "diffusers.safetensors", 0.8)
        wanted = run(bridge.to_model(changed), latents, noise)
        near(f"{dtype}: the LoRA", wanted, plain, 2.0, 1e-3)
        for name, tensors in spelled.items():
            model, _ = comfy.sd.load_lora_for_models(bridge.to_model(base), None, dict(tensors), 0.8, 0)
            near(
                f"{dtype}: core's loader, {name}", run(model, latents, noise), wanted, 1e-5 if dtype == "fp32" else 1e-3
            )
            near("the model without it, after", run(model.parent, latents, noise), plain, 0.0)
    packed = bridge.to_model(handles.quantized(opened.model, "int8_weight_only"))
    model, _ = comfy.sd.load_lora_for_models(packed, None, dict(diffusers), 0.8, 0)
    near("quantized: the LoRA", run(model, latents, noise), run(packed, latents, noise), 2.0, 1e-3)
    whole = {f"diffusion_model.{layers[0]}.diff": random(128, 128) / 30}
    model, _ = comfy.sd.load_lora_for_models(bridge.to_model(opened.model), None, dict(whole), 1.0, 0)
    near("a whole weight's change", run(model, latents, noise), run(model.parent, latents, noise), 2.0, 1e-4)
    theirs, _ = comfy.sd.load_lora_for_models(
        core_model(FOLDER / "1.5"),
        None,
        {k.replace(layers[0], naming.comfy_name(layers[0])): v for k, v in whole.items()},
        1.0,
        0,
    )
    model.add_object_patch("model_sampling", theirs.model.model_sampling)
    near("and core's own patching of it", run(model, latents, noise), run(theirs, latents, noise), 1e-5)
    for name, unfit in {"packed": packed, "scaled": bridge.to_model(build("1.5", dtype="fp16").model)}.items():
        refused(f"are {name}", lambda unfit=unfit: comfy.sd.load_lora_for_models(unfit, None, dict(whole), 1.0, 0))
    mine = bridge.to_model(opened.model)
    other = {
        "lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 4),
        "lora_unet_down_blocks_0.lora_up.weight": torch.zeros(4, 4),
    }
    refused("named like a layer", lambda: comfy.sd.load_lora_for_models(mine, None, other, 1.0, 0))
    wide = {
        f"transformer.{layers[0]}.lora_A.weight": torch.zeros(4, 64),
        f"transformer.{layers[0]}.lora_B.weight": torch.zeros(128, 4),
    }
    refused("does not fit", lambda: comfy.sd.load_lora_for_models(mine, None, wide, 1.0, 0))
    refused("bypass LoRA", lambda: comfy.sd.load_bypass_lora_for_models(mine, None, dict(diffusers), 1.0, 0))
    from comfy import hooks

    group = hooks.create_hook_lora(diffusers, 1.0, 0.0)
    extra = {"hooks": group}
    refused("LoRA hooks", lambda: run(mine, latents, noise, extra=extra))


# --- parts ---


def parts():
    """CLIP and VAE in core's nodes give what our nodes give, and ours take core's VAE."""
    opened = build("1.5")
    model, clip, core_vae = NODES["CogVideoX15ToComfyUI"]().run(
        model=opened.model, text_encoder=opened.text_encoder, vae=opened.vae
    )
    assert isinstance(model.model, comfy.model_base.BaseModel)
    assert isinstance(core_vae, comfy.sd.VAE)
    assert isinstance(clip, comfy.sd.CLIP)
    for prompt in ("a panda plays the guitar", "", "(a cat:1.4) in a garden"):
        ((found, extra),) = nodes.CLIPTextEncode().encode(clip, prompt)[0]
        ((wanted, _),) = NODES["CogVideoX15TextEncode"]().run(text_encoder=opened.text_encoder, prompt=prompt)[0]
        assert found.equal(wanted)
        assert extra["pooled_output"] is None
        ((again, _),) = NODES["CogVideoX15TextEncode"]().run(text_encoder=clip, prompt=prompt)[0]
        assert again.equal(wanted)
    refused(
        "last layer", lambda: nodes.CLIPTextEncode().encode(nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0], "a")
    )
    for length, batch in ((4, 1), (5, 2)):
        samples = {"samples": random(batch, 16, length, 4, 6)}
        wanted = NODES["CogVideoX15VAEDecode"]().run(samples=samples, vae=opened.vae)[0]
        assert nodes.VAEDecode().decode(core_vae, samples)[0].equal(wanted)
        assert nodes.VAEDecodeTiled().decode(core_vae, samples, 64, 16, 8, 4)[0].equal(wanted)
        assert NODES["CogVideoX15VAEDecode"]().run(samples=samples, vae=core_vae)[0].equal(wanted)
    images = torch.rand(17, 32, 48, 3)
    wanted = NODES["CogVideoX15VAEEncode"]().run(images=images, vae=opened.vae)[0]["samples"]
    assert nodes.VAEEncode().encode(core_vae, images)[0]["samples"].equal(wanted)
    assert nodes.VAEEncodeTiled().encode(core_vae, images, 64, 16)[0]["samples"].equal(wanted)
    told = heard()
    with told:
        assert nodes.VAEEncode().encode(core_vae, torch.rand(19, 40, 56, 3))[0]["samples"].shape == (1, 16, 5, 4, 6)
    assert any("cut to 17" in text for text in told.texts)
    assert any("cropped to 48x32" in text for text in told.texts)
    refused("cannot be saved", core_vae.get_sd)
    refused("made for other models", lambda: clip.generate(clip.tokenize("a cat")), (AttributeError,))
    refused("made for other models", lambda: core_vae.first_stage_model.gaussians_per_point, (AttributeError,))
    # As nodes look that compile or decode by themselves.
    refused("works inside of a text encoder or VAE", lambda: core_vae.first_stage_model.decoder, (AttributeError,))
    refused("works inside of a text encoder or VAE", lambda: clip.cond_stage_model.t5xxl, (AttributeError,))
    assert not hasattr(clip.cond_stage_model, "t5xxl")
    refused("asks for 'l'", lambda: clip.tokenize("a cat")["l"])
    print("CLIP and VAE are ours", flush=True)


def core_vae():
    """Our nodes run on the weights of core's CogVideoX VAE, where they are."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    levels = dict(down_block_types=["CogVideoXDownBlock3D"] * 4, up_block_types=["CogVideoXUpBlock3D"] * 4)
    # Of the released shapes: core's class knows no others.
    reference = AutoencoderKLCogVideoX(block_out_channels=(128, 256, 256, 512), **levels).eval()
    file = FOLDER / "vae.safetensors"
    save_file(reference.state_dict(), file)
    theirs = comfy.sd.VAE(sd=load_file(file), dtype=torch.float32)
    images, latents = torch.rand(9, 32, 48, 3), random(1, 16, 3, 4, 6)
    with torch.no_grad():
        wanted = reference.decode(latents).sample[0].mul(0.5).add(0.5).clamp(0, 1).permute(1, 2, 3, 0)
        encoded, first = (
            reference.encode(clip.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mode() for clip in (images, images[:1])
        )
    before = sum(tensor.nbytes for tensor in tensors())
    found = NODES["CogVideoX15VAEDecode"]().run(samples={"samples": latents}, vae=theirs)[0]
    near("core's VAE in our VAE Decode, and diffusers", found, wanted, 1e-5)
    near("core's own decode", nodes.VAEDecode().decode(theirs, {"samples": latents})[0], wanted, 1.0, 1e-3)
    found = NODES["CogVideoX15VAEEncode"]().run(images=images, vae=theirs)[0]["samples"]
    near("core's VAE in our VAE Encode, and diffusers", found, encoded, 1e-5)
    positive = negative = [[random(1, 226, 32), {}]]
    with_image = NODES["CogVideoX15ImageToVideo"]().run(
        positive=positive, negative=negative, vae=theirs, start_image=images[:1], width=48, height=32, length=17
    )[0]
    near("core's VAE in our Image to Video", with_image[0][1]["concat_latent_image"][:, :, :1], first, 1e-5)
    # Nothing of its size was made that lives on.
    size = sum(tensor.nbytes for tensor in theirs.first_stage_model.state_dict().values())
    assert sum(tensor.nbytes for tensor in tensors()) - before < size / 4
    assert sum(loaded.model is theirs.patcher for loaded in management.current_loaded_models) == 1
    wan = comfy.sd.VAE(sd={"taesd_decoder.1.weight": torch.zeros(64, 4, 3, 3)})
    refused("TAESD", lambda: NODES["CogVideoX15VAEDecode"]().run(samples={"samples": latents}, vae=wan))


def tensors():
    """All tensors that are alive, each storage once."""
    gc.collect()
    return {
        t.data_ptr(): t
        for t in gc.get_objects()
        if torch.is_tensor(t) and t.device.type == "cpu" and t.layout == torch.strided
    }.values()


# --- a run ---


def one_run():
    """One sentinel, one loaded module and one place in core's list; batches, caches, previews and cancelling."""
    opened = build("1.5")
    model = bridge.to_model(opened.model)
    latents = empty(5, batch=2)
    noise = random(*latents.shape)
    entered, loads = [], []
    enter, load_module = sentinel.Sentinel.__enter__, weights.load_module
    sentinel.Sentinel.__enter__ = lambda self: entered.append(1) or enter(self)
    weights.load_module = lambda *args, **kwargs: loads.append(1) or load_module(*args, **kwargs)
    seen = []
    found = run(
        model, latents, noise, callback=lambda step, clean, noisy, steps: seen.append((step, clean.shape, noisy.shape))
    )
    assert (len(entered), len(loads)) == (1, 1)
    # What is shown has the video's frames, and not what pads them.
    assert seen == [(step, latents.shape, latents.shape) for step in range(5)]
    near("two videos at once", found, ours(opened.model, latents, noise), 2e-4)
    run(model, latents, noise)
    assert (len(entered), len(loads)) == (3, 1)
    sentinel.Sentinel.__enter__, weights.load_module = enter, load_module
    # In core's list once, with its true size, also where our own sampler ran on the same weights.
    host = importlib.import_module("pack.nodes.host")
    part = opened.model.weights
    for _ in range(2):
        host.make_room(part, 1 << 20)
        assert [loaded.model_memory() for loaded in management.current_loaded_models] == [part.nbytes]
        management.load_models_gpu([model])
        assert [loaded.model for loaded in management.current_loaded_models] == [model]
        assert [loaded.model_loaded_memory() for loaded in management.current_loaded_models] == [part.nbytes]
    parked = []
    part.park = lambda: parked.append(1)
    management.unload_all_models()
    assert parked
    del part.park
    for memory in ("offload_blocks", "offload_layers"):
        offloading = build("1.5", memory=memory).model
        assert bridge.to_model(offloading).model_size() == 0
        near(memory, run(bridge.to_model(offloading), latents, noise), found, 0.0)

    # A cancelled run leaves nothing behind: the next is as the first.
    def cancel(step, *_):
        management.interrupt_current_processing(step == 1)
        management.throw_exception_if_processing_interrupted()

    try:
        run(model, latents, noise, callback=cancel)
        raise AssertionError("not cancelled")
    except management.InterruptProcessingException:
        pass
    assert model.model.diffusion_model.run is None
    near("after a cancelled run", run(model, latents, noise), found, 0.0)
    # Previews: core's, in our colours.
    import comfy.cli_args
    import latent_preview
    from PIL import ImageStat

    comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.Latent2RGB
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    shown = previewer.decode_latent_to_preview(latents.normal_())
    assert shown.size == (20, 12)
    assert max(ImageStat.Stat(shown).stddev) > 40
    # Gone with the nodes' outputs.
    gone = weakref.ref(part)
    del model, opened, part, offloading, found
    gc.collect()
    assert gone() is None


def caches():
    """Our step caches work under core's samplers, and refuse those they cannot follow."""
    deep = tiny.build_deep(FOLDER / "deep")
    plain = handles.open_handles(deep, "fp32").model
    latents = empty(4)
    noise = random(*latents.shape)
    for method in choices.CACHES:
        cached = handles.with_cache(plain, cache.Cache(method, 0.5, 0.1, 0.95))
        near(
            method, run(bridge.to_model(cached), latents, noise, steps=10), ours(cached, latents, noise, steps=10), 2e-3
        )
    near(
        "a cache makes another video",
        run(bridge.to_model(cached), latents, noise, steps=10),
        ours(plain, latents, noise, steps=10),
        1.0,
        1e-4,
    )
    refused("counts steps", lambda: run(bridge.to_model(cached), latents, noise, sampler="heun", steps=10))
    skip = of(nodes_slg.SkipLayerGuidanceDiT, bridge.to_model(cached), 3.0, 0.3, 1.0, "0", "", 0.0)
    refused("counts steps", lambda: run(skip, latents, noise, steps=10))
    # All steps but the first and the last, whatever the weights are.
    scheduled(handles.with_cache(plain, cache.Cache(choices.TEACACHE, 0.8, 0.0, 1.0)), latents, noise)


def scheduled(cached, latents, noise):
    """Where other conditionings begin or end within a run, the step runs in full: nothing of one prompt is reused for
    another."""
    first, second, negative = prompts(tokens=(226, 226, 226))
    whole, early, late = (0.0, 1.0), (0.0, 0.5), (0.5, 1.0)

    def during(prompt, share):
        return [prompt, {"start_percent": share[0], "end_percent": share[1]}]

    def sampled(positive, negatives, full=()):
        def planned(*given):
            schedule = plan(*given)
            steps.append(schedule.skipped)
            return dataclasses.replace(schedule, skipped=schedule.skipped - set(full))

        steps, plan, sampling.plan_skips = [], sampling.plan_skips, planned
        options = dict(disable_pbar=True, seed=7)
        try:
            model = bridge.to_model(cached)
            found = comfy.sample.sample(
                model, noise, 10, 6.0, "ddim", "simple", positive, negatives, latents, **options
            )
        finally:
            sampling.plan_skips = plan
        return found, steps[0]

    for what, positive, negatives in (
        ("a prompt after another", [(first, early), (second, late)], [(negative, whole)]),
        ("a prompt beside another from the middle on", [(first, whole), (second, late)], [(negative, whole)]),
        ("a prompt beside another up to the middle", [(first, early), (second, whole)], [(negative, whole)]),
        ("a negative prompt after another", [(first, whole)], [(negative, early), (second, late)]),
    ):
        given = [[during(*entry) for entry in entries] for entries in (positive, negatives)]
        found, skipped = sampled(*given)
        assert {4, 5} <= skipped, skipped
        # Step 5, where the prompts change, runs in full as it is, and step 4 does not.
        assert torch.equal(found, sampled(*given, full=[5])[0]), what
        assert not torch.equal(found, sampled(*given, full=[4])[0]), what


@contextmanager
def failing(times):
    """Have the transformer run out of memory at its calls from the third on, so many times."""
    from diffusers import CogVideoXTransformer3DModel as kind

    before, calls = kind.forward, []

    def fails(module, *args, **kwargs):
        calls.append(kwargs["hidden_states"].shape[0])
        if 3 <= len(calls) < 3 + times:
            raise torch.OutOfMemoryError("no memory is left")
        return before(module, *args, **kwargs)

    kind.forward = fails
    try:
        yield calls
    finally:
        kind.forward = before


def out_of_memory():
    """Running out of memory goes on in less, and where there is no less, the latents are saved."""
    opened = build("1.5")
    model = bridge.to_model(opened.model)
    latents = empty(5)
    noise = random(*latents.shape)
    wanted = run(model, latents, noise)
    with failing(1) as calls:
        near("after running out of memory once", run(model, latents, noise), wanted, 1e-5)
    # Both halves together, then one by one.
    assert calls[:3] == [2, 2, 2]
    assert set(calls[3:]) == {1}
    import folder_paths

    folder_paths.set_input_directory(str(FOLDER))
    with failing(1000):
        refused("can be opened with Load Latent", lambda: run(model, latents, noise))
    (saved,) = FOLDER.glob("*.latent")
    assert load_file(saved)["latent_tensor"].shape == latents.shape


def check():
    """Model Check says what core's own model is and stops it at the first step that is not finite."""
    change = lambda parts: loud_models.loud_stream(parts["transformer"], 3e4, gate=4.0)  # noqa: E731
    build("loud", change=change)
    latents = empty(4)
    noise = random(*latents.shape)
    loud_half = core_model(FOLDER / "loud", torch.float16)
    node = NODES["CogVideoX15ModelCheck"]()
    model, report = node.run(model=loud_half)
    for words in (
        "held in fp16",
        "trained in bf16",
        "computes in fp16",
        "Mismatch",
        "scaled by 4519",
        "wrapping the first",
    ):
        assert words in report, (words, report)
    refused("Step 1 of 5: ComfyUI's own CogVideoX gave NaN or Inf", lambda: run(model, latents, noise))
    refused("blocks.0.ff_out", lambda: run(model, latents, noise))
    told = heard()
    with told:
        assert not run(node.run(model=loud_half, action="warn")[0], latents, noise).isfinite().all()
    assert len([text for text in told.texts if "gave NaN" in text]) == 1, told.texts
    build("1.5")
    quiet = core_model(FOLDER / "1.5")
    model, report = node.run(model=quiet)
    assert "computes in fp32" in report
    assert "Mismatch" not in report
    near("a watched model", run(model, latents, noise), run(quiet, latents, noise), 0.0)
    mine = bridge.to_model(build("1.5").model)
    assert "watches itself" in node.run(model=mine)[1]
    other = comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), "cpu", "cpu")
    refused("knows what CogVideoX needs only", lambda: node.run(model=other))


def speed():
    """Seconds a step under KSampler and in our sampler, which take turns: for ``benchmarks/bridge.py``."""
    big = dict(num_attention_heads=8, num_layers=4, time_embed_dim=512, text_embed_dim=512)
    change = lambda parts: parts.update(transformer=tiny.build_transformer("1.5", **big))  # noqa: E731
    model = build("big", change=change).model
    mine, latents = bridge.to_model(model), empty(8, height=20, width=32)
    noise, given, ends = random(*latents.shape), prompts(width=512), []

    class Ends(importlib.import_module("pack.cogvideox.events").Events):
        def step(self, *_):
            ends.append(time.perf_counter())

    def ours_does():
        ours(model, latents, noise, given, steps=6, events=Ends())

    def core_does():
        run(mine, latents, noise, given=given, steps=6, callback=lambda *_: ends.append(time.perf_counter()))

    rounds = {"our sampler": (ours_does, []), "KSampler": (core_does, [])}
    for turn in range(5):
        for work, times in rounds.values():
            ends.clear()
            work()
            # The first turn warms up.
            times += [later - before for before, later in pairwise(ends)] if turn else []
    medians = {name: statistics.median(times) for name, (_, times) in rounds.items()}
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.3f} s a step, {seconds / medians['our sampler']:.3f}", flush=True)


if __name__ == "__main__":
    for section in arguments:
        globals()[str(section)]()
        print(f"{section} done", flush=True)
    sys.exit(0)
