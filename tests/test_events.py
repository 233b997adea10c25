"""What a run tells: the defaults of ``Events``, and that a run tells all of it."""

import logging

import torch

from cogvideox.events import Events
from cogvideox.handles import open_handles
from cogvideox.sampling import sample
from cogvideox.text import encode_prompt
from cogvideox.vae import decode
from tests.conftest import CPU
from tests.told import Told


class Bars(Events):
    def __init__(self):
        self.seen = {}

    def progress(self, what, done, total, unit):
        self.seen.setdefault((what, unit), []).append((done, total))


def test_notes_are_logged_with_their_level_and_so_is_what_was_done_again(caplog):
    events = Events()
    with caplog.at_level(logging.INFO):
        events.note("the cache skipped nothing", logging.INFO)
        events.healed("step 3 was done again")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "the cache skipped nothing"),
        ("WARNING", "step 3 was done again"),
    ]


def test_a_step_is_progress_where_nobody_looks_at_the_video():
    events = Bars()
    events.step(1, 2, torch.zeros(1))
    events.counter("writing", "frame")(3, 4)
    assert events.seen == {("sampling", "step"): [(1, 2)], ("writing", "frame"): [(3, 4)]}


def test_from_prompt_to_frames_all_work_is_told_to_its_end(tiny):
    events, opened = Bars(), open_handles(tiny, "fp32", CPU)
    prompts = [encode_prompt(opened.text_encoder, text, events=events).embeddings for text in ("a panda", "")]
    latents = sample(opened.model, *prompts, torch.zeros(1, 16, 4, 4, 4), seed=1, steps=2, events=events)
    decode(opened.vae, latents, events=events)
    assert set(events.seen) == {
        ("loading text encoder", "B"),
        ("encoding", "layer"),
        ("loading transformer", "B"),
        ("sampling", "step"),
        ("loading VAE", "B"),
        ("decoding", "latent frame"),
    }
    for told in events.seen.values():
        assert told[-1][0] == told[-1][1]


def test_every_strip_of_a_decode_asks_whether_to_stop(tiny):
    asked = []
    decode(open_handles(tiny, "fp32", CPU).vae, torch.randn(1, 16, 3, 2, 2), events=Told(check=lambda: asked.append(1)))
    assert len(asked) > 20
