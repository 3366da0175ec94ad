"""How fused projections are read from checkpoint files, and written to them.

A composite checkpoint holds the gate and the up projection of dense and shared MLPs apart. The model holds them fused,
gate first. Transformers' rule for that goes wrong in two places, each without an error:

- Where `DistributedConfig(fsdp_size=...)` shards the fused weight, Transformers 5.23 shards gate and up each and
  concatenates this rank's shards. The result has its rows in another order than this rank's shard of the fused weight.
- Where bitsandbytes has quantized the fused layer, Transformers 5.23 and 5.24 write halves of its packed bytes, and of
  the tensors beside them. Nothing can read such a file again.

The experts of a composite checkpoint are apart as well, and stacked in the model. Quantized ones are written as they
are in the model, unless their format has a released layout.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightTransform,
)
from transformers.distributed.utils import is_dtensor

from ..layers.quantized import QuantizedModule


def with_fused_projections(mapping: list[WeightTransform]) -> list[WeightTransform]:
    """`mapping`, with `ConcatenateWhole` where a rule does nothing but `Concatenate`.

    The rules of experts merge them first, and Transformers shards those correctly. They get operations that copy each
    expert once, and whose reverse leaves quantized experts whole.
    """
    for transform in mapping:
        if not isinstance(transform, WeightConverter):
            continue
        if [type(op) for op in transform.operations] == [Concatenate]:
            (concatenate,) = transform.operations
            transform.operations = [ConcatenateWhole(concatenate.dim, concatenate.num_shards_attribute)]
        elif type(transform.operations[0]) is MergeModulelist:
            merge, *rest = transform.operations
            fused_dim = rest[0].dim if [type(op) for op in rest] == [Concatenate] else None
            rest = [ConcatenateExperts(op.dim) if type(op) is Concatenate else op for op in rest]
            transform.operations = [MergeExperts(merge.dim, fused_dim), *rest]
    return mapping


class MergeExperts(MergeModulelist):
    """`MergeModulelist` that is reversed by `SplitUnlessQuantized`.

    Where gate and up projections are to be concatenated next, it does that too: each weight is copied to its place in
    the fused tensor, in place of a copy into a stack and another one from there.

    Args:
        dim (`int`): As in Transformers.
        fused_dim (`int`, *optional*): The axis along which `ConcatenateExperts` comes next. None: it does not.
    """

    def __init__(self, dim: int = 0, fused_dim: int | None = None):
        super().__init__(dim)
        self.fused_dim = fused_dim

    @torch.no_grad
    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """As in Transformers, but the result may have the name and the content that `ConcatenateExperts` would give it.

        Args:
            input_dict (`dict`): For each source its tensors, one for each expert of this rank.
            source_patterns, target_patterns (`list[str]`): The sources in order, and the name of the result.
            **kwargs: Passed to Transformers' operation.
        """
        parts = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        if parts and not any(map(len, parts)):
            input_dict.clear()
            return {target_patterns[0]: _no_experts(**kwargs)}
        if self.fused_dim is None or self.dim != 0 or len(parts) < 2 or not _are_stacks(parts):
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        shape = [len(parts[0]), *parts[0][0].shape]
        widths = [part[0].shape[self.fused_dim - 1] for part in parts]
        shape[self.fused_dim] = sum(widths)
        fused = parts[0][0].new_empty(shape)
        for piece, part in zip(fused.split(widths, self.fused_dim), parts, strict=True):
            for expert, tensor in enumerate(part):
                piece[expert].copy_(tensor)
        input_dict.clear()
        return {target_patterns[0]: fused}

    @property
    def reverse_op(self) -> "SplitUnlessQuantized":
        return SplitUnlessQuantized(self.dim)


class ConcatenateExperts(Concatenate):
    """`Concatenate` that is reversed by `ChunkUnlessQuantized`, and passes on what `MergeExperts` has fused."""

    @torch.no_grad
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """As in Transformers.

        Args:
            input_dict (`dict`): The fused tensor under its name, or a stack for each source.
            source_patterns, target_patterns (`list[str]`): The sources in order, and the name of the result.
            **kwargs: Passed to Transformers' operation.
        """
        if list(input_dict) == target_patterns and isinstance(input_dict[target_patterns[0]], torch.Tensor):
            return input_dict
        return super().convert(input_dict, source_patterns, target_patterns, **kwargs)

    @property
    def reverse_op(self) -> "ChunkUnlessQuantized":
        return ChunkUnlessQuantized(self.dim)


def _no_experts(*, model: PreTrainedModel, full_layer_name: str, **kwargs: Any) -> torch.Tensor:
    """The part of a rank that has no expert, such as the last of three ranks that share four experts."""
    target = model.get_parameter_or_buffer(full_layer_name)
    return torch.empty(target.to_local().shape, dtype=target.dtype, device=target.device_mesh.device_type)


def _are_stacks(parts: list[Any]) -> bool:
    """Whether each part is a list of plain tensors, as many in each, of one dtype, device and shape in a list."""
    if not all(isinstance(part, list) and part for part in parts):
        return False
    first = parts[0][0]
    return all(
        len(part) == len(parts[0])
        and all(
            type(tensor) is torch.Tensor
            and tensor.shape == part[0].shape
            and (tensor.dtype, tensor.device) == (first.dtype, first.device)
            for tensor in part
        )
        for part in parts
    )


class ConcatenateWhole(Concatenate):
    """`Concatenate` whose result is this rank's shard of the fused weight, along whatever axis it is sharded."""

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
        """As in Transformers. Every rank converts at once where the target is sharded along `self.dim`.

        Args:
            input_dict (`dict`): For each source the whole tensor, or this rank's shard of it.
            source_patterns, target_patterns (`list[str]`): The sources in order, and the name of the result.
            full_layer_name (`str`): Name of the target in `model`.
            model (`PreTrainedModel`): Its parameter of that name tells how it is sharded.
            **kwargs: Passed to Transformers' operation.
        """
        target = model.get_parameter_or_buffer(full_layer_name)
        if not _is_sharded(target, self.dim):
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        from torch.distributed.tensor import DTensor, distribute_tensor  # not there in every build of PyTorch

        mesh, placements = target.device_mesh, target.placements
        shape = list(target.shape)
        shape[self.dim] //= len(input_dict)  # the patterns name the scales of MXFP8 files as well
        stride = torch.empty(shape, device="meta").stride()
        for name, pieces in input_dict.items():
            piece = pieces[0] if isinstance(pieces, list) else pieces
            dtype = piece.dtype
            if dtype.itemsize == 1:
                piece = piece.view(torch.uint8)  # not every backend gathers 8-bit floats
            whole = DTensor.from_local(piece.contiguous(), mesh, placements, shape=torch.Size(shape), stride=stride)
            input_dict[name] = joined(whole).view(dtype)
        converted = super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        factor = _groups_of(target)
        if factor is not None:
            return {name: _part_of_groups(fused, self.dim, factor, mesh) for name, fused in converted.items()}
        return {
            name: distribute_tensor(fused, mesh, placements, src_data_rank=None).to_local()
            for name, fused in converted.items()
        }

    @property
    def reverse_op(self) -> "ChunkUnlessQuantized":
        return ChunkUnlessQuantized(self.dim, self.num_shards_attribute)


class ChunkUnlessQuantized(Chunk):
    """`Chunk` that leaves a quantized weight, and the tensors beside it, whole and under their names in the model.

    Files with those names load, in stock Transformers too.
    """

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
        """As in Transformers.

        Args:
            input_dict (`dict`): The weight of the fused layer, or a tensor stored beside it (`weight.absmax`).
            source_patterns, target_patterns (`list[str]`): Names of the fused weight and of its parts.
            full_layer_name (`str`): Name of the tensor, with the first part's name in place of the fused one.
            model (`PreTrainedModel`): Its parameter tells whether it is quantized.
            **kwargs: Passed to Transformers' operation.
        """
        name = _name_of_whole(model, full_layer_name, source_patterns, target_patterns)
        if name is None:
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        (tensors,) = input_dict.values()
        return {name: tensors}


class SplitUnlessQuantized(SplitModulelist):
    """`SplitModulelist` that leaves quantized experts whole, as `ChunkUnlessQuantized` does."""

    @torch.no_grad
    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """As in Transformers.

        Args:
            input_dict (`dict`): The weight of all experts, or its parts.
            source_patterns, target_patterns (`list[str]`): Names of that weight and of its parts.
            full_layer_name (`str`): Name of the weight, with the first part's name in place of its own.
            model (`PreTrainedModel`): Its module tells whether the experts are quantized.
            **kwargs: Passed to Transformers' operation.
        """
        name = _name_of_whole(model, full_layer_name, source_patterns, target_patterns)
        if name is None:
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        (tensors,) = input_dict.values()
        return {name: tensors}


def _name_of_whole(
    model: PreTrainedModel, full_layer_name: str, source_patterns: list[str], target_patterns: list[str]
) -> str | None:
    """The name in the model of a tensor that is saved whole. None for one that is saved in parts."""
    fused = source_patterns[0].replace(r"\.", ".")
    layer, _, suffix = full_layer_name.rpartition(target_patterns[0])
    module, weight = _module_and_parameter(model, layer + fused)
    if isinstance(module, QuantizedModule):
        return None if module.weight_format.is_split_on_disk else layer + fused + suffix
    if weight is None or type(weight) is nn.Parameter or is_dtensor(weight):
        return None
    return layer + fused + suffix


def _module_and_parameter(model: nn.Module, name: str) -> tuple[nn.Module | None, nn.Parameter | None]:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # a wrapper's names differ from the file's; what it wraps is not quantized
        return None, None
    return module, module._parameters.get(leaf)  # as it is stored, whatever the layer shows


def joined(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a `DTensor`, for which all ranks call this; other tensors as they are.

    Tensor parallelism gives each rank a part of the gates and a part of the ups. With PyTorch before 2.12, a tensor of
    such parts does not join them itself.
    """
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Shard  # not there in every build of PyTorch

    factor = _groups_of(tensor)
    if factor is None:
        return tensor.full_tensor()
    dim = tensor.placements[0].dim % tensor.ndim
    groups = tensor.to_local().unflatten(dim, (factor, -1))
    parts = DTensor.from_local(groups, tensor.device_mesh, [Shard(dim + 1)], run_check=False)
    return parts.full_tensor().flatten(dim, dim + 1)


def with_joined_groups(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` with the fused projections that tensor parallelism has cut whole, on the host. All ranks call this."""
    return {
        name: joined(tensor).cpu() if is_dtensor(tensor) and _groups_of(tensor) is not None else tensor
        for name, tensor in state_dict.items()
    }


def _part_of_groups(tensor: torch.Tensor, dim: int, factor: int, mesh: Any) -> torch.Tensor:
    """This rank's part of each of `factor` equal groups along `dim`, side by side."""
    groups = tensor.unflatten(dim, (factor, -1))
    return groups.chunk(mesh.size(), dim + 1)[mesh.get_local_rank()].flatten(dim, dim + 1)


def _groups_of(tensor: Any) -> int | None:
    """In how many equal groups a `DTensor` is cut into equal parts; None where it is cut in another way."""
    factor = getattr(tensor.placements[0], "split_factor", None)
    if tensor.device_mesh.ndim > 1 or factor is None:
        return None
    return factor if tensor.shape[tensor.placements[0].dim] % (factor * tensor.device_mesh.size()) == 0 else None


def _is_sharded(tensor: torch.Tensor, dim: int) -> bool:
    if not is_dtensor(tensor):
        return False
    from torch.distributed.tensor import Replicate

    return any(
        not isinstance(placement, Replicate) and placement.dim % tensor.ndim == dim % tensor.ndim
        for placement in tensor.placements
    )
