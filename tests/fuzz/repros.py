"""The findings of the fuzzing, each as small as it could be made. ``repros.py [NAME …]`` runs them and says what each
did."""

import json
import os
import shutil
import struct
import sys
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import signal

import core
import torch

torch.set_num_threads(1)
from targets import common  # noqa: E402

BASE, HERE = core.WORK / "base", core.WORK / "repros"
CASES = {}


def repro(function):
    CASES[function.__name__] = function
    return function


def folder():
    """A fresh copy of the tiny folder in diffusers layout."""
    target = HERE / "CogVideo" / "model"
    shutil.rmtree(HERE, ignore_errors=True)
    shutil.copytree(BASE / "folder", target)
    return target


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def listing():
    from cogvideox.checkpoint.catalogue import list_checkpoints

    return list_checkpoints([HERE / "CogVideo"], [HERE / "CogVideo"])


def open_(path):
    from cogvideox.checkpoint.layout import open_checkpoint

    return open_checkpoint(path)


@repro
def listing_deep_config():
    (folder() / "transformer/config.json").write_text("[" * 50_000)
    listing()


@repro
def listing_index_not_text():
    index = next((folder() / "transformer").glob("*.index.json"))
    change(index, weight_map={"a": None})
    listing()


@repro
def listing_config_not_text():
    change(folder() / "transformer/config.json", _class_name=["CogVideoXTransformer3DModel"])
    listing()


@repro
def listing_sat_latest_long():
    (folder() / "latest").write_text("a" * 5000)
    (HERE / "CogVideo/sat").mkdir()
    (HERE / "CogVideo/sat/latest").write_text("a" * 5000)
    listing()


@repro
def listing_pickle_keys():
    place = folder().parent / "sat/1000"
    place.mkdir(parents=True)
    torch.save({"module": {1: torch.ones(3)}}, place / "mp_rank_00_model_states.pt")
    listing()


@repro
def listing_pickle_sparse():
    place = folder().parent / "sat/1000"
    place.mkdir(parents=True)
    torch.save({"module": {"a": torch.sparse_coo_tensor([[0]], [1.0], (3,))}}, place / "mp_rank_00_model_states.pt")
    listing()


@repro
def listing_pickle_bomb():
    place = folder().parent / "sat/1000"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "mp_rank_00_model_states.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"]" * 200_000_000)
        archive.writestr("x/version", b"3\n")
    print(f"{(place / 'mp_rank_00_model_states.pt').stat().st_size:,} bytes")
    listing()


@repro
def listing_gguf_array():
    raw = bytearray((BASE / "q8.gguf").read_bytes())
    folder()
    raw[24:24] = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 5, 2**64 - 1)
    raw[16:24] = struct.pack("<Q", struct.unpack_from("<Q", raw, 16)[0] + 1)
    (HERE / "CogVideo/x.gguf").write_bytes(raw)
    listing()


@repro
def listing_gguf_deep():
    raw = bytearray((BASE / "q8.gguf").read_bytes())
    folder()
    raw[24:24] = (
        struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQ", 4, 0)
    )
    raw[16:24] = struct.pack("<Q", struct.unpack_from("<Q", raw, 16)[0] + 1)
    (HERE / "CogVideo/x.gguf").write_bytes(raw)
    listing()


@repro
def listing_safetensors_deep():
    folder()
    text = b'{"patch_embed.text_proj.weight":' + b"[" * 50_000
    (HERE / "CogVideo/x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    listing()


@repro
def listing_fifo():
    folder()
    os.mkfifo(HERE / "CogVideo/x.safetensors")
    listing()


@repro
def gguf_type_changed():
    """F32 -> F16 in one tensor's entry: half of its bytes, read as another dtype."""
    from gguf import GGUFReader

    folder()
    file = HERE / "x.gguf"
    raw = bytearray((BASE / "q8.gguf").read_bytes())
    name = next(tensor.name for tensor in GGUFReader(BASE / "q8.gguf").tensors if tensor.tensor_type == 0)
    at = raw.index(name.encode()) + len(name)
    (dims,) = struct.unpack_from("<I", raw, at)
    struct.pack_into("<I", raw, at + 4 + 8 * dims, 1)
    file.write_bytes(raw)
    modules = [
        common.load_module(open_(path).parts["transformer"], common.FP32, torch.device("cpu")).state_dict()[name]
        for path in (BASE / "q8.gguf", file)
    ]
    print(name, "was", modules[0][:3].tolist(), "is", modules[1][:3].tolist())
    return "loaded with other numbers, without a word"


@repro
def safetensors_overlap():
    folder()
    header, data = common.split(BASE / "diffusers.safetensors")
    a, b = "transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.1.attn1.to_q.weight"
    header[a]["data_offsets"] = header[b]["data_offsets"]
    (HERE / "x.safetensors").write_bytes(common.joined(json.dumps(header).encode(), data))
    part = open_(HERE / "x.safetensors").parts["transformer"]
    state = common.load_module(part, common.FP32, torch.device("cpu")).state_dict()
    from safetensors import safe_open

    try:
        safe_open(HERE / "x.safetensors", "pt")
    except Exception as error:
        return f"layer 0 is layer 1: {state[a].equal(state[b])}; the library says: {error}"


@repro
def safetensors_shift():
    folder()
    header, data = common.split(BASE / "diffusers.safetensors")
    a = "transformer_blocks.0.attn1.to_q.weight"
    header[a]["data_offsets"] = [offset - 1 for offset in header[a]["data_offsets"]]
    (HERE / "x.safetensors").write_bytes(common.joined(json.dumps(header).encode(), data))
    state = common.load_module(
        open_(HERE / "x.safetensors").parts["transformer"], common.FP32, torch.device("cpu")
    ).state_dict()
    return f"loaded one byte off: largest weight {state[a].abs().nan_to_num().max().item():.3g}"


@repro
def safetensors_float_offsets():
    folder()
    header, data = common.split(BASE / "diffusers.safetensors")
    a = "transformer_blocks.0.attn1.to_q.weight"
    header[a]["data_offsets"] = [float(offset) for offset in header[a]["data_offsets"]]
    (HERE / "x.safetensors").write_bytes(common.joined(json.dumps(header).encode(), data))
    common.load_module(open_(HERE / "x.safetensors").parts["transformer"], common.FP32, torch.device("cpu"))


@repro
def safetensors_integer_weight():
    folder()
    header, data = common.split(BASE / "diffusers.safetensors")
    header["transformer_blocks.1.norm2.norm.weight"]["dtype"] = "I16"
    (HERE / "x.safetensors").write_bytes(common.joined(json.dumps(header).encode(), data))
    common.sample_once(common.use(HERE / "x.safetensors", __import__("random").Random(1)), 1)


@repro
def safetensors_huge_shape():
    folder()
    header, data = common.split(BASE / "diffusers.safetensors")
    header["time_embedding.linear_1.weight"] |= {"shape": [2**60, 0], "data_offsets": [0, 0]}
    (HERE / "x.safetensors").write_bytes(common.joined(json.dumps(header).encode(), data))
    common.load_module(open_(HERE / "x.safetensors").parts["transformer"], common.FP32, torch.device("cpu"))


@repro
def open_device():
    open_("/dev/null")


@repro
def config_wrong_type():
    here = folder()
    change(here / "vae/config.json", block_out_channels=0.5)
    common.load_module(open_(here).part("vae"), common.FP32, torch.device("cpu"))


@repro
def t5_config_wrong_type():
    here = folder()
    change(here / "text_encoder/config.json", is_encoder_decoder=1.5)
    common.load_module(open_(here).part("text_encoder"), common.FP32, torch.device("cpu"))


def _scale(value):
    here = folder()
    change(here / "vae/config.json", scaling_factor=value)
    from cogvideox.handles import open_handles

    result = common.sample_once(open_handles(here, "fp32", common.CPU), 1)
    return f"scaling_factor {value!r}: finite {result.isfinite().all().item()}, largest {result.abs().max().item():.3g}"


for _number, _value in enumerate((0, None, "0.7", float("nan"), -1, True, 1e30)):
    CASES[f"vae_scale_{_number}_{_value}"] = lambda value=_value: _scale(value)


@repro
def scheduler_wrong_type():
    here = folder()
    change(here / "scheduler/scheduler_config.json", num_train_timesteps="1000")
    from cogvideox.handles import open_handles

    common.sample_once(open_handles(here, "fp32", common.CPU), 1)


@repro
def scheduler_huge():
    here = folder()
    change(here / "scheduler/scheduler_config.json", num_train_timesteps=10**9)
    from cogvideox.handles import open_handles

    common.sample_once(open_handles(here, "fp32", common.CPU), 1)


@repro
def scheduler_nan():
    here = folder()
    change(here / "scheduler/scheduler_config.json", beta_start=float("nan"))
    from cogvideox.handles import open_handles

    common.sample_once(open_handles(here, "fp32", common.CPU), 1)


@repro
def tokenizer_cut():
    here = folder()
    file = here / "tokenizer/spiece.model"
    file.write_bytes(file.read_bytes()[:100_000])
    from cogvideox.handles import open_handles
    from cogvideox.text import encode_prompt

    encode_prompt(open_handles(here, "fp32", common.CPU).text_encoder, "a panda")


@repro
def sat_yaml_laughs():
    file = folder().parent / "inference.yaml"
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    file.write_text("\n".join([*lines, "args:", "  fp16: *a11", ""]))
    from interop.check import check_config

    print(f"{file.stat().st_size} bytes")
    check_config(file)


@repro
def sat_yaml_laughs_fix():
    file = folder().parent / "inference.yaml"
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    file.write_text("\n".join([*lines, "args:", "  fp16: True", "  sampling_fps: 16", ""]))
    from interop.check import check_config, fix_config

    print(check_config(file).verdict)
    fix_config(file)


@repro
def sat_yaml_bool_tag():
    file = folder().parent / "inference.yaml"
    file.write_text("args:\n  fp16: !!bool x\n")
    from interop.check import check_config

    check_config(file)


@repro
def sat_yaml_many_keys():
    file = folder().parent / "inference.yaml"
    file.write_text("args:\n  fp16: True\n" + "".join(f"  k{i}: {i}\n" for i in range(5000)))
    from interop.check import check_config

    start = time.process_time()
    check_config(file)
    return f"{time.process_time() - start:.1f} s of the processor for 5,000 keys"


def _lora(tensors, **settings):
    from safetensors.torch import save_file

    here = folder()
    file = HERE / "style.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)} if settings else None)
    from cogvideox.handles import open_handles, with_lora

    model = open_handles(here, "fp32", common.CPU).model
    return with_lora(model, file)


_TO_Q = "transformer.transformer_blocks.0.attn1.to_q"


def _pair(rank=4):
    return {f"{_TO_Q}.lora_A.weight": torch.ones(rank, 128), f"{_TO_Q}.lora_B.weight": torch.ones(128, rank)}


@repro
def lora_rank_zero():
    _lora(_pair(0))


@repro
def lora_pattern_broken():
    _lora(_pair(), **{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(": 3}})


@repro
def lora_pattern_slow():
    _lora(_pair(), **{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(.*.*)*z": 3}})


@repro
def lora_alpha_text():
    _lora(_pair(), **{"transformer.lora_alpha": "8"})


@repro
def lora_alpha_nan():
    model = _lora(_pair() | {f"{_TO_Q}.alpha": torch.tensor(float("nan"))})
    return f"taken without a word: scale {model.loras[0].pairs['transformer_blocks.0.attn1.to_q'].scale}"


@repro
def lora_alpha_nan_run():
    from cogvideox.sampling import sample

    model = _lora(_pair() | {f"{_TO_Q}.alpha": torch.tensor(float("nan"))})
    prompt = torch.full((1, 226, common.TEXT_WIDTH), 0.1)
    sample(model, prompt, prompt, torch.zeros(1, 16, 1, 2, 2), seed=1, steps=1)


def _workflow(graph, migrates=True):
    folder()
    file = HERE / "old.json"
    file.write_text(json.dumps(graph))
    from interop.check import check_config
    from interop.migrate import migrate_workflow

    check_config(file)
    if migrates:
        migrate_workflow(file, HERE / "new.json")


def _old(age="old"):
    from tests import wrapper_workflows

    return wrapper_workflows.text_to_video().page(age)


@repro
def migrate_far_place():
    graph = _old()
    graph["links"] = []
    for node in graph["nodes"]:
        node["pos"], node["size"] = [0, 1e18], [315, 200]
    _workflow(graph)


@repro
def migrate_tall_node():
    graph = _old()
    graph["links"] = []
    for node in graph["nodes"]:
        node["pos"], node["size"] = [0, 0], [315, 10**10]
    _workflow(graph)


@repro
def migrate_socket_name():
    graph = _old()
    next(node for node in graph["nodes"] if node["inputs"])["inputs"][0]["name"] = ["a"]
    _workflow(graph)


@repro
def migrate_extra():
    graph = _old()
    graph["extra"] = {"linkExtensions": [{"id": []}]}
    _workflow(graph)


@repro
def migrate_links_both_forms():
    graph = _old()
    first = graph["links"][0]
    graph["links"][0] = dict(
        zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), first, strict=False)
    )
    _workflow(graph)


@repro
def migrate_output_links():
    graph = _old()
    for node in graph["nodes"]:
        for socket in node["outputs"]:
            socket["links"] = 3
    _workflow(graph)


@repro
def migrate_links_number():
    graph = _old("named")
    graph["links"] = 7
    _workflow(graph)


@repro
def check_widget_name():
    graph = _old()
    node = next(node for node in graph["nodes"] if node["type"] == "DownloadAndLoadCogVideoModel")
    node["inputs"] = [{"name": "a", "widget": {"name": ["a"]}, "link": None} for _ in node["widgets_values"]]
    _workflow(graph, False)


@repro
def empty_latent_within_its_limits():
    from targets import nodes_inputs as n

    state = n.prepare(BASE)
    n.call(state, "EmptyLatent", width=16384, height=16384, length=16001, batch_size=64)


@repro
def prompt_none():
    from targets import nodes_inputs as n

    state = n.prepare(BASE)
    n.call(state, "TextEncode", text_encoder=state["good"]["text_encoder"], prompt=None)


@repro
def downloader_choice():
    from targets import nodes_inputs as n

    state = n.prepare(BASE)
    state["nodes"]["CogVideoX15Downloader"].IS_CHANGED(checkpoint="CogVideoX-5b", download=False)


@repro
def model_none_queue():
    from targets import nodes_inputs as n

    state = n.prepare(BASE)
    print(state["nodes"]["CogVideoX15ModelLoader"].VALIDATE_INPUTS(model=3))


def main(names):
    BASE.mkdir(parents=True, exist_ok=True)
    common.build(BASE)

    def stop(*_):
        raise core.Hang("12 s, and not done")

    signal.signal(signal.SIGALRM, stop)
    for name in names or CASES:
        signal.alarm(12)
        start = time.monotonic()
        try:
            said = CASES[name]()
            verdict = f"returned: {said}"
        except (Exception, core.Hang) as error:
            found = core.judge(error)
            verdict = (
                f"[{found['kind']}] {type(error).__module__}.{found['type']}: {found['said'][:170]!r} at "
                f"{found['place']}"
            )
        signal.alarm(0)
        print(
            f"{name} ({time.monotonic() - start:.1f} s, peak {core._memory()[1] / 1e9:.2f} GB): {verdict}", flush=True
        )


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, -1))
    main(sys.argv[1:])
