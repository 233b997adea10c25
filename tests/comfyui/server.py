"""A real ComfyUI for the tests: started once, in a folder of its own, with the pack and a tiny checkpoint in it."""

import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import websocket
from PIL import Image
from safetensors.torch import save_file

from cogvideox.video import write_mp4
from tests.conftest import ROOT
from tests.tiny_checkpoint import build_checkpoint

#: ComfyUI's protocol.py: the binary messages that carry a text for a node, and a preview with what it is of.
_TEXT_EVENT, _PREVIEW_EVENT = 3, 4
_ENDS = ("execution_success", "execution_error", "execution_interrupted")


#: A custom node of the tests' own that counts what is alive in the server's process.
_PROBE = """
import gc
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}

@PromptServer.instance.routes.get("/cogvideox15_test/alive")
async def alive(_):
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    parts = ("CogVideoXTransformer3DModel", "T5EncoderModel", "AutoencoderKLCogVideoX")
    return web.json_response(
        {
            "weights": sum(
                kind.__name__ == "Weights" and kind.__module__.endswith("cogvideox.weights") for kind in kinds
            ),
            "modules": sum(kind.__name__ in parts for kind in kinds),
        }
    )
"""


#: Checkpoints of the examples, by folder: their variant.
_CHECKPOINTS = {
    "CogVideoX1.5-5B-I2V": "1.5-i2v",
    "CogVideoX-Fun-V1.5-5b-InP": "fun-inp",
    # Called as the released file is.
    "void_pass1.safetensors": "void",
    "DOVE": "1.5",
}


@dataclass
class Told:
    """What the page was told while a prompt ran.

    Attributes:
        texts: those shown on nodes, by node id.
        events: the messages, in order.
        previews: what each is of, and the picture as a file.
    """

    history: dict = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    events: list[dict] = field(default_factory=list)
    previews: list[tuple[dict, bytes]] = field(default_factory=list)

    def progress(self, node: str) -> list[tuple[int, int]]:
        """The steps of a node's progress bar: (done, in all)."""
        steps = [event["data"] for event in self.events if event["type"] == "progress"]
        return [(step["value"], step["max"]) for step in steps if step["node"] == node]


class Comfy:
    """The server's HTTP API. ``base`` is its folder: models, output and custom_nodes lie under it, nothing in the
    checkout.

    ``put`` is called with the folder that the pack is to be in; without it that is a link to this one."""

    def __init__(
        self,
        checkout: Path,
        python: str,
        base: Path,
        put: Callable[[Path], None] = lambda folder: folder.symlink_to(ROOT),
    ):
        self.base = base
        build_checkpoint(base / "models" / "CogVideo" / "CogVideoX1.5-5B")
        for folder in ("custom_nodes", "input"):
            (base / folder).mkdir(exist_ok=True)
        put(base / "custom_nodes" / "a pack with spaces")
        (base / "custom_nodes" / "probe.py").write_text(_PROBE, encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log = base / "log.txt"
        command = [
            python,
            str(checkout / "main.py"),
            "--cpu",
            "--base-directory",
            str(base),
            "--port",
            self.url.rsplit(":", 1)[1],
        ]
        self._log_file = self.log.open("w")
        self._process = subprocess.Popen(command, cwd=checkout, stdout=self._log_file, stderr=subprocess.STDOUT)
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        for _ in range(300):
            if self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(1)
        self.close()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log_file.close()

    def get(self, path: str) -> dict:
        with self.open(path) as answer:
            return json.load(answer)

    def open(self, path: str) -> http.client.HTTPResponse:
        return urllib.request.urlopen(self.url + path, timeout=30)

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else {}

    def wait(self, prompt_id: str, seconds: float = 180) -> dict:
        """The history entry of a queued prompt, once it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if history:
                return history[prompt_id]
            time.sleep(0.2)
        raise RuntimeError(f"the prompt did not end in {seconds} s:\n{self.log.read_text()[-3000:]}")

    def run(self, prompt: dict) -> dict:
        queued = self.post("/prompt", {"prompt": prompt})
        if "prompt_id" not in queued:
            raise RuntimeError(json.dumps(queued))
        return self.wait(queued["prompt_id"])

    def run_listening(self, prompt: dict) -> tuple[dict, dict[str, list[str]]]:
        """The history of a prompt, and the texts that were shown on its nodes while it ran, by node id."""
        told = self.listen(prompt)
        return told.history, told.texts

    def listen(self, prompt: dict, previews: str = "none", on_event: Callable[[dict], None] | None = None) -> "Told":
        """Run a prompt and note all that the page would be told.

        Args:
            previews: ComfyUI's setting of the preview method.
            on_event: called with each event as it comes.
        """
        client, told = "the-tests", Told()
        socket = websocket.create_connection(f"{self.url.replace('http', 'ws')}/ws?clientId={client}", timeout=180)
        try:
            socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            queued = self.post(
                "/prompt", {"prompt": prompt, "client_id": client, "extra_data": {"preview_method": previews}}
            )["prompt_id"]
            while True:
                message = socket.recv()
                if isinstance(message, bytes):
                    kind, length = struct.unpack(">II", message[:8])
                    head, rest = message[8 : 8 + length].decode(), message[8 + length :]
                    if kind == _TEXT_EVENT:
                        told.texts.setdefault(head, []).append(rest.decode())
                    elif kind == _PREVIEW_EVENT:
                        told.previews.append((json.loads(head), rest))
                    continue
                event = json.loads(message)
                told.events.append(event)
                if on_event is not None:
                    on_event(event)
                if event["type"] in _ENDS and event["data"].get("prompt_id") == queued:
                    told.history = self.wait(queued)
                    return told
        finally:
            socket.close()

    def replace_checkpoint(self, variant: str = "1.5", **build) -> None:
        folder = self.base / "models" / "CogVideo" / "CogVideoX1.5-5B"
        shutil.rmtree(folder)
        build_checkpoint(folder, variant, **build)


def add_example_files(base: Path) -> None:
    """What the examples need beside the text-to-video checkpoint: others, a picture, a clip and LoRAs, one of another
    model."""
    models, name = base / "models", "transformer.transformer_blocks.0.attn1.to_out.0"
    for folder, variant in _CHECKPOINTS.items():
        built = base.with_name(f"{base.name}-examples") / folder
        if not built.exists():
            build_checkpoint(built, variant)
        shutil.copytree(built, models / "CogVideo" / folder, dirs_exist_ok=True)
    Image.new("RGB", (200, 100), (200, 120, 40)).save(base / "input" / "example.png")
    write_mp4(torch.rand(20, 64, 96, 3), base / "input" / "input.mp4", 16, overwrite=True)
    (models / "loras").mkdir(exist_ok=True)
    for file in ("my_cogvideox_lora", "another"):
        halves = {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)}
        save_file(halves, models / "loras" / f"{file}.safetensors")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}, models / "loras" / "sd15.safetensors")


def remove_example_checkpoints(base: Path) -> None:
    """Take away the checkpoints of ``add_example_files``, so that there is the text-to-video one alone."""
    for folder in _CHECKPOINTS:
        shutil.rmtree(base / "models" / "CogVideo" / folder, ignore_errors=True)


def from_environment(base: Path, **options) -> Comfy | None:
    """A server from ``COMFYUI_PATH`` and ``COMFYUI_PYTHON``, or None where there is no checkout."""
    if "COMFYUI_PATH" not in os.environ:
        return None
    return Comfy(Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON", sys.executable), base, **options)
