"""Decide in which dtype each part of a checkpoint runs, and say why."""
