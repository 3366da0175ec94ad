"""Naive MiniMax Sparse Attention: the definition, which every backend is tested against.

A file holds the operators of one family: what each is called with, as a dataclass that all backends take, and what it
computes. Apart from the lists by position, every function loops over the sequences of a batch and builds the full
query x key score matrix of each, so memory is quadratic in a sequence's length. Half precision inputs are computed in
float32, float64 inputs in float64.

README.md has the legend of dimensions and the contract of the block lists; here len_q and len_k are the tokens of one
sequence.
"""

from .attention import (
    BlockSparseAttentionArgs,
    BlockSparseAttentionBackwardArgs,
    BlockSparseAttentionWithKVCacheArgs,
    block_sparse_attention,
    block_sparse_attention_backward,
    block_sparse_attention_with_kvcache,
)
from .indexer_loss import (
    AttentionLseArgs,
    IndexerKLLossArgs,
    IndexerKLLossBackwardArgs,
    attention_lse,
    indexer_kl_loss,
    indexer_kl_loss_backward,
)
from .selection import (
    SelectBlocksArgs,
    SelectBlocksWithKVCacheArgs,
    select_blocks,
    select_blocks_with_kvcache,
)
from .structured import StructuredBlocksArgs, philox, structured_block_list, structured_blocks_of

__all__ = [
    "AttentionLseArgs",
    "BlockSparseAttentionArgs",
    "BlockSparseAttentionBackwardArgs",
    "BlockSparseAttentionWithKVCacheArgs",
    "IndexerKLLossArgs",
    "IndexerKLLossBackwardArgs",
    "SelectBlocksArgs",
    "SelectBlocksWithKVCacheArgs",
    "StructuredBlocksArgs",
    "attention_lse",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_attention_with_kvcache",
    "indexer_kl_loss",
    "indexer_kl_loss_backward",
    "philox",
    "select_blocks",
    "select_blocks_with_kvcache",
    "structured_block_list",
    "structured_blocks_of",
]
