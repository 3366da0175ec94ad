"""Parts of the tokens of a pass, one after the other, where no gradient is recorded.

Without gradients, the activations of one layer are all that a pass holds, and those of the experts are the largest. A
pass over a long prompt, or over many packed sequences, would be limited by them.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

from ..fused.support import is_watched

# Tokens that take their experts at a time. For the released model (6144 channels, 4 experts of width 3072 for a token,
# bfloat16) our kernels hold for each pair of a token and an expert, at their largest moment: the token and its gates
# and ups (12 KiB each). That is 96 KiB for a token, and 1.5 GiB for 16384 tokens. Where the kernels do not run, the
# `grouped_mm` of Transformers holds the token, the expert's output (12 KiB each), and in float32 the weighted output in
# two orders (24 KiB each). That is 288 KiB for a token: 4.5 GiB for 16384 tokens, and 36 GiB for 128k. Each expert then
# has 512 tokens on average, whose products take longer than reading its weights, and fill the tiles of the products.
# The dense MLP (12288 wide) holds less: 84 KiB for a token.
TOKENS_OF_A_PART = 16384

# The same for experts in fewer bits. Each part dequantizes all experts that have tokens. For a layer of the released
# model in MXFP8 that reads and writes 22 GB, 5 ms at the rate of an H200. So parts are larger, and their tokens hold twice
# as much beside the group of dequantized experts.
TOKENS_OF_A_QUANTIZED_PART = 32768

# Tokens that pass a layer at a time, where a cache lets the attention run on parts as well: as many as `generate` reads
# at a time. For the released model and 128k tokens the attention would hold, in GiB: the layer's input and its norm
# (1.5 each), queries and output (2 each), partial outputs of the kernel (1.5), keys and index (0.5). That is 9 GiB
# beside the cache, and with parts 5 GiB: the hidden states, partial outputs (1.5 each) and a quarter of the rest (1.9).
TOKENS_OF_A_LAYER = 32768

# In a pass over more tokens than this, the last layer attends from the tokens alone whose outputs are read. For fewer
# tokens that saves little, and their outputs stay those of a whole layer, to the last bit.
TOKENS_OF_A_LAST_LAYER = 1024


def may_run_in_parts(num_tokens: int, most: int, modules: Iterable[nn.Module]) -> bool:
    """Whether `modules` are to be called for one part of `most` tokens after the other.

    Hooks would see the parts, so there may be none: among them are those that move weights and those that split them
    among processes. Processes that share a model call all modules equally often, but may have different numbers of
    tokens.
    """
    return (
        not is_torchdynamo_compiling()  # first, so that no graph is guarded on the number of tokens
        and num_tokens > most
        and not torch.is_grad_enabled()
        and not _has_several_processes()
        and not any(is_watched(module) for module in modules)
    )


def _has_several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def last_tokens(states: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` tokens of (B, T, ...) states; the states themselves where that is all of them."""
    num_tokens = states.shape[1]
    return states if num_tokens == count else states[:, num_tokens - count :]


def parts_of(num_tokens: int, most: int) -> Iterator[slice]:
    """The parts, one after the other."""
    for start in range(0, num_tokens, most):
        yield slice(start, min(start + most, num_tokens))
