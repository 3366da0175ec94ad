"""KV-major tiles: a key block, and the queries that attend to it for one key/value head.

Attention and the indexer's loss walk over the key blocks, gather the queries that selected a block, and fold the block
into sums that belong to those queries. Every product is a plain matmul without wasted rows, and each key block is read
once. A walk that computes gradients needs neither atomics nor a second pass: a block's key gradient has one owner, and
a query occurs once per block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..sequences import bounded_block_size, compute_dtype, packed_sequences

# Elements of the largest temporary tile of scores. A tile is read and written several times, so it should stay in
# cache: 4 MiB in float32.
ATTENTION_TILE = 2**20

# The same for tiles in which every query attends to all keys, on devices that want few and large products.
DEVICE_TILE = 2**25

# The keys of such a tile.
DENSE_KEYS = 512


@dataclass(frozen=True)
class Tile:
    """Some of the queries that selected one key block for one key/value head, and that block's keys.

    Attributes:
        head (int): The key/value head.
        tokens (n,): Rows of `query`, ascending.
        keys (slice): Rows of `key` and `value`.
        future (bool (m, 1, keys) or None): The keys in the future of the first m tokens; None where no token has any.
    """

    head: int
    tokens: torch.Tensor
    keys: slice
    future: torch.Tensor | None


def tiles_of(
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_kv_heads: int,
    block_size: int,
    q_heads_per_kv: int,
) -> Iterator[Tile]:
    """The tiles of the listed blocks, or of all keys s <= t where `block_indices` is None."""
    if block_indices is None:
        return causal_tiles(cu_seqlens_q, cu_seqlens_k, num_kv_heads, q_heads_per_kv)
    return listed_tiles(block_indices, cu_seqlens_q, cu_seqlens_k, block_size, q_heads_per_kv)


def listed_tiles(
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    q_heads_per_kv: int,
) -> Iterator[Tile]:
    """Inverts the block lists: for every key block and head, the queries that selected it, in bounded tiles."""
    total_q, num_kv_heads = block_indices.shape[:2]
    device = block_indices.device
    starts, ends = cu_seqlens_k[:-1].tolist(), cu_seqlens_k[1:].tolist()
    longest = max((end - start for start, end in zip(starts, ends)), default=0)
    block_size = bounded_block_size(block_size, longest)
    len_q, len_k = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    blocks_of_sequence = (len_k + block_size - 1) // block_size
    first_block = blocks_of_sequence.cumsum(0) - blocks_of_sequence  # of each sequence, counted over the batch
    num_blocks = int(blocks_of_sequence.sum())
    if num_blocks == 0 or total_q == 0:
        return

    sequence = torch.repeat_interleave(torch.arange(len(len_q), device=device), len_q, output_size=total_q)
    position = torch.arange(total_q, device=device) - (cu_seqlens_q[:-1].long() + len_q - len_k)[sequence]
    own_block = (position // block_size)[:, None, None]
    attended = (block_indices >= 0) & (block_indices <= own_block)
    # Pairs (head, block, token), sorted: a stable sort keeps the tokens of a pair ascending.
    heads = torch.arange(num_kv_heads, device=device)[:, None]
    pair = heads * num_blocks + first_block[sequence][:, None, None] + block_indices
    token = torch.arange(total_q, device=device)[:, None, None].expand_as(pair)[attended]
    pair, order = pair[attended].sort(stable=True)
    token = token[order]
    # Tokens inside the block themselves come first in its list. Only they have keys of the block in their future.
    is_inside = (block_indices == own_block)[attended][order]
    inside = torch.bincount(pair[is_inside], minlength=num_kv_heads * num_blocks).tolist()
    counts = torch.bincount(pair, minlength=num_kv_heads * num_blocks).tolist()

    keys_of_block = []
    for start, end in zip(starts, ends):
        keys_of_block += [slice(first, min(first + block_size, end)) for first in range(start, end, block_size)]
    sequence_start = torch.repeat_interleave(
        cu_seqlens_k[:-1].long(), blocks_of_sequence, output_size=num_blocks
    ).tolist()

    tile = max(1, ATTENTION_TILE // (q_heads_per_kv * block_size))
    offset = 0
    for index, count in enumerate(counts):
        head, block = divmod(index, num_blocks)
        keys = keys_of_block[block]
        for first in range(0, count, tile):
            tokens = token[offset + first : offset + min(first + tile, count)]
            future = None
            if first < inside[index]:
                row_position = position[tokens[: inside[index] - first]]
                key_position = torch.arange(keys.start, keys.stop, device=device) - sequence_start[block]
                future = (key_position > row_position[:, None]).unsqueeze(1)
            yield Tile(head, tokens, keys, future)
        offset += count


def causal_tiles(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, num_kv_heads: int, q_heads_per_kv: int
) -> Iterator[Tile]:
    """Tiles of queries that attend to all keys s <= t; each tile has at most `DENSE_KEYS` keys."""
    device = cu_seqlens_q.device
    elements = ATTENTION_TILE if device.type == "cpu" else DEVICE_TILE
    tile = max(1, elements // (q_heads_per_kv * DENSE_KEYS))
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        shift = keys.stop - queries.stop  # from a query's row to the row of its own key
        for first_key in range(keys.start, keys.stop, DENSE_KEYS):
            block = slice(first_key, min(first_key + DENSE_KEYS, keys.stop))
            for start in range(max(queries.start, first_key - shift), queries.stop, tile):
                tokens = torch.arange(start, min(start + tile, queries.stop), device=device)
                future = None
                if start + shift < block.stop - 1:
                    own_key = tokens[: block.stop - 1 - shift - start] + shift
                    future = (torch.arange(block.start, block.stop, device=device) > own_key[:, None]).unsqueeze(1)
                for head in range(num_kv_heads):
                    yield Tile(head, tokens, block, future)


def rows_by_head(states: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(total_q, H_q, D) as (H_kv, total_q, q_heads_per_kv * D), in the dtype of the sums.

    The rows of one key/value head lie next to each other, so that gathering a token's rows is one copy.
    """
    by_head = states.unflatten(1, (num_kv_heads, -1)).flatten(2).transpose(0, 1)
    return by_head.to(compute_dtype(states)).contiguous()


def rows_by_token(states: torch.Tensor, q_heads_per_kv: int, dtype: torch.dtype) -> torch.Tensor:
    """Undoes `rows_by_head`, in the given dtype."""
    return states.transpose(0, 1).unflatten(2, (q_heads_per_kv, -1)).flatten(1, 2).to(dtype).contiguous()


def tile_scores(query_rows: torch.Tensor, key_rows: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Scores of a tile, -inf where the key is in the token's future.

    Args:
        query_rows (n * q_heads_per_kv, D): The tile's query rows, token by token.
        key_rows (keys, D): The tile's keys.
        tile (Tile): The tile.

    Returns:
        (n, q_heads_per_kv, keys).
    """
    scores = (query_rows @ key_rows.T).unflatten(0, (len(tile.tokens), -1))
    if tile.future is not None:
        scores[: len(tile.future)].masked_fill_(tile.future, float("-inf"))
    return scores


class RunningSum:
    """Log-sum-exp of (rows, ...) scores that arrive in pieces, relative to the largest seen so far."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.largest = torch.full(shape, float("-inf"), dtype=dtype, device=device)
        self.total = torch.zeros(shape, dtype=dtype, device=device)

    def add(self, head: int, tokens: torch.Tensor, scores: torch.Tensor) -> None:
        """Adds the exponentials of `scores` (n, ..., keys) to the rows `tokens`; overwrites `scores`.

        Each row of `scores` must hold a finite one.
        """
        before = self.largest[head].index_select(0, tokens)
        after = torch.maximum(before, scores.amax(-1))
        total = self.total[head].index_select(0, tokens).mul_((before - after).exp_())
        total.add_(scores.sub_(after.unsqueeze(-1)).exp_().sum(-1))
        self.largest[head].index_copy_(0, tokens, after)
        self.total[head].index_copy_(0, tokens, total)

    def log(self) -> torch.Tensor:
        """The log-sum-exp, -inf for rows that nothing was added to."""
        return self.largest + self.total.log()
