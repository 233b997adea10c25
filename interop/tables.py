"""Facts of ComfyUI-CogVideoXWrapper, VideoX-Fun and the packs around them: nodes, their sockets and widgets by age.

Sources: kijai/ComfyUI-CogVideoXWrapper, nodes.py, model_loading.py and pipeline_cogvideox.py in all 341 commits;
MinusZoneAI/ComfyUI-CogVideoX-MZ; aigc-apps/VideoX-Fun (CogVideoX-Fun until 2025), comfyui/comfyui_nodes.py and
comfyui/cogvideox_fun/nodes.py in all commits to 804a425.

Until 19 November 2024 one socket, ``pipeline``, brought model, VAE and text encoder to every node, and gave the
sampler's size too. Ages are told from each other by their sockets' names and, where a file only lists values, by which
widgets these would fit.
"""

from collections.abc import Mapping, Sequence

PACK = "ComfyUI-CogVideoXWrapper"
FUN_PACK = "VideoX-Fun"
AFTER_SEED = "control_after_generate"
AFTERWARDS = ("fixed", "increment", "decrement", "randomize")

#: VideoX-Fun's nodes for CogVideoX, under the names of all ages.
FUN_LOADERS = ("LoadCogVideoXFunModel", "LoadCogVideoX_Fun_Model", "LoadCogVideoX_FUN_Model")
FUN_LORAS = ("LoadCogVideoXFunLora", "LoadCogVideoX_Fun_Lora", "LoadCogVideoX_FUN_Lora")
FUN_FROM_TEXT = ("CogVideoXFunT2VSampler", "CogVideoX_Fun_T2VSampler", "CogVideoX_FUN_T2VSampler")
FUN_FROM_IMAGES = ("CogVideoXFunInpaintSampler", "CogVideoX_Fun_I2VSampler", "CogVideoX_FUN_I2VSampler")
FUN_FROM_VIDEO = ("CogVideoXFunV2VSampler", "CogVideoX_Fun_V2VSampler", "CogVideoX_FUN_V2VSampler")
VIDEOX_FUN_SAMPLERS = (*FUN_FROM_TEXT, *FUN_FROM_IMAGES, *FUN_FROM_VIDEO)
FUN_KINDS = (*FUN_LOADERS, *FUN_LORAS, *VIDEOX_FUN_SAMPLERS)
#: Its nodes that serve its other models too, which are migrated where they serve CogVideoX alone, and their widgets.
FUN_TEXT = ("FunTextBox", "CogVideoX_FUN_TextBox", "TextBox")
FUN_SHARED = {
    **dict.fromkeys(FUN_TEXT, ("prompt",)),
    "FunCompile": ("cache_size_limit",),
    "FunAttention": ("attention_type",),
}
#: Its nodes for pictures, which stay.
FUN_PICTURES = (
    *("ImageMaximumNode", "ImageCollectNode", "CreateTrajectoryBasedOnKJNodes"),
    *("ImageToCanny", "ImageToDepth", "ImageToPose", "VideoToCanny", "VideoToDepth", "VideoToPose"),
)
_FUN_INPUTS = ("cogvideoxfun_model", "prompt", "negative_prompt")
#: Node -> its sockets, of all ages. What else is connected is not known.
SOCKETS = {
    **dict.fromkeys(FUN_LOADERS, ()),
    **dict.fromkeys(FUN_LORAS, ("cogvideoxfun_model",)),
    **dict.fromkeys(FUN_FROM_TEXT, _FUN_INPUTS),
    **dict.fromkeys(FUN_FROM_IMAGES, (*_FUN_INPUTS, "start_img", "end_img")),
    **dict.fromkeys(FUN_FROM_VIDEO, (*_FUN_INPUTS, "validation_video", "control_video")),
    "DownloadAndLoadCogVideoModel": ("pab_config", "block_edit", "lora", "compile_args"),
    "CogVideoXModelLoader": ("block_edit", "lora", "compile_args"),
    "DownloadAndLoadCogVideoGGUFModel": ("pab_config", "block_edit", "compile_args"),
    "MZ_CogVideoXLoader": ("pab_config", "block_edit"),
    "CogVideoXVAELoader": ("compile_args",),
    "CogVideoLoraSelect": ("prev_lora",),
    "CogVideoLoraSelectComfy": ("prev_lora",),
    "CogVideoTextEncode": ("clip", "text"),
    "CogVideoEncodePrompt": ("pipeline",),
    "CogVideoTextEncodeCombine": ("conditioning_1", "conditioning_2"),
    "CogVideoImageEncode": ("vae", "start_image", "end_image", "pipeline", "image", "mask", "vae_override"),
    "CogVideoImageInterpolationEncode": ("pipeline", "start_image", "end_image", "mask", "vae_override"),
    "CogVideoImageEncodeFunInP": ("vae", "start_image", "end_image"),
    "CogVideoSampler": (
        *(
            "model",
            "pipeline",
            "positive",
            "negative",
            "embeds",
            "samples",
            "image_cond_latents",
            "context_options",
            "controlnet",
        ),
        *("tora_trajectory", "fastercache", "feta_args", "teacache_args"),
    ),
    "CogVideoDecode": ("vae", "samples", "pipeline", "vae_override"),
}
_TILES = ("tile_sample_min_height", "tile_sample_min_width", "tile_overlap_factor_height", "tile_overlap_factor_width")
_OLD_SAMPLER = ("height", "width", "num_frames", "steps", "cfg", "seed", AFTER_SEED, "scheduler")
_TEMPORAL_TILES = ("t_tile_length", "t_tile_overlap")
_FUN_STEPS = ("seed", AFTER_SEED, "steps", "cfg")
#: Node -> the orders of its list of values, the newest first. Orders that only go on where an older one ends are left
#: out.
ORDERS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "DownloadAndLoadCogVideoModel": (
        ("model", "precision", "quantization", "enable_sequential_cpu_offload", "attention_mode", "load_device"),
        (
            "model",
            "precision",
            "fp8_transformer",
            "compile",
            "enable_sequential_cpu_offload",
            "attention_mode",
            "load_device",
        ),
        ("model", "precision", "fp8_transformer", "compile", "enable_sequential_cpu_offload", "load_device"),
        ("model", "precision", "fp8_transformer", "torch_compile", "onediff"),
        ("precision",),
    ),
    "CogVideoXModelLoader": (
        ("model", "base_precision", "quantization", "load_device", "enable_sequential_cpu_offload", "attention_mode"),
    ),
    "DownloadAndLoadCogVideoGGUFModel": (
        ("model", "vae_precision", "fp8_fastmode", "load_device", "enable_sequential_cpu_offload", "attention_mode"),
        (
            "model",
            "vae_precision",
            "fp8_fastmode",
            "load_device",
            "enable_sequential_cpu_offload",
            "compile",
            "attention_mode",
        ),
        ("model", "vae_precision", "fp8_fastmode", "compile"),
    ),
    "MZ_CogVideoXLoader": (
        (
            "unet_name",
            "vae_name",
            "weight_dtype",
            "fp8_fast_mode",
            "enable_sequential_cpu_offload",
            "enable_vae_encode_tiling",
        ),
        (
            "unet_name",
            "vae_name",
            "weight_dtype",
            "fp8_fast_mode",
            "dyn_offload_cpu_layer",
            "enable_sequential_cpu_offload",
        ),
    ),
    "CogVideoXVAELoader": (("model_name", "precision"),),
    "CogVideoLoraSelect": (("lora", "strength", "fuse_lora"),),
    "CogVideoLoraSelectComfy": (("lora", "strength", "fuse_lora"),),
    "CogVideoTextEncode": (("prompt", "strength", "force_offload"),),
    "CogVideoEncodePrompt": (("prompt", "negative_prompt"),),
    "CogVideoTextEncodeCombine": (("combination_mode", "weighted_average_ratio"),),
    "CogVideoImageEncode": (
        ("enable_tiling", "noise_aug_strength", "strength", "start_percent", "end_percent"),
        ("chunk_size", "enable_tiling", "noise_aug_strength"),
        ("chunk_size", "enable_vae_slicing"),
    ),
    "CogVideoImageInterpolationEncode": (("enable_tiling",),),
    "CogVideoImageEncodeFunInP": (("num_frames", "enable_tiling", "noise_aug_strength"),),
    # The page itself adds what becomes of the seed. Width and height changed places from 14 to 19 November 2024.
    "CogVideoSampler": (
        ("num_frames", "steps", "cfg", "seed", AFTER_SEED, "scheduler", "denoise_strength"),
        (*_OLD_SAMPLER, "denoise_strength"),
        (*_OLD_SAMPLER, *_TEMPORAL_TILES, "denoise_strength"),
        (
            "height",
            "width",
            "num_frames",
            "fps",
            "steps",
            "cfg",
            "seed",
            AFTER_SEED,
            "scheduler",
            *_TEMPORAL_TILES,
            "denoise_strength",
        ),
        ("height", "width", "num_frames", "fps", "steps", "cfg", "seed", AFTER_SEED, "scheduler", "denoise_strength"),
        ("height", "width", "num_frames", "fps", "steps", "cfg", "seed", AFTER_SEED, "denoise_strength"),
    ),
    "CogVideoDecode": (
        ("enable_vae_tiling", *_TILES, "auto_tile_size"),
        ("enable_vae_tiling", *_TILES, "enable_vae_slicing"),
    ),
    "CogVideoXFasterCache": (("start_step", "hf_step", "lf_step", "cache_device", "num_blocks_to_cache"),),
    "CogVideoXTeaCache": (("rel_l1_thresh",),),
    "CogVideoXTorchCompileSettings": (("backend", "fullgraph", "mode", "dynamic", "dynamo_cache_size_limit"),),
    "CogVideoPABConfig": (
        ("spatial_broadcast", "spatial_threshold_start", "spatial_threshold_end", "spatial_range"),
        ("spatial_broadcast", "pab_threshold_start", "pab_threshold_end", "pab_range", "steps"),
    ),
    **dict.fromkeys(
        FUN_LOADERS,
        (
            ("model", "model_type", "GPU_memory_mode", "precision"),
            ("model", "model_type", "low_gpu_memory_mode", "precision"),
            ("model", "low_gpu_memory_mode", "precision"),
        ),
    ),
    **dict.fromkeys(FUN_LORAS, (("lora_name", "strength_model", "lora_cache"),)),
    **dict.fromkeys(FUN_FROM_TEXT, (("video_length", "width", "height", "is_image", *_FUN_STEPS, "scheduler"),)),
    **dict.fromkeys(FUN_FROM_IMAGES, (("video_length", "base_resolution", *_FUN_STEPS, "scheduler"),)),
    **dict.fromkeys(
        FUN_FROM_VIDEO, (("video_length", "base_resolution", *_FUN_STEPS, "denoise_strength", "scheduler"),)
    ),
}
_SWITCHES = {
    *(
        "enable_sequential_cpu_offload",
        "fp8_fastmode",
        "fp8_fast_mode",
        "torch_compile",
        "onediff",
        "fuse_lora",
        "force_offload",
        "enable_tiling",
    ),
    *(
        "enable_vae_tiling",
        "enable_vae_slicing",
        "enable_vae_encode_tiling",
        "auto_tile_size",
        "spatial_broadcast",
        "fullgraph",
        "dynamic",
    ),
    *("low_gpu_memory_mode", "is_image", "lora_cache"),
}
_WHOLE = {
    *(
        "height",
        "width",
        "num_frames",
        "fps",
        "steps",
        "seed",
        "chunk_size",
        *_TEMPORAL_TILES,
        *_TILES[:2],
        "dyn_offload_cpu_layer",
    ),
    *(
        "spatial_threshold_start",
        "spatial_threshold_end",
        "spatial_range",
        "pab_threshold_start",
        "pab_threshold_end",
        "pab_range",
    ),
    *("start_step", "hf_step", "lf_step", "num_blocks_to_cache", "dynamo_cache_size_limit"),
    *("video_length", "base_resolution"),
}
_NUMBERS = {
    *(
        "cfg",
        "denoise_strength",
        "strength",
        "noise_aug_strength",
        "start_percent",
        "end_percent",
        "weighted_average_ratio",
        "rel_l1_thresh",
        "strength_model",
    ),
    *_TILES[2:],
}
PRECISIONS = ("fp16", "bf16", "fp32")
_CHOICES = {
    "precision": PRECISIONS,
    "base_precision": PRECISIONS,
    "vae_precision": PRECISIONS,
    "compile": ("disabled", "onediff", "torch"),
    "load_device": ("main_device", "offload_device"),
    "model_type": ("Inpaint", "Control"),
    AFTER_SEED: AFTERWARDS,
}


def known_widgets(kind: str) -> set[str]:
    """The widgets of a node, of all ages."""
    return {name for order in ORDERS.get(kind, ()) for name in order}


def fits(name: str, value) -> bool:
    """Whether a value can be that of a widget. Where a file only lists values, this tells which widgets it lists."""
    if name in _SWITCHES:
        return isinstance(value, bool)
    if name in _WHOLE:
        return type(value) is int
    if name in _NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name == "fp8_transformer":
        return isinstance(value, bool) or (isinstance(value, str) and value not in PRECISIONS)
    if not isinstance(value, str):
        return False
    if name in _CHOICES:
        return value in _CHOICES[name]
    if name == "attention_mode":
        return value == "comfy" or "sdpa" in value or "sage" in value
    return value not in PRECISIONS if name == "model" else value not in AFTERWARDS if name == "scheduler" else True


def order_of(kind: str, values: Sequence) -> tuple[str, ...]:
    """The names of a list of values: of the orders that the node had, the newest of those that fit best."""

    def score(order: tuple[str, ...]) -> float:
        matching = sum(fits(name, value) for name, value in zip(order, values, strict=False))
        return matching - max(0, len(values) - len(order)) - 0.1 * max(0, len(order) - len(values))

    return max(ORDERS[kind], key=score, default=())


#: Loaders, and their widgets with the model's name and the dtype.
MODEL_LOADERS = {
    "DownloadAndLoadCogVideoModel": ("model", "precision"),
    "CogVideoXModelLoader": ("model", "base_precision"),
    "DownloadAndLoadCogVideoGGUFModel": ("model", "vae_precision"),
    "MZ_CogVideoXLoader": ("unet_name", "weight_dtype"),
    **dict.fromkeys(FUN_LOADERS, ("model", "precision")),
}
LORAS = ("CogVideoLoraSelect", "CogVideoLoraSelectComfy")
ENCODERS = ("CogVideoImageEncode", "CogVideoImageInterpolationEncode")
#: The encoder for CogVideoX-Fun InP models, which makes a mask too.
FUN_ENCODER = "CogVideoImageEncodeFunInP"
SPEED = ("CogVideoXFasterCache", "CogVideoXTeaCache", "CogVideoPABConfig", "CogVideoXTorchCompileSettings")
#: Its schedulers that are ours, and of the others the one to begin with. Those named DPM and DDIM_tiled are of 2024's
#: summer.
SAME_SCHEDULER = {"CogVideoXDDIM": "ddim", "CogVideoXDPMScheduler": "dpm", "DPM": "dpm"}
NEAR_SCHEDULER = {"DPM++": "dpm", "SASolverScheduler": "dpm"}
#: The same of VideoX-Fun (``all_cheduler_dict`` in videox_fun/ui/controller.py).
FUN_SCHEDULERS = {"DDIM": "ddim_origin", "DDIM_Origin": "ddim_origin", "DDIM_Cog": "ddim"}
#: The folder that DownloadAndLoadCogVideoModel makes in models/CogVideo, where it is not the repository's name.
FOLDERS = {
    "THUDM/CogVideoX-2b": "CogVideo2B",
    "kijai/CogVideoX-5b-1.5-T2V": "CogVideoX-5b-1.5/transformer_T2V",
    "kijai/CogVideoX-5b-1.5-I2V": "CogVideoX-5b-1.5/transformer_I2V",
}
#: What its ways to quantize are here, and whether that is the same.
QUANTIZATION = {
    "enabled": ("fp8_weight_only", True),
    "fp8_e4m3fn": ("fp8_weight_only", True),
    "fp8_e5m2": ("fp8_weight_only", False),
    "fastmode": ("fp8_dynamic", True),
    "fp8_e4m3fn_fast": ("fp8_dynamic", True),
    "fp8_e4m3fn_fastmode": ("fp8_dynamic", True),
    "fp8_fastmode": ("fp8_dynamic", True),
    "torchao_fp8dq": ("fp8_dynamic", True),
    "torchao_fp8dqrow": ("fp8_dynamic", True),
    "torchao_fp8wo": ("fp8_weight_only", True),
    "torchao_int8dq": ("int8_dynamic", True),
    "torchao_int8wo": ("int8_weight_only", True),
    "torchao_fp6": ("int8_weight_only", False),
    "torchao_int4wo": ("int8_weight_only", False),
    "torchao_int4": ("int8_weight_only", False),
}
#: Names of files whose weights are packed already, which stay as they are.
PACKED = r"fp8|gguf|q[2-8]_|int[48]|nf4"
#: LoRAs whose fused strength that pack divides by their rank, and the rank that those of DimensionX have.
DIVIDED, DIMENSIONX_RANK = r"orbit|dimensionx", 256
#: What cannot be left out without making another video, and why: sampler's input -> sentence.
OTHER_VIDEO = {
    "tora_trajectory": "Tora's trajectories",
    "controlnet": "a ControlNet",
}
#: CogVideoX-Fun's models by their names, and those of them that read no mask.
FUN, FUN_CONTROL = r"fun(?![a-z])", "pose|control"
#: Models that it is the same with: a pattern of their names -> what they are.
OTHER_MODELS = {
    FUN: "a CogVideoX-Fun model other than V1.5-5b-InP",
    r"(?<![a-z])tora(?![a-z])": "a Tora model",
    "img2vid": "a model that is told its image in a way of its own",
}
#: Where an input takes a node of one kind: that kind. What else is connected there is not known.
EXPECTED = {
    "context_options": "CogVideoContextOptions",
    "feta_args": "CogVideoEnhanceAVideo",
    "fastercache": "CogVideoXFasterCache",
    "teacache_args": "CogVideoXTeaCache",
    "block_edit": "CogVideoTransformerEdit",
    "compile_args": "CogVideoXTorchCompileSettings",
    "pab_config": "CogVideoPABConfig",
}
#: That pack's own samplers for them, of autumn 2024.
FUN_SAMPLERS = ("CogVideoXFunSampler", "CogVideoXFunVid2VidSampler", "CogVideoXFunControlSampler")
#: Nodes that are left out, and what that means.
LEFT_OUT = {
    "CogVideoContextOptions": (
        "Context windows are not carried over: the whole clip is made at once, which takes more memory, and over the "
        "length that the model was trained for the picture may suffer. Put CogVideoX-1.5 Context Windows between the "
        "loader and the sampler, and choose ddim, to have windows again."
    ),
    "CogVideoEnhanceAVideo": "Enhance-A-Video is not here, so the video will differ from the old one.",
    "CogVideoTransformerEdit": "Removing blocks of the transformer is not here: all of them run.",
    "CogVideoLatentPreview": (
        "The preview of latents is not here: decode them with CogVideoX-1.5 VAE Decode to see them."
    ),
    "CogVideoXFunResizeToClosestBucket": (
        "CogVideoX-Fun's buckets are not here: the node that takes the image scales and crops it itself."
    ),
    FUN_ENCODER: "No sampler that is switched on uses it.",
    "CogVideoXFunSampler": "CogVideoX-1.5 Inpaint and CogVideoX-1.5 Sampler make its videos.",
    "CogVideoXFunVid2VidSampler": "CogVideoX-1.5 Inpaint and CogVideoX-1.5 Sampler make its videos.",
    "CogVideoXFunControlSampler": "CogVideoX-1.5 Inpaint and CogVideoX-1.5 Sampler make its videos.",
}
#: Its other nodes, which are refused where they are used.
REST = {
    *(
        "CogVideoControlNet",
        "DownloadAndLoadCogVideoControlNet",
        "DownloadAndLoadToraModel",
        "ToraEncodeTrajectory",
        "ToraEncodeOpticalFlow",
    ),
    *("CogVideoControlImageEncode", "CogVideoDualTextEncode_311"),
}
#: Nodes of others that make an empty image latent or scale a picture: their widgets in order, and whether their outputs
#: 1 and 2 are width and height.
EMPTY_LATENTS = {
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
}
RESIZERS = {
    "ImageResizeKJ": (("width", "height", "upscale_method", "keep_proportion", "divisible_by"), True),
    "ImageResizeKJv2": (
        ("width", "height", "upscale_method", "keep_proportion", "pad_color", "crop_position", "divisible_by"),
        True,
    ),
    "ImageResize+": (("width", "height", "interpolation", "method", "condition", "multiple_of"), True),
    "GetImageSizeAndCount": ((), True),
    "CogVideoXFunResizeToClosestBucket": ((), False),
    "ImageScale": (("upscale_method", "width", "height", "crop"), False),
}
#: Ways of the resizers that end at width x height, whatever comes in.
EXACT = (None, False, "stretch", "crop", "pad", "fill / crop")
#: Their inputs that make the size another.
SIZE_INPUTS = {"width", "height", "width_input", "height_input", "get_image_size"}
#: Nodes whose first widget is what they give: the page's, ComfyUI's, ComfyUI-KJNodes' and others'.
CONSTANTS = (
    *("PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean", "PrimitiveString"),
    *("INTConstant", "FloatConstant", "BOOLConstant", "StringConstant", "Int", "easy int", "ImpactInt"),
)
OLD = SOCKETS.keys() | ORDERS.keys() | LEFT_OUT.keys() | REST
#: Widgets of the old nodes that change nothing about the video.
WITHOUT_EFFECT = {
    *(
        "force_offload",
        "enable_tiling",
        "enable_vae_tiling",
        "load_device",
        "fuse_lora",
        "chunk_size",
        "enable_vae_slicing",
        "fps",
    ),
    *("enable_vae_encode_tiling", "dyn_offload_cpu_layer", "auto_tile_size", *_TILES),
    "lora_cache",
}
