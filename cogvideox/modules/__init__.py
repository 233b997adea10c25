"""How the modules of diffusers and transformers run otherwise: never a file, never a decision."""
