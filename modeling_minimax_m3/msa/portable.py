"""The `torch` backend: MiniMax Sparse Attention in plain PyTorch, on any device, at memory linear in tokens.

Selection walks over chunks of queries, so that a bounded tile of scores exists at a time. Attention is KV-major: it
walks over the key blocks, gathers the queries that selected a block, and folds the block into their running softmax;
every product is a plain matmul without wasted rows, and each key block is read once. The backward walks the same way
and needs neither atomics nor a second pass: a block's key gradient has one owner, a query occurs once per block.

Decoding (a few new tokens per row) gathers the selected blocks instead, with no value read on the host, so that CUDA
graphs can capture it. The other paths read the sequence lengths on the host.

Scores, softmax and sums are float32 for half precision inputs, and float64 for float64 inputs.
Dimension legend: see README.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from .sequences import bounded_block_size, cached_sequences, compute_dtype, packed_sequences

# Elements of the largest temporary score tile: 16 MiB in float32 for the selection, whose matmuls want many keys, and
# 4 MiB for the attention, whose tile is read and written several times and should stay in cache.
_SELECTION_TILE = 2**22
_ATTENTION_TILE = 2**20

# The same where every query attends to all keys, on devices that want few and large products, and the keys of such a
# tile.
_DEVICE_TILE = 2**25
_DENSE_KEYS = 512

# Up to this many new tokens per row the cached forms gather; above, they run as one variable-length call per row.
_MAX_GATHERED_TOKENS = 16


def _top_blocks(
    block_scores: torch.Tensor, position: torch.Tensor, block_size: int, topk: int, local_blocks: int, init_blocks: int
) -> torch.Tensor:
    """Ids of the `topk` best blocks of each row, ascending, -1 after them: int32 (..., topk).

    `block_scores` is (..., N), `position` (..., 1) with the position of each row's query, negative for padding. Blocks
    up to the query's own are listed, the always-selected ones first, whatever any score is.
    """
    num_blocks = block_scores.shape[-1]
    own_block = torch.div(position, block_size, rounding_mode="floor")
    block = torch.arange(num_blocks, dtype=torch.int32, device=block_scores.device)
    forced = (block < init_blocks) | (block > own_block - local_blocks)
    ranks = _ordered_bits(block_scores)
    limits = torch.iinfo(ranks.dtype)
    ranks.masked_fill_(forced, limits.max).masked_fill_(block > own_block, limits.min)

    # `torch.topk` leaves open which of several equal ranks it returns, so only its threshold is used.
    width = min(topk, num_blocks)
    threshold = ranks.topk(width, dim=-1).values[..., -1:]
    above = ranks > threshold
    tied = (ranks == threshold) & (threshold > limits.min)
    open_places = width - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= open_places))
    ids = torch.where(chosen, block, num_blocks).topk(width, dim=-1, largest=False, sorted=True).values
    return pad(ids.masked_fill(ids == num_blocks, -1), (0, topk - width), value=-1)


def _ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the floats, NaN above inf; never the least or the greatest of their dtype."""
    values = values.masked_fill(values.isnan(), float("nan")) + 0.0  # NaN of one sign, zero of one sign
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _selection_chunk(keys: int, num_heads: int) -> int:
    """How many queries fit a tile of scores, when the first of them sees `keys` keys and each further one sees more:
    the largest n with num_heads * n * (keys + n) <= _SELECTION_TILE, at least 1."""
    return max(1, (math.isqrt(keys * keys + 4 * _SELECTION_TILE // num_heads) - keys) // 2)


def select_blocks(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
) -> torch.Tensor:
    """As `reference.select_blocks`."""
    total_q, num_heads, _ = index_query.shape
    device, dtype = index_query.device, compute_dtype(index_query)
    selected = torch.full((total_q, num_heads, topk), -1, dtype=torch.int32, device=device)
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        len_k = keys.stop - keys.start
        past = len_k - (queries.stop - queries.start)
        size = bounded_block_size(block_size, len_k)
        # Zero keys complete the last block; they lie in every query's future, so the causal mask removes them.
        padded_keys = pad(index_key[keys].to(dtype), (0, 0, 0, -len_k % size))
        start = queries.start
        while start < queries.stop:
            first = past + start - queries.start  # position of the chunk's first query
            stop = min(start + _selection_chunk(first + size, num_heads), queries.stop)
            last = past + stop - 1 - queries.start
            seen = (last // size + 1) * size  # keys of the blocks that the chunk can see
            scores = index_query[start:stop].to(dtype).flatten(0, 1) @ padded_keys[:seen].T
            scores = scores.view(stop - start, num_heads, seen)
            position = torch.arange(first, last + 1, device=device)[:, None, None]
            # Keys before `first` are in no query's future.
            scores[..., first:].masked_fill_(torch.arange(first, seen, device=device) > position, float("-inf"))
            block_scores = scores.unflatten(-1, (-1, size)).amax(-1)
            selected[start:stop] = _top_blocks(block_scores, position, size, topk, local_blocks, init_blocks)
            start = stop
    return selected


@dataclass
class _Tile:
    """Some of the queries that selected one key block for one key/value head, and that block's keys.

    Attributes:
        head (`int`): The key/value head.
        tokens (`torch.Tensor`): (n,) rows of `query`, ascending.
        keys (`slice`): Rows of `key` and `value`.
        future (`torch.Tensor` or None): (m, 1, len(keys)) boolean, the keys in the future of the first m tokens; None
            where no token has any.
    """

    head: int
    tokens: torch.Tensor
    keys: slice
    future: torch.Tensor | None


def _tiles(
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    group: int,
) -> Iterator[_Tile]:
    """Inverts the block lists: for every key block and head, the queries that selected it, in bounded tiles."""
    total_q, num_heads = block_indices.shape[:2]
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
    head = torch.arange(num_heads, device=device)[:, None]
    pair = head * num_blocks + first_block[sequence][:, None, None] + block_indices
    token = torch.arange(total_q, device=device)[:, None, None].expand_as(pair)[attended]
    pair, order = pair[attended].sort(stable=True)
    token = token[order]
    # Tokens inside the block themselves come first in its list, and are the only ones with keys in their future.
    inside = torch.bincount(pair[(block_indices == own_block)[attended][order]], minlength=num_heads * num_blocks)
    counts = torch.bincount(pair, minlength=num_heads * num_blocks).tolist()
    inside = inside.tolist()

    owners = []
    for start, end in zip(starts, ends):
        owners += [slice(first, min(first + block_size, end)) for first in range(start, end, block_size)]
    sequence_start = torch.repeat_interleave(
        cu_seqlens_k[:-1].long(), blocks_of_sequence, output_size=num_blocks
    ).tolist()

    tile = max(1, _ATTENTION_TILE // (group * block_size))
    offset = 0
    for index, count in enumerate(counts):
        head, block = divmod(index, num_blocks)
        keys = owners[block]
        for first in range(0, count, tile):
            tokens = token[offset + first : offset + min(first + tile, count)]
            future = None
            if first < inside[index]:
                row_position = position[tokens[: inside[index] - first]]
                key_position = torch.arange(keys.start, keys.stop, device=device) - sequence_start[block]
                future = (key_position > row_position[:, None]).unsqueeze(1)
            yield _Tile(head, tokens, keys, future)
        offset += count


def _causal_tiles(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, num_heads: int, group: int
) -> Iterator[_Tile]:
    """As `_tiles`, for queries that attend to every key before and at their own; the tiles' keys are no blocks."""
    device = cu_seqlens_q.device
    elements = _ATTENTION_TILE if device.type == "cpu" else _DEVICE_TILE
    tile = max(1, elements // (group * _DENSE_KEYS))
    for queries, keys in packed_sequences(cu_seqlens_q, cu_seqlens_k):
        shift = keys.stop - queries.stop  # from a query's row to the row of its own key
        for first_key in range(keys.start, keys.stop, _DENSE_KEYS):
            block = slice(first_key, min(first_key + _DENSE_KEYS, keys.stop))
            for start in range(max(queries.start, first_key - shift), queries.stop, tile):
                tokens = torch.arange(start, min(start + tile, queries.stop), device=device)
                future = None
                if start + shift < block.stop - 1:
                    own_key = tokens[: block.stop - 1 - shift - start] + shift
                    future = (torch.arange(block.start, block.stop, device=device) > own_key[:, None]).unsqueeze(1)
                for head in range(num_heads):
                    yield _Tile(head, tokens, block, future)


def _tiles_of(
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_heads: int,
    block_size: int,
    group: int,
) -> Iterator[_Tile]:
    if block_indices is None:
        return _causal_tiles(cu_seqlens_q, cu_seqlens_k, num_heads, group)
    return _tiles(block_indices, cu_seqlens_q, cu_seqlens_k, block_size, group)


def _grouped_rows(states: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(total_q, H_q, D) as (H_kv, total_q, G * D) in the dtype of the sums: the rows of one key/value head lie next to
    each other, so that gathering a token's rows is one copy."""
    grouped = states.unflatten(1, (num_kv_heads, -1)).flatten(2).transpose(0, 1)
    return grouped.to(compute_dtype(states)).contiguous()


def _ungrouped(states: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Undoes `_grouped_rows`, in the given dtype."""
    return states.transpose(0, 1).unflatten(2, (group, -1)).flatten(1, 2).to(dtype).contiguous()


def _tile_scores(query_rows: torch.Tensor, key_rows: torch.Tensor, tile: _Tile) -> torch.Tensor:
    """Scores (n, G, keys) of a tile's query rows (n * G, D), -inf where the key is in the token's future."""
    scores = (query_rows @ key_rows.T).unflatten(0, (len(tile.tokens), -1))
    if tile.future is not None:
        scores[: len(tile.future)].masked_fill_(tile.future, float("-inf"))
    return scores


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.block_sparse_attention`."""
    dtype, device = compute_dtype(query), query.device
    total_q, num_heads, head_dim = query.shape
    num_kv_heads, value_dim = key.shape[1], value.shape[2]
    group = num_heads // num_kv_heads
    grouped_query = _grouped_rows(query, num_kv_heads) * softmax_scale
    # The running softmax of each row: largest score, sum of exponentials relative to it, weighted sum of values.
    largest = torch.full((num_kv_heads, total_q, group), float("-inf"), dtype=dtype, device=device)
    total = torch.zeros_like(largest)
    accumulated = torch.zeros((num_kv_heads, total_q, group * value_dim), dtype=dtype, device=device)
    for tile in _tiles(block_indices, cu_seqlens_q, cu_seqlens_k, block_size, group):
        head, tokens = tile.head, tile.tokens
        query_rows = grouped_query[head].index_select(0, tokens).view(-1, head_dim)
        scores = _tile_scores(query_rows, key[tile.keys, head].to(dtype), tile)
        before = largest[head].index_select(0, tokens)
        # Each row sees at least one key of each of its blocks, so this is finite.
        after = torch.maximum(before, scores.amax(-1))
        weights = scores.sub_(after.unsqueeze(-1)).exp_()
        decay = (before - after).exp_()
        new_total = total[head].index_select(0, tokens).mul_(decay).add_(weights.sum(-1))
        rows = accumulated[head].index_select(0, tokens)
        rows.view(-1, group, value_dim).mul_(decay.unsqueeze(-1))
        rows.view(-1, value_dim).addmm_(weights.flatten(0, 1), value[tile.keys, head].to(dtype))
        largest[head].index_copy_(0, tokens, after)
        total[head].index_copy_(0, tokens, new_total)
        accumulated[head].index_copy_(0, tokens, rows)
    lse = _ungrouped(largest + total.log(), group, dtype).view(total_q, num_heads)
    # Rows that attend to nothing have a sum of 0 and stay 0.
    accumulated.view(num_kv_heads, total_q, group, value_dim).div_(total.masked_fill_(total == 0, 1.0).unsqueeze(-1))
    return _ungrouped(accumulated, group, query.dtype), lse


def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from the saved lse, deterministic."""
    dtype = compute_dtype(query)
    head_dim, num_kv_heads, value_dim = query.shape[2], key.shape[1], value.shape[2]
    group = query.shape[1] // num_kv_heads
    grouped_query = _grouped_rows(query, num_kv_heads) * softmax_scale
    grouped_grad = _grouped_rows(grad_out, num_kv_heads)
    # What each row's softmax subtracts from the gradient of its probabilities.
    delta = _grouped_rows((grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True), num_kv_heads)
    lse = _grouped_rows(lse.unsqueeze(-1), num_kv_heads)
    grad_query = torch.zeros_like(grouped_query)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    for tile in _tiles(block_indices, cu_seqlens_q, cu_seqlens_k, block_size, group):
        head, tokens = tile.head, tile.tokens
        query_rows = grouped_query[head].index_select(0, tokens).view(-1, head_dim)
        grad_rows = grouped_grad[head].index_select(0, tokens).view(-1, value_dim)
        key_rows, value_rows = key[tile.keys, head].to(dtype), value[tile.keys, head].to(dtype)
        scores = _tile_scores(query_rows, key_rows, tile)
        probs = scores.sub_(lse[head].index_select(0, tokens).unsqueeze(-1)).exp_().flatten(0, 1)
        grad_value[tile.keys, head] += probs.T @ grad_rows
        grad_scores = grad_rows @ value_rows.T
        grad_scores.sub_(delta[head].index_select(0, tokens).view(-1, 1)).mul_(probs)
        # The queries carry the scale already.
        grad_key[tile.keys, head] += grad_scores.T @ query_rows
        # A token occurs once in a tile, so no two of its rows are added at the same place.
        rows = grad_query[head].index_select(0, tokens)
        rows.view(-1, head_dim).addmm_(grad_scores, key_rows)
        grad_query[head].index_copy_(0, tokens, rows)
    grad_query = _ungrouped(grad_query.mul_(softmax_scale), group, query.dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class _RunningSum:
    """Log-sum-exp of (rows, ...) scores that arrive in pieces, relative to the largest seen so far."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.largest = torch.full(shape, float("-inf"), dtype=dtype, device=device)
        self.total = torch.zeros(shape, dtype=dtype, device=device)

    def add(self, head: int, tokens: torch.Tensor, scores: torch.Tensor) -> None:
        """Adds the exponentials of `scores` (n, ..., keys), each row with a finite one, in place, to rows `tokens`."""
        before = self.largest[head].index_select(0, tokens)
        after = torch.maximum(before, scores.amax(-1))
        total = self.total[head].index_select(0, tokens).mul_((before - after).exp_())
        total.add_(scores.sub_(after.unsqueeze(-1)).exp_().sum(-1))
        self.largest[head].index_copy_(0, tokens, after)
        self.total[head].index_copy_(0, tokens, total)

    def log(self) -> torch.Tensor:
        """The log-sum-exp, -inf for rows that nothing was added to."""
        return self.largest + self.total.log()


def attention_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
) -> torch.Tensor:
    """As `reference.attention_lse`."""
    dtype = compute_dtype(query)
    (total_q, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    group = num_heads // num_kv_heads
    grouped_query = _grouped_rows(query, num_kv_heads) * softmax_scale
    sums = _RunningSum((num_kv_heads, total_q, group), dtype, query.device)
    for tile in _tiles_of(block_indices, cu_seqlens_q, cu_seqlens_k, num_kv_heads, block_size, group):
        query_rows = grouped_query[tile.head].index_select(0, tile.tokens).view(-1, head_dim)
        scores = _tile_scores(query_rows, key[tile.keys, tile.head].to(dtype), tile)
        sums.add(tile.head, tile.tokens, scores)
    return _ungrouped(sums.log(), group, dtype).view(total_q, num_heads)


def _index_tiles(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
) -> Iterator[tuple[_Tile, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tiles with the main attention's mean probabilities (n, keys), scaled index queries (n, D_idx), index keys."""
    dtype = compute_dtype(query)
    num_kv_heads, head_dim = key.shape[1:]
    group = query.shape[1] // num_kv_heads
    grouped_query = _grouped_rows(query, num_kv_heads) * softmax_scale
    grouped_lse = _grouped_rows(lse.unsqueeze(-1), num_kv_heads)
    grouped_index_query = _grouped_rows(index_query, num_kv_heads) * index_scale
    for tile in _tiles_of(block_indices, cu_seqlens_q, cu_seqlens_k, num_kv_heads, block_size, group):
        head, tokens = tile.head, tile.tokens
        query_rows = grouped_query[head].index_select(0, tokens).view(-1, head_dim)
        scores = _tile_scores(query_rows, key[tile.keys, head].to(dtype), tile)
        probs = scores.sub_(grouped_lse[head].index_select(0, tokens).unsqueeze(-1)).exp_().mean(1)
        yield tile, probs, grouped_index_query[head].index_select(0, tokens), index_key[tile.keys].to(dtype)


def indexer_kl_loss(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.indexer_kl_loss`, in one pass: with z the scaled index scores, kl is the sum of p * (log p - z)
    plus the sum of p times the log-sum-exp of z."""
    dtype, device = compute_dtype(index_query), index_query.device
    shape = (index_query.shape[1], index_query.shape[0])
    sums = _RunningSum(shape, dtype, device)
    divergence, mass = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    for tile, probs, rows, keys in _index_tiles(
        index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale,
        index_scale,
    ):  # fmt: skip
        head, tokens = tile.head, tile.tokens
        scores = rows @ keys.T
        terms = torch.xlogy(probs, probs).sub_(probs * scores).sum(-1)
        divergence[head].index_copy_(0, tokens, terms.add_(divergence[head].index_select(0, tokens)))
        mass[head].index_copy_(0, tokens, probs.sum(-1).add_(mass[head].index_select(0, tokens)))
        if tile.future is not None:
            scores[: len(tile.future)].masked_fill_(tile.future.squeeze(1), float("-inf"))
        sums.add(head, tokens, scores)
    index_lse = sums.log()
    kl = divergence.add_(mass.mul_(index_lse.masked_fill(sums.total == 0, 0.0)))
    return kl.T.contiguous(), index_lse.T.contiguous()


def indexer_kl_loss_backward(
    grad_kl: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    index_lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.indexer_kl_loss_backward`, deterministic."""
    dtype = compute_dtype(index_query)
    grad_rows = torch.zeros_like(index_query.transpose(0, 1), dtype=dtype).contiguous()
    grad_index_key = torch.zeros(index_key.shape, dtype=dtype, device=index_key.device)
    for tile, probs, rows, keys in _index_tiles(
        index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale,
        index_scale,
    ):  # fmt: skip
        head, tokens = tile.head, tile.tokens
        scores = rows @ keys.T
        if tile.future is not None:
            scores[: len(tile.future)].masked_fill_(tile.future.squeeze(1), float("-inf"))
        grad_scores = scores.sub_(index_lse[:, head].index_select(0, tokens).unsqueeze(-1)).exp_().sub_(probs)
        grad_scores.mul_(grad_kl[:, head].index_select(0, tokens).unsqueeze(-1))
        # The rows carry the scale already.
        grad_index_key[tile.keys] += grad_scores.T @ rows
        grad_rows[head].index_copy_(0, tokens, grad_rows[head].index_select(0, tokens).addmm_(grad_scores, keys))
    grad_index_query = grad_rows.mul_(index_scale).transpose(0, 1).to(index_query.dtype).contiguous()
    return grad_index_query, grad_index_key.to(index_key.dtype)


def _gathered_position(
    num_new: int, cache_seqlens: torch.Tensor, cache_leftpad: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, T, 1, 1) of the new tokens, negative for padding, and left paddings (B, 1, 1, 1)."""
    leftpad = torch.zeros_like(cache_seqlens) if cache_leftpad is None else cache_leftpad
    first = (cache_seqlens - leftpad - num_new).long()
    position = first[:, None] + torch.arange(num_new, device=cache_seqlens.device)
    return position[:, :, None, None], leftpad.long()[:, None, None, None]


def _clamped_pages(block_table: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """The table with its unused entries, which may hold anything, turned into pages that exist."""
    return block_table.long().clamp(0, len(cache) - 1)


def select_blocks_with_kvcache(
    index_query: torch.Tensor,
    index_key_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    topk: int,
    local_blocks: int,
    init_blocks: int,
) -> torch.Tensor:
    """As `reference.select_blocks_with_kvcache`."""
    batch, num_new, num_heads, _ = index_query.shape
    device, dtype = index_query.device, compute_dtype(index_query)
    if num_new > _MAX_GATHERED_TOKENS:
        selected = torch.full((batch, num_new, num_heads, topk), -1, dtype=torch.int32, device=device)
        rows = cached_sequences((index_key_cache,), num_new, cache_seqlens, cache_leftpad, block_table)
        for row, padding, (index_key,) in rows:
            selected[row, padding:] = select_blocks(
                index_query[row, padding:],
                index_key,
                *_cu_seqlens(num_new - padding, len(index_key), device),
                block_size,
                topk,
                local_blocks,
                init_blocks,
            )
        return selected

    keys = index_key_cache
    if block_table is not None:
        keys = keys[_clamped_pages(block_table, keys)].flatten(1, 2)
    if device.type == "cpu":  # elsewhere this would wait for the device, so unused slots are scored too
        keys = keys[:, : max(cache_seqlens.tolist(), default=0)]
    slots = keys.shape[1]
    scores = (index_query.to(dtype).flatten(1, 2) @ keys.to(dtype).mT).unflatten(1, (num_new, num_heads))
    block_size = bounded_block_size(block_size, slots)
    position, leftpad = _gathered_position(num_new, cache_seqlens, cache_leftpad)
    rank = torch.arange(slots, device=device)
    if cache_leftpad is not None and slots > 0:  # shift each row, so that its first real token has rank 0
        scores = scores.gather(-1, (rank + leftpad).clamp_(max=slots - 1).expand_as(scores))
    scores.masked_fill_(rank > position, float("-inf"))
    scores = pad(scores, (0, -slots % block_size), value=float("-inf"))
    block_scores = scores.unflatten(-1, (-1, block_size)).amax(-1)
    if block_scores.shape[-1] == 0:
        return torch.full((batch, num_new, num_heads, topk), -1, dtype=torch.int32, device=device)
    return _top_blocks(block_scores, position, block_size, topk, local_blocks, init_blocks)


def block_sparse_attention_with_kvcache(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_indices: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    block_size: int,
    softmax_scale: float,
) -> torch.Tensor:
    """As `reference.block_sparse_attention_with_kvcache`."""
    batch, num_new, num_heads, _ = query.shape
    num_kv_heads = key_cache.shape[2]
    device, dtype = query.device, compute_dtype(query)
    if num_new > _MAX_GATHERED_TOKENS:
        out = query.new_zeros((batch, num_new, num_heads, value_cache.shape[-1]))
        rows = cached_sequences((key_cache, value_cache), num_new, cache_seqlens, cache_leftpad, block_table)
        for row, padding, (key, value) in rows:
            out[row, padding:], _ = block_sparse_attention(
                query[row, padding:],
                key,
                value,
                block_indices[row, padding:],
                *_cu_seqlens(num_new - padding, len(key), device),
                block_size,
                softmax_scale,
            )
        return out

    slots = key_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    block_size = bounded_block_size(block_size, slots)
    position, leftpad = _gathered_position(num_new, cache_seqlens, cache_leftpad)
    rank = (block_indices.long()[..., None] * block_size + torch.arange(block_size, device=device)).flatten(-2)
    attended = (rank >= 0) & (rank <= position)  # (B, T, H_kv, topk * block_size)
    slot = torch.where(attended, rank + leftpad, 0)
    row = torch.arange(batch, device=device)[:, None, None, None]
    if block_table is not None:
        page_size = key_cache.shape[1]
        row, slot = _clamped_pages(block_table, key_cache)[row, slot // page_size], slot % page_size
    head = torch.arange(num_kv_heads, device=device)[:, None]
    keys, values = key_cache[row, slot, head].to(dtype), value_cache[row, slot, head].to(dtype)
    # Whatever the slots that are not attended hold must not reach the sum, not even as 0 * NaN.
    values = values.masked_fill(~attended[..., None], 0.0)
    grouped_query = query.to(dtype).unflatten(2, (num_kv_heads, -1)) * softmax_scale
    scores = (grouped_query @ keys.mT).masked_fill(~attended.unsqueeze(-2), torch.finfo(dtype).min)
    # A row without a key averages zeros.
    return (scores.softmax(-1) @ values).flatten(2, 3).to(query.dtype)


def _cu_seqlens(len_q: int, len_k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The offsets of a batch of one sequence."""
    q, k = (torch.tensor([0, length], dtype=torch.int32, device=device) for length in (len_q, len_k))
    return q, k
