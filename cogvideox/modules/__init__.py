"""Changes how modules of diffusers and transformers run. Knows no files and makes no decisions."""
