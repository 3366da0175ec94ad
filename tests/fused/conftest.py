"""Fixtures of the fused operators' tests."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_minimax_m3.fused import experts
from modeling_minimax_m3.msa import extension

from .expert_cases import KERNELS


@pytest.fixture(scope="module")
def compiled_kernels() -> None:
    """Builds the extension where it is missing, so that no test of a kernel has to."""
    reason = extension.load(build=True)
    assert reason is None, reason


@pytest.fixture
def pretended_kernels(monkeypatch):
    """The kernels' formulas in their place, so that the calls around them run on a CPU; unwritten rows hold NaN."""
    monkeypatch.setattr(experts, "kernels_take", lambda *tensors: True)
    for name, formula in KERNELS.items():
        monkeypatch.setattr(torch.ops.minimax_m3_msa_cuda, name, formula, raising=False)
    product = F.grouped_mm

    def poisoned_product(left, right, offs):
        out = product(left, right, offs=offs)
        if out.dim() == 2:
            out.detach().masked_fill_((torch.arange(len(out)) >= offs[-1])[:, None], math.nan)
        return out

    monkeypatch.setattr(F, "grouped_mm", poisoned_product)
