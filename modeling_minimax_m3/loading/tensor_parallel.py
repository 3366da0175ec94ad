"""How processes share the weights of a model under Transformers' tensor and expert parallelism.

The configuration has the plan of stock Transformers, which gathers the queries, keys and values of all processes and
splits them again, and leaves dense and shared MLPs whole. Here the plan of a model that is loaded gets other rules,
where the sizes allow it and the user names none for the same layers:

- Each process has key/value heads of its own, with their queries, index queries and cache.
- Each process has a part of the dense and shared MLPs.

Then a layer sums twice over the processes: behind its attention and behind its MLP (see `fused/shards.py`).
"""

import re
from typing import Any

from torch import distributed, nn
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from ..fused import shards
from ..fused.shards import Processes
from ..layers.attention import MiniMaxM3VLAttention
from ..layers.moe import MiniMaxM3VLDenseMLP, MiniMaxM3VLExperts
from ..layers.mxfp8 import Mxfp8Linear
from ..mxfp8 import GROUP_SIZE

logger = logging.get_logger(__name__)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_STOCK_RULES = {**dict.fromkeys(_PROJECTIONS, "colwise_gather_output"), "o_proj": "rowwise_split_input"}
_OWN_HEADS = {**dict.fromkeys(_PROJECTIONS, shards.COLUMNS), "o_proj": shards.ROWS}
_OWN_INDEX_HEADS = {"indexer.q_proj": shards.COLUMNS}
_MLP_RULES = {"gate_up_proj": shards.PACKED_COLUMNS, "down_proj": shards.ROWS}


def choose_rules(model: PreTrainedModel, distributed_config: DistributedConfig) -> None:
    """Put our rules into `model.tp_plan`, before the model is spread.

    Args:
        model (`PreTrainedModel`): Its layers are those that are going to be loaded.
        distributed_config (`DistributedConfig`): How many processes there are, and the user's own rules.
    """
    count = distributed_config.tp_size or 1
    override = distributed_config.tp_plan if isinstance(distributed_config.tp_plan, dict) else None
    if count == 1 or override == {} or not _knows_weights(model):
        return
    plan = dict(model.tp_plan or {})
    for name, rules in _own_rules(model, plan, count, with_mlps=distributed_config.dp_size == 1):
        rules = {f"{name}.{layer}": style for layer, style in rules.items()}
        if not rules.keys() & (override or {}).keys():
            plan.update(rules)
    model._tp_plan = plan


def _own_rules(
    model: PreTrainedModel, plan: dict[str, str], count: int, with_mlps: bool
) -> list[tuple[str, dict[str, str]]]:
    """Names of modules, with a wildcard for their layers, and our rules for the linear layers in them."""
    found: dict[str, dict[str, str]] = {}
    refused: set[str] = set()
    for name, module in model.named_modules():
        name = with_wildcards(name)
        if isinstance(module, MiniMaxM3VLAttention):
            if any(plan.get(f"{name}.{layer}") != style for layer, style in _STOCK_RULES.items()):
                continue  # the model's plan is not the one that we know
            found.setdefault(name, {}).update(_OWN_HEADS | (_OWN_INDEX_HEADS if module.indexer is not None else {}))
            heads = module.config.num_key_value_heads
            if heads % count or not _can_cut(module.o_proj, count):
                refused.add(name)
                if distributed.get_rank() == 0:
                    logger.warning_once(
                        f"{count} processes cannot share {heads} key/value heads evenly, so each gathers the queries, keys "
                        "and values of all heads, and holds the cache of all heads. A `tp_size` that divides "
                        f"num_key_value_heads={heads} is faster."
                    )
        elif isinstance(module, MiniMaxM3VLDenseMLP) and with_mlps and plan:
            found.setdefault(name, {}).update(_MLP_RULES)
            # The files have gates and ups apart, and each is read in two groups.
            if not _can_cut(module.down_proj, 2 * count):
                refused.add(name)
    return [(name, rules) for name, rules in found.items() if name not in refused]


def _can_cut(layer: nn.Linear, count: int) -> bool:
    """Whether each of `count` processes can have an equal part of the columns of a weight."""
    return layer.in_features % (count * (GROUP_SIZE if isinstance(layer, Mxfp8Linear) else 1)) == 0


def _knows_weights(model: PreTrainedModel) -> bool:
    """Whether the linear layers are plain or in MXFP8. Others are cut as stock Transformers does, or not at all."""
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    return not is_quantized or any(isinstance(module, Mxfp8Linear) for module in model.modules())


def with_wildcards(name: str) -> str:
    """The name of a module as the plans have it: `*` for the number of its layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def note_shards(model: PreTrainedModel, distributed_config: DistributedConfig, mesh_manager: Any) -> None:
    """Tell the layers which parts of them this process has, after the plans have been applied.

    Raises:
        ValueError: A plan of the user's own cuts some projections of an attention by heads, and others not.
    """
    if (distributed_config.tp_size or 1) == 1:
        return
    processes = Processes(mesh_manager.get_mesh("tp"))
    for name, module in model.named_modules():
        if isinstance(module, MiniMaxM3VLAttention) and _has_own_heads(with_wildcards(name), module, model.tp_plan):
            module.share_heads(processes)
        style = _style_of(with_wildcards(name), module, model, distributed_config)
        if style is not None:
            shards.note_shard(module, style, processes)


def _style_of(name: str, module: nn.Module, model: PreTrainedModel, config: DistributedConfig) -> str | None:
    """The style of a module. None where it has none, or exchanges more than sums without gradients."""
    if config.dp_size > 1:
        return None  # FSDP has the parts of all processes gathered while a layer runs
    if config.ep_size == 1 or not isinstance(module, MiniMaxM3VLExperts):
        return model.tp_plan.get(name)
    sums = config.ep_size == config.tp_size and config.ep_implementation in ("auto", "all_reduce")
    return model.ep_plan.get(name) if sums else None


def _has_own_heads(name: str, attention: MiniMaxM3VLAttention, plan: dict[str, str]) -> bool:
    rules = _OWN_HEADS if attention.indexer is None else _OWN_HEADS | _OWN_INDEX_HEADS
    agree = {plan.get(f"{name}.{layer}") == style for layer, style in rules.items()}
    cuts_heads = any(plan.get(f"{name}.{layer}") == shards.COLUMNS for layer in rules)
    if cuts_heads and len(agree) > 1:
        raise ValueError(f"`tp_plan` must have all of these rules for {name}, or none of them: {rules}.")
    return cuts_heads
