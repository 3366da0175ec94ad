"""The `torch` backend: MiniMax Sparse Attention in plain PyTorch, on any device, at memory linear in tokens.

Each function computes what the function of the same name in `reference` defines. Scores, softmax and sums are float32
for half precision inputs, and float64 for float64 inputs. README.md has the legend of dimensions.

Decoding (at most `MAX_DECODE_TOKENS` new tokens per row) reads no value on the host, so that CUDA graphs can capture
it. The other functions read the sequence lengths on the host.
"""

from .attention import (
    block_sparse_attention,
    block_sparse_attention_backward,
    block_sparse_attention_with_kvcache,
)
from .caches import MAX_DECODE_TOKENS
from .indexer_loss import attention_lse, indexer_kl_loss, indexer_kl_loss_backward
from .selection import select_blocks, select_blocks_with_kvcache
from .structured import structured_blocks_of

__all__ = [
    "MAX_DECODE_TOKENS",
    "attention_lse",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_attention_with_kvcache",
    "indexer_kl_loss",
    "indexer_kl_loss_backward",
    "select_blocks",
    "select_blocks_with_kvcache",
    "structured_blocks_of",
]
