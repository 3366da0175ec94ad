"""MiniMax Sparse Attention operators on plain tensors: see README.md for the maths and the block-index contract."""

from .attention import block_sparse_attention, block_sparse_attention_with_kvcache
from .backends import available_backends
from .selection import select_blocks, select_blocks_with_kvcache

__all__ = [
    "available_backends",
    "block_sparse_attention",
    "block_sparse_attention_with_kvcache",
    "select_blocks",
    "select_blocks_with_kvcache",
]
