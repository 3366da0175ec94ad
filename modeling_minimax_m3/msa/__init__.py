"""MiniMax Sparse Attention operators on plain tensors: see README.md for the maths and the block-index contract."""

from .attention import block_sparse_attention, block_sparse_attention_with_kvcache
from .backends import Explanation, available_backends
from .explanation import explain
from .indexer_loss import indexer_kl_loss
from .selection import select_blocks, select_blocks_with_kvcache
from .structured import StructuredPattern, structured_blocks, structured_blocks_of

__all__ = [
    "Explanation",
    "StructuredPattern",
    "available_backends",
    "block_sparse_attention",
    "block_sparse_attention_with_kvcache",
    "explain",
    "indexer_kl_loss",
    "select_blocks",
    "select_blocks_with_kvcache",
    "structured_blocks",
    "structured_blocks_of",
]
