"""Workflows in the format of VideoX-Fun's own nodes for CogVideoX, as ComfyUI's page and API have them."""

from tests.wrapper_workflows import NODES as OTHERS
from tests.wrapper_workflows import Workflow

_MODEL = {"cogvideoxfun_model": "FunModels"}
_GIVEN = _MODEL | {"prompt": "STRING_PROMPT", "negative_prompt": "STRING_PROMPT"}
_SEED = {"seed": 43, "control_after_generate": "randomize", "steps": 30, "cfg": 5.0}
_MADE = {"images": "IMAGE"}
#: Node -> its sockets, its widgets with a value each, its outputs: of comfyui/cogvideox_fun/nodes.py and
#: comfyui/comfyui_nodes.py there.
NODES = OTHERS | {
    "LoadCogVideoXFunModel": (
        {},
        {
            "model": "CogVideoX-Fun-V1.5-5b-InP",
            "model_type": "Inpaint",
            "GPU_memory_mode": "model_cpu_offload",
            "precision": "bf16",
        },
        _MODEL,
    ),
    "LoadCogVideoXFunLora": (
        _MODEL,
        {"lora_name": "fun/reward.safetensors", "strength_model": 0.7, "lora_cache": False},
        _MODEL,
    ),
    "FunTextBox": ({}, {"prompt": "A panda plays the guitar."}, {"prompt": "STRING_PROMPT"}),
    "FunCompile": ({"funmodels": "FunModels"}, {"cache_size_limit": 64}, {"funmodels": "FunModels"}),
    "FunAttention": ({"funmodels": "FunModels"}, {"attention_type": "flash"}, {"funmodels": "FunModels"}),
    "CogVideoXFunT2VSampler": (
        _GIVEN,
        {"video_length": 85, "width": 672, "height": 384, "is_image": False, **_SEED, "scheduler": "DDIM"},
        _MADE,
    ),
    "CogVideoXFunInpaintSampler": (
        _GIVEN | {"start_img": "IMAGE", "end_img": "IMAGE"},
        {"video_length": 85, "base_resolution": 512, **_SEED, "scheduler": "DDIM"},
        _MADE,
    ),
    "CogVideoXFunV2VSampler": (
        _GIVEN | {"validation_video": "IMAGE", "control_video": "IMAGE"},
        {"video_length": 45, "base_resolution": 512, **_SEED, "denoise_strength": 0.7, "scheduler": "DDIM"},
        _MADE,
    ),
    "WanFunT2VSampler": ({"funmodels": "FunModels", "prompt": "STRING_PROMPT"}, {"steps": 50}, _MADE),
    "ImageMaximumNode": ({"video_1": "IMAGE", "video_2": "IMAGE"}, {}, {"image": "IMAGE"}),
}


def _drawn(kind, **inputs):
    w = Workflow(NODES)
    w.add("LoadCogVideoXFunModel", "loader")
    w.add("FunTextBox", "positive")
    w.add("FunTextBox", "negative", prompt="blurry")
    for name, (node, given) in inputs.items():
        w.add(node, name, **given)
    links = {socket: (name, 0) for name, socket in _CONNECTED.items() if name in inputs}
    w.add(
        kind,
        "sampler",
        cogvideoxfun_model=("loader", 0),
        prompt=("positive", 0),
        negative_prompt=("negative", 0),
        **links,
    )
    w.add("VHS_VideoCombine", "save", images=("sampler", 0))
    # The node that gives the video, as other workflows call it.
    w.names["decode"] = w.names["sampler"]
    return w


_CONNECTED = {"picture": "start_img", "last": "end_img", "clip": "validation_video"}


def text_to_video():
    return _drawn("CogVideoXFunT2VSampler")


def image_to_video():
    return _drawn("CogVideoXFunInpaintSampler", picture=("LoadImage", {}), last=("LoadImage", {}))


def video_to_video():
    return _drawn("CogVideoXFunV2VSampler", clip=("VHS_LoadVideo", {}))


USES = {"text": text_to_video, "images": image_to_video, "video": video_to_video}
