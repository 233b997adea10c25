"""A real ComfyUI for the tests: started once, in a folder of its own, with the pack and a tiny checkpoint in it."""

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
from pathlib import Path

import torch
import websocket
from PIL import Image
from safetensors.torch import save_file

from cogvideox.video import write_mp4
from tests.conftest import ROOT
from tests.tiny_checkpoint import build_checkpoint

#: ComfyUI's protocol.py: the binary message that carries a text for a node.
_TEXT_EVENT = 3
_ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Comfy:
    """The server's HTTP API. ``base`` is its folder: models, output and custom_nodes lie under it, nothing in the checkout.

    ``pack`` is the folder's name that the pack is installed in. In one with spaces all works but what the page fetches from it by its address, help
    and thumbnails, which aiohttp then does not find.
    """

    def __init__(self, checkout: Path, python: str, base: Path, pack: str = "a pack with spaces"):
        self.base = base
        build_checkpoint(base / "models" / "CogVideo" / "CogVideoX1.5-5B")
        for folder in ("custom_nodes", "input"):
            (base / folder).mkdir(exist_ok=True)
        (base / "custom_nodes" / pack).symlink_to(ROOT)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log = base / "log.txt"
        command = [python, str(checkout / "main.py"), "--cpu", "--base-directory", str(base), "--port", self.url.rsplit(":", 1)[1]]
        self._log_file = self.log.open("w")
        self._process = subprocess.Popen(command, cwd=checkout, stdout=self._log_file, stderr=subprocess.STDOUT)
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        for _ in range(120):
            if self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log_file.close()

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
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
        """The history of a prompt, and the texts that were shown on its nodes while it ran, by node id, as the page receives them."""
        client = "the-tests"
        shown: dict[str, list[str]] = {}
        socket = websocket.create_connection(f"{self.url.replace('http', 'ws')}/ws?clientId={client}", timeout=180)
        try:
            queued = self.post("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
            while True:
                message = socket.recv()
                if isinstance(message, bytes):
                    kind, length = struct.unpack(">II", message[:8])
                    if kind == _TEXT_EVENT:
                        shown.setdefault(message[8 : 8 + length].decode(), []).append(message[8 + length :].decode())
                    continue
                event = json.loads(message)
                if event["type"] in _ENDS and event["data"].get("prompt_id") == queued:
                    return self.wait(queued), shown
        finally:
            socket.close()

    def replace_checkpoint(self, variant: str = "1.5", **build) -> None:
        folder = self.base / "models" / "CogVideo" / "CogVideoX1.5-5B"
        shutil.rmtree(folder)
        build_checkpoint(folder, variant, **build)


def add_example_files(base: Path) -> None:
    """What the examples need beside the text-to-video checkpoint: an image-to-video one, a picture, a clip and LoRAs, one of another model."""
    models, name = base / "models", "transformer.transformer_blocks.0.attn1.to_out.0"
    if (models / "CogVideo" / "CogVideoX1.5-5B-I2V").exists():
        return
    build_checkpoint(models / "CogVideo" / "CogVideoX1.5-5B-I2V", "1.5-i2v")
    Image.new("RGB", (200, 100), (200, 120, 40)).save(base / "input" / "example.png")
    write_mp4(torch.rand(20, 64, 96, 3), base / "input" / "input.mp4", 16)
    (models / "loras").mkdir(exist_ok=True)
    for file in ("my_cogvideox_lora", "another"):
        halves = {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)}
        save_file(halves, models / "loras" / f"{file}.safetensors")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}, models / "loras" / "sd15.safetensors")


def from_environment(base: Path, **options) -> Comfy | None:
    """A server from ``COMFYUI_PATH`` and ``COMFYUI_PYTHON``, or None where there is no checkout."""
    if "COMFYUI_PATH" not in os.environ:
        return None
    return Comfy(Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON", sys.executable), base, **options)
