"""Say before a run which steps TeaCache will skip: from the timesteps, and the weights of the timestep embedding."""

from collections.abc import Collection, Mapping, Sequence

import torch

from .checkpoint.parts import Part
from .choices import TEACACHE
from .finite import check_finite
from .handles import Model
from .loading import read_wide
from .modules.teacache import Schedule, family_of, schedule_skips
from .requests import guided_steps, turns_of
from .schedulers import make_scheduler, schedule_timesteps
from .variants import OFS, full_config


def plan_skips(model: Model, timesteps: Sequence[float], in_full: Collection[int] = ()) -> Schedule | None:
    """Choose the steps of a run that ``model``'s TeaCache skips; None where it has none that skips.

    Args:
        timesteps: of all steps of the run.
        in_full: steps that must not be skipped, besides the first and the last.
    """
    cache, steps = model.cache, len(timesteps)
    if cache is None or model.skipping != TEACACHE:
        return None
    config = full_config(model.weights.config)
    within = cache.within(steps)
    allowed = [step for step in within if 0 < step < steps - 1 and step not in in_full]
    count = min(len(allowed), int(cache.strength * len(within) + 1e-9))
    change = family_of(config).change
    distances = embedding_distances(model.weights.part, config, timesteps) if count else [0.0] * steps
    return schedule_skips([0.0, *map(change, distances[1:])], count, set(allowed))


def skips_text(
    model: Model,
    steps: int = 50,
    scheduler: str = "ddim",
    denoise: float = 1.0,
    guidance: tuple[float, float, float] = (6.0, 0.0, 1.0),
) -> str | None:
    """Say in a sentence what ``model``'s TeaCache skips, and what is published for that; None where it has none that
    skips.

    Args:
        guidance: ``cfg``, ``cfg_start`` and ``cfg_end`` of ``sample``.
    """
    noise_schedule = make_scheduler(model.scheduler_config, scheduler)
    timesteps = schedule_timesteps(noise_schedule, steps, denoise).tolist()
    schedule = plan_skips(model, timesteps, turns_of(guided_steps(*guidance, len(timesteps))))
    if schedule is None:
        return None
    return f"TeaCache will skip {schedule.text}. {family_of(full_config(model.weights.config)).text}"


def embedding_distances(part: Part, config: Mapping, timesteps: Sequence[float]) -> list[float]:
    """Return how far the timestep embedding, ``ofs`` included, comes from each timestep to the next, relative to its
    size, in L1; 0 for the first.

    Computed in fp32 from the weights as they are stored, so that it is the same in every dtype and after a heal. LoRAs
    are not looked at.

    Raises:
        ValueError: if it is not finite.
    """
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    def embed(what: str, width: int, inner: int, values: torch.Tensor) -> torch.Tensor:
        """Embed ``values`` ``[n]`` as ``CogVideoXTransformer3DModel`` does."""
        projection = Timesteps(width, config["flip_sin_to_cos"], config["freq_shift"])
        with torch.device("meta"):
            layers = TimestepEmbedding(width, inner, config["timestep_activation_fn"])
        weights = read_wide(part, [f"{what}_embedding.{name}" for name in layers.state_dict()])
        layers.load_state_dict({name.partition(".")[2]: value for name, value in weights.items()}, assign=True)
        return layers(projection(values))

    with torch.no_grad():
        inner = config["num_attention_heads"] * config["attention_head_dim"]
        embedded = embed("time", inner, config["time_embed_dim"], torch.tensor(timesteps))
        if config["ofs_embed_dim"]:
            embedded = embedded + embed("ofs", config["ofs_embed_dim"], config["ofs_embed_dim"], torch.tensor([OFS]))
        check_finite(
            embedded,
            "The transformer's timestep embedding",
            "Its file is damaged: download it again (scan_weights in the loader, or generate.py --check PATH --scan, "
            "lists what is wrong in it).",
        )
        distances = [0.0]
        for now, before in zip(embedded[1:], embedded[:-1], strict=True):
            size = before.abs().mean()
            # Of what is zero throughout there is no share.
            distances.append(((now - before).abs().mean() / size).item() if size else 0.0)
        return distances
