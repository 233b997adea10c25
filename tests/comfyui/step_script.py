"""Run by ComfyUI's interpreter in its checkout, for benchmarks/step.py: seconds a step of ComfyUI's own CogVideoX
model, by the clock and of the processor.

Arguments beside those of ``inside``: the weights, in ComfyUI's names, and what to run them with.
"""

import json
import time

from inside import arguments  # isort: skip # It comes first: it makes the others importable.

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import torch

WEIGHTS, INPUTS = map(str, arguments)
given = comfy.utils.load_torch_file(INPUTS)
dtype = torch.float32 if comfy.model_management.get_torch_device().type == "cpu" else torch.bfloat16
model = comfy.sd.load_diffusion_model(WEIGHTS, model_options={"dtype": dtype})
steps, latents = int(given["steps"]), torch.zeros([int(side) for side in given["shape"]])
positive, negative = ([[prompt, {}]] for prompt in given["prompts"])


def run():
    ends = []
    noise, options = (
        torch.randn(latents.shape),
        dict(callback=lambda *_: ends.append((time.perf_counter(), time.process_time())), disable_pbar=True, seed=1),
    )
    comfy.sample.sample(model, noise, steps, 6.0, "ddim", "simple", positive, negative, latents, **options)
    return [(last - first) / (len(ends) - 1) for first, last in zip(ends[0], ends[-1], strict=True)]


run()
print(json.dumps([torch.__version__, [run() for _ in range(int(given["rounds"]))]]))
