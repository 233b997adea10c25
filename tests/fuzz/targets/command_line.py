"""The command line, in this process: real options with odd values, prompts from files, anything to check. Oracle: it
ends with a status that is documented, with at least a sentence where that is not 0, never with a traceback, a failure
it does not know, or 20 lines of options."""

import contextlib
import io
import os
import shutil
import sys

import torch
from mutate import NAMES as ODD_NAMES

from tests.told import Told

from . import common

NAME = "command_line"
TEXTS = [
    "", " ", "a panda", "@", "@@", "@@x", "@prompt.txt", "@none.txt", "@folder", "@utf16.txt", "@latin.txt", "@huge.txt", "@fifo", "@'prompt.txt'", "-", "--", "-x", "\x00", "\n",
    "x" * 5000, "熊猫" * 300, "\u202e", os.fsdecode(b"\xd0\xdc"), "\ud800", "%s{0}", "a\tb\x1b[31m", "🐼",
]  # fmt: skip
NUMBERS = [
    "0", "1", "2", "17", "16", "32", "33", "-1", "-0", "1.5", "1e3", "nan", "inf", "-inf", "", " 1", "0x10", "1_0", "٣", "abc", "9" * 400, "9" * 6000, str(2**63), str(2**64 - 1),
    str(2**64), "1/2", "30000/1001", "1/0", "23.976", "0.5", "1e-400", "1e400", "+2", "1,5", "100000", "999984",
]  # fmt: skip
PATHS = [
    "ck", "none", "folder", "", " ", ".", "..", "/", "x.png", "x.mp4", "clip.mp4", "lora.safetensors", "noise.bin", "empty", "fifo", "loop", "dangling", "'x.png'", '"clip.mp4"', "~/none",
    "~nobody_here/x", "https://example.com/x.png", "file:///etc/passwd", "x.latent", "workflow.json", "inference.yaml", "x" * 300, "a/" * 2500, "\x00", os.fsdecode(b"\xff.png"), "x\n.png",
    "ck/vae", "ck/transformer", "ck/model_index.json", "ck/transformer/config.json", "/dev/null",
]  # fmt: skip
OUTPUTS = [
    "new.mp4",
    "x.mp4",
    "folder",
    "folder/new.mp4",
    "none/new.mp4",
    "x" * 252 + ".mp4",
    "new.avi",
    "",
    "fifo",
    "loop.mp4",
    "'new.mp4'",
    "\x00.mp4",
    "ck",
    "clip.mp4",
]
VALUES = {
    "--prompt": TEXTS, "--negative": TEXTS, "--width": NUMBERS, "--height": NUMBERS, "--frames": NUMBERS, "--fps": NUMBERS, "--seed": NUMBERS, "--steps": NUMBERS,
    "--cfg": NUMBERS, "--strength": NUMBERS, "--image": PATHS, "--end-image": PATHS, "--video": PATHS, "--model": PATHS, "--text-encoder": PATHS, "--vae": PATHS,
    "--tokenizer": PATHS, "--lora": [*PATHS, "lora.safetensors:nan", "lora.safetensors:1e400", "lora.safetensors:", ":1", "lora.safetensors:0.5", "x:y:z"],
    "--output": OUTPUTS, "--decode": PATHS, "--check": PATHS,
    "--dtype": ["auto", "fp32", "bf16", "fp16", "fp8", ""], "--on-mismatch": ["fix", "stop", "x"], "--memory": ["auto", "cpu", "gpu", "offload_blocks", "x"],
    "--quantize": ["int8_weight_only", "fp8_dynamic", "x"], "--attention": ["auto", "sdpa", "flash3", "sage", "x"], "--scheduler": ["ddim", "dpm", "x"],
    "--cache": ["teacache", "first_block", "pab:0.5", "taylorseer:nan", "faster_cache:2", "x", "pab:", "pab:-1"], "--device": ["cpu", "cpu:3", "cuda", "cuda:9", "meta", "xpu", "mps", "foo", "", "cuda:x"],
    "--on-black": ["pass", "stop", "x"], "--on-nan": ["heal", "stop", "x"], "--compile": ["x"],
}  # fmt: skip
SWITCHES = [
    "--plan",
    "--dynamic-cfg",
    "--overwrite",
    "--keep-audio",
    "--scan",
    "--fix",
    "--json",
    "--help",
    "--no-such",
    "--debug",
]


def prepare(base):
    state = common.build(base)
    from PIL import Image

    from cogvideox.video import write_latent, write_mp4
    from tests.tiny_checkpoint import TEXT_WIDTH  # noqa: F401

    place = base / "command_line"
    if not (place / "done").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        Image.effect_noise((64, 48), 50).save(place / "x.png")
        write_mp4(torch.rand(20, 48, 64, 3), place / "clip.mp4", 30)
        (place / "x.mp4").write_bytes((place / "clip.mp4").read_bytes())
        write_latent(torch.zeros(1, 16, 1, 4, 4), place, "x").rename(place / "x.latent")
        from safetensors.torch import save_file

        key = "transformer.transformer_blocks.0.attn1.to_out.0"
        save_file(
            {f"{key}.lora_A.weight": torch.randn(2, 128), f"{key}.lora_B.weight": torch.randn(128, 2)},
            place / "lora.safetensors",
        )
        (place / "noise.bin").write_bytes(bytes(range(256)) * 40)
        (place / "empty").touch()
        (place / "prompt.txt").write_text("a panda", encoding="utf-8-sig")
        (place / "utf16.txt").write_text("a panda", encoding="utf-16")
        (place / "latin.txt").write_bytes(b"\xe9\xff")
        (place / "huge.txt").write_bytes(b"x" * (2 << 20))
        (place / "workflow.json").write_text(
            '{"1": {"class_type": "CogVideoXModelLoader", "inputs": {"model": "x", "base_precision": "fp16"}}}'
        )
        (place / "inference.yaml").write_text("args:\n  sampling_fps: 16\n  fp16: True\n")
        (place / "done").touch()
    import generate  # noqa: F401

    return state | {"place": place}


def case(state, rng, folder):
    shutil.copytree(state["place"], folder, dirs_exist_ok=True)
    (folder / "ck").symlink_to(state["base"] / "folder")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    kind = rng.choice(("make", "make", "make", "make", "check", "decode", "anything"))
    arguments: dict[str, str] = {}
    if kind == "make":
        arguments = {
            "--model": "ck",
            "--prompt": "a panda",
            "--width": "32",
            "--height": "32",
            "--frames": "1",
            "--steps": "2",
            "--device": "cpu",
            "--dtype": "fp32",
            "--output": "new.mp4",
        }
    elif kind == "check":
        arguments = {"--check": rng.choice(PATHS), "--device": "cpu"}
    elif kind == "decode":
        arguments = {
            "--decode": "x.latent",
            "--model": "ck",
            "--device": "cpu",
            "--output": "new.mp4",
            "--on-black": "pass",
        }
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        option = rng.choice(list(VALUES))
        arguments[option] = rng.choice(VALUES[option] if rng.random() < 0.93 else ODD_NAMES)
    words = [word for pair in arguments.items() for word in pair]
    if rng.random() < 0.5:
        words = (
            [
                f"{option}={value}" if rng.random() < 0.3 else word
                for option, value in arguments.items()
                for word in (option, value)
            ]
            if rng.random() < 0.05
            else words
        )
    words += rng.sample(SWITCHES, rng.choice((0, 0, 0, 1, 2)))
    if kind == "make" and rng.random() < 0.8 and "--plan" not in words:
        words.append("--plan")
    if rng.random() < 0.05:
        rng.shuffle(words)
    stdin = rng.choice((b"", b"a panda", b"\xff\xfe", b"x" * (2 << 20)))
    mine = (folder / "x.mp4").read_bytes()

    def act():
        import generate

        out, err = io.StringIO(), io.StringIO()
        before = sys.stdin
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    status = generate.main(words)
                except SystemExit as stopped:
                    status = stopped.code
        finally:
            sys.stdin = before
        said, complaint = out.getvalue(), err.getvalue()
        if status not in (0, 1, 2, 3):
            return f"status: {status!r}"
        last = [line for line in complaint.splitlines() if line.startswith("error: ")]
        if status in (1, 2) and (len(last) != 1 or len(last[0]) < 20):
            return f"{len(last)} lines of error: {complaint[-300:]}"
        if status in (1, 2) and len(last[0]) > 4000:
            return "a long error"
        if "--debug" not in words and ("Traceback" in complaint or "does not know (" in complaint):
            return f"unforeseen: {complaint[-500:]}"
        if status == 2 and len(complaint) > 1500:
            return f"much ado: {len(complaint)} letters"
        (said + complaint).encode()
        if (folder / "x.mp4").read_bytes() != mine and "--overwrite" not in words:
            return "a file was replaced unasked"
        leftover = [name for name in os.listdir(folder) if ".part" in name or ".trial" in name]
        if leftover:
            return f"left behind: {leftover}"
        if (
            status == 0
            and "new.mp4" in words[-20:]
            and kind == "make"
            and not {"--plan", "--help", "--check", "--decode"} & set(words)
            and arguments.get("--output") == "new.mp4"
        ):
            from cogvideox.video import read_video

            read_video(folder / "new.mp4", events=Told())
        return None

    return f"{kind} {' '.join(word[:40] for word in words)!r}", act
