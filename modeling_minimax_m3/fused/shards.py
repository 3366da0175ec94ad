"""Modules whose weights several processes share by a plan of Transformers (tensor and expert parallelism).

Such a plan turns weights into `DTensor`s and replaces the forward of a module on the instance. What that forward adds
to the class's own is known: it multiplies by this process's part of the weight, and then sums or gathers the outputs.
`note_shard` records it, so that operators can take the place of such a module: they read the part of this process
(`local_part`), and make the sums themselves, one for several modules.

All processes have the same inputs, and the same outputs behind a sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.distributed.utils import is_dtensor
from transformers.utils import is_torchdynamo_compiling

from . import one_shot_sum
from .support import has_hooks, is_of_kind, runs_as_written

# `torch.distributed.tensor` is not there in every build of PyTorch, so it is imported where it is used.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Styles of linear layers: outputs of this process's own, also of a fused gate and up projection; or inputs of its own,
# whose products are summed.
COLUMNS, PACKED_COLUMNS, ROWS = "colwise", "packed_colwise", "rowwise"
# Styles of experts, whose outputs are summed: a part of every expert, or all of some experts.
CUT_EXPERTS, WHOLE_EXPERTS = "moe_tp_experts", "ep_dispatch_experts"

_SUMMED = (ROWS, CUT_EXPERTS, WHOLE_EXPERTS)
_STYLES = (COLUMNS, PACKED_COLUMNS, *_SUMMED)


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes that share a model's weights.

    Args:
        mesh (`DeviceMesh`): Of one dimension.
    """

    mesh: "DeviceMesh"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        return self  # a copy of a model works with the same processes

    @property
    def count(self) -> int:
        """How many processes."""
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return self.mesh.get_local_rank()

    def part_of(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part of what all processes have, along a dimension that their number divides."""
        return states.chunk(self.count, dim)[self.rank].contiguous()

    def fan_out(self, states: torch.Tensor) -> torch.Tensor:
        """`states` themselves, which go into parts. Their gradient is the sum of those of all parts."""
        if not (torch.is_grad_enabled() and states.requires_grad):
            return states
        from torch.distributed.tensor import DTensor, Partial, Replicate

        spread = DTensor.from_local(states, self.mesh, [Replicate()], run_check=False)
        return spread.to_local(grad_placements=[Partial()])

    def total(self, states: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' `states`, which may be overwritten. All processes have the same bits of it."""
        if torch.is_grad_enabled() and states.requires_grad:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            terms = DTensor.from_local(states, self.mesh, [Partial()], run_check=False)
            return arrived(terms.redistribute(placements=[Replicate()]).to_local())
        group = self.mesh.get_group()
        result = one_shot_sum.total(states, group) if one_shot_sum.takes(states, self.count) else None
        if result is not None:
            return result
        states = states.contiguous()
        torch.distributed.all_reduce(states, group=group)
        return states

    def gathered(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """All processes' `states`, of equal shapes, side by side along `dim`."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        parts = DTensor.from_local(states.contiguous(), self.mesh, [Shard(dim % states.dim())], run_check=False)
        return arrived(parts.redistribute(placements=[Replicate()]).to_local())


@dataclass(frozen=True, eq=False)
class PlannedForward:
    """What a plan made of a module's forward.

    Args:
        style (`str`): Name of the style.
        processes (`Processes`): Those that hold the parts.
        forward (`Callable`): What stands in the place of the class's forward.
    """

    style: str
    processes: Processes
    forward: Callable[..., Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PlannedForward":
        return self  # as the function that a plan put on the instance


def note_shard(module: nn.Module, style: str, processes: Processes) -> None:
    """Record that the plan has just replaced the forward of `module`. Styles that are unknown here are left out."""
    if style in _STYLES and "forward" in module.__dict__:
        module.__dict__["_planned_forward"] = PlannedForward(style, processes, module.__dict__["forward"])


def planned_forward(module: nn.Module, kind: type[nn.Module]) -> PlannedForward | None:
    """What the plan made of `module`; None where there is none, or a call does more than that and the class say."""
    planned: PlannedForward | None = module.__dict__.get("_planned_forward")
    if planned is None or module.__dict__.get("forward") is not planned.forward or has_hooks(module):
        return None
    return planned if is_of_kind(module, kind) else None


def runs_as_planned(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` runs the forward of `kind` alone, or what the plan made of it, without gradients."""
    if runs_as_written(module, kind):
        return True
    return not torch.is_grad_enabled() and planned_forward(module, kind) is not None


def gives_output(layer: nn.Module, is_alone: bool) -> bool:
    """Whether the product with this process's part is the output of `layer`, or becomes it by `summed`.

    Args:
        layer (module): What a call of it does is known.
        is_alone (bool): Whether the output is that of one layer, so that it can be summed.
    """
    return style_of(layer) != ROWS or is_alone


def style_of(module: nn.Module) -> str | None:
    """The style by which processes share the weights of `module`; None where they do not."""
    planned: PlannedForward | None = module.__dict__.get("_planned_forward")
    return None if planned is None else planned.style


def summed(output: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The output of `module`, from what the part of this process gives. A call of it is known to do no more."""
    planned: PlannedForward | None = module.__dict__.get("_planned_forward")
    return output if planned is None or planned.style not in _SUMMED else planned.processes.total(output)


def refuse_unknown_adapters(module: nn.Module, names: tuple[str, ...]) -> None:
    """Raise where adapters are around a part of a layer, and PEFT has not cut them as the layer.

    Args:
        module (module): What has the layers.
        names (tuple of str): The layers.

    Raises:
        NotImplementedError: Adapters take a part for the layer. Their gradients would be those of this process alone.
    """
    for name in names:
        base_layer = getattr(module.get_submodule(name), "base_layer", None)
        style = None if base_layer is None else style_of(base_layer)
        is_known = style in (COLUMNS, ROWS) and getattr(base_layer, "_hf_tp_plan", None) == style
        if style is not None and not is_known:
            raise NotImplementedError(
                f"`target_modules` must not name {name} of {type(module).__name__}, of which each process has a part: the "
                "installed PEFT does not cut adapters of such a layer. Load the model with whole layers of this name, by a "
                "rule of another style in the `tp_plan` of `DistributedConfig` (docs/training.md)."
            )


def local_expert_ids(experts: nn.Module, expert_ids: torch.Tensor) -> torch.Tensor:
    """Ids that count this process's experts from 0. Others are outside of 0 to E - 1.

    Args:
        experts (module): With `num_experts`, the number E of experts that this process has.
        expert_ids (tokens, K): Ids that count all experts.
    """
    planned: PlannedForward | None = experts.__dict__.get("_planned_forward")
    if planned is None or planned.style != WHOLE_EXPERTS:
        return expert_ids
    num_experts: Any = experts.num_experts
    return expert_ids - planned.processes.rank * num_experts


# By the weight: this process's part as a parameter, which kernels may read ahead (`few_tokens.are_constant`).
_parts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def local_part(weight: torch.Tensor) -> torch.Tensor:
    """This process's part of `weight`, or `weight` itself where it is whole. Without gradients."""
    if not is_dtensor(weight):
        return weight
    sharded: Any = weight
    with torch.no_grad():
        part: torch.Tensor = sharded.to_local()
    known: torch.Tensor | None = _parts.get(weight)
    if known is None or not _is_same_memory(known, part):
        known = _parts[weight] = nn.Parameter(part, requires_grad=False)
        known.__dict__["_mesh"] = sharded.device_mesh
    return known


def agreed(answer: bool, weight: torch.Tensor) -> bool:
    """Whether all processes that have a part of a weight say yes.

    Processes with different answers would take different paths, and wait for each other for ever.

    Args:
        answer (bool): Of this process, of values in its part.
        weight (tensor): What `local_part` has returned, or a whole weight, on which all processes agree.
    """
    mesh: DeviceMesh | None = weight.__dict__.get("_mesh")
    if mesh is None:
        return answer
    answers = torch.tensor([answer], dtype=torch.int32, device=weight.device)
    torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MIN, group=mesh.get_group())
    return bool(answers)


def _is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    # A tensor keeps its memory, so no other tensor can have come to lie there meanwhile.
    return (one.data_ptr(), one.dtype, one.shape) == (other.data_ptr(), other.dtype, other.shape)


def arrived(states: torch.Tensor) -> torch.Tensor:
    """`states` as a plain tensor, which kernels take. A collective's result may be one that waits when it is read."""
    wait = None if type(states) is torch.Tensor or is_torchdynamo_compiling() else getattr(states, "wait", None)
    return states if wait is None else wait()
