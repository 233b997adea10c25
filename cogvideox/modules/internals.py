"""Touch the private attributes of diffusers, transformers and torch: each is named here and nowhere else.

What is private may be renamed in any release. A test asserts that each of ``NAMES`` is there, so that the tests with
the newest versions fail with the name. What is set on a hook has to be there already (``steer``), as a field that no
hook reads would do nothing, and nobody would notice.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn, TypeAlias

import torch
from torch import nn

#: A module of diffusers or transformers. Its attributes (``transformer_blocks``, ``attn1``, ``enable_cache``) are not
#: in the type hints of ``nn.Module``, which takes any attribute for a tensor or a module.
LibraryModule: TypeAlias = Any
#: Where diffusers keeps a module's hooks, and what ``enable_cache`` notes on it.
HOOKS, CACHE_CONFIG = "_diffusers_hook", "_cache_config"
#: diffusers' hook that notes, in the first forward, in which order offloaded layers run, and takes itself off hooks
#: that then must be the last.
_NOTES_ORDER = "lazy_prefetch_group_offloading"
#: Every private name that is relied on: (module, attribute path).
NAMES: tuple[tuple[str, str], ...] = (
    ("diffusers.hooks.hooks", "HookRegistry.get_hook"),
    ("diffusers.hooks.hooks", "ModelHook._is_stateful"),
    ("diffusers.models.attention_dispatch", "_check_attention_backend_requirements"),
    ("diffusers.models._modeling_parallel", "ContextParallelInput"),
    ("diffusers.models._modeling_parallel", "ContextParallelOutput"),
    ("diffusers.models._modeling_parallel", "ParallelConfig.setup"),
    ("os", "_exit"),
    ("torch", "_fused_sdp_choice"),
    ("torch", "_int_mm"),
    ("torch", "_scaled_mm"),
    ("torch", "_dynamo.config.recompile_limit"),
    ("torch", "_dynamo.config.skip_nnmodule_hook_guards"),
    ("torch._dynamo.callback", "callback_handler.register_start_callback"),
    ("torch._dynamo.exc", "TorchDynamoException"),
    ("torch._inductor.cpp_builder", "get_cpp_compiler"),
    ("torch.utils._triton", "has_triton"),
    ("torch.utils._python_dispatch", "TorchDispatchMode"),
    ("torch", "ops.aten._scaled_dot_product_efficient_attention"),
    ("torch", "UntypedStorage._cdata"),
)


# --- diffusers' hooks ---


def hook_registry(module: nn.Module) -> Any | None:
    """Return diffusers' registry of a module's hooks, or None."""
    return vars(module).get(HOOKS)


def is_hooked(module: nn.Module) -> bool:
    """Return whether diffusers has put hooks on a module."""
    return HOOKS in vars(module)


def notes_offload_order(module: nn.Module) -> bool:
    """Return whether a hook waits for the module's first forward to note in which order offloaded layers run: no hook
    may be put on top of it."""
    registry = hook_registry(module)
    return registry is not None and registry.get_hook(_NOTES_ORDER) is not None


def stateful_hooks(module: nn.Module) -> list[Any]:
    """List the hooks on a module and below it that keep something from one forward to the next."""
    registries = [registry for child in module.modules() if (registry := hook_registry(child)) is not None]
    return [hook for registry in registries for hook in registry.hooks.values() if hook._is_stateful]


def forget_hooks_below(module: nn.Module) -> None:
    """Have diffusers look for the hooks below a module again: before 0.42 it keeps a list of them."""
    registry = hook_registry(module)
    if registry is not None:
        vars(registry).pop("_child_registries_cache", None)


def steer(hooks: Sequence[Any], field: str, value: Any) -> None:
    """Set a field on those of diffusers' hooks that have it.

    Raises:
        AttributeError: if none has it: what is set on a hook that does not read it would change nothing, in silence.
    """
    found = [hook for hook in hooks if hasattr(hook, field)]
    if not found:
        kinds = ", ".join(sorted({type(hook).__name__ for hook in hooks})) or "no hooks"
        raise AttributeError(
            f"None of diffusers' hooks ({kinds}) has the field {field}: this version of diffusers calls it otherwise."
        )
    for hook in found:
        setattr(hook, field, value)


def innermost_forward(module: nn.Module) -> Callable:
    """Return a module's own ``forward``, below all hooks of diffusers."""
    registry = hook_registry(module)
    return registry._fn_refs[0].forward if registry is not None and registry._fn_refs else module.forward


def replace_forward(module: nn.Module, forward: Callable) -> Callable[[], None]:
    """Put ``forward`` in the place of a module's own, below all hooks of diffusers; return what undoes it."""
    registry = hook_registry(module)
    if registry is not None and registry._fn_refs:
        innermost = registry._fn_refs[0]
        own = innermost.forward
        innermost.forward = forward
        return partial(setattr, innermost, "forward", own)
    own = vars(module).get("forward")
    module.forward = forward
    return partial(vars(module).pop, "forward") if own is None else partial(setattr, module, "forward", own)


def own_forward(module: nn.Module) -> Callable:
    """Return what ``replace_forward`` would take the place of."""
    registry = hook_registry(module)
    return registry._fn_refs[0].forward if registry is not None and registry._fn_refs else module.forward


# --- diffusers' context parallelism ---


def context_parallel(degree: int, mesh: Any, device: torch.device, rank: int) -> tuple[Any, dict[str, Any]]:
    """Make diffusers' config of context parallelism, and the plan of a CogVideoX transformer, which the library lacks:
    the streams are split where the first block takes them, the positions at each block, and the output is joined.

    Args:
        mesh: of all processes, with dimensions ``ring`` and ``ulysses``.
    """
    from diffusers.models import _modeling_parallel as parallel

    config = parallel.ParallelConfig(
        context_parallel_config=parallel.ContextParallelConfig(ulysses_degree=degree, ulysses_anything=True)
    )
    config.setup(rank, mesh.size(), device, mesh=mesh)
    stream = parallel.ContextParallelInput(split_dim=1, expected_dims=3)
    positions = [parallel.ContextParallelInput(split_dim=0, expected_dims=2)] * 2
    plan = {
        "transformer_blocks.0": {"hidden_states": stream, "encoder_hidden_states": stream},
        "transformer_blocks.*": {"image_rotary_emb": positions},
        "proj_out": parallel.ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    return config, plan


def apply_context_parallel(module: LibraryModule, config: Any, plan: dict[str, Any]) -> Callable[[], None]:
    """Put diffusers' hooks of a plan on a transformer; return what takes them off, and leaves nothing."""
    from diffusers.hooks import context_parallel

    children = [*module.transformer_blocks, module.proj_out]
    before = [(child, had(child, ("forward", HOOKS))) for child in children]

    def remove() -> None:
        context_parallel.remove_context_parallel(module, plan)
        for child, own in before:
            for name in ("forward", HOOKS):
                vars(child).pop(name, None)
            vars(child).update(own)
        forget_hooks_below(module)

    context_parallel.apply_context_parallel(module, config.context_parallel_config, plan)
    return remove


def splits_anything() -> bool:
    """Return whether this diffusers shares sequences whose length its processes do not divide."""
    from diffusers.models import _modeling_parallel as parallel

    return "ulysses_anything" in parallel.ContextParallelConfig.__dataclass_fields__


# --- torch ---


def is_watched(module: nn.Module) -> bool:
    """Return whether a module has forward hooks of torch."""
    return bool(module._forward_hooks)


def modules_in_hooks(module: nn.Module) -> list[nn.Module]:
    """List the modules that a module's forward hooks, as ``partial`` makes them, are called with."""
    given = (argument for hook in module._forward_hooks.values() for argument in getattr(hook, "args", ()))
    return [argument for argument in given if isinstance(argument, nn.Module)]


def call_forward_hooks(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> None:
    """Call a module's forward hooks, as calling it would, where its ``forward`` is not what runs; copy what they return
    into ``output``."""
    for number, hook in module._forward_hooks.items():
        arguments: tuple[Any, ...] = ((given,), {}) if number in module._forward_hooks_with_kwargs else ((given,),)
        changed = hook(module, *arguments, output)
        if changed is not None:
            output.copy_(changed)


def storage_id(tensor: torch.Tensor) -> int:
    """Return what tells a tensor's storage from others, on the meta device too, where there is no address."""
    return tensor.untyped_storage()._cdata


def multiply_int8(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply int8 ``[tokens, in]`` by ``[in, out]`` with CUDA's kernels: int32."""
    return torch._int_mm(tokens, weights)


def multiply_fp8(
    tokens: torch.Tensor,
    weights: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Multiply fp8 ``[tokens, in]`` by ``[in, out]``, and by fp32 scales ``[tokens, 1]`` and ``[1, out]`` where they
    are given, which CUDA's kernel takes for a result in bf16: in ``dtype``."""
    one = torch.ones((), device=tokens.device)
    of_tokens, of_rows = (one, one) if scales is None else scales
    return torch._scaled_mm(tokens, weights, scale_a=of_tokens, scale_b=of_rows, out_dtype=dtype, use_fast_accum=True)


def refuses_attention(backend: Any) -> Exception | None:
    """Return what diffusers' dispatch says of a member of its list of kernels whose package it could not load, or
    None."""
    from diffusers.models import attention_dispatch

    try:
        attention_dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as error:
        return error
    return None


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Compute attention as one operation, whatever the device: on the meta device torch would take it apart."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, False, scale=scale)[0]


def lacks_fused_attention(dtype: torch.dtype, device: torch.device, channels: int) -> bool:
    """Return whether torch computes all scores of an attention, as the device has no kernel that goes without them:
    older cards of AMD's, NVIDIA's before Ampere in bf16. Apple's GPUs have one in the newest versions of torch only,
    which do not say."""
    if device.type not in ("cpu", "cuda", "xpu"):
        return device.type != "meta"
    if not getattr(torch, device.type).is_available():
        return False
    query = torch.zeros(1, 1, 8, channels, dtype=dtype, device=device)
    try:
        return torch._fused_sdp_choice(query, query, query) == torch.nn.attention.SDPBackend.MATH.value
    except RuntimeError:
        # A device of which this version of torch does not say: it has the choice.
        return False


def lacks_cpp_compiler() -> bool:
    """Return whether torch finds no C++ compiler for code on the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:  # InvalidCxxCompiler; on Windows, torch 2.11 raises a plain one.
        return True
    return False


def lacks_triton() -> bool:
    """Return whether torch finds no triton that works with the card."""
    from torch.utils._triton import has_triton

    return not has_triton()


def on_compiling(begin: Callable[..., None], end: Callable[..., None]) -> Sequence[Callable[[], None]]:
    """Have ``begin`` and ``end`` called around each compilation; return what undoes that."""
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    return partial(callback_handler.remove_start_callback, begin), partial(callback_handler.remove_end_callback, end)


def compiled_versions(most: int) -> AbstractContextManager:
    """Have torch keep up to ``most`` versions of one function's code, one for each set of layers with hooks, as LoRAs
    put on: of itself it takes code that was compiled without for one that has some."""
    return torch._dynamo.config.patch(recompile_limit=most, skip_nnmodule_hook_guards=False)


def compiler_error() -> type[Exception]:
    """Return the class of what torch raises where it cannot compile."""
    return torch._dynamo.exc.TorchDynamoException


# --- Python ---


def end_process(status: int) -> NoReturn:
    """End the process at once, whatever its threads are waiting for."""
    os._exit(status)


# --- transformers ---


def kept_in_fp32(module: nn.Module) -> Sequence[str]:
    """List the modules that transformers itself keeps in float32 when a model runs in float16 (T5's ``wo``, which
    overflows there)."""
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ())


def had(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Return what of ``names`` is set on a module itself, not on its class."""
    return {name: vars(module)[name] for name in names if name in vars(module)}
