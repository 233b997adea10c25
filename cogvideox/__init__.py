"""CogVideoX on plain PyTorch: checkpoint, text, sampling, decode and the black-frame check, without ComfyUI.

Importing this package imports nothing: each module says what it needs.
"""
