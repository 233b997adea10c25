"""In which dtype each part of a checkpoint runs, and why."""
