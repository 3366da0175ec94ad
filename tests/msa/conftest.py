"""Fixtures of the operators' tests. Hypothesis tests need helpers of session scope, so these come as namespaces.

| file | holds |
| --- | --- |
| `loops.py` | the meaning of the operators in plain loops (fixture `brute`) |
| `cases.py`, `comparison.py` | random inputs; errors and tolerances (fixture `inputs`) |
| `gpu_cases.py`, `gpu_selection.py` | the same for the compiled kernels (fixture `gpu`) |
| `pretended_gpu.py` | tensors that say they are on a GPU, for tests of the choice between backends |
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_minimax_m3.msa import extension

for _name in ("comparison", "gpu_selection", "loops"):
    pytest.register_assert_rewrite(f"{__package__}.{_name}")

from . import cases, comparison, gpu_cases, gpu_selection, loops  # noqa: E402 (after their asserts are registered)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """One thread: tensors of a few hundred tokens take longer to share among threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def brute() -> SimpleNamespace:
    return SimpleNamespace(
        attend=loops.attend,
        attend_with_kvcache=loops.attend_with_kvcache,
        check_selection=loops.check_selection,
        check_selection_with_kvcache=loops.check_selection_with_kvcache,
        selected_sets=loops.selected_sets,
    )


@pytest.fixture(scope="session")
def inputs() -> SimpleNamespace:
    return SimpleNamespace(
        make_cached=cases.make_cached,
        make_varlen=cases.make_varlen,
        offsets=cases.offsets,
        op_arguments=cases.op_arguments,
        random_block_indices=cases.random_block_indices,
        relative_error=comparison.relative_error,
    )


@pytest.fixture(scope="session")
def gpu() -> SimpleNamespace:
    """Inputs and checks of the compiled kernels; what is not special to a GPU is in `inputs`."""
    return SimpleNamespace(
        assert_rows=comparison.assert_rows,
        assert_selection=gpu_selection.assert_selection,
        block_scores=gpu_selection.exact_block_scores,
        cached=gpu_cases.cached_on_gpu,
        offsets=gpu_cases.offsets_on_gpu,
        packed=gpu_cases.Packed,
        poison=gpu_cases.poison,
        strided=gpu_cases.strided,
    )


@pytest.fixture(scope="module")
def compiled_kernels() -> None:
    """Builds the extension where it is missing, so that no test of a kernel has to."""
    reason = extension.load(build=True)
    assert reason is None, reason


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes uninitialised tensors hold NaN, or a large number in integer ones, so that reading one shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
