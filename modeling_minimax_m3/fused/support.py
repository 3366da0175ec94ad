"""Whether the compiled kernels take a call. Every other call runs the definition in plain PyTorch."""

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch.autograd import forward_ad
from transformers.utils import is_torchdynamo_compiling, output_capturing

from ..msa import extension

Module = TypeVar("Module", bound=torch.nn.Module)

HALF_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (*HALF_DTYPES, torch.float32)  # of the kernels that take float32 too

_looked_for_library = False


def kernels_take(*tensors: torch.Tensor) -> bool:
    """Whether the kernels may read these tensors now: a GPU's plain tensors, outside of compilers and transforms.

    Compilers fuse the definition by themselves. `torch.func` and forward mode differentiate only the definition.
    """
    return (
        not is_torchdynamo_compiling()
        and all(tensor.is_cuda and type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        and len({tensor.device for tensor in tensors}) == 1
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and _library_is_loaded()
        and extension.device_reason(tensors[0].device.index) is None
    )


def _library_is_loaded() -> bool:
    global _looked_for_library
    if not _looked_for_library:
        _looked_for_library = True
        extension.load(build=False)
    return extension.is_loaded()


def starts_vectors(tensor: torch.Tensor) -> bool:
    """Whether kernels can read the tensor's last dimension, a multiple of 8, 16 bytes at a time."""
    if tensor.data_ptr() % 16 != 0:
        return False
    if tensor.is_contiguous():
        return True
    *strides, last = tensor.stride()
    vector = 16 // tensor.element_size()
    return last == 1 and all(stride % vector == 0 for stride in strides)


def is_vector_block(tensor: torch.Tensor) -> bool:
    """The same, of tensors that must be contiguous."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def as_vectors(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where kernels can read it 16 bytes at a time, else a copy."""
    return tensor if starts_vectors(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def as_vector_block(tensor: torch.Tensor) -> torch.Tensor:
    """The same, of what must be contiguous."""
    return tensor if is_vector_block(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def runs_as_written(module: torch.nn.Module, kind: type[Module]) -> TypeGuard[Module]:
    """Whether a call of `module` runs the forward of `kind` alone, so that a larger operator may take its place.

    While a compiler traces, the answer is no: it fuses the modules by itself.
    """
    return is_of_kind(module, kind) and not is_watched(module)


def is_of_kind(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether the class of `module` is `kind`, with the forward that it was written with, and no compiler traces."""
    return (
        not is_torchdynamo_compiling()
        and type(module) is kind
        # Libraries of kernels replace the forward of a class.
        and kind.forward.__module__ in (base.__module__ for base in kind.__mro__)
    )


def is_watched(module: torch.nn.Module) -> bool:
    """Whether a call of `module` does more than its class says.

    Its forward is replaced on the instance (as Accelerate does for offloaded weights), or hooks wait for the call. The
    hooks by which Transformers records outputs stay on a model, and do nothing while nothing is recorded. Those by which
    a `device_map` brings inputs to the device of a module do nothing where they are there: the kernels ask for that.
    """
    return ("forward" in module.__dict__ and not _only_aligns_devices(module)) or has_hooks(module)


def has_hooks(module: torch.nn.Module) -> bool:
    """The same, of all but a forward that is replaced on the instance."""
    return bool(
        module._compiled_call_impl is not None
        or module._forward_pre_hooks
        or any(not is_idle_recorder(hook) for hook in module._forward_hooks.values())
        or module._backward_pre_hooks
        or module._backward_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )


def _only_aligns_devices(module: torch.nn.Module) -> bool:
    """Whether what stands for the forward of the class is that of Accelerate, and moves nothing but inputs."""
    accelerate = "accelerate.hooks"
    hook: Any = module.__dict__.get("_hf_hook")
    replaced = module.__dict__["forward"]
    return (
        (type(hook).__module__, type(hook).__name__) == (accelerate, "AlignDevicesHook")
        and not (hook.offload or hook.io_same_device or hook.no_grad)
        and getattr(getattr(replaced, "func", None), "__module__", None) == accelerate
        and getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward
    )


def is_idle_recorder(hook: Callable) -> bool:
    """Whether `hook` is one of Transformers' for recording outputs, and no call records any now."""
    return (
        getattr(hook, "__module__", None) == output_capturing.__name__ and not output_capturing._active_collector.get()
    )
