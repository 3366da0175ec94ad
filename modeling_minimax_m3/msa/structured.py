"""`structured_blocks`: key blocks chosen by position alone, at constant cost per token and with nothing learned.

A query's list depends on its own block b, the layer and the key/value head, so every backend, every split of the work
and every kind of cache lists the same blocks. It has W = local + anchor + random places. Where b + 1 <= W it holds
every visible block. Otherwise:

- local: b, b - 1, ..., as many as `local_blocks`;
- anchors: the multiples of a stride in [0, b]; the stride is `anchor_stride` times the smallest power of two that
  leaves at most `anchor_blocks` of them;
- random: all remaining places, drawn without replacement from the blocks that are not listed yet.

`reference.structured_block_list` is the definition, with the random numbers written out.
"""

import sys
from dataclasses import dataclass

import torch

from . import checks, cuda, portable, reference
from .backends import Operator, check_backend, run_on_backend
from .reference import StructuredBlocksArgs
from .sequences import sequence_of

# The longest list: the `torch` backend takes operations for each of its places, and draws one place after the other.
MAX_WIDTH = 1024
MAX_KV_HEADS = 1024

STRUCTURED_BLOCKS_OF = Operator(
    name="structured_blocks_of",
    reference=reference.structured_blocks_of,
    portable=portable.structured_blocks_of,
    cuda=cuda.structured_blocks_of,
    unsupported=cuda.structured_blocks_of_unsupported,
)


@dataclass(frozen=True)
class StructuredPattern:
    """How many blocks of each kind a query attends to.

    Attributes:
        local_blocks (int): Blocks at the query's end, its own included.
        anchor_blocks (int): At most this many blocks at regular intervals.
        anchor_stride (int): The smallest interval, in blocks.
        random_blocks (int): At least this many random blocks.
        seed (int): 64-bit seed of the random blocks.
    """

    local_blocks: int
    anchor_blocks: int
    anchor_stride: int
    random_blocks: int
    seed: int

    def __post_init__(self) -> None:
        checks.check_at_least("local_blocks", self.local_blocks, 1)
        checks.check_at_least("anchor_blocks", self.anchor_blocks, 0)
        checks.check_at_least("anchor_stride", self.anchor_stride, 1, maximum=sys.maxsize)
        checks.check_at_least("random_blocks", self.random_blocks, 0)
        checks.check_at_least("seed", self.seed, 0, maximum=2**64 - 1)
        if self.width > MAX_WIDTH:
            raise ValueError(
                f"`local_blocks` + `anchor_blocks` + `random_blocks` must be at most {MAX_WIDTH}: "
                f"got {self.local_blocks} + {self.anchor_blocks} + {self.random_blocks}"
            )

    @property
    def width(self) -> int:
        """Places of a list."""
        return self.local_blocks + self.anchor_blocks + self.random_blocks


def structured_blocks_of(
    own_block: torch.Tensor,
    num_kv_heads: int,
    layer_idx: int,
    pattern: StructuredPattern,
    num_blocks: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The lists of queries in the given blocks.

    Args:
        own_block (...): Integer, the block of each query in its own sequence; negative for padding, whose list is
            empty.
        num_kv_heads (int): H_kv.
        layer_idx (int): Index of the layer, which the random blocks depend on.
        pattern (StructuredPattern): What to list.
        num_blocks (int or None): A number that all of `own_block` are below, if known. Where there are more queries
            than that, the `torch` backend computes the lists once per block.
        backend (str): "auto", "cuda", "torch" or "reference"; they list the same blocks.

    Returns:
        int32 (..., H_kv, W): block ids, ascending, -1 after the last.

    Raises:
        ValueError, TypeError: An argument's dtype or value is not as above.
        NotImplementedError: The named backend cannot run the call.
    """
    args = structured_blocks_of_args(own_block, num_kv_heads, layer_idx, pattern, num_blocks, backend)
    return torch.ops.minimax_m3_msa.structured_blocks_of(*args.values(), backend)


def structured_blocks_of_args(
    own_block: torch.Tensor,
    num_kv_heads: int,
    layer_idx: int,
    pattern: StructuredPattern,
    num_blocks: int | None,
    backend: str,
) -> StructuredBlocksArgs:
    """Checks the arguments of a call of `structured_blocks_of`."""
    checks.check_at_least("num_kv_heads", num_kv_heads, 1, MAX_KV_HEADS)
    checks.check_at_least("layer_idx", layer_idx, 0)
    if not isinstance(pattern, StructuredPattern):
        raise TypeError(f"`pattern` must be a StructuredPattern, got {pattern!r}")
    checks.check_dense("own_block", own_block)
    if own_block.dtype not in checks.INTEGER_DTYPES:
        raise TypeError(f"`own_block` must be a tensor of integers, got {own_block.dtype}")
    if num_blocks is not None:
        checks.check_at_least("num_blocks", num_blocks, 0)
    check_backend(backend)
    seed = pattern.seed - 2**64 if pattern.seed >= 2**63 else pattern.seed  # operators take signed integers
    return StructuredBlocksArgs(
        own_block.long(), num_kv_heads, layer_idx, pattern.local_blocks, pattern.anchor_blocks,
        min(pattern.anchor_stride, 2**31), pattern.random_blocks, seed, num_blocks,
    )  # fmt: skip


@torch.library.custom_op("minimax_m3_msa::structured_blocks_of", mutates_args=())
def _structured_blocks_of(
    own_block: torch.Tensor,
    num_kv_heads: int,
    layer_idx: int,
    local_blocks: int,
    anchor_blocks: int,
    anchor_stride: int,
    random_blocks: int,
    seed: int,
    num_blocks: int | None,
    backend: str,
) -> torch.Tensor:
    if checks.values_are_checked(own_block) and own_block.numel() > 0:
        largest = int(own_block.max())
        if largest >= (2**31 if num_blocks is None else num_blocks):
            limit = "2**31" if num_blocks is None else f"`num_blocks`, which is {num_blocks}"
            raise ValueError(f"`own_block` must lie below {limit}, got {largest}")
    args = StructuredBlocksArgs(
        own_block, num_kv_heads, layer_idx, local_blocks, anchor_blocks, anchor_stride, random_blocks, seed, num_blocks
    )
    return run_on_backend(backend, STRUCTURED_BLOCKS_OF, args)


@_structured_blocks_of.register_fake
def _(
    own_block: torch.Tensor,
    num_kv_heads: int,
    layer_idx: int,
    local_blocks: int,
    anchor_blocks: int,
    anchor_stride: int,
    random_blocks: int,
    seed: int,
    num_blocks: int | None,
    backend: str,
) -> torch.Tensor:
    width = local_blocks + anchor_blocks + random_blocks
    return own_block.new_empty((*own_block.shape, num_kv_heads, width), dtype=torch.int32)


def structured_blocks(
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_kv_heads: int,
    block_size: int,
    local_blocks: int,
    anchor_blocks: int,
    anchor_stride: int,
    random_blocks: int,
    seed: int,
    layer_idx: int,
    total_q: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The lists of all queries of a variable-length batch.

    Args:
        cu_seqlens_q, cu_seqlens_k (batch + 1,): int32 offsets of the sequences, starting at 0; query i of a sequence
            sits at position len_k - len_q + i.
        num_kv_heads (int): H_kv.
        block_size (int): Keys per block.
        local_blocks, anchor_blocks, anchor_stride, random_blocks, seed (int): As in `StructuredPattern`.
        layer_idx (int): Index of the layer.
        total_q (int or None): Number of queries; without it the last offset is read, which waits for the device.
        backend (str): "auto", "cuda", "torch" or "reference"; they list the same blocks.

    Returns:
        int32 (total_q, H_kv, W): block ids, ascending, -1 where fewer are visible.

    Raises:
        ValueError, TypeError: An argument's shape, dtype, device or value is not as above.
        NotImplementedError: The named backend cannot run the call.
    """
    args = structured_blocks_args(
        cu_seqlens_q, cu_seqlens_k, num_kv_heads, block_size, local_blocks, anchor_blocks, anchor_stride,
        random_blocks, seed, layer_idx, total_q, backend,
    )  # fmt: skip
    return torch.ops.minimax_m3_msa.structured_blocks_of(*args.values(), backend)


def structured_blocks_args(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_kv_heads: int,
    block_size: int,
    local_blocks: int,
    anchor_blocks: int,
    anchor_stride: int,
    random_blocks: int,
    seed: int,
    layer_idx: int,
    total_q: int | None,
    backend: str,
) -> StructuredBlocksArgs:
    """Checks the arguments of a call of `structured_blocks`, and finds the block of each query."""
    pattern = StructuredPattern(local_blocks, anchor_blocks, anchor_stride, random_blocks, seed)
    checks.check_at_least("block_size", block_size, 1)
    checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    check_backend(backend)
    if total_q is not None:
        checks.check_at_least("total_q", total_q, 0)
    if checks.are_readable(cu_seqlens_q):
        last_q, last_k = int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1])
        checks.check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, last_q, last_k)
        if total_q not in (None, last_q):
            raise ValueError(f"`total_q` must be the last of `cu_seqlens_q`, {last_q}, got {total_q}")
    if total_q is None:
        total_q = int(cu_seqlens_q[-1])
    token = torch.arange(total_q, device=cu_seqlens_q.device)
    sequence = sequence_of(token, cu_seqlens_q).clamp(max=max(len(cu_seqlens_q) - 2, 0))
    past = cu_seqlens_k.diff() - cu_seqlens_q.diff()
    position = token - cu_seqlens_q[sequence] + past[sequence]
    own_block = torch.div(position, block_size, rounding_mode="floor")
    return structured_blocks_of_args(own_block, num_kv_heads, layer_idx, pattern, None, backend)
