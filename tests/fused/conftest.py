"""Fixtures of the fused operators' tests."""

import pytest

from modeling_minimax_m3.msa import extension


@pytest.fixture(scope="module")
def compiled_kernels() -> None:
    """Builds the extension where it is missing, so that no test of a kernel has to."""
    reason = extension.load(build=True)
    assert reason is None, reason
