"""Run by ComfyUI's interpreter in its checkout, for benchmarks/vae_decode.py: its table of small clips with ComfyUI's
own VAE beside the others, all in this one process.

Arguments beside those of ``inside``: how many rounds, and the numbers of the cases.
"""

import sys

from inside import ROOT, arguments  # isort: skip # It comes first: it makes the others importable.

from comfy.ldm.cogvideo.vae import AutoencoderKLCogVideoX

# In the place of the checkout, which has `tests` too.
sys.path[0] = str(ROOT)
from benchmarks.vae_decode import print_cases  # noqa: E402

rounds, *cases = (int(str(argument)) for argument in arguments)
print_cases(cases, rounds, AutoencoderKLCogVideoX)
