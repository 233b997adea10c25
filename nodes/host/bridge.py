"""Our transformer as core's MODEL: a real ``BaseModel`` in a real ``ModelPatcher``, whose every call is the engine's.

Core's samplers see a plain v-prediction model. Its own parameterisation for CogVideoX (``V_PREDICTION_DDPM``) does not
divide what a sampler scales by sqrt(1 + sigma^2), so that the model would read noise of about 4519 sigma.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from comfy import conds, latent_formats, lora, model_base, model_sampling, supported_models, utils
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from comfy.weight_adapter.lora import LoRAAdapter
from einops import rearrange
from torch import nn

from ...cogvideox.checkpoint.naming import comfy_name
from ...cogvideox.geometry import padded, padding_frames, rotary_embedding
from ...cogvideox.preview import LATENT_RGB, stretched
from ...cogvideox.variants import OFS, full_config
from ...cogvideox.words import listed, short
from .core_parts import OURS, Known, PartPatcher, StandIn
from .page import failures_shown
from .progress import NodeEvents, saving_latents

if TYPE_CHECKING:
    from ...cogvideox.dtypes import Precision
    from ...cogvideox.handles import Model
    from ...cogvideox.sentinel import Sentinel
    from ...cogvideox.weights import Placement, Weights

_KEY = "cogvideox15"
_PREFIX = "diffusion_model."
#: The share of the signal at the last timestep that core has in the place of zero (comfy/model_sampling.py), as sigma
#: would be infinite.
_LEAST_SIGNAL = 4.8973451890853435e-08
#: What core's memory check multiplies ``memory_required`` by, before it runs several conditionings as one batch.
_CORES_MARGIN = 1.5
#: Videos of a batch that Latent From Batch takes one out of.
_LARGEST_BATCH = 64
#: How far two sigmas may be apart, relatively, that are one step's.
_SAME_SIGMA = 1e-3
#: What LTXV's guidance (STG, modality) asks of a call of its own: parts of attention that are left out.
_LTXV_GUIDANCE = ("stg_self_attn_blocks", "a2v_cross_attn", "v2a_cross_attn")
#: Core maps LoRAs under ``transformer.``, as diffusers' trainers write them, and under no prefix by the model's class:
#: this one of its classes stands for names that are the model's own.
_Diffusers: Any = getattr(model_base, "Kandinsky5", object)


def to_model(model: "Model") -> "ModelPatcher":
    """Make core's MODEL of a transformer, with its LoRAs, cache, attention and compiling. No weight is read.

    Raises:
        ValueError: for a checkpoint that does not predict v.
    """
    patcher = ModelPatcher(Bridged(model), model.weights.device, torch.device("cpu"))
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _sample_padded)
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, _sample_entered)
    return patcher


def noise_levels(scheduler_config: Mapping) -> torch.Tensor:
    """Return the sigmas ``[timesteps]`` of a checkpoint's own noise schedule, its ``snr_shift_scale`` and zero terminal
    SNR included.

    Raises:
        ValueError: if the model does not predict v.
    """
    from ...cogvideox.schedulers import make_scheduler

    schedule = make_scheduler(scheduler_config, "ddim")
    if schedule.config.prediction_type != "v_prediction":
        raise ValueError(
            f"The checkpoint predicts {schedule.config.prediction_type}, and only those that predict v, as all "
            "released ones do, are made a MODEL. Use CogVideoX-1.5 Sampler."
        )
    signal = schedule.alphas_cumprod.double().clamp(min=_LEAST_SIGNAL)
    return ((1 - signal) / signal).sqrt()


class _LatentFormat(latent_formats.CogVideoX):
    """The checkpoint's own scale, and our colours for previews."""

    latent_rgb_factors = LATENT_RGB.tolist()
    latent_rgb_factors_reshape = staticmethod(stretched)

    def __init__(self, scale: float):
        super().__init__()
        self.scale_factor = scale


class _Sampling(StandIn, model_sampling.ModelSamplingDiscrete, model_sampling.V_PREDICTION):
    """Core's sampling of a model that predicts v, over the checkpoint's own noise levels."""


class Bridged(model_base.CogVideoX, _Diffusers):
    """Core's model around ``Net``: what a sampler's latents and conditionings are before the transformer reads them."""

    def __init__(self, model: "Model"):
        config = full_config(model.weights.config)
        kept = ("in_channels", "num_attention_heads", "num_layers")
        settings = supported_models.CogVideoX_T2V(
            {"image_model": "cogvideox", "disable_unet_model_creation": True} | {name: config[name] for name in kept}
        )
        settings.latent_format = _LatentFormat(model.latent_scale)
        # Not through the classes between, which would build core's transformer.
        model_base.BaseModel.__init__(self, settings, model_base.ModelType.V_PREDICTION, model.weights.device)
        settings.unet_config = Known(settings.unet_config)
        self.image_to_video = model.variant.image_to_video
        #: Of the timesteps that the model knows, whatever another node samples by.
        self.levels = noise_levels(model.scheduler_config).float()
        self.model_sampling = _Sampling(settings)
        self.model_sampling.set_sigmas(self.levels)
        self.diffusion_model = Net(model, config)

    @property
    def weights(self) -> "Weights":
        return self.diffusion_model.handle.weights

    def encode_adm(self, **_) -> None:
        return None

    def concat_cond(self, *, noise, concat_latent_image=None, device=None, **_):
        """Return what an image-to-video model reads beside the noise ``[B, 16, T, h, w]``: scaled and padded as the
        reference does; None for text to video."""
        net = self.diffusion_model
        if concat_latent_image is None or not net.handle.variant.image_to_video:
            return None
        image = concat_latent_image.to(device, torch.float32)
        image = padded(image, max(0, noise.shape[2] - image.shape[2]), 2, zeros=True)
        return utils.repeat_to_batch_size(net.handle.image_latent_scale * image, noise.shape[0])

    def extra_conds(self, *, noise, cross_attn=None, ofs=None, **given):
        found = {}
        image = self.concat_cond(noise=noise, **given)
        if image is not None:
            found["c_concat"] = conds.CONDNoiseShape(image)
        if cross_attn is not None:
            # Not CONDCrossAttn, which repeats tokens so as to batch prompts of unequal length: joint attention would
            # read them.
            found["c_crossattn"] = conds.CONDRegular(cross_attn)
        if self.diffusion_model.ofs_proj_dim is not None:
            ofs = torch.full((1,), OFS) if ofs is None else torch.as_tensor(ofs, dtype=torch.float32).reshape(-1)
            found["ofs"] = conds.CONDRegular(utils.repeat_to_batch_size(ofs.to(noise.device), noise.shape[0]))
        return found

    def memory_required(self, input_shape, cond_shapes=None) -> int:
        """Return the bytes of a step's activations, caches and LoRAs, as the engine counts them."""
        return self.diffusion_model.step_bytes(tuple(input_shape))


class Net(StandIn):
    """What core calls as ``diffusion_model``: no parameters, names of those that it stands for, and the engine's
    transformer within a run.

    Attributes:
        handle: the model.
        run: the run in progress.
        patches: those of the patcher that a sampler runs, as ``_split_patches`` has them.
    """

    def __init__(self, handle: "Model", config: Mapping):
        super().__init__()
        self.handle, self.config = handle, config
        self.run: _Run | None = None
        self.patches: tuple[dict, dict] = {}, {}
        self.padding = 0
        # What core casts the latents to; the engine casts to its own precision, which healing may change.
        self.dtype = torch.float32
        self.in_channels, self.ofs_proj_dim = config["in_channels"], config["ofs_embed_dim"]
        self.patch_size, self.patch_size_t = config["patch_size"], config["patch_size_t"]
        self._bytes: dict[tuple[int, ...], int] = {}
        #: Modules of the transformer that others may look for.
        self._inner = frozenset(name.split(".")[0] for name in self.advertised)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_inner", ()):
            with failures_shown():
                raise ValueError(
                    f"Something asks for a module inside of the model ({name}), and only the engine may work on those: "
                    f"a bypass LoRA, a patch of single blocks or saving a LoRA out of a model does so. {OURS}"
                )
        return super().__getattr__(name)

    @cached_property
    def advertised(self) -> Mapping[str, torch.Tensor]:
        """Tensors without memory for the names that others may patch: diffusers', and core's."""
        tensors = self.handle.weights.part.tensors
        return {
            spelled: torch.empty(tensor.shape, device="meta")
            for name, tensor in tensors.items()
            for spelled in dict.fromkeys((name, comfy_name(name)))
        }

    def state_dict(self, *_, destination=None, prefix="", keep_vars=False):
        destination = {} if destination is None else destination
        destination.update({prefix + name: tensor for name, tensor in self.advertised.items()})
        return destination

    def own_name(self, key: str) -> str:
        """Return diffusers' name for a key of ``BaseModel.state_dict``."""
        return self._own_names[key.removeprefix(_PREFIX)]

    @cached_property
    def _own_names(self) -> dict[str, str]:
        names = list(self.handle.weights.part.tensors)
        return {comfy_name(name): name for name in names} | {name: name for name in names}

    def step_bytes(self, shape: tuple[int, ...]) -> int:
        from ...cogvideox.memory import plan_memory

        shape = *shape[:3], *(side + -side % self.patch_size for side in shape[3:])
        if shape not in self._bytes:
            plan = plan_memory(self.handle, shape, guided=False)
            self._bytes[shape] = plan.activations + plan.loras + plan.cache
        return self._bytes[shape]

    def forward(self, x, timestep, context, ofs=None, transformer_options=None, **given):
        transformer_options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._predict, self, wrappers)
        return executor.execute(x, timestep, context, ofs, transformer_options, **given)

    def _predict(self, x, timestep, context, ofs, transformer_options, **_):
        """Predict v ``[B, 16, T, h, w]`` for ``x`` ``[B, C, T, h, w]``."""
        # A whole video is padded before it is sampled; windows of it, and areas, may be odd.
        padding, (height, width) = padding_frames(x.shape[2], self.config), x.shape[-2:]
        if padding:
            video, image = x[:, :16], x[:, 16:]
            x = torch.cat([padded(video, padding, 2), padded(image, padding, 2, zeros=True)], dim=1)
        beside = (0, -width % self.patch_size, 0, -height % self.patch_size, 0, 0)
        if any(beside):
            x = nn.functional.pad(x, beside, mode="replicate")
        own = slice(None), slice(None), slice(padding, None), slice(height), slice(width)
        if self.run is not None:
            return self.run.predict(x, timestep, context, ofs, transformer_options)[own]
        # Called by something that is no sampler, or by one that began with another model (Dual Model CFG Guider).
        given: dict[str, Any] = dict(timesteps=[float(timestep[0])], sigmas=[float("nan")], tokens=context.shape[1])
        with _Run(self, self.handle, x[:, :16], **given, patches=self.patches) as run:
            return run.predict(x, timestep, context, ofs, transformer_options)[own]


class ModelPatcher(PartPatcher):
    """Core's patcher of our transformer. Patches of weights are kept here, as core's are, and run beside the weights,
    which are never changed."""

    def get_free_memory(self, device):
        """Answer so that core runs both halves of guidance as one batch where the engine's plan does."""
        run = self.model.diffusion_model.run
        if run is None:
            free = self.weights.free
            return super().get_free_memory(device) if free is None else free
        batch, *shape = run.shape
        return _CORES_MARGIN * self.model.memory_required([run.copies * batch, *shape]) + 1

    @property
    def _busy(self) -> bool:
        return self.model.diffusion_model.run is not None

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
        # A step that runs needs them.
        return 0 if self._busy else super().partially_unload(device_to, memory_to_free, force_patch_weights)

    def detach(self, unpatch_all=True):
        return self.model if self._busy else super().detach(unpatch_all)

    def pre_run(self):
        super().pre_run()
        self.model.diffusion_model.patches = _split_patches(self)

    def cleanup(self):
        super().cleanup()
        self.model.diffusion_model.patches = {}, {}

    @failures_shown()
    def set_injections(self, key, injections):
        """Refuse: injections replace modules."""
        raise ValueError(f"This node injects code into the model's modules, and only the engine runs those. {OURS}")

    @failures_shown()
    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """Take patches by key: LoRAs run in every storage, other changes only where weights are plain.

        Raises:
            ValueError: for none that fits, for layers of another size, and for what cannot be run.
        """
        if not patches:
            raise ValueError(
                "Nothing in this LoRA is named like a layer of CogVideoX where ComfyUI's own loaders look, so it would "
                "change nothing. Load it with CogVideoX-1.5 LoRA Loader, before CogVideoX-1.5 to ComfyUI, which knows "
                "more formats."
            )
        if strength_model != 1.0:
            raise ValueError(f"This node scales the model's own weights, which stay as they are. {OURS}")
        net = self.model.diffusion_model
        dense = []
        for key, patch in patches.items():
            name = key if isinstance(key, str) else key[0]
            if name not in self.model.state_dict():
                continue
            if isinstance(key, str) and _is_low_rank(patch):
                up, down = patch.weights[:2]
                layer = net.advertised[net.own_name(name)].shape
                if (up.shape[0], math.prod(down.shape[1:])) != (layer[0], math.prod(layer[1:])):
                    raise ValueError(
                        f"The LoRA does not fit: for {short(net.own_name(name))} it holds {list(down.shape)} and "
                        f"{list(up.shape)}, but the layer of this model is {list(layer)}. It was trained on another "
                        "model. Choose a LoRA trained on this checkpoint."
                    )
            else:
                dense.append(name)
        if dense:
            _check_plain(self.weights, net, dense)
        return super().add_patches(patches, strength_patch, strength_model)


def _is_low_rank(patch: Any) -> bool:
    """Whether a patch is two matrices and a scale, and nothing else."""
    return isinstance(patch, LoRAAdapter) and all(extra is None for extra in patch.weights[3:])


def _check_plain(weights: "Weights", net: Net, keys: list[str]) -> None:
    """Refuse changes of whole weights where weights are not there as they are.

    Raises:
        ValueError: naming why, and what to do.
    """
    stored = [weights.part.tensors[net.own_name(key)] for key in keys]
    if weights.precision.range_safe:
        why = "are scaled (range-safe fp16)"
    elif weights.method is not None or any(tensor.is_packed for tensor in stored):
        why = "are packed (fp8, GGUF or quantized)"
    elif weights.memory in ("offload_blocks", "offload_layers") and weights.device.type != "cpu":
        why = "are brought to the card block by block"
    else:
        return
    raise ValueError(
        f"It changes whole weights ({listed(sorted(keys), 3)}), and this model's {why}, so that they cannot be "
        "changed. A LoRA of two small matrices a layer works; for this one choose dtype bf16 or fp32 and memory gpu in "
        "CogVideoX-1.5 Model Loader."
    )


def _split_patches(patcher: ModelPatcher) -> tuple[dict[str, list], dict[str, list]]:
    """Sort a patcher's patches: by layer, what makes pairs (down, up), scaled, which in fp32 are gigabytes together;
    and the rest as core has them, by the weight's name."""
    net = patcher.model.diffusion_model
    pairs: dict[str, list[Callable]] = {}
    dense: dict[str, list] = {}
    for key, patches in patcher.patches.items():
        name = net.own_name(key)
        layer = net.advertised[name].shape
        for entry in patches:
            strength, patch, _, offset, function = entry
            if not (_is_low_rank(patch) and offset is None and function is None and name.endswith(".weight")):
                dense.setdefault(name, []).append(entry)
                continue
            pairs.setdefault(name.removesuffix(".weight"), []).append(partial(_pair, patch, strength, layer))
    return pairs, dense


def _pair(patch: Any, strength: float, layer: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a patch's ``down`` and ``up`` as ``lora.added`` takes them, for a weight of the shape ``layer``."""
    up, down, alpha = patch.weights[:3]
    rank = down.shape[0]
    scale = strength * (1.0 if alpha is None else float(alpha) / rank)
    down = down.to("cpu", torch.float32).reshape(rank, *layer[1:])
    return down, up.to("cpu", torch.float32).reshape(layer[0], rank, *(1,) * (len(layer) - 2)) * scale


@contextmanager
def _weights_changed(dense: Mapping[str, list], module: nn.Module, precision: "Precision", mode: str) -> Iterator[None]:
    """Have a module run with changed weights, as core calculates them, for the length of a ``with`` block."""
    if dense and (precision.range_safe or mode != "gpu"):
        raise ValueError(
            f"The model now runs in {precision.name}, {mode}, where the whole weights that a LoRA changes are not "
            "there to be changed. Choose another LoRA, or dtype fp32 and memory gpu in CogVideoX-1.5 Model Loader."
        )
    before = []
    try:
        for name, patches in dense.items():
            parameter = module.get_parameter(name)
            before.append((parameter, parameter.data))
            changed = lora.calculate_weight(patches, parameter.data.float().clone(), _PREFIX + name)
            parameter.data = changed.to(parameter.dtype)
        yield
    finally:
        for parameter, data in reversed(before):
            parameter.data = data


class _Run:
    """One run of a sampler: the transformer entered once, with LoRAs, caches and one sentinel. A context manager.

    Attributes:
        shape: of the sampler's latents, ``[B, 16, T, h, w]``, padded.
        padding: latent frames in front that are not the video's.
        copies: conditionings that run as one batch, at most.
    """

    def __init__(
        self,
        net: Net,
        model: "Model",
        latents: torch.Tensor,
        timesteps: list[float],
        sigmas: list[float],
        tokens: int,
        guided: bool = False,
        joinable: bool = True,
        patches: tuple[dict, dict] = ({}, {}),
        padding: int = 0,
    ):
        """Args:
        timesteps, sigmas: of all steps, on the host.
        tokens: of the longest prompt.
        guided: whether several conditionings run at each step.
        joinable: whether their prompts are of one length.
        patches: those of other nodes, as ``_split_patches`` has them.
        padding: latent frames in front that are not the video's.
        """
        self._net, self._model, self.shape, self._sigmas = net, model, tuple(latents.shape), sigmas
        self._given = (latents, guided, joinable, tokens, timesteps)
        self._patches, self.padding = patches, padding
        self._events = NodeEvents(model.variant.fps)
        self._running = ExitStack()
        self._rotary: dict[tuple[int, ...], Any] = {}
        self._prompts: list[tuple[torch.Tensor, dict[torch.dtype, torch.Tensor]]] = []
        self._index, self._sigma, self._stale = -1, math.nan, False
        # What each call of this step, and of the one before, was about, in turn.
        self._calls: list[tuple] = []
        self._calls_before: list[tuple] = []
        self._sentinel: Sentinel
        self._speedups: Any

    def __enter__(self) -> "_Run":
        from ...cogvideox.lora import added, applied
        from ...cogvideox.memory import choose_placements
        from ...cogvideox.sampling import make_speedups
        from ...cogvideox.sentinel import Sentinel

        model, device = self._model, self._model.weights.device
        latents, guided, joinable, tokens, timesteps = self._given
        placements = choose_placements(model, latents, guided, joinable, tokens, self._events)
        speedups = make_speedups(model, latents.shape, tokens, timesteps, self._events.note)
        pairs, dense = self._patches

        @contextmanager
        def prepared(module: nn.Module, precision: "Precision", placement: "Placement | None") -> Iterator[None]:
            mode = "gpu" if placement is None or device.type == "cpu" else placement.mode
            batched = guided and placement is not None and placement.batched
            with (
                _weights_changed(dense, module, precision, mode),
                applied(model.loras, module, precision, device),
                added(((name, [pair() for pair in made]) for name, made in pairs.items()), module, precision, device),
                speedups.attached(module, batched, precision),
            ):
                yield

        self._guided, self._speedups = guided, speedups
        sentinel = Sentinel(model.weights, "heal", self._events, prepared, placements, speedups.shortcuts)
        self._sentinel = self._running.enter_context(sentinel)
        self._running.enter_context(torch.no_grad())
        self._net.run = self
        return self

    def __exit__(self, *error) -> None:
        self._net.run = None
        self._running.close()
        if error[0] is None:
            self._speedups.report()

    @property
    def copies(self) -> int:
        placement = self._sentinel.placement
        return 2 if self._guided and placement is not None and placement.batched else 1

    def predict(self, x, timestep, context, ofs, options: dict) -> torch.Tensor:
        """Predict v ``[B, 16, T, h, w]``, finite.

        Raises:
            NonFiniteError: if it is not finite and no precision makes it so.
            OutOfMemory: with the latents of the last finished step.
        """
        from ...cogvideox.sentinel import OutOfMemory

        index = self._begin(options)
        tries = 0

        def work(module: nn.Module, precision: "Precision") -> torch.Tensor:
            nonlocal tries
            if tries:
                self._begin_again(index, options)
            tries += 1
            return self._run(x, timestep, context, ofs, options, module, precision)

        try:
            return self._sentinel.run(work, f"step {index + 1} of {len(self._sigmas)}")
        except OutOfMemory as error:
            if x.shape[2:] == self.shape[2:]:
                error.latents = x[: self.shape[0], :16, self.padding :].float().cpu() / self._model.latent_scale
            raise

    def _begin(self, options: dict) -> int:
        """Return the number of the step, and note that it begins where it does.

        Raises:
            ValueError: if a step cache cannot follow the sampler.
        """
        sigmas = options.get("sigmas")
        sigma = self._sigmas[0] if sigmas is None else float(sigmas[0])
        # Which conditionings: some begin, or end, within a run.
        asked = tuple(options.get("uuids") or options.get("cond_or_uncond") or ())
        if sigma == self._sigma:
            place = len(self._calls)
            again = set(asked) <= {one for call in self._calls for one in call}
            if self._index > 0 and place >= len(self._calls_before) and again:
                self._refuse_cache()
            if self._index > 0 and self._calls_before[place : place + 1] != [asked]:
                self._begin_again(self._index, options)
            self._calls.append(asked)
            return self._index
        self._stale |= self._calls[:1] != [asked]
        self._sigma, self._calls_before, self._calls = sigma, self._calls, [asked]
        distances = [abs(math.log(max(step, 1e-9) / max(sigma, 1e-9))) for step in self._sigmas]
        nearest = min(distances)
        index = 0 if math.isnan(nearest) else distances.index(nearest)
        if nearest > _SAME_SIGMA or index < self._index:
            self._refuse_cache()
        self._index = index
        self._speedups.begin(index, self._halves(options), anew=self._stale)
        self._stale = False
        return index

    def _begin_again(self, index: int, options: dict) -> None:
        """Have a step's further calls run in full, and the next step: what caches hold of the step's other calls is not
        theirs."""
        self._speedups.begin(index, self._halves(options))
        self._stale = True

    def _halves(self, options: dict) -> bool:
        """Return whether a call has both halves of guidance, as far as calls have both in this run."""
        return self._guided and (self.copies == 1 or len(options.get("cond_or_uncond", (0, 1))) > 1)

    def _refuse_cache(self) -> None:
        method = self._model.skipping
        if method is not None:
            raise ValueError(
                f"The cache {method} counts steps, and this sampler, or a node such as Skip Layer Guidance, "
                "calls the model otherwise than once a step. Take CogVideoX-1.5 Cache away, or choose a sampler such "
                "as euler, ddim or dpmpp_2m, and no such node."
            )

    def _run(self, x, timestep, context, ofs, options, module: nn.Module, precision: "Precision") -> torch.Tensor:
        from ...cogvideox.modules.joint import blocks_replaced

        placement, dtype = self._sentinel.placement, precision.activations
        copies = len(options.get("cond_or_uncond", (0,)))
        # A batch that core put together before memory ran out is run in its pieces.
        pieces = copies if placement is not None and not placement.batched and x.shape[0] % copies == 0 else 1
        outputs = []
        with blocks_replaced(module, _replacements(options)):
            for piece in range(pieces):
                video, times, prompt = (tensor.chunk(pieces)[piece] for tensor in (x, timestep, context))
                video = rearrange(video.to(dtype), "b c t h w -> b t c h w")
                given = ofs.chunk(pieces)[piece] if ofs is not None and ofs.shape[0] == x.shape[0] else ofs
                output = module(
                    hidden_states=video,
                    encoder_hidden_states=self._prompt(prompt, dtype),
                    timestep=times,
                    ofs=None if given is None else given.to(video),
                    image_rotary_emb=self._positions(video),
                    return_dict=False,
                )[0]
                outputs.append(rearrange(output.float(), "b t c h w -> b c t h w"))
        return torch.cat(outputs)

    def _prompt(self, context: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the embeddings in a dtype: for equal ones the same tensor at every step, as what depends on it alone
        is computed once."""
        equal = (casts for known, casts in self._prompts if known.shape == context.shape and known.equal(context))
        casts = next(equal, None)
        if casts is None:
            casts = {}
            self._prompts.append((context, casts))
        if dtype not in casts:
            casts[dtype] = context.to(dtype)
        return casts[dtype]

    def _positions(self, video: torch.Tensor) -> Any:
        _, length, _, height, width = video.shape
        size = (length, height, width)
        if size not in self._rotary:
            self._rotary[size] = rotary_embedding(self._net.config, *size, video.device)
        return self._rotary[size]


def _replacements(options: dict) -> dict[int, Callable]:
    """Return what other nodes put in the place of blocks (Skip Layer Guidance), as the engine takes it."""
    others = _replaced_elsewhere(options)
    if others:
        raise ValueError(
            f"A node patches what this model does not give out ({listed(others)}) in calls of its own, which would "
            "take their time and change nothing: PAG, STG and their like work on attention. Take it away."
        )
    found = options.get("patches_replace", {}).get("dit", {})
    return {key[1]: partial(_replaced, patch) for key, patch in found.items() if key[0] == "double_block"}


def _replaced_elsewhere(options: dict) -> list[str]:
    """List what other nodes replace that is no block of the transformer."""
    replaced = [name for name, patches in options.get("patches_replace", {}).items() if patches and name != "dit"]
    return replaced + [name for name in _LTXV_GUIDANCE if name in options]


def _replaced(patch, own, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, **given):
    def original(args: dict) -> dict:
        video, text = own(
            hidden_states=args["img"],
            encoder_hidden_states=args["txt"],
            temb=args["vec"],
            image_rotary_emb=args["pe"],
            **given,
        )
        return {"img": video, "txt": text}

    args = {"img": hidden_states, "txt": encoder_hidden_states, "vec": temb, "pe": image_rotary_emb}
    result = patch(args, {"original_block": original})
    return result["img"], result["txt"]


@failures_shown()
def _sample_padded(
    executor,
    noise,
    latent_image,
    sampler,
    sigmas,
    denoise_mask=None,
    callback=None,
    disable_pbar=False,
    seed=None,
    **shapes,
):
    """Stand around a guider's whole run: what cannot run is refused before a weight is read, and a clip whose latent
    frames are odd is padded in front, as the reference does, and cut again."""
    guider = executor.class_obj
    net = guider.model_patcher.model.diffusion_model
    _refuse(guider, sampler)
    padding = padding_frames(latent_image.shape[2], net.config)
    _check(guider, net.handle, noise, latent_image, sigmas, padding)
    if not padding:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **shapes)
    noise = torch.cat([_noise_in_front(noise, padding, 0 if seed is None else seed), noise], dim=2)
    latent_image = padded(latent_image, padding, 2)
    if denoise_mask is not None:
        denoise_mask = padded(denoise_mask, padding, 2)
    if "latent_shapes" in shapes:
        shapes["latent_shapes"] = [latent_image.shape]

    def cut(step, clean, noisy, steps):
        callback(step, clean[:, :, padding:], noisy[:, :, padding:], steps)

    told = None if callback is None else cut
    net.padding = padding
    try:
        sampled = executor(noise, latent_image, sampler, sigmas, denoise_mask, told, disable_pbar, seed, **shapes)
    finally:
        net.padding = 0
    return sampled[:, :, padding:]


def _noise_in_front(noise: torch.Tensor, padding: int, seed: int) -> torch.Tensor:
    """Return the noise ``[B, C, padding, h, w]`` of the frames in front; none where a run begins without noise.

    Of one draw with the video's, in the reference's order: the numbers that our own sampler pads with.
    """
    from ...cogvideox.sampling import draw_noise

    batch, channels, length, height, width = noise.shape
    if not noise.any():
        return noise.new_zeros(batch, channels, padding, height, width)
    like = noise.new_zeros(()).expand(batch, length + padding, channels, height, width)
    drawn = draw_noise(like, torch.Generator("cpu").manual_seed(seed), _places(noise.cpu(), seed))
    return rearrange(drawn[:, :padding], "b t c h w -> b c t h w")


def _places(noise: torch.Tensor, seed: int) -> list[int] | None:
    """Find which videos of the batch that a seed draws these are (Latent From Batch): core hands on their noise alone.
    None for noise that is not the seed's."""
    generator, found = torch.Generator("cpu").manual_seed(seed), dict[int, int]()
    for place in range(_LARGEST_BATCH):
        drawn = torch.randn(noise.shape[1:], generator=generator).to(noise.dtype)
        found |= {number: place for number, video in enumerate(noise) if video.equal(drawn)}
        if len(found) == len(noise):
            return [found[number] for number in range(len(noise))]
    return None


def _sample_entered(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    """Stand around the sampler itself, when core has made room: the transformer is entered once for all its calls."""
    from ...cogvideox.sentinel import NonFiniteError

    net, options = guider.model_patcher.model.diffusion_model, extra_args["model_options"]
    entries = [entry for side in guider.conds.values() for entry in side]
    tokens = {entry["cross_attn"].shape[1] for entry in entries}
    cfg = getattr(guider, "cfg", 1.0)
    guided = len(entries) > 1 and (not math.isclose(cfg, 1.0) or options.get("disable_cfg1_optimization", False))
    timesteps = guider.inner_model.model_sampling.timestep(sigmas[:-1]).tolist()
    run = _Run(
        net,
        _as_compiled(net.handle, options),
        noise,
        timesteps,
        sigmas[:-1].tolist(),
        max(tokens),
        guided,
        len(tokens) == 1,
        net.patches,
        net.padding,
    )
    try:
        with saving_latents(), run, _second_entered(guider, run, noise, sigmas, max(tokens)):
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
    except NonFiniteError as error:
        # The page prints a class of the engine's own with its module.
        raise RuntimeError(str(error)) from error


@contextmanager
def _second_entered(guider, run: _Run, noise: torch.Tensor, sigmas: torch.Tensor, tokens: int) -> Iterator[None]:
    """Have the second model of Dual Model CFG Guider, where it is called, called in the run of the first if it is the
    same, and else in one of its own, for the length of a ``with`` block."""
    second = _second(guider)
    if second is None or getattr(guider, "uncond_inner", None) is None:
        yield
        return
    net = second.model.diffusion_model
    if net.run is run:
        yield
    elif second.weights is guider.model_patcher.weights:
        # As ``_refuse_second`` has it, nothing of it is otherwise.
        net.run = run
        try:
            yield
        finally:
            net.run = None
    else:
        timesteps = second.get_model_object("model_sampling").timestep(sigmas[:-1]).tolist()
        how: dict[str, Any] = dict(patches=net.patches, padding=run.padding)
        with _Run(net, net.handle, noise, timesteps, sigmas[:-1].tolist(), tokens, **how):
            yield


def _as_compiled(model: "Model", options: dict) -> "Model":
    """Return the model compiled as the pack compiles, block by block, where core's node asks for compiling: as a whole
    it would be compiled around the sentinel, in many pieces."""
    from ...cogvideox.modules.compiled import Compiled

    asked = options.get("torch_compile_kwargs")
    if asked is None:
        return model
    options["transformer_options"].get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).pop("torch.compile", None)
    return model if model.compiled else replace(model, compiled=Compiled(dynamic=bool(asked.get("dynamic"))))


def _refuse(guider, sampler) -> None:
    """Refuse what would run and give another picture than its user thinks.

    Raises:
        ValueError: naming it, why, and what to do.
    """
    options = guider.model_options["transformer_options"]
    if type(sampler).__name__ == "VOID_DDIM":
        raise ValueError(
            "VOID's sampler gives the model latents at another scale than this model reads, so the video would be "
            "wrong. Choose another sampler, such as ddim in KSampler."
        )
    if getattr(options.get("easycache"), "name", "") == "LazyCache":
        raise ValueError(
            "LazyCache compares latents that begin at 4519 times the size of a picture with zero terminal SNR, so it "
            "would skip the wrong steps. Use EasyCache, or CogVideoX-1.5 Cache before CogVideoX-1.5 to ComfyUI."
        )
    changed = guider.model_options.get("sampler_post_cfg_function", ())
    if any(getattr(function, "__name__", "") == "epsilon_scaling_function" for function in changed):
        raise ValueError(
            "Epsilon Scaling takes a share less of the noise off, and with zero terminal SNR the noise begins at 4519 "
            "times the size of a picture, so it would stay in the video. Take it away."
        )
    second = _second(guider)
    for patcher in (guider.model_patcher, *([] if second is None else [second])):
        _refuse_sampling(patcher)
    if second is not None:
        _refuse_second(guider.model_patcher, second)
    handler = guider.model_options.get("context_handler")
    if handler is not None and getattr(handler, "dim", 2) != 2:
        raise ValueError(
            f"Context Windows (Manual) has dim at {handler.dim}, and a video's frames are dimension 2, so no window "
            "would be made along them. Set dim to 2."
        )
    if handler is not None and "easycache" in options:
        raise ValueError(
            "EasyCache compares each call of the model with the one before, and with Context Windows (Manual) that is "
            "another window of the video. Take one of the two away."
        )
    if options.get("rope_options"):
        raise ValueError(
            "A node scales or shifts rotary positions (ScaleROPE), which this model does not give out, so it would do "
            "nothing. Take it away."
        )
    named = [name for name, patches in options.get("patches", {}).items() if patches]
    named += _replaced_elsewhere(options)
    if named:
        raise ValueError(
            f"A node patches what this model does not have, or does not give out ({listed(named)}), so it would do "
            "nothing: NAG, PAG and their like work on attention. Take it away."
        )
    if "optimized_attention_override" in options:
        NodeEvents().note(
            "A node chooses another attention kernel, which has no effect here: choose it with CogVideoX-1.5 "
            "Attention, before CogVideoX-1.5 to ComfyUI."
        )


def _second(guider) -> ModelPatcher | None:
    """Return the second model of Dual Model CFG Guider, which reads the negative conditioning, where it is ours."""
    second = getattr(guider, "uncond_model_patcher", None)
    return second if isinstance(second, ModelPatcher) else None


def _refuse_sampling(patcher: ModelPatcher) -> None:
    """Refuse a model whose predictions a node has core read as another model's.

    Raises:
        ValueError: naming such nodes.
    """
    # The second is how core itself has CogVideoX; older versions lack it.
    reads_v = model_sampling.V_PREDICTION, getattr(model_sampling, "V_PREDICTION_DDPM", model_sampling.V_PREDICTION)
    sampling = patcher.get_model_object("model_sampling")
    if not isinstance(sampling, reads_v) or isinstance(sampling, model_sampling.EDM):
        raise ValueError(
            "A node such as ModelSamplingSD3 or ModelSamplingDiscrete has the sampler read what the model predicts as "
            "another model's, and CogVideoX predicts v, so the video would be wrong. Take it away."
        )
    levels = patcher.model.levels
    told = sampling.timestep(levels).float()
    wrong = (told - torch.arange(len(levels))).abs()
    if wrong.max() > 1:
        at = int(wrong.argmax())
        raise ValueError(
            "A node such as ModelSamplingContinuousEDM, or ModelSamplingDiscrete with zsnr off, samples by another "
            f"noise schedule than this model was trained with: at sigma {levels[at]:.4g} it tells the model timestep "
            f"{told[at]:.4g}, and that is {at} of the model's, so the video would be wrong. Take it away."
        )


def _refuse_second(first: ModelPatcher, second: ModelPatcher) -> None:
    """Refuse a second model (Dual Model CFG Guider) of the first one's weights that is set up otherwise, as both are
    set up at once; and one that reads other latents.

    Raises:
        ValueError: saying how to have both.
    """
    one, other = first.model.diffusion_model, second.model.diffusion_model
    if (one.handle.latent_scale, one.patch_size_t) != (other.handle.latent_scale, other.patch_size_t):
        raise ValueError(
            f"The second model of Dual Model CFG Guider, {other.handle.variant.name}, reads latents otherwise than the "
            f"first, {one.handle.variant.name}, so what it makes of those would be wrong. Give it a model of the same "
            "release."
        )
    if second.weights is not first.weights:
        return
    patched = bool(first.patches or second.patches)
    if other.handle is not one.handle or (patched and second.patches_uuid != first.patches_uuid):
        raise ValueError(
            "The second model of Dual Model CFG Guider differs from the first in its LoRAs or settings alone, and both "
            "are set up at once: what belongs to one would act in both. Give it a CogVideoX-1.5 Model Loader of its "
            "own."
        )


def _check(
    guider, model: "Model", noise: torch.Tensor, latents: torch.Tensor, sigmas: torch.Tensor, padding: int
) -> None:
    """Refuse what the engine refuses, and say what the model was not trained for.

    Args:
        padding: latent frames that the model reads in front of ``latents``.

    Raises:
        ValueError: as ``requests`` has it.
    """
    from ...cogvideox.requests import check_embeddings, outside_training, plan_steps

    second, events = _second(guider), NodeEvents()
    readers = {} if second is None else {"negative": second.model.diffusion_model.handle}
    of_images = model.variant.image_to_video or any(reader.variant.image_to_video for reader in readers.values())
    images: list[torch.Tensor | None] = []
    for side, entries in guider.conds.items():
        reader = readers.get(side, model)
        for entry in entries:
            if entry.get("cross_attn") is None:
                raise ValueError(f"The {side} conditioning has no prompt. Connect CLIP Text Encode.")
            if entry.get("control") is not None:
                raise ValueError(
                    "A ControlNet of another model is connected, which this one cannot read. Take it away."
                )
            check_embeddings(entry["cross_attn"], side, full_config(reader.weights.config), latents.shape[0])
            _check_part(entry, side, latents.shape[2] + padding)
            image = entry.get("concat_latent_image")
            # Both sides have an image, of which each of two models reads what it can.
            images.append(image if reader.variant.image_to_video or not of_images else None)
            plan_steps(reader, latents, images[-1])
    for note in outside_training(model, latents, images[0]):
        events.note(note)
    begins, top = float(sigmas[0]), float(guider.model_patcher.get_model_object("model_sampling").sigma_max)
    if begins < 0.9 * top and noise.any() and not latents.any():
        events.note(
            f"The schedule begins at sigma {begins:.4g}, and the model was trained to begin at {top:.4g}, with noise "
            "alone: the video will be washed out. Sample all steps (denoise 1, from step 0) by the scheduler simple; "
            "ddim_uniform is none for a model with zero terminal SNR."
        )
    if padding and latents.any() and not noise.any() and begins > float(sigmas[-1]):
        events.note(
            "This sampler goes on from latents that hold their noise already. The model reads latent frames in pairs, "
            "and the frame that the sampler before it had in front of the first is not handed on, so the first frame "
            "comes out otherwise than in one run. Sample in one run."
        )


def _check_part(entry: Mapping, side: str, frames: int) -> None:
    """Refuse a conditioning for a part of the picture that core cannot find in a video.

    Args:
        frames: latent frames that are sampled.

    Raises:
        ValueError: naming the node, and what to do.
    """
    area, mask = entry.get("area"), entry.get("mask")
    if area is not None and area[0] == "percentage" and len(area) != 7:
        raise ValueError(
            f"The {side} conditioning has an area of a picture in percent, and a video has three dimensions. Use "
            "Conditioning (Set Area with Percentage for Video)."
        )
    if mask is None:
        return
    if entry.get("set_area_to_bounds"):
        raise ValueError(
            f"The {side} conditioning is to be sampled within the bounds of its mask, which ComfyUI finds in pictures "
            "alone. Choose default for set_cond_area in Conditioning (Set Mask)."
        )
    if mask.ndim > 2 and mask.shape[-3] not in (1, frames):
        raise ValueError(
            f"The mask of the {side} conditioning has {mask.shape[-3]} frames, and {frames} latent frames are sampled. "
            "Use a mask of one picture, which holds for all of them."
        )
