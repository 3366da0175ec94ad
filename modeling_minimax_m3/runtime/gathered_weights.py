"""Whether the processes that share a model have to make equally many passes."""

import torch
from torch import nn


def gathers_weights(*modules: nn.Module) -> bool:
    """Whether passes gather weights of `modules` from all processes, as under FSDP and ZeRO-3.

    Each process has inputs of its own then, and waits in each pass for the same pass of the others.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # not there in every build of PyTorch

    if any(hasattr(parameter, "ds_id") for module in modules for parameter in module.parameters()):  # ZeRO-3
        return True
    sharded = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(part, sharded) for module in modules for part in module.modules())
