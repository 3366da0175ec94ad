"""The `cuda` backend: calls into the compiled kernels.

Each function computes what the function of the same name in `reference` defines. Beside a function stands
`..._unsupported`, which says why the kernels cannot run a call, or None where they can. It looks at dtypes, shapes,
strides, addresses and the device; whether there is a binary to run is for `extension` to say.
"""

from .attention import (
    block_sparse_attention,
    block_sparse_attention_backward,
    block_sparse_attention_backward_unsupported,
    block_sparse_attention_unsupported,
    block_sparse_attention_with_kvcache,
    block_sparse_attention_with_kvcache_unsupported,
)
from .caches import MAX_DECODE_TOKENS
from .indexer_loss import (
    attention_lse,
    attention_lse_unsupported,
    indexer_kl_loss,
    indexer_kl_loss_backward,
    indexer_kl_loss_backward_missing,
    indexer_kl_loss_backward_unsupported,
    indexer_kl_loss_missing,
    indexer_kl_loss_unsupported,
    saved_tokens,
)
from .memory import run
from .selection import (
    select_blocks,
    select_blocks_unsupported,
    select_blocks_with_kvcache,
    select_blocks_with_kvcache_unsupported,
)
from .structured import structured_blocks_of, structured_blocks_of_unsupported
from .support import DTYPES

__all__ = [
    "DTYPES",
    "MAX_DECODE_TOKENS",
    "attention_lse",
    "attention_lse_unsupported",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_attention_backward_unsupported",
    "block_sparse_attention_unsupported",
    "block_sparse_attention_with_kvcache",
    "block_sparse_attention_with_kvcache_unsupported",
    "indexer_kl_loss",
    "indexer_kl_loss_backward",
    "indexer_kl_loss_backward_missing",
    "indexer_kl_loss_backward_unsupported",
    "indexer_kl_loss_missing",
    "indexer_kl_loss_unsupported",
    "run",
    "saved_tokens",
    "select_blocks",
    "select_blocks_unsupported",
    "select_blocks_with_kvcache",
    "select_blocks_with_kvcache_unsupported",
    "structured_blocks_of",
    "structured_blocks_of_unsupported",
]
