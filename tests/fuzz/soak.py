"""``soak.py [RUNS]``: the tiny text-to-video graph again and again in one process, with LoRAs, caches and quantization,
in many sizes; then one handle in four threads. Prints resident memory, open files, threads, temporary files, live
tensors and leftover hooks as it goes. The status is 1 if anything has grown after the first 50 runs, or was wrong."""

import gc
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import core
import torch

torch.set_num_threads(1)
from targets import nodes_inputs  # noqa: E402


def measure():
    gc.collect()
    rss = core._memory()[0] / 1e6
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    maps = sum(1 for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line)
    return {
        "rss_mb": round(rss), "fds": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "os_threads": len(os.listdir("/proc/self/task")),
        "temp": len(os.listdir(tempfile.gettempdir())), "tensors": len(tensors), "maps": maps, "cwd": len(os.listdir(".")),
    }  # fmt: skip


def hooks(model):
    module = model.weights._module
    return (
        0
        if module is None
        else sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())
    )


def main(runs):
    base = core.WORK / "base"
    base.mkdir(parents=True, exist_ok=True)
    here = core.WORK / "soak"
    here.mkdir(exist_ok=True)
    state = nodes_inputs.prepare(base)
    os.chdir(here)
    good, call, rng = state["good"], nodes_inputs.call, random.Random(7)
    files = ("folder", "fp8.safetensors", "q8.gguf", "sat", "diffusers.safetensors")
    print("start", json.dumps(measure()), flush=True)
    history, seen, failed = [], {}, []
    for run in range(runs):
        began = time.monotonic()
        again = rng.random() < 0.3
        what = {
            "path": rng.choice(files),
            "dtype": rng.choice(("fp32", "fp16", "bf16")),
            "size": rng.choice(((16, 16), (32, 16), (48, 32))),
            "length": rng.choice((1, 17)),
            "steps": rng.choice((1, 2, 4)),
            "lora": rng.choice((0, 0, 1, 2)),
            "cache": rng.choice((None, None, "teacache", "first_block", "taylorseer", "pab", "faster_cache")),
            "quantize": rng.choice((None, None, "int8_weight_only", "fp8_weight_only", "int8_dynamic")),
            "scheduler": rng.choice(("ddim", "dpm")),
            "cfg": rng.choice((1.0, 6.0)),
        }
        if again and seen:
            what = json.loads(rng.choice(list(seen)))
            what["size"] = tuple(what["size"])
        try:
            parts = (
                {}
                if what["path"] == "folder"
                else {"text_encoder_name": str(base / "t5.safetensors"), "vae_name": str(base / "vae.safetensors")}
            )
            model, encoder, vae, _ = call(
                state, "ModelLoader", model=str(base / what["path"]), dtype=what["dtype"], **parts
            )
            encoder = encoder if what["path"] == "folder" else good["text_encoder"]
            if what["quantize"] and what["path"] not in ("fp8.safetensors", "q8.gguf"):
                model, encoder, _ = call(state, "Quantize", model=model, method=what["quantize"], text_encoder=encoder)
            for number in range(what["lora"]):
                (model,) = call(state, "LoraLoader", model=model, lora_name=state["lora"], strength=0.5 + number)
            if what["cache"]:
                (model,) = call(state, "Cache", model=model, method=what["cache"], strength=0.5, start=0.0, end=1.0)
            (positive,) = call(state, "TextEncode", text_encoder=encoder, prompt="a panda plays the guitar")
            (latent,) = call(state, "EmptyLatent", width=what["size"][0], height=what["size"][1], length=what["length"])
            (samples,) = call(
                state,
                "Sampler",
                model=model,
                positive=positive,
                negative=positive,
                latent_image=latent,
                seed=3,
                steps=what["steps"],
                cfg=what["cfg"],
                scheduler=what["scheduler"],
                denoise=1.0,
            )
            (images,) = call(state, "VAEDecode", samples=samples, vae=vae)
            call(state, "BlackFrameCheck", images=images, action="pass")
            if rng.random() < 0.3:
                call(state, "VAEEncode", images=images, vae=vae)
            digest, key = hashlib.sha1(images.numpy().tobytes()).hexdigest(), json.dumps(what)
            if seen.setdefault(key, digest) != digest:
                failed.append(f"run {run}: another result for {key}")
            left = hooks(model)
            if left:
                failed.append(f"run {run}: {left} hooks left on the module, {key}")
        except Exception as error:
            verdict = core.judge(error)
            failed.append(
                f"run {run}: [{verdict['kind']}] {verdict['type']} at {verdict['place']}: {verdict['said'][:200]} "
                f"{what}"
            )
        model = encoder = vae = samples = images = latent = positive = None
        history.append(measure() | {"seconds": round(time.monotonic() - began, 2)})
        if run % 10 == 9:
            print(run + 1, json.dumps(history[-1]), flush=True)
    failed += growth(history)
    print("repeated settings compared:", sum(1 for _ in seen), "distinct of", runs)
    print("problems:", len(failed))
    for line in failed[:20]:
        print("  ", line)
    return state, not failed


def growth(history, settled=50, window=25):
    """What has grown after the first runs, in sentences: the least of the last ones is set against the least of those
    just after the first."""
    if len(history) < settled + 2 * window:
        print(f"too few runs to tell growth; {settled + 2 * window} are enough")
        return []
    said = []
    for name in history[0]:
        if name == "seconds":
            continue
        # Which settings a run has decides what it holds, so that only the least of many can be compared.
        early, late = (
            min(entry[name] for entry in part) for part in (history[settled : settled + window], history[-window:])
        )
        print(f"{name}: {early} after {settled} runs, {late} at the end")
        if late - early > (30 if name == "rss_mb" else 0):
            said.append(f"{name} has grown from {early} to {late}")
    return said


def threads(state, workers=4, rounds=4):
    good, call = state["good"], nodes_inputs.call
    jobs = [(seed, cfg) for seed in range(rounds) for cfg in (1.0, 6.0)]

    def one(seed, cfg, model):
        (latent,) = call(state, "EmptyLatent", width=32, height=16, length=1)
        (samples,) = call(
            state,
            "Sampler",
            model=model,
            positive=good["positive"],
            negative=good["positive"],
            latent_image=latent,
            seed=seed,
            steps=2,
            cfg=cfg,
            scheduler="ddim",
            denoise=1.0,
        )
        (images,) = call(state, "VAEDecode", samples=samples, vae=good["vae"])
        return images

    plain = good["model"]
    (styled,) = call(state, "LoraLoader", model=plain, lora_name=state["lora"], strength=5.0)
    (cached,) = call(state, "Cache", model=plain, method="first_block", strength=0.5, start=0.0, end=1.0)
    models = {"plain": plain, "lora": styled, "cache": cached}
    alone = {(name, job): one(*job, model) for name, model in models.items() for job in jobs}
    wrong, errors = [], []

    def work(number):
        rng = random.Random(number)
        for _ in range(len(jobs)):
            job, name = rng.choice(jobs), rng.choice(list(models))
            try:
                if not one(*job, models[name]).equal(alone[name, job]):
                    wrong.append((name, job))
                if rng.random() < 0.2:
                    plain.weights.park()
                if rng.random() < 0.1:
                    plain.weights.release()
            except Exception as error:
                errors.append(core.judge(error))

    running = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(300)
    stuck = sum(thread.is_alive() for thread in running)
    print(
        f"threads: {workers} x {len(jobs)} runs of one handle; wrong {wrong[:5]} ({len(wrong)}), errors {errors[:3]} "
        f"({len(errors)}), stuck {stuck}"
    )
    return not (wrong or errors or stuck)


if __name__ == "__main__":
    state, sound = main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
    sys.exit(0 if threads(state) and sound else 1)
