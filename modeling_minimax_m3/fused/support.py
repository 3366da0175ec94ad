"""Whether the compiled kernels take a call. Every other call runs the definition in plain PyTorch."""

import torch
from torch.autograd import forward_ad
from transformers.utils import is_torchdynamo_compiling

from ..msa import extension

HALF_DTYPES = (torch.float16, torch.bfloat16)

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


def runs_as_written(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether a call of `module` runs the forward of `kind` alone: no adapter, no hook, no replaced forward."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and not torch.nn.modules.module._has_any_global_hook()
    )
