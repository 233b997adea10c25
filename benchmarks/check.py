"""How long the dtype check of a checkpoint of the real size takes: headers and configs only, 11 GB in three shards.
Limit: 20 ms.

The shards are sparse files with the real headers of CogVideoX1.5-5B's transformer. The other side reads the shards, as
a check of weights would have to (a tenth of the bytes, to be done soon; holes, so no disk is waited for). And how long
the header of its GGUF file takes, with the gguf package's own reader on the other side. Limit: 30 ms.
"""

import json
import statistics
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

from cogvideox.checkpoint.gguf import read_gguf_header
from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.precision.hardware import Hardware
from cogvideox.precision.policy import plan_dtypes

CONFIG = dict(
    num_attention_heads=48,
    attention_head_dim=64,
    num_layers=42,
    in_channels=16,
    out_channels=16,
    patch_size_t=2,
    patch_bias=False,
    time_embed_dim=512,
    text_embed_dim=4096,
    use_rotary_positional_embeddings=True,
    sample_width=300,
    sample_height=300,
    sample_frames=81,
)
SHARDS = 3


def write_sparse_checkpoint(folder: Path) -> int:
    """Write configs, headers and holes in the place of weights; returns the bytes of the weights."""
    with init_empty_weights():
        model = CogVideoXTransformer3DModel(**CONFIG)
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    model.save_config(transformer)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "CogVideoXDDIMScheduler"}))
    tensors = list(model.state_dict().items())
    total, weight_map = 0, {}
    for number in range(SHARDS):
        name, offset, header = f"diffusion_pytorch_model-{number + 1:05}-of-{SHARDS:05}.safetensors", 0, {}
        for key, tensor in tensors[number::SHARDS]:
            size = tensor.numel() * 2
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
            offset, weight_map[key] = offset + size, name
        text = json.dumps(header).encode()
        with (transformer / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
        total += offset
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def write_sparse_gguf(file: Path) -> None:
    """Write a header with every tensor, matrices in Q4_K, and a hole in the place of the data."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    with init_empty_weights():
        tensors = CogVideoXTransformer3DModel(**CONFIG).state_dict()
    writer, total = GGUFWriter(str(file), arch="cogvideox"), 0
    for name, tensor in tensors.items():
        kind = GGMLQuantizationType["Q4_K" if tensor.ndim == 2 and tensor.shape[1] % 256 == 0 else "F32"]
        block, size = GGML_QUANT_SIZES[kind]
        nbytes = tensor.numel() // block * size
        shape = tensor.shape if kind == GGMLQuantizationType.F32 else (tensor.shape[0], nbytes // tensor.shape[0])
        dtype = np.dtype("float32" if kind == GGMLQuantizationType.F32 else "uint8")
        writer.add_tensor_info(name, tuple(shape), dtype, nbytes, raw_dtype=kind)
        total += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as opened:
        opened.truncate(-(-file.stat().st_size // 32) * 32 + total)


def median(work, count: int) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "CogVideoX1.5-5B"
        total = write_sparse_checkpoint(folder)
        hardware = Hardware(torch.device("cpu"), "CPU")
        times = []
        for _ in range(20):
            start = time.perf_counter()
            plan = plan_dtypes(open_checkpoint(folder), "fp16", hardware)
            times.append(time.perf_counter() - start)
        shard = max((folder / "transformer").glob("*.safetensors"), key=lambda path: path.stat().st_size)
        start = time.perf_counter()
        with shard.open("rb", buffering=0) as file:
            buffer, left = bytearray(64 << 20), total // 10
            while left > 0:
                left -= file.readinto(buffer)
        read = (time.perf_counter() - start) * 10
        file = Path(name) / "model.gguf"
        write_sparse_gguf(file)
        from gguf import GGUFReader

        ours, theirs = median(lambda: read_gguf_header(file), 20), median(lambda: GGUFReader(file), 5)
        count, known = (
            len(read_gguf_header(file)),
            {tensor.name: tensor.data_offset for tensor in GGUFReader(file).tensors},
        )
        assert {name: stored.offset for name, stored in read_gguf_header(file).items()} == known
    print(plan.text)
    print(f"\n{total / 1e9:.2f} GB of weights in {SHARDS} shards")
    print(f"check, first call    {times[0] * 1e3:9.1f} ms")
    print(f"check, median of 20  {statistics.median(times) * 1e3:9.1f} ms")
    print(f"reading the weights  {read * 1e3:9.1f} ms  {read / times[0]:.0f} x the check's first call")
    print(
        f"\nGGUF, {count} tensors: header, median of 20 {ours * 1e3:9.1f} ms; the gguf package's reader "
        f"{theirs * 1e3:9.1f} ms"
    )


if __name__ == "__main__":
    main()
