"""Loading of fused projections whose weight is cut over devices.

A composite checkpoint holds the gate and the up projection of dense and shared MLPs apart; the model holds them fused,
gate first. Where `DistributedConfig(fsdp_size=...)` cuts the fused weight, Transformers 5.23 cuts gate and up each and
concatenates this rank's pieces. That is no piece of the fused weight: its rows come out in another order, with no error.
"""

from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, WeightConverter, WeightTransform


def with_whole_concatenation(mapping: list[WeightTransform]) -> list[WeightTransform]:
    """`mapping`, with `ConcatenateWhole` where a rule does nothing but `Concatenate`. Experts are merged first, one by
    one, and Transformers cuts those rightly."""
    for transform in mapping:
        if isinstance(transform, WeightConverter) and [type(op) for op in transform.operations] == [Concatenate]:
            (concatenate,) = transform.operations
            transform.operations = [ConcatenateWhole(concatenate.dim, concatenate.num_shards_attribute)]
    return mapping


class ConcatenateWhole(Concatenate):
    """`Concatenate` whose result is this rank's piece of the whole, also where that is cut along the same axis."""

    @torch.no_grad
    def convert(
        self,
        input_dict: dict[str, torch.Tensor | list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """As in Transformers. Collective where the target is cut along `self.dim`: every rank converts it.

        Args:
            input_dict (`dict`): Per source the whole tensor, or this rank's piece, cut as the target is.
            source_patterns, target_patterns (`list[str]`): The sources in order, and the name of the result.
            full_layer_name (`str`): Name of the target in `model`.
            model (`PreTrainedModel`): Its parameter of that name says how it is cut.
        """
        target = model.get_parameter_or_buffer(full_layer_name)
        if not _is_cut(target, self.dim):
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        from torch.distributed.tensor import DTensor, distribute_tensor  # not there in every build of PyTorch

        mesh, placements = target.device_mesh, target.placements
        shape = list(target.shape)
        shape[self.dim] //= len(source_patterns)
        stride = torch.empty(shape, device="meta").stride()
        for name, pieces in input_dict.items():
            piece = pieces[0] if isinstance(pieces, list) else pieces
            whole = DTensor.from_local(piece.contiguous(), mesh, placements, shape=torch.Size(shape), stride=stride)
            input_dict[name] = whole.full_tensor()
        converted = super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        return {
            name: distribute_tensor(fused, mesh, placements, src_data_rank=None).to_local()
            for name, fused in converted.items()
        }


def _is_cut(tensor: torch.Tensor, dim: int) -> bool:
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(tensor, DTensor):
        return False
    return any(
        not isinstance(placement, Replicate) and placement.dim % tensor.ndim == dim % tensor.ndim
        for placement in tensor.placements
    )
