"""Tensors that say they are on a GPU, for tests of the choice between backends where there is none."""

import torch


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on the first GPU."""

    device = property(lambda self: torch.device("cuda", 0))


def on_device(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).as_subclass(OnDevice)
