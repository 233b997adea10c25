"""TeaCache skips exactly as many steps as it is told, those that the paper's rule skips, and equals its reference.

With the environment variable TEACACHE_PATH at a checkout of https://github.com/ali-vilab/TeaCache the reference's own
forward is run too.
"""

import importlib.util
import os
import random
import re
import types
from functools import partial
from pathlib import Path

import diffusers
import numpy
import pytest
import torch
from torch import nn

from cogvideox.handles import open_handles, with_cache
from cogvideox.modules.cache import Cache
from cogvideox.modules.teacache import FAMILIES, TeaRun, family_of, schedule_skips
from cogvideox.sampling import sample
from cogvideox.schedulers import make_scheduler, schedule_timesteps
from cogvideox.skips import embedding_distances, plan_skips, skips_text
from cogvideox.variants import full_config
from tests.conftest import CPU
from tests.reference import draw_prompts, reference_latents
from tests.tiny_checkpoint import TEXT_WIDTH, build_checkpoint, build_transformer
from tests.told import Told

STEPS, SHAPE = 20, (1, 16, 4, 4, 6)
VARIANTS = ("1.5", "1.5-i2v", "5b", "2b")
#: Steps that the reference's own forward skipped of 20 at a threshold of 0.2, with the weights of ``calm``.
RECORDED = {
    "1.5": [1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18],
    "1.5-i2v": [1, 2, 4, 5, 7, 8, 10, 11, 13, 15, 16, 18],
    "5b": [1, 3, 5, 7, 9, 11, 13, 15, 17],
    "2b": [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17],
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """``calm(variant)``: a checkpoint whose timestep embedding changes by a few percent from step to step, as that of
    trained ones, and not by half."""
    built = {}

    def soothe(variant, parts):
        parts["transformer"] = build_transformer(variant, num_layers=3)
        with torch.no_grad():
            parts["transformer"].time_embedding.linear_2.bias += 1.5

    def get(variant):
        if variant not in built:
            folder = tmp_path_factory.mktemp("calm") / variant
            built[variant] = build_checkpoint(
                folder, variant, change=partial(soothe, variant), stored={"transformer": torch.float32}
            )
        return built[variant]

    return get


@pytest.fixture
def opened(calm):
    return lambda variant: open_handles(calm(variant), "fp32", CPU).model


def timesteps_of(model, steps=STEPS):
    return schedule_timesteps(make_scheduler(model.scheduler_config, "ddim"), steps, 1.0).tolist()


def planned(model, strength, start=0.0, end=1.0, steps=STEPS):
    return plan_skips(with_cache(model, Cache("teacache", strength, start, end)), timesteps_of(model, steps))


class Plain(nn.Module):
    """TeaCache as the paper has it, written down plainly around an unmodified transformer, which it changes: it decides
    at each step from the embedding that the transformer itself makes, and where it skips, the one block adds what all
    added."""

    def __init__(self, transformer, threshold, polynomial, steps):
        super().__init__()
        # A list, as the transformer must not find them below this.
        self.blocks, self.threshold, self.steps = list(transformer.transformer_blocks), threshold, steps
        self.polynomial = numpy.poly1d(polynomial)
        self.step, self.total, self.before, self.skipped, self.added = 0, 0.0, None, [], None
        transformer.register_forward_pre_hook(self.decide, with_kwargs=True)
        transformer.transformer_blocks = nn.ModuleList([self])

    def decide(self, transformer, _, given):
        embedded = transformer.time_embedding(transformer.time_proj(given["timestep"]))
        if transformer.ofs_embedding is not None:
            embedded = embedded + transformer.ofs_embedding(transformer.ofs_proj(given["ofs"]))
        full = self.step in (0, self.steps - 1)
        if not full:
            distance = (embedded - self.before).abs().mean() / self.before.abs().mean()
            self.total += self.polynomial(distance.item())
            full = self.total >= self.threshold
        if full:
            self.total = 0.0
        else:
            self.skipped.append(self.step)
        self.before, self.full, self.step = embedded, full, self.step + 1

    def forward(self, hidden_states, encoder_hidden_states, **more):
        streams = hidden_states, encoder_hidden_states
        if self.full:
            for block in self.blocks:
                streams = block(hidden_states=streams[0], encoder_hidden_states=streams[1], **more)
            self.added = [
                after - before for after, before in zip(streams, (hidden_states, encoder_hidden_states), strict=True)
            ]
            return streams
        return tuple(stream + added for stream, added in zip(streams, self.added, strict=True))


class Reference:
    """The same with the authors' own forward."""

    def __init__(self, transformer, threshold, polynomial, steps):
        path = Path(os.environ["TEACACHE_PATH"]) / "TeaCache4CogVideoX1.5" / "teacache_sample_video.py"
        spec = importlib.util.spec_from_file_location("teacache_reference", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        state = dict(enable_teacache=True, rel_l1_thresh=threshold, cnt=0, num_steps=steps, coefficients=polynomial)
        state |= dict(accumulated_rel_l1_distance=0, previous_modulated_input=None)
        for name, value in state.items():
            setattr(transformer, name, value)
        transformer.forward = types.MethodType(module.teacache_forward, transformer)
        self.ran = []
        transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: self.ran.append(transformer.cnt))
        self.steps = steps

    @property
    def skipped(self):
        """It has counted the step before its blocks run, and begins anew after the last."""
        return sorted(set(range(self.steps)) - {(count - 1) % self.steps for count in self.ran})


RULES = [
    Plain,
    pytest.param(
        Reference, marks=pytest.mark.skipif("TEACACHE_PATH" not in os.environ, reason="needs a checkout of TeaCache")
    ),
]


class TestReference:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
    def test_every_step_of_the_transformer_is_the_references_at_the_threshold_that_is_said(
        self, calm, opened, rule, variant, strength
    ):
        model = opened(variant)
        schedule = planned(model, strength)
        assert len(schedule.skipped) == strength * STEPS
        assert schedule.early == schedule.late
        unmodified = diffusers.CogVideoXTransformer3DModel.from_pretrained(calm(variant) / "transformer").eval()
        config, rotary = unmodified.config, None
        expected = rule(unmodified, schedule.late, family_of(config).polynomial, STEPS)
        if config.use_rotary_positional_embeddings:
            tokens = (2 if config.patch_size_t else 4) * 2 * 3
            angles = torch.randn(tokens, 32).repeat_interleave(2, dim=1)
            rotary = angles.cos(), angles.sin()
        size = (60, 90) if config.use_learned_positional_embeddings else (4, 6)
        run = TeaRun(schedule)
        with torch.no_grad(), model.weights.running() as module, run.attached(module, batched=True):
            for step, timestep in enumerate(timesteps_of(model)):
                given = dict(
                    hidden_states=torch.randn(2, 4, config.in_channels, *size),
                    encoder_hidden_states=torch.randn(2, 226 if variant == "2b" else 8, TEXT_WIDTH),
                    timestep=torch.tensor([int(timestep)] * 2),
                    ofs=torch.tensor([2.0]) if config.ofs_embed_dim else None,
                    image_rotary_emb=rotary,
                    return_dict=False,
                )
                run.begin(step, guided=True)
                assert torch.equal(module(**given)[0], unmodified(**given)[0]), step
        assert expected.skipped == sorted(schedule.skipped)
        assert [step for (step, _), ran in run.ran.items() if ran == 0] == expected.skipped

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
    def test_a_run_is_the_pipeline_with_it(self, calm, opened, rule, scheduler):
        model, prompts = opened("1.5"), draw_prompts(8)
        pipeline = diffusers.CogVideoXPipeline.from_pretrained(calm("1.5"), torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        schedule = planned(model, 0.5)
        rule(pipeline.transformer, schedule.late, FAMILIES["1.5"].polynomial, STEPS)
        expected = reference_latents(pipeline, prompts, SHAPE, scheduler=scheduler, steps=STEPS)
        cached = with_cache(model, Cache("teacache", 0.5, 0.0, 1.0))
        ours = sample(cached, *prompts, torch.zeros(SHAPE), seed=1, steps=STEPS, scheduler=scheduler)
        assert torch.equal(ours, expected)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_steps_are_those_that_the_references_own_forward_skipped(self, opened, variant):
        model = opened(variant)
        distances = embedding_distances(model.weights.part, full_config(model.weights.config), timesteps_of(model))
        changes = [0.0, *map(FAMILIES[variant].change, distances[1:])]
        skipped, total = [], 0.0
        for step in range(1, STEPS - 1):
            total += changes[step]
            if total < 0.2:
                skipped.append(step)
            else:
                total = 0.0
        assert skipped == RECORDED[variant]
        assert planned(model, len(skipped) / STEPS).skipped == set(skipped)


class TestCount:
    @pytest.mark.parametrize("seed", range(5))
    def test_exactly_as_many_as_asked_for_are_skipped_whatever_the_changes(self, seed):
        rng = random.Random(seed)
        for _ in range(200):
            steps = rng.choice((1, 2, 3, 8, 20, 50))
            values = rng.choice(((0.05,), (0.0, 0.1, 0.2), tuple(rng.random() for _ in range(9))))
            changes = [0.0, *(rng.choice(values) for _ in range(steps - 1))]
            allowed = {step for step in range(1, steps - 1) if rng.random() < rng.choice((0.5, 1.0))}
            count = rng.randint(0, len(allowed))
            found = schedule_skips(changes, count, allowed)
            assert len(found.skipped) == count
            assert found.skipped <= allowed

    def test_where_no_threshold_skips_so_many_the_first_steps_run_more_often(self):
        """Of steps that change alike one threshold skips none, and the next every other."""
        found = schedule_skips([0.05] * 21, 5, range(1, 20))
        assert sorted(found.skipped) == [10, 12, 14, 16, 18]
        assert re.search(r"threshold 0\.01 before step \d+ and 0\.1 from there", found.text)

    def test_the_threshold_that_is_said_is_the_roundest(self):
        changes = [0.0, *[0.07] * 20]
        assert [schedule_skips(changes, count, range(1, 20)).late for count in (10, 13)] == [0.1, 0.2]

    @pytest.mark.parametrize("strength", [0.1, 0.3, 0.5, 0.9, 1.0])
    def test_strength_is_the_share_of_the_steps_between_start_and_end(self, opened, strength):
        model = opened("1.5")
        inside = planned(model, strength, 0.2, 0.7).skipped
        assert len(inside) == int(strength * 10 + 1e-9)
        assert inside <= set(range(4, 14))
        # The first step and the last run.
        assert len(planned(model, strength).skipped) == min(18, int(strength * STEPS + 1e-9))

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_it_is_the_same_in_every_dtype(self, calm, opened, dtype):
        other = open_handles(calm("1.5"), dtype, CPU).model
        assert planned(other, 0.4) == planned(opened("1.5"), 0.4)


class TestSaid:
    def test_the_node_and_the_plan_say_the_threshold_and_what_is_published(self, opened):
        model = opened("1.5")
        said = skips_text(with_cache(model, Cache("teacache", 0.5)), steps=50)
        assert re.search(
            r"will skip 21 of 50 steps, the paper's threshold [\d.]+\. .*465 s without, 322 s at 0\.1", said
        )
        assert "475 s without" in skips_text(with_cache(opened("1.5-i2v"), Cache()), steps=50)
        assert "publish no times" in skips_text(with_cache(opened("2b"), Cache()), steps=50)
        assert skips_text(model) is None
        assert skips_text(with_cache(model, Cache("pab"))) is None
        assert skips_text(with_cache(model, Cache(strength=0.0))) is None

    @pytest.mark.parametrize(("variant", "steps", "strength"), [("5b", 50, 0.45), ("5b", 100, 0.15), ("1.5", 200, 0.6)])
    def test_the_threshold_that_is_said_is_the_one_that_skips_as_many(self, opened, variant, steps, strength):
        model = with_cache(opened(variant), Cache("teacache", strength, 0.0, 1.0))
        schedule = planned(opened(variant), strength, steps=steps)
        (said,) = re.findall(r"threshold ([\d.]+)\. ", skips_text(model, steps=steps))
        assert float(said) == schedule.late == schedule.early

    def test_what_is_said_before_is_what_runs_where_guidance_begins_or_ends(self, opened):
        model, said = with_cache(opened("1.5"), Cache("teacache", 1.0, 0.0, 1.0)), []
        guidance = dict(cfg=6.0, cfg_start=0.3, cfg_end=0.8)
        sample(model, *draw_prompts(8), torch.zeros(SHAPE), seed=1, steps=STEPS, events=Told(said), **guidance)
        before = skips_text(model, STEPS, guidance=tuple(guidance.values()))
        (planned_skips,) = re.findall(r"will skip (.*?)\. ", before)
        assert f"Planned were {planned_skips}." in said[-1]
        assert planned_skips not in skips_text(model, STEPS)

    @pytest.mark.parametrize("value", [float("nan"), 0.0])
    def test_a_timestep_embedding_that_is_damaged_or_zero(self, tmp_path, value):
        def damage(parts):
            with torch.no_grad():
                for parameter in parts["transformer"].time_embedding.linear_2.parameters():
                    parameter.fill_(value)

        folder = build_checkpoint(tmp_path / "model", "1.5", change=damage)
        model = with_cache(open_handles(folder, "fp32", CPU).model, Cache("teacache", 0.5))
        if value == 0:
            assert "will skip" in skips_text(model)
        else:
            with pytest.raises(ValueError, match="timestep embedding holds .* Its file is damaged"):
                skips_text(model)

    def test_the_sampler_says_what_was_skipped_as_planned(self, opened):
        model, said = with_cache(opened("1.5"), Cache("teacache", 0.5, 0.0, 1.0)), []
        sample(model, *draw_prompts(8), torch.zeros(SHAPE), seed=1, steps=STEPS, events=Told(said))
        assert said[-1].startswith("TeaCache skipped 30 of 60 block evaluations (50%). Planned were 10 of 20 steps, ")
