"""Change how modules of diffusers and transformers run; know no files and decide nothing."""
