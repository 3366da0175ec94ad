"""`structured_blocks`: key blocks chosen by position alone, at constant cost per token and with nothing learned.

A query's list depends on its own block b, the layer and the key/value head, so every backend, every split of the work
and every kind of cache lists the same blocks. It has W = local + anchor + random places. Where b + 1 <= W it holds every
visible block. Otherwise:

- local: b, b - 1, ..., as many as `local_blocks`;
- anchors: the multiples of a stride in [0, b]; the stride is `anchor_stride` times the smallest power of two that leaves
  at most `anchor_blocks` of them;
- random: all remaining places, drawn without replacement from the blocks that are not listed yet.

`reference.structured_block_list` is the definition, with the random numbers written out. The `torch` backend gets the
same integers from tensor operations, and the `cuda` backend from a kernel.
"""

import sys
from dataclasses import dataclass

import torch

from . import checks, cuda, reference
from .backends import check_backend, resolve_backend
from .reference import PHILOX_KEY_STEPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS
from .sequences import sequence_of

_WORD = 0xFFFFFFFF

# Places of a list: the `torch` backend does something for each of them, and draws one after the other.
MAX_WIDTH = 1024
MAX_KV_HEADS = 1024


@dataclass(frozen=True)
class StructuredPattern:
    """How many blocks of each kind a query attends to.

    Attributes:
        local_blocks (`int`): Blocks at the query's end, its own included.
        anchor_blocks (`int`): At most this many blocks at regular intervals.
        anchor_stride (`int`): The smallest interval, in blocks.
        random_blocks (`int`): At least this many random blocks.
        seed (`int`): 64-bit seed of the random blocks.
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
        return self.local_blocks + self.anchor_blocks + self.random_blocks


def structured_blocks_of(
    own_block: torch.Tensor,
    num_kv_heads: int,
    layer_idx: int,
    pattern: StructuredPattern,
    num_blocks: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The lists of queries in the given blocks: int32 (..., H_kv, W), ascending ids, -1 after them.

    Args:
        own_block (...): Integer, the block of each query in its own sequence; negative for padding, which lists nothing.
        num_kv_heads: H_kv.
        layer_idx: Index of the layer, which the random blocks depend on.
        pattern: What to list.
        num_blocks: A number that all of `own_block` are below, if known. Where there are more queries than that, the
            `torch` backend works the lists out once per block.
        backend: "auto", "cuda", "torch" or "reference"; they list the same blocks.

    Raises:
        ValueError, TypeError: an argument's dtype or value is not as above.
        NotImplementedError: the named backend cannot run the call.
    """
    checks.check_at_least("num_kv_heads", num_kv_heads, 1, MAX_KV_HEADS)
    checks.check_at_least("layer_idx", layer_idx, 0)
    if not isinstance(pattern, StructuredPattern):
        raise TypeError(f"`pattern` must be a StructuredPattern, got {pattern!r}")
    checks.check_dense("own_block", own_block)
    if own_block.dtype not in checks.INTEGER_DTYPES:
        raise TypeError(f"`own_block` must be a tensor of integers, got {own_block.dtype}")
    if num_blocks is not None:
        checks.check_at_least("num_blocks", num_blocks, 0)
    seed = pattern.seed - 2**64 if pattern.seed >= 2**63 else pattern.seed  # operators take signed integers
    return torch.ops.minimax_m3_msa.structured_blocks_of(
        own_block.long(), num_kv_heads, layer_idx, pattern.local_blocks, pattern.anchor_blocks,
        min(pattern.anchor_stride, 2**31), pattern.random_blocks, seed, num_blocks, check_backend(backend),
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
    args = (own_block, num_kv_heads, layer_idx, local_blocks, anchor_blocks, anchor_stride, random_blocks, seed)
    backend = resolve_backend(backend, "structured_blocks_of", args)
    if backend == "reference":
        return reference.structured_blocks_of(*args)
    if backend == "cuda":
        return cuda.run("structured_blocks_of", args)
    pattern = StructuredPattern(local_blocks, anchor_blocks, anchor_stride, random_blocks, seed % 2**64)
    if num_blocks is None and own_block.device.type == "cpu" and own_block.numel() > 0:
        num_blocks = int(own_block.max()) + 1
    if num_blocks is None or num_blocks >= own_block.numel():
        return _lists(own_block, num_kv_heads, layer_idx, pattern)
    lists = _lists(torch.arange(num_blocks, device=own_block.device), num_kv_heads, layer_idx, pattern)
    return lists[own_block.clamp(min=0)].masked_fill(own_block[..., None, None] < 0, -1)


@_structured_blocks_of.register_fake
def _(
    own_block, num_kv_heads, layer_idx, local_blocks, anchor_blocks, anchor_stride, random_blocks, seed, num_blocks,
    backend,
):  # fmt: skip
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
        cu_seqlens_q, cu_seqlens_k (batch + 1): int32 offsets of the sequences, starting at 0; query i of a sequence
            sits at position len_k - len_q + i.
        num_kv_heads: H_kv.
        block_size: Keys per block.
        local_blocks, anchor_blocks, anchor_stride, random_blocks, seed: As in `StructuredPattern`.
        layer_idx: Index of the layer.
        total_q: Number of queries; without it the last offset is read, which waits for the device.
        backend: "auto", "cuda", "torch" or "reference"; they list the same blocks.

    Returns:
        int32 (total_q, H_kv, W): block ids, ascending, -1 where fewer are visible.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
        NotImplementedError: the named backend cannot run the call.
    """
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
    return structured_blocks_of(own_block, num_kv_heads, layer_idx, pattern, backend=backend)


def _lists(own_block: torch.Tensor, num_kv_heads: int, layer_idx: int, pattern: StructuredPattern) -> torch.Tensor:
    """The `torch` backend of `structured_blocks_of`."""
    block = own_block.unsqueeze(-1).expand(*own_block.shape, num_kv_heads)
    device, width = block.device, pattern.width
    every = torch.arange(width, device=device)
    everything = torch.where(every <= block[..., None], every, -1)  # what queries with few visible blocks list

    # From here on queries with few blocks compute a list that is thrown away: let them stand in a block that has one.
    last = block.clamp(min=width)
    listed = [last - i for i in range(pattern.local_blocks)]
    is_new = [torch.ones_like(last, dtype=torch.bool)] * pattern.local_blocks
    if pattern.anchor_blocks > 0:
        stride = _anchor_stride(last, pattern)
        for i in range(pattern.anchor_blocks):
            anchor = i * stride
            listed.append(anchor)
            is_new.append(anchor <= last - pattern.local_blocks)
    # One past the last block stands for a place that is not taken; it sorts to the end.
    fixed = torch.where(torch.stack(is_new, dim=-1), torch.stack(listed, dim=-1), last[..., None] + 1)
    fixed = fixed.sort(dim=-1).values
    num_fixed = torch.stack(is_new, dim=-1).sum(-1)

    places = width - num_fixed  # random blocks to draw, at least pattern.random_blocks
    unlisted = last + 1 - num_fixed
    drawn = _draw(unlisted, places, last, layer_idx, pattern)
    # The r-th unlisted block: step over each listed one that is not above it.
    for listed_block in fixed.unbind(-1):
        drawn = torch.where(drawn >= listed_block[..., None], drawn + 1, drawn)
    is_drawn = torch.arange(drawn.shape[-1], device=device) < places[..., None]
    drawn = torch.where(is_drawn, drawn, last[..., None] + 1)
    chosen = torch.cat((fixed, drawn), dim=-1).sort(dim=-1).values[..., :width]
    return torch.where(block[..., None] < width, everything, chosen).to(torch.int32)


def _anchor_stride(block: torch.Tensor, pattern: StructuredPattern) -> torch.Tensor:
    """The smallest `anchor_stride` * 2**k with at most `anchor_blocks` multiples in [0, block]."""
    stride = torch.full_like(block, pattern.anchor_stride)
    for _ in range(32):  # block ids are int32
        stride = torch.where(block // stride + 1 <= pattern.anchor_blocks, stride, 2 * stride)
    return stride


def _draw(
    unlisted: torch.Tensor, places: torch.Tensor, block: torch.Tensor, layer_idx: int, pattern: StructuredPattern
) -> torch.Tensor:
    """Floyd's sampling of `places` different numbers below `unlisted` (..., H_kv): int64 (..., H_kv, most places).

    Column d is meaningful where d < places. Draw d is uniform below unlisted - places + d + 1, or that number itself
    where the draw was already taken.
    """
    most = pattern.width - pattern.local_blocks
    draw = torch.arange(most, device=block.device)
    head = torch.arange(block.shape[-1], device=block.device)[:, None]
    words = _philox_first_word(layer_idx, head, block[..., None], draw, pattern.seed)
    bound = (unlisted - places)[..., None] + draw + 1
    candidate = (words * bound) >> 32
    taken = []
    for d in range(most):
        number = candidate[..., d]
        if taken:
            is_taken = (torch.stack(taken, dim=-1) == number[..., None]).any(-1)
            number = torch.where(is_taken, bound[..., d] - 1, number)
        taken.append(number)
    return torch.stack(taken, dim=-1) if taken else block.new_zeros((*block.shape, 0))


def _philox_first_word(
    layer_idx: int, head: torch.Tensor, block: torch.Tensor, draw: torch.Tensor, seed: int
) -> torch.Tensor:
    """First 32-bit word of Philox-4x32-10 with key `seed` and counter (layer, head, block, draw), in int64."""
    head, block, draw = torch.broadcast_tensors(head, block, draw)
    words = [torch.full_like(block, layer_idx), head, block, draw]
    keys = [seed & _WORD, seed >> 32]
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap, but keep the bits of the unsigned ones.
        first, second = words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]
        words = [
            ((second >> 32) & _WORD) ^ words[1] ^ keys[0],
            second & _WORD,
            ((first >> 32) & _WORD) ^ words[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [(key + step) & _WORD for key, step in zip(keys, PHILOX_KEY_STEPS)]
    return words[0]
