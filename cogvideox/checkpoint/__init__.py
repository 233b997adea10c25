"""What is on disk: safetensors headers, the folders checkpoints come in, and loading straight into the dtype to run
in."""
