"""Events as tests hear them."""

from cogvideox.events import Events


class Told(Events):
    """Keep what a run tells, and call what is to happen at a step, at other progress, or where it could be cancelled.

    Args:
        notes: gets the sentences, but for those about work that was done again.
        heals: gets the sentences about work that was done again.
        step: called with (done, total, predicted clean latents).
        progress: called with (done, total) of the work whose name begins with ``of``.
        check: called where a run could be cancelled.
    """

    def __init__(self, notes=None, heals=None, step=None, progress=None, of="", check=None):
        self.notes = [] if notes is None else notes
        self.heals = [] if heals is None else heals
        self._step, self._progress, self._of, self._check = step, progress, of, check

    def note(self, text, level=30):
        super().note(text, level)
        self.notes.append(text)

    def healed(self, text):
        super().note(text)
        self.heals.append(text)

    def step(self, done, total, clean):
        if self._step is not None:
            self._step(done, total, clean)

    def progress(self, what, done, total, unit):
        if self._progress is not None and what.startswith(self._of):
            self._progress(done, total)

    def check_cancelled(self):
        if self._check is not None:
            self._check()
