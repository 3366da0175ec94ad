"""The rule of forced blocks, which a query attends to whatever their scores are."""

import torch


def is_forced(block: torch.Tensor, own_block: torch.Tensor, local_blocks: int, init_blocks: int) -> torch.Tensor:
    """Whether blocks are among the first `init_blocks`, or the last `local_blocks` up to the query's own.

    A block that the query does not see may count as forced among the first ones: the caller leaves it out.

    Args:
        block (integer (N,)): Block ids.
        own_block (integer (..., 1)): The block that each query lies in.
        local_blocks (int): Forced blocks at the query's end.
        init_blocks (int): Forced blocks at the sequence's start.

    Returns:
        bool (..., N).
    """
    is_local = (block <= own_block) & (block > own_block - local_blocks)
    return (block < init_blocks) | is_local
