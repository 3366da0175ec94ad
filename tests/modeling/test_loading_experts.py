"""The experts of a checkpoint on their way into the fused weight: the numbers of Transformers' rules, in one copy."""

import pytest
import torch
from torch import nn
from transformers import MiniMaxM3VLConfig as StockConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from modeling_minimax_m3.loading.fused_projections import ConcatenateExperts, MergeExperts

SOURCES = ["experts.*.w1.weight", "experts.*.w3.weight"]
TARGETS = ["experts.gate_up_proj"]


def run(operations, tensors):
    found = dict(tensors)
    for operation in operations:
        found = operation.convert(found, source_patterns=SOURCES, target_patterns=TARGETS)
    return found


def experts(count, rows, dtype):
    numbers = torch.randint(0, 120, (count, rows, 32), dtype=torch.uint8)
    tensors = numbers.view(dtype) if dtype.itemsize == 1 else numbers.to(dtype)
    return list(tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("rows", [(16, 16), (8, 24)])
def test_numbers_are_those_of_transformers_rules(dtype, rows):
    tensors = {pattern: experts(5, count, dtype) for pattern, count in zip(SOURCES, rows, strict=True)}
    (expected,) = run([MergeModulelist(0), Concatenate(1)], tensors).values()
    found = run([MergeExperts(0, 1), ConcatenateExperts(1)], tensors)
    assert list(found) == TARGETS
    assert found[TARGETS[0]].dtype == dtype and found[TARGETS[0]].is_contiguous()
    torch.testing.assert_close(
        found[TARGETS[0]].view(torch.uint8), expected.view(torch.uint8), rtol=0, atol=0
    )  # bytes, as not every comparison knows 8-bit floats


def test_gate_comes_first_whatever_the_order_of_the_tensors():
    gate, up = torch.zeros(1, 2, 32), torch.ones(1, 2, 32)
    found = run([MergeExperts(0, 1), ConcatenateExperts(1)], {SOURCES[1]: list(up), SOURCES[0]: list(gate)})
    assert found[TARGETS[0]][0, :2].eq(0).all() and found[TARGETS[0]][0, 2:].eq(1).all()


def test_weights_are_copied_once(monkeypatch):
    tensors = {pattern: experts(4, 16, torch.bfloat16) for pattern in SOURCES}
    for name in ("stack", "cat"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: pytest.fail("a second copy"))
    run([MergeExperts(0, 1), ConcatenateExperts(1)], tensors)


@pytest.mark.parametrize("odd", ["count", "kind", "dtype"])
def test_other_inputs_go_transformers_way(odd):
    gate, up = experts(4, 16, torch.float32), experts(4, 16, torch.float32)
    if odd == "count":
        gate = gate[:3]
    elif odd == "kind":
        gate = [nn.Parameter(tensor) for tensor in gate]
    else:
        gate = [tensor.double() for tensor in gate]
    merged = MergeExperts(0, 1).convert(
        {SOURCES[0]: gate, SOURCES[1]: up}, source_patterns=SOURCES, target_patterns=TARGETS
    )
    assert {name: len(stack) for name, stack in merged.items()} == {SOURCES[0]: len(gate), SOURCES[1]: 4}


def test_the_rules_of_experts_are_these():
    rules = [
        rule.operations
        for rule in get_checkpoint_conversion_mapping(StockConfig.model_type)
        if isinstance(rule, WeightConverter) and "gate_up_proj" in str(rule.target_patterns)
    ]
    of_experts = [operations for operations in rules if len(operations) == 2]
    assert of_experts
    for merge, concatenate in of_experts:
        assert type(merge) is MergeExperts and type(concatenate) is ConcatenateExperts
        assert (merge.dim, merge.fused_dim, concatenate.dim) == (0, 1, 1)
