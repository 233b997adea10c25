"""Workflows in the format of ComfyUI-CogVideoXWrapper (kijai), as its pages of different ages save them and as the API
takes them."""

#: Node -> its sockets, its widgets with a value each (the page's own behind the seed), its outputs. From that pack's
#: nodes.py and model_loading.py; below them nodes of other packs that its users have.
NODES = {
    "DownloadAndLoadCogVideoModel": (
        {"block_edit": "TRANSFORMERBLOCKS", "lora": "COGLORA", "compile_args": "COMPILEARGS"},
        {
            "model": "kijai/CogVideoX-5b-1.5-T2V",
            "precision": "bf16",
            "quantization": "disabled",
            "enable_sequential_cpu_offload": False,
            "attention_mode": "sdpa",
            "load_device": "main_device",
        },
        {"model": "COGVIDEOMODEL", "vae": "VAE"},
    ),
    "CogVideoXModelLoader": (
        {"block_edit": "TRANSFORMERBLOCKS", "lora": "COGLORA", "compile_args": "COMPILEARGS"},
        {
            "model": "CogVideoX_1_5_5b_T2V_bf16.safetensors",
            "base_precision": "bf16",
            "quantization": "disabled",
            "load_device": "main_device",
            "enable_sequential_cpu_offload": False,
            "attention_mode": "sdpa",
        },
        {"model": "COGVIDEOMODEL"},
    ),
    "DownloadAndLoadCogVideoGGUFModel": (
        {"block_edit": "TRANSFORMERBLOCKS"},
        {
            "model": "CogVideoX_5b_1_5_I2V_GGUF_Q4_0.safetensors",
            "vae_precision": "bf16",
            "fp8_fastmode": False,
            "load_device": "main_device",
            "enable_sequential_cpu_offload": False,
            "attention_mode": "sdpa",
        },
        {"model": "COGVIDEOMODEL", "vae": "VAE"},
    ),
    "CogVideoXVAELoader": (
        {"compile_args": "COMPILEARGS"},
        {"model_name": "cogvideox_vae.safetensors", "precision": "bf16"},
        {"vae": "VAE"},
    ),
    "CogVideoLoraSelect": (
        {"prev_lora": "COGLORA"},
        {"lora": "style.safetensors", "strength": 1.0, "fuse_lora": False},
        {"lora": "COGLORA"},
    ),
    "CogVideoTextEncode": (
        {"clip": "CLIP"},
        {"prompt": "a panda", "strength": 1.0, "force_offload": True},
        {"conditioning": "CONDITIONING", "clip": "CLIP"},
    ),
    "CogVideoTextEncodeCombine": (
        {"conditioning_1": "CONDITIONING", "conditioning_2": "CONDITIONING"},
        {"combination_mode": "weighted_average", "weighted_average_ratio": 0.25},
        {"conditioning": "CONDITIONING"},
    ),
    "CogVideoImageEncode": (
        {"vae": "VAE", "start_image": "IMAGE", "end_image": "IMAGE"},
        {"enable_tiling": False, "noise_aug_strength": 0.0, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0},
        {"samples": "LATENT"},
    ),
    "CogVideoSampler": (
        {
            "model": "COGVIDEOMODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "samples": "LATENT",
            "image_cond_latents": "LATENT",
            "context_options": "COGCONTEXT",
            "controlnet": "COGVIDECONTROLNET",
            "tora_trajectory": "TORAFEATURES",
            "fastercache": "FASTERCACHEARGS",
            "feta_args": "FETAARGS",
            "teacache_args": "TEACACHEARGS",
        },
        {
            "num_frames": 49,
            "steps": 25,
            "cfg": 6.0,
            "seed": 123456789,
            "control_after_generate": "increment",
            "scheduler": "CogVideoXDPMScheduler",
            "denoise_strength": 1.0,
        },
        {"samples": "LATENT"},
    ),
    "CogVideoDecode": (
        {"vae": "VAE", "samples": "LATENT"},
        {
            "enable_vae_tiling": True,
            "tile_sample_min_height": 240,
            "tile_sample_min_width": 360,
            "tile_overlap_factor_height": 0.2,
            "tile_overlap_factor_width": 0.2,
            "auto_tile_size": True,
        },
        {"images": "IMAGE"},
    ),
    "CogVideoContextOptions": (
        {},
        {
            "context_schedule": "uniform_standard",
            "context_frames": 48,
            "context_stride": 4,
            "context_overlap": 4,
            "freenoise": True,
        },
        {"context_options": "COGCONTEXT"},
    ),
    "CogVideoXTeaCache": ({}, {"rel_l1_thresh": 0.3}, {"teacache_args": "TEACACHEARGS"}),
    "CogVideoXFasterCache": (
        {},
        {"start_step": 15, "hf_step": 30, "lf_step": 40, "cache_device": "main_device", "num_blocks_to_cache": 42},
        {"fastercache": "FASTERCACHEARGS"},
    ),
    "CogVideoXTorchCompileSettings": (
        {},
        {"backend": "inductor", "fullgraph": False, "mode": "default", "dynamic": False, "dynamo_cache_size_limit": 64},
        {"torch_compile_args": "COMPILEARGS"},
    ),
    "CogVideoEnhanceAVideo": ({}, {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0}, {"feta_args": "FETAARGS"}),
    "CogVideoTransformerEdit": ({}, {"remove_blocks": "15, 25, 37"}, {"block_list": "TRANSFORMERBLOCKS"}),
    "CogVideoLatentPreview": (
        {"samples": "LATENT"},
        {"seed": 0, "control_after_generate": "fixed"},
        {"images": "IMAGE", "factors": "STRING"},
    ),
    "ToraEncodeTrajectory": (
        {"vae": "VAE"},
        {"width": 720},
        {"tora_trajectory": "TORAFEATURES", "video_flow_images": "IMAGE"},
    ),
    "CogVideoControlNet": (
        {"images": "IMAGE"},
        {"control_strength": 1.0},
        {"cogvideo_controlnet": "COGVIDECONTROLNET"},
    ),
    "CogVideoImageEncodeFunInP": (
        {"vae": "VAE", "start_image": "IMAGE", "end_image": "IMAGE"},
        {"num_frames": 49, "enable_tiling": True, "noise_aug_strength": 0.0},
        {"image_cond_latents": "LATENT"},
    ),
    "CogVideoXFunSampler": (
        {"pipeline": "COGVIDEOPIPE"},
        {"video_length": 49},
        {"cogvideo_pipe": "COGVIDEOPIPE", "samples": "LATENT"},
    ),
    "ConsisIDFaceEncode": ({"image": "IMAGE"}, {"scale": 1.0}, {"consis_id_cond": "CONSISID"}),
    "CogVideoXFunResizeToClosestBucket": (
        {"images": "IMAGE"},
        {"base_resolution": 512, "upscale_method": "lanczos", "crop": "disabled"},
        {"images": "IMAGE", "width": "INT", "height": "INT"},
    ),
    "CLIPLoader": ({}, {"clip_name": "t5xxl_fp16.safetensors", "type": "sd3"}, {"CLIP": "CLIP"}),
    "VAELoader": ({}, {"vae_name": "cogvideox_vae.safetensors"}, {"VAE": "VAE"}),
    "EmptyLatentImage": ({}, {"width": 720, "height": 480, "batch_size": 1}, {"LATENT": "LATENT"}),
    "LoadImage": ({}, {"image": "example.png", "upload": "image"}, {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "ImageResizeKJ": (
        {"image": "IMAGE", "get_image_size": "IMAGE"},
        {"width": 1360, "height": 768, "upscale_method": "lanczos", "keep_proportion": False, "divisible_by": 2},
        {"IMAGE": "IMAGE", "width": "INT", "height": "INT"},
    ),
    "ImageScale": (
        {"image": "IMAGE"},
        {"upscale_method": "lanczos", "width": 1360, "height": 768, "crop": "center"},
        {"IMAGE": "IMAGE"},
    ),
    "VHS_LoadVideo": ({}, {"video": "input.mp4", "frame_load_cap": 33}, {"IMAGE": "IMAGE", "frame_count": "INT"}),
    "VHS_VideoCombine": (
        {"images": "IMAGE", "vae": "VAE"},
        {"frame_rate": 16, "format": "video/h264-mp4"},
        {"Filenames": "VHS_FILENAMES"},
    ),
    "SaveWEBM": ({"images": "IMAGE"}, {"filename_prefix": "video", "codec": "vp9", "fps": 16.0, "crf": 32.0}, {}),
    "PreviewImage": ({"images": "IMAGE"}, {}, {}),
    "INTConstant": ({}, {"value": 49}, {"value": "INT"}),
    "StringConstant": ({}, {"string": "a city"}, {"STRING": "STRING"}),
    "PrimitiveNode": ({}, {"value": "", "control_after_generate": "fixed"}, {"COMBO": "COMBO"}),
    "PrimitiveString": ({}, {"value": ""}, {"STRING": "STRING"}),
    "GetWarpedNoiseFromVideo": ({"images": "IMAGE"}, {"degradation": 0.5}, {"noise": "LATENT"}),
    "Reroute": ({"": "*"}, {}, {"": "VAE"}),
    "SetNode": ({"VAE": "VAE"}, {"Constant": "VAE"}, {"*": "*"}),
    "GetNode": ({}, {"Constant": "VAE"}, {"VAE": "VAE"}),
    "easy setNode": ({"*": "*"}, {"Constant": "model"}, {}),
    "easy getNode": ({}, {"Constant": "model"}, {"COGVIDEOMODEL": "COGVIDEOMODEL"}),
    "Reroute (rgthree)": ({"": "*"}, {}, {"": "*"}),
    "mxReroute": ({"": "*"}, {}, {"": "*"}),
    "ReroutePrimitive|pysssss": ({"value": "*"}, {}, {"": "*"}),
    "Any Switch (rgthree)": (
        {"any_01": "COGVIDEOMODEL", "any_02": "COGVIDEOMODEL", "any_03": "COGVIDEOMODEL"},
        {},
        {"COGVIDEOMODEL": "COGVIDEOMODEL"},
    ),
    "Note": ({}, {"text": "Mind the seed."}, {}),
}
_PIPE = {"cogvideo_pipe": "COGVIDEOPIPE"}
_SIZE = {"height": 480, "width": 720}
_STEPS = {
    "steps": 25,
    "cfg": 6.0,
    "seed": 123456789,
    "control_after_generate": "increment",
    "scheduler": "CogVideoXDPMScheduler",
}
_TILES = {"t_tile_length": 49, "t_tile_overlap": 8}
_OPTIONAL = {
    "samples": "LATENT",
    "image_cond_latents": "LATENT",
    "context_options": "COGCONTEXT",
    "controlnet": "COGVIDECONTROLNET",
}
_LOADER = {"model": "THUDM/CogVideoX-5b", "precision": "bf16", "fp8_transformer": "disabled", "compile": "disabled"}
_OFFLOAD = {"enable_sequential_cpu_offload": False}
_EDIT = {"block_edit": "TRANSFORMERBLOCKS", "lora": "COGLORA"}
#: Its nodes before 19 November 2024, when one link brought model, VAE and text encoder: day -> sockets and widgets of
#: the loader, widgets of the sampler, sockets and widgets of the encoder.
_AGES = {
    "2024-08-06": (
        {},
        {"precision": "bf16"},
        {**_SIZE, "num_frames": 48, "fps": 8, **_STEPS, "denoise_strength": 1.0},
        {},
        {},
    ),
    "2024-08-07": (
        {},
        {"precision": "bf16"},
        {**_SIZE, "num_frames": 48, "fps": 8, **_STEPS, **_TILES, "denoise_strength": 1.0},
        {},
        {},
    ),
    "2024-09-03": (
        {},
        _LOADER | _OFFLOAD,
        {**_SIZE, "num_frames": 49, **_STEPS, **_TILES, "denoise_strength": 1.0},
        {"mask": "MASK"},
        {"chunk_size": 16, "enable_vae_slicing": True},
    ),
    "2024-10-30": (
        {"pab_config": "PAB_CONFIG", **_EDIT},
        _LOADER | _OFFLOAD,
        {**_SIZE, "num_frames": 49, **_STEPS, "denoise_strength": 1.0},
        {"mask": "MASK"},
        {"chunk_size": 16, "enable_tiling": False},
    ),
    "2024-11-16": (
        {**_EDIT, "compile_args": "COMPILEARGS"},
        _LOADER | _OFFLOAD | {"attention_mode": "sdpa", "load_device": "main_device"},
        {"width": 720, "height": 480, "num_frames": 49, **_STEPS, "denoise_strength": 1.0},
        {"mask": "MASK", "vae_override": "VAE"},
        {"chunk_size": 16, "enable_tiling": False, "noise_aug_strength": 0.0},
    ),
}
PIPED = tuple(_AGES)


def nodes_of_age(day):
    """``NODES`` as they were on a day of ``PIPED``."""
    sockets, loader, sampler, encoder_sockets, encoder = _AGES[day]
    pipe = {"pipeline": "COGVIDEOPIPE"}
    prompts = {"positive": "CONDITIONING", "negative": "CONDITIONING"}
    others = (
        _OPTIONAL
        if "pab_config" in sockets or "compile_args" in sockets
        else {"samples": "LATENT", "image_cond_latents": "LATENT"}
    )
    fast = {"tora_trajectory": "TORAFEATURES", "fastercache": "FASTERCACHEARGS"} if others is _OPTIONAL else {}
    return NODES | {
        "DownloadAndLoadCogVideoModel": (sockets, loader, _PIPE),
        "CogVideoSampler": (pipe | prompts | others | fast, sampler, _PIPE | {"samples": "LATENT"}),
        "CogVideoDecode": (pipe | {"samples": "LATENT"}, {"enable_vae_tiling": True}, {"images": "IMAGE"}),
        "CogVideoImageEncode": (pipe | {"image": "IMAGE", **encoder_sockets}, encoder, {"samples": "LATENT"}),
        "CogVideoEncodePrompt": (pipe, {"prompt": "a panda", "negative_prompt": ""}, prompts),
        "CogVideoImageInterpolationEncode": (
            pipe | {"start_image": "IMAGE", "end_image": "IMAGE"},
            {"enable_tiling": False},
            {"samples": "LATENT"},
        ),
        "CogVideoPABConfig": (
            {},
            {
                "spatial_broadcast": True,
                "spatial_threshold_start": 850,
                "spatial_threshold_end": 100,
                "spatial_range": 2,
            },
            {"pab_config": "PAB_CONFIG"},
        ),
        "MZ_CogVideoXLoader": (
            {"pab_config": "PAB_CONFIG", "block_edit": "TRANSFORMERBLOCKS"},
            {
                "unet_name": "CogVideoX_5b.safetensors",
                "vae_name": "cogvideox_vae.safetensors",
                "weight_dtype": "bf16",
                "fp8_fast_mode": False,
                "enable_sequential_cpu_offload": False,
                "enable_vae_encode_tiling": False,
            },
            _PIPE,
        ),
    }


_TYPES = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}


class Workflow:
    """A workflow being drawn: nodes side by side, each with links and changes of its widgets.

    ``w.add("CogVideoDecode", vae=("loader", 1), auto_tile_size=False)`` returns the node's id; ``name`` is how others
    may call it.

    Args:
        table: the nodes there are, as ``NODES`` has them.
    """

    def __init__(self, table=NODES):
        self.table = table
        self.nodes = {}
        self.names = {}

    def add(self, kind, name=None, mode=0, **inputs):
        sockets, widgets, _ = self.table[kind]
        assert inputs.keys() <= sockets.keys() | widgets.keys(), (kind, inputs)
        id_ = max(self.nodes, default=7) + 3
        links = {
            key: (self.names.get(value[0], value[0]), value[1])
            for key, value in inputs.items()
            if isinstance(value, tuple)
        }
        values = {key: inputs[key] if key in inputs and key not in links else value for key, value in widgets.items()}
        self.nodes[id_] = {"kind": kind, "mode": mode, "values": values, "links": links}
        self.names[name or kind] = id_
        return id_

    def change(self, name, mode=None, **inputs):
        node = self.nodes[self.names[name]]
        node["mode"] = node["mode"] if mode is None else mode
        for key, value in inputs.items():
            if isinstance(value, tuple):
                node["links"][key] = (self.names.get(value[0], value[0]), value[1])
            elif value is None:
                node["links"].pop(key)
            else:
                node["values"][key] = value

    def page(self, age="old", place=None):
        """As the page saves it. ``old`` names only the widgets that were turned into inputs; ``new`` all of them;
        ``named`` saves them as an object, and links too (version 1)."""
        numbers = {}
        for id_, node in self.nodes.items():
            for key in node["links"]:
                numbers[id_, key] = len(numbers) + 100
        links, nodes = [], []
        for index, (id_, node) in enumerate(self.nodes.items()):
            sockets, widgets, outputs = self.table[node["kind"]]
            inputs = [{"name": key, "type": kind, "link": numbers.get((id_, key))} for key, kind in sockets.items()]
            inputs += [
                {"name": key, "type": _TYPES[type(value)], "widget": {"name": key}, "link": numbers.get((id_, key))}
                for key, value in widgets.items()
                if (id_, key) in numbers or (age != "old" and key != "control_after_generate")
            ]
            for slot, socket in enumerate(inputs):
                if socket["link"] is not None:
                    origin, output = node["links"][socket["name"]]
                    links.append(
                        [
                            socket["link"],
                            origin,
                            output,
                            id_,
                            slot,
                            list(self.table[self.nodes[origin]["kind"]][2].values())[output],
                        ]
                    )
            x, y = place(index) if place else (400 * index, 10 * index)
            nodes.append(
                {
                    "id": id_,
                    "type": node["kind"],
                    "pos": {"0": x, "1": y} if age == "old" else [x, y],
                    "size": [315, 100 + index],
                    "flags": {},
                    "order": index,
                    "mode": node["mode"],
                    "inputs": inputs,
                    "outputs": [{"name": key, "type": kind, "links": None} for key, kind in outputs.items()],
                    "properties": {
                        "Node name for S&R": node["kind"],
                        **({} if age == "old" else {"cnr_id": "some-pack", "ver": "1"}),
                    },
                    # Nodes of ComfyUI-VideoHelperSuite are saved with an object in every age.
                    "widgets_values": dict(node["values"])
                    if age == "named" or node["kind"].startswith("VHS_")
                    else list(node["values"].values()),
                }
            )
        by_id = {node["id"]: node for node in nodes}
        for number, origin, output, *_ in links:
            socket = by_id[origin]["outputs"][output]
            socket["links"] = [*(socket["links"] or []), number]
        groups = [{"title": "All of it", "bounding": [-20, -80, 5000, 900], "color": "#3f789e", "font_size": 24}]
        page = {"nodes": nodes, "groups": groups, "config": {}, "extra": {"ds": {"scale": 0.5, "offset": [1, 2]}}}
        if age == "named":
            names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
            state = {"lastNodeId": 900, "lastLinkId": 950, "lastGroupId": 1, "lastRerouteId": 0}
            return page | {
                "links": [dict(zip(names, link, strict=True)) for link in links],
                "state": state,
                "version": 1,
            }
        return page | {
            "links": links,
            "last_node_id": max(by_id),
            "last_link_id": max(numbers.values(), default=0),
            "version": 0.4,
        }

    def api(self):
        prompt = {}
        for id_, node in self.nodes.items():
            if node["kind"] not in ("Note", "Reroute", "SetNode", "GetNode"):
                values = {key: value for key, value in node["values"].items() if key != "control_after_generate"}
                links = {key: [str(origin), output] for key, (origin, output) in node["links"].items()}
                prompt[str(id_)] = {
                    "inputs": values | links,
                    "class_type": node["kind"],
                    "_meta": {"title": f"My {node['kind']}"},
                }
        return prompt


def _start(model, **loader):
    w = Workflow()
    w.add("CLIPLoader")
    w.add("DownloadAndLoadCogVideoModel", "loader", model=model, **loader)
    w.add(
        "CogVideoTextEncode",
        "positive",
        clip=("CLIPLoader", 0),
        prompt="A panda plays the guitar.",
        force_offload=False,
    )
    w.add("CogVideoTextEncode", "negative", clip=("positive", 1), prompt="blurry")
    return w


def _finish(w, **sampler):
    w.add(
        "CogVideoSampler", "sampler", model=("loader", 0), positive=("positive", 0), negative=("negative", 0), **sampler
    )
    w.add("CogVideoDecode", "decode", vae=("loader", 1), samples=("sampler", 0))
    w.add("VHS_VideoCombine", "save", images=("decode", 0))
    w.add("Note")
    return w


def text_to_video():
    w = _start("kijai/CogVideoX-5b-1.5-T2V")
    w.add("EmptyLatentImage", "size", width=1360, height=768)
    return _finish(w, samples=("size", 0))


def image_to_video():
    w = _start("kijai/CogVideoX-5b-1.5-I2V")
    w.add("LoadImage", "picture")
    w.add("ImageResizeKJ", "resize", image=("picture", 0))
    w.add("CogVideoImageEncode", "encode", vae=("loader", 1), start_image=("resize", 0))
    return _finish(w, image_cond_latents=("encode", 0))


def inpaint():
    """Start and end images of a CogVideoX-Fun-V1.5-InP, joined as in that pack's cogvideox_Fun_I2V_02.json."""
    w = _start("alibaba-pai/CogVideoX-Fun-V1.5-5b-InP")
    w.add("LoadImage", "picture")
    w.add("ImageResizeKJ", "resize", image=("picture", 0))
    w.add("LoadImage", "last")
    w.add("CogVideoImageEncodeFunInP", "encode", vae=("loader", 1), start_image=("resize", 0), end_image=("last", 0))
    return _finish(w, image_cond_latents=("encode", 0))


def video_to_video():
    w = _start("THUDM/CogVideoX-5b")
    w.add("VHS_LoadVideo", "clip")
    w.add("CogVideoImageEncode", "encode", vae=("loader", 1), start_image=("clip", 0))
    return _finish(w, samples=("encode", 0), denoise_strength=0.8)


def piped(use, day):
    """A workflow of before 19 November 2024.

    Args:
        use: ``text``, ``image`` or ``video``.
        day: one of ``PIPED``.
    """
    w = Workflow(nodes_of_age(day))
    w.add("CLIPLoader")
    named = (
        {"model": "THUDM/CogVideoX-5b-I2V"}
        if use == "image" and "model" in w.table["DownloadAndLoadCogVideoModel"][1]
        else {}
    )
    w.add("DownloadAndLoadCogVideoModel", "loader", **named)
    for name, prompt in (("positive", "A panda plays the guitar."), ("negative", "blurry")):
        w.add("CogVideoTextEncode", name, clip=("CLIPLoader", 0), prompt=prompt)
    given = {}
    if use == "image":
        w.add("LoadImage", "picture")
        w.add("ImageResizeKJ", "resize", image=("picture", 0), width=720, height=480)
        w.add("CogVideoImageEncode", "encode", pipeline=("loader", 0), image=("resize", 0))
        given = {"image_cond_latents": ("encode", 0)}
    elif use == "video":
        w.add("VHS_LoadVideo", "clip")
        w.add("CogVideoImageEncode", "encode", pipeline=("loader", 0), image=("clip", 0))
        given = {"samples": ("encode", 0), "denoise_strength": 0.8}
    w.add(
        "CogVideoSampler",
        "sampler",
        pipeline=("loader", 0),
        positive=("positive", 0),
        negative=("negative", 0),
        **given,
    )
    w.add("CogVideoDecode", "decode", pipeline=("sampler", 0), samples=("sampler", 1))
    w.add("VHS_VideoCombine", "save", images=("decode", 0))
    return w
