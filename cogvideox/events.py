"""What a run tells while it goes on, and where it can be stopped: one object for progress, notes and cancelling."""

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


class Events:
    """Hear of a run as it goes on.

    This class logs the notes and is silent about the rest: override what is to be shown. What a method raises ends the
    run between two pieces of work, with nothing half done left behind.
    """

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        """Hear that ``done`` of ``total`` units (``B``, ``step``, ``frame``, …) of some work are done, last with both
        equal.

        Args:
            what: the work, as a bar's label: ``loading VAE``.
        """

    def step(self, done: int, total: int, clean: torch.Tensor) -> None:
        """Hear that a step of the sampler is done.

        Args:
            clean: the predicted clean latents ``[B, 16, T, H/8, W/8]``, scaled, without padding, on the device.
        """
        self.progress("sampling", done, total, "step")

    def note(self, text: str, level: int = logging.WARNING) -> None:
        """Hear a sentence for the user, with the level that ``logging`` has for its weight."""
        logger.log(level, "%s", text)

    def healed(self, text: str) -> None:
        """Hear a sentence for the user about work that had to be done again: it was not finite, or memory ran out."""
        self.note(text)

    def check_cancelled(self) -> None:
        """Raise something if the run is to stop here. Called often, many times a second in long work."""

    def counter(self, what: str, unit: str) -> Callable[..., None]:
        """Return ``progress`` of one kind of work as a function of (done, total)."""
        return lambda done, total, *_: self.progress(what, done, total, unit)
