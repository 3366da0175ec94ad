"""The lightning indexer: small queries and keys whose dot products choose the key blocks of a sparse layer.

A selection passes no gradient, so the language loss never reaches an indexer. A loss of its own trains it: the
divergence of its scores' softmax from the main attention (`msa.indexer_kl_loss`). That loss reaches nothing else,
because the hidden states that feed an indexer are detached, and so is the main attention.

While `config.indexer_loss_coef` is 0 the parameters are frozen (`requires_grad` is False), so that optimizers,
data-parallel wrappers and resumed runs see no parameter without a gradient. Some parameters are made trainable all the
same, such as those of an adapter on every linear layer: they get gradients of 0.
"""

import torch
from torch import nn

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from ..fused.shards import Processes
from .normalization import MiniMaxM3VLRMSNorm
from .rotary import normalize_and_rotate
from .token_parts import last_tokens


class MiniMaxM3VLIndexer(nn.Module):
    """Index queries, one head per key/value head, and one shared index key head.

    It has no value projection and adds nothing to the residual stream. Its parameters are frozen unless
    `config.indexer_loss_coef` is above 0.

    Attributes:
        processes (`Processes`, *optional*): Those that share the heads. Each has the index queries of its key/value
            heads, and the index key.
    """

    processes: Processes | None = None

    def __init__(self, config: MiniMaxM3VLTextConfig):
        super().__init__()
        self.head_dim = config.index_head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.index_n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.q_norm = MiniMaxM3VLRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = MiniMaxM3VLRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.requires_grad_(config.indexer_loss_coef > 0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        num_queries: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries (B, num_queries, H_idx, D_idx) of the last tokens, and keys (B, T, D_idx) of all.

        Args:
            hidden_states (`torch.Tensor`): (B, T, hidden). They get no gradient.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): Cosines and sines, each (B, T, rotary channels).
            num_queries (`int`, *optional*): How many tokens get queries. Default: all.
        """
        hidden_states = hidden_states.detach()
        num_queries = hidden_states.shape[1] if num_queries is None else num_queries
        index_query = self.q_proj(last_tokens(hidden_states, num_queries)).unflatten(-1, (-1, self.head_dim))
        index_query = normalize_and_rotate(
            self.q_norm, index_query, *(last_tokens(states, num_queries) for states in position_embeddings)
        )
        index_key = normalize_and_rotate(self.k_norm, self.k_proj(hidden_states), *position_embeddings)
        if self.processes is not None:
            index_key = self.processes.fan_out(index_key)
        return index_query, index_key.squeeze(2)


class _ZeroGradients(torch.autograd.Function):
    generate_vmap_rule = True  # this, `setup_context` and `jvp` are for `torch.func`

    @staticmethod
    def forward(states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return states.view_as(states)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.others = [(other.shape, other.dtype, other.device) for other in inputs[1:]]

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others)


def with_zero_gradients(states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`states` itself, whose backward also sends a gradient of 0 to each of `others`.

    The parameters that only `others` depend on would get no gradient at all otherwise, and
    `DistributedDataParallel(find_unused_parameters=False)` takes that for an error.
    """
    return _ZeroGradients.apply(states, *others)
