"""``--stage both``: VOID's first pass, and the second, whose noise moves as the first's video does."""

import argparse
from copy import copy
from functools import partial

from cogvideox.choices import FIRST
from cogvideox.files import stem_of
from commands.job import DEFAULT_OUTPUT, Job, open_handles_of, output_of, prepared
from commands.ranks import Place
from commands.terminal import say, terminal_events
from commands.video import (
    check_team,
    company,
    encoded,
    finish_job,
    once_for_all,
    sampled,
    say_plan,
    say_skips,
)
from commands.void import read_first_pass

#: What Netflix's code makes the first pass with (``predict_v2v.py`` and ``config/quadmask_cogvideox.py``).
_SETTINGS = {"cfg": 1.0, "cfg_range": (0.0, 1.0), "dynamic_cfg": False, "steps": 30, "scheduler": "ddim_origin"}


def make_both(options: argparse.Namespace, place: Place) -> int:
    """Make both passes, all that can be wrong with either checked before the first; the first's video is kept."""
    events = terminal_events()
    with company(options, place) as ranks:
        output = output_of(options) if place.is_first else options.output or DEFAULT_OUTPUT
        kept = output.with_stem(f"{stem_of(output)}_first_pass")
        first = _prepared("First pass:", copy(options), place, stage=FIRST, second_model=None, output=kept, **_SETTINGS)
        second = _prepared("Second pass:", copy(options), place, model=options.second_model, output=output)
        if options.plan:
            return 0
        if ranks is not None:
            for job in (first, second):
                check_team(job, place)
            ranks.meet()
        prompts = {name: once_for_all(ranks, partial(encoded, first, name, events)) for name in second.read}
        for job in (first, second):
            latent = sampled(job, prompts, events, ranks)
            if place.is_first:
                finish_job(job, latent)
            job.model.weights.release()
            if job is first and second.warp is not None and place.is_first:
                # As a second pass by itself would read it.
                size = second.source.width, second.source.height
                second.warp.video = read_first_pass(first.output, second.source.frames, size, events)
    return 0


def _prepared(title: str, options: argparse.Namespace, place: Place, **changes: object) -> Job:
    """Check one of the passes, and say what it takes where that alone is wanted."""
    vars(options).update(changes)
    say(title)
    job = prepared(options, terminal_events(), open_handles_of, writes=place.is_first)
    if options.plan:
        say_plan(job, place)
    say_skips(job)
    return job
