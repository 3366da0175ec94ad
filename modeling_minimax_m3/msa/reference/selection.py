"""`select_blocks` by definition: all scores of a sequence, their maximum per block, two sorts."""

from dataclasses import dataclass

import torch

from ..arguments import Arguments
from ..forced_blocks import is_forced
from ..sequences import bounded_block_size, cached_sequences, compute_dtype, cu_seqlens_of_one, packed_sequences
from .per_sequence import positions


@dataclass(frozen=True, eq=False)
class SelectBlocksArgs(Arguments):
    """`select_blocks`.

    Attributes:
        index_query (total_q, H_idx, D_idx): Queries of the indexer.
        index_key (total_k, D_idx): Keys of the indexer.
        cu_seqlens_q, cu_seqlens_k (batch + 1,): Offsets of the sequences.
        block_size (int): Keys per block.
        topk (int): Blocks per query, forced ones included.
        local_blocks (int): Forced blocks at the query's end.
        init_blocks (int): Forced blocks at the sequence's start.
    """

    index_query: torch.Tensor
    index_key: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_size: int
    topk: int
    local_blocks: int
    init_blocks: int


@dataclass(frozen=True, eq=False)
class SelectBlocksWithKVCacheArgs(Arguments):
    """`select_blocks_with_kvcache`.

    Attributes:
        index_query (B, T, H_idx, D_idx): Queries of the newest tokens of each row.
        index_key_cache ((B, S, D_idx) or (pages, page_size, D_idx)): Keys of the indexer.
        cache_seqlens (B,): Slots in use, new tokens and left padding included.
        cache_leftpad ((B,) or None): Slots of padding at the start of each row.
        block_table ((B, pages of a row) or None): Pages of each row, in order.
        block_size, topk, local_blocks, init_blocks (int): As in `SelectBlocksArgs`.
    """

    index_query: torch.Tensor
    index_key_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    block_size: int
    topk: int
    local_blocks: int
    init_blocks: int

    def form(self, most_decode_tokens: int) -> str:
        """Returns "decode" for few new tokens per row, else "packed": the rows become packed sequences."""
        return "decode" if self.index_query.shape[1] <= most_decode_tokens else "packed"

    def packed(
        self,
        index_query: torch.Tensor,
        index_key: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
    ) -> SelectBlocksArgs:
        """The same selection over packed sequences."""
        return SelectBlocksArgs(
            index_query=index_query,
            index_key=index_key,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            block_size=self.block_size,
            topk=self.topk,
            local_blocks=self.local_blocks,
            init_blocks=self.init_blocks,
        )


def select_blocks(args: SelectBlocksArgs) -> torch.Tensor:
    """The key blocks that each query attends to: int32 (total_q, H_idx, topk), -1 where fewer are visible."""
    index_query, device, dtype = args.index_query, args.index_query.device, compute_dtype(args.index_query)
    selected = torch.full((*index_query.shape[:2], args.topk), -1, dtype=torch.int32, device=device)
    for queries, keys in packed_sequences(args.cu_seqlens_q, args.cu_seqlens_k):
        len_k = keys.stop - keys.start
        block_size = bounded_block_size(args.block_size, len_k)
        num_blocks = -(-len_k // block_size)
        position = positions(queries, keys, device)[:, None, None]  # (len_q, 1, 1)

        scores = torch.einsum("qhd,kd->qhk", index_query[queries].to(dtype), args.index_key[keys].to(dtype))
        scores = scores.masked_fill(torch.arange(len_k, device=device) > position, float("-inf"))
        scores = torch.nn.functional.pad(scores, (0, num_blocks * block_size - len_k), value=float("-inf"))
        block_scores = scores.unflatten(-1, (num_blocks, block_size)).amax(-1)  # (len_q, H_idx, N)

        own_block = position // block_size
        block = torch.arange(num_blocks, device=device)
        forced = is_forced(block, own_block, args.local_blocks, args.init_blocks)

        # Two stable sorts: by score, NaN first, ties to the lower block id; then forced blocks before all others.
        best = block_scores.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.where(block <= own_block, torch.where(forced, 0, 1), 2).expand_as(best)
        best = best.gather(-1, rank.gather(-1, best).sort(dim=-1, stable=True).indices)[..., : args.topk]
        best = best.masked_fill(best > own_block, -1)
        selected[queries, :, : best.shape[-1]] = best.to(torch.int32)
    return selected


def select_blocks_with_kvcache(args: SelectBlocksWithKVCacheArgs) -> torch.Tensor:
    """`select_blocks` for the newest T tokens of each cached row: int32 (B, T, H_idx, topk)."""
    index_query, device = args.index_query, args.index_query.device
    num_new = index_query.shape[1]
    selected = torch.full((*index_query.shape[:3], args.topk), -1, dtype=torch.int32, device=device)
    rows = cached_sequences((args.index_key_cache,), num_new, args.cache_seqlens, args.cache_leftpad, args.block_table)
    for row, padding, (index_key,) in rows:
        offsets = cu_seqlens_of_one(num_new - padding, len(index_key), device)
        selected[row, padding:] = select_blocks(args.packed(index_query[row, padding:], index_key, *offsets))
    return selected
