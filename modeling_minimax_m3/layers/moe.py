"""Feed-forward parts of a decoder layer: the dense MLP, and the mixture of experts with its router.

E is the number of experts, K of experts per token, F an intermediate size. `tokens` counts those of a pass, B * T.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations import use_experts_implementation

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from ..fused import experts as many_tokens
from ..fused import few_tokens, shards
from ..fused.router import route
from ..fused.support import runs_as_written
from ..fused.swiglu import swiglu_oai
from . import token_parts
from .expert_adapters import multiplies_updates_apart
from .token_parts import may_run_in_parts, parts_of


class MiniMaxM3VLDenseMLP(nn.Module):
    """Gated MLP with one fused gate-and-up projection; serves the dense layers and the shared expert.

    Args:
        config (`MiniMaxM3VLTextConfig`): Gives the hidden size and the activation's constants.
        intermediate_size (`int`, *optional*): Width of the MLP. Default: `config.dense_intermediate_size`.
    """

    def __init__(self, config: MiniMaxM3VLTextConfig, intermediate_size: int | None = None):
        super().__init__()
        width = config.dense_intermediate_size if intermediate_size is None else intermediate_size
        self.swiglu_alpha = config.swiglu_alpha
        self.swiglu_limit = float(config.swiglu_limit)  # an integer may be too large for torch
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        constants = (self.swiglu_alpha, self.swiglu_limit)
        weights = self.few_token_weights()
        if weights is not None and few_tokens.takes_mlp(hidden_states, weights):
            return shards.summed(few_tokens.mlp(hidden_states, *weights, *constants), self.down_proj)
        shards.refuse_unknown_adapters(self, ("gate_up_proj", "down_proj"))
        return self.down_proj(swiglu_oai(self.gate_up_proj(hidden_states), *constants))

    def few_token_weights(self) -> tuple[few_tokens.Weight, few_tokens.Weight] | None:
        """The weights of both projections, or None where the projections do more than multiply by them.

        Where processes share the MLP, the weights are the part of this process, and the outputs have to be summed.
        """
        gate_up, down = (few_tokens.weight_of(layer) for layer in (self.gate_up_proj, self.down_proj))
        are_parts = self.is_shared or shards.style_of(self.gate_up_proj) is shards.style_of(self.down_proj) is None
        return None if gate_up is None or down is None or not are_parts else (gate_up, down)

    @property
    def is_shared(self) -> bool:
        """Whether each process has a part of the MLP."""
        styles = [shards.style_of(layer) for layer in (self.gate_up_proj, self.down_proj)]
        return styles == [shards.PACKED_COLUMNS, shards.ROWS]

    def part(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What this process's part of the MLP gives: a term of the output. Without gradients, and of plain weights."""
        gate_up, down = (shards.local_part(layer.weight) for layer in (self.gate_up_proj, self.down_proj))
        gated = swiglu_oai(F.linear(hidden_states, gate_up), self.swiglu_alpha, self.swiglu_limit)
        return F.linear(gated, down)

    def runs_in_parts(self, num_tokens: int) -> bool:
        """Whether a layer calls `add_in_parts` in place of the module."""
        return may_run_in_parts(num_tokens, token_parts.TOKENS_OF_A_PART, self.modules())

    def add_in_parts(self, total: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Add `self(hidden_states)` to `total`, which is contiguous, in place. Both are (..., hidden)."""
        total, tokens = (states.reshape(-1, states.shape[-1]) for states in (total, hidden_states))
        for part in parts_of(len(tokens), token_parts.TOKENS_OF_A_PART):
            total[part] += self(tokens[part])


@multiplies_updates_apart
@use_experts_implementation
class MiniMaxM3VLExperts(nn.Module):
    """The routed experts, their weights stacked along a leading expert axis.

    `forward` is the eager path. Transformers replaces it with the kernel that `config._experts_implementation` names
    (`grouped_mm` by default), which reads the same attributes and calls `_apply_gate`.
    """

    def __init__(self, config: MiniMaxM3VLTextConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.swiglu_alpha = config.swiglu_alpha
        self.swiglu_limit = float(config.swiglu_limit)  # an integer may be too large for torch
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def few_token_weights(self) -> tuple[few_tokens.Weight, few_tokens.Weight] | None:
        """Both weights; None where the experts do more than their class says."""
        if not shards.runs_as_planned(self, MiniMaxM3VLExperts):
            return None
        return shards.local_part(self.gate_up_proj), shards.local_part(self.down_proj)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu_oai(gate_up, self.swiglu_alpha, self.swiglu_limit)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states (`torch.Tensor`): (tokens, hidden).
            top_k_index (`torch.Tensor`): (tokens, K) expert ids. Expert parallelism marks the pairs that another rank
                computes with the id `num_experts`; they add nothing here.
            top_k_weights (`torch.Tensor`): (tokens, K).

        Returns:
            (tokens, hidden), in the dtype of `hidden_states`.
        """
        output = torch.zeros_like(hidden_states)
        chosen = [expert for expert in torch.unique(top_k_index).tolist() if expert < self.num_experts]
        # Where all tokens belong to other ranks, one expert runs on no token: the other ranks' backward waits for this
        # rank's, which therefore has to pass here.
        for expert in chosen or [0]:
            token, choice = torch.nonzero(top_k_index == expert, as_tuple=True)
            gate_up = F.linear(hidden_states[token], self.gate_up_proj[expert])
            expert_output = F.linear(self._apply_gate(gate_up), self.down_proj[expert])
            weighted = expert_output * top_k_weights[token, choice, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


def experts_forward(
    experts: MiniMaxM3VLExperts,
    weights: tuple[torch.Tensor, torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    scale: float,
    shared_expert: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What a sparse block computes, on a GPU: the shared expert plus `scale` times the weighted sum of the routed ones.

    The caller has asked `fused.experts.takes_experts`.

    Args:
        experts (`MiniMaxM3VLExperts`): The routed experts.
        weights (`tuple[torch.Tensor, torch.Tensor]`): Theirs: (E, 2 * F, hidden) and (E, hidden, F).
        hidden_states (`torch.Tensor`): (tokens, hidden).
        top_k_index (`torch.Tensor`): (tokens, K) expert ids. Ids outside of 0 to E - 1 add nothing.
        top_k_weights (`torch.Tensor`): (tokens, K), float32.
        scale (`float`): Factor of the weights.
        shared_expert (`Callable`): Sees every token.

    Returns:
        (tokens, hidden).
    """
    gate_up, down = weights
    order = many_tokens.plan(top_k_index, experts.num_experts)
    # Each of these is freed when the next is there, unless autograd keeps it.
    constants = (experts.swiglu_alpha, experts.swiglu_limit)
    states = many_tokens.gated_product(hidden_states, gate_up, order, *constants)
    states = many_tokens.grouped_product(states, down, order)
    return many_tokens.unpermute(states, top_k_weights, scale, order, shared_expert(hidden_states))


class MiniMaxM3VLTopKRouter(nn.Module):
    """Sigmoid router: a learned bias takes part in choosing the experts, never in weighting them."""

    def __init__(self, config: MiniMaxM3VLTextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose `top_k` experts for every token.

        Args:
            hidden_states (`torch.Tensor`): (..., hidden), read as (tokens, hidden).

        Returns:
            Logits (tokens, E) in the dtype of the router's weight; weights (tokens, K) in float32 that sum to one over
            the chosen experts; and expert ids (tokens, K) in no particular order.
        """
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        router_logits = few_tokens.product(hidden_states.to(self.weight.dtype), self.weight)
        top_k_weights, top_k_index = route(router_logits, self.e_score_correction_bias, self.top_k)
        return router_logits, top_k_weights, top_k_index


class MiniMaxM3VLSparseMoeBlock(nn.Module):
    """Routed experts, scaled, plus one shared expert that sees every token."""

    def __init__(self, config: MiniMaxM3VLTextConfig):
        super().__init__()
        self.routed_scaling_factor = config.routed_scaling_factor
        self.gate = MiniMaxM3VLTopKRouter(config)
        self.experts = MiniMaxM3VLExperts(config)
        self.shared_experts = MiniMaxM3VLDenseMLP(config, intermediate_size=config.shared_intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        return self._combine(tokens, top_k_index, top_k_weights).view_as(hidden_states)

    def _combine(self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        experts, scale = self.experts, float(self.routed_scaling_factor)
        expert_weights = self._weights_of_experts()
        shared = None if expert_weights is None else self._weights_of_shared_expert()
        # Processes sum the outputs of both kinds of experts at once, if they share both.
        are_cut = shards.style_of(experts) is not None
        if shared is not None and self.shared_experts.is_shared != are_cut:
            shared = None
        if expert_weights is not None and (shared is not None or not are_cut):
            local_index = shards.local_expert_ids(experts, top_k_index)
            if shared is not None and few_tokens.takes_mlp(
                tokens, (*shared, *expert_weights), local_index, top_k_weights
            ):
                constants = (experts.swiglu_alpha, experts.swiglu_limit)
                out = few_tokens.mlp(tokens, *shared, *constants, *expert_weights, local_index, top_k_weights, scale)
                return shards.summed(out, experts)
            gate_up, down = expert_weights
            is_plain = shared is None or isinstance(shared[0], torch.Tensor)
            if (
                isinstance(gate_up, torch.Tensor)
                and isinstance(down, torch.Tensor)
                and (is_plain or not are_cut)
                and self._is_as_fast_grouped(tokens)
                and many_tokens.takes_experts(tokens, gate_up, down, local_index, top_k_weights)
            ):
                shared_expert = self.shared_experts.part if are_cut else self.shared_experts
                out = experts_forward(
                    experts, (gate_up, down), tokens, local_index, top_k_weights, scale, shared_expert
                )
                return shards.summed(out, experts)
        routed = self.experts(tokens, top_k_index, top_k_weights)
        return routed * self.routed_scaling_factor + self.shared_experts(tokens)

    @property
    def _experts_implementation(self) -> str | None:
        return getattr(self.experts.config, "_experts_implementation", None)

    def _weights_of_experts(self) -> tuple[few_tokens.Weight, few_tokens.Weight] | None:
        """None unless the experts do what their class and our choice of Transformers' kernels say."""
        # The class is asked, because a wrapper of adapters passes questions on to what it wraps.
        answer = getattr(type(self.experts), "few_token_weights", None)
        if answer is None or self._experts_implementation not in (None, "grouped_mm", "batched_mm"):
            return None  # any other name is a user's choice
        return answer(self.experts)

    def _weights_of_shared_expert(self) -> tuple[few_tokens.Weight, few_tokens.Weight] | None:
        """None unless the shared expert does what its class says."""
        if runs_as_written(self.shared_experts, MiniMaxM3VLDenseMLP):
            return self.shared_experts.few_token_weights()
        return None

    def _is_as_fast_grouped(self, tokens: torch.Tensor) -> bool:
        """Whether our grouped path may run although the configuration names another kernel of Transformers.

        `generate` names `batched_mm` for decoding, because it never waits for the GPU. On these GPUs the grouped
        product does not wait either.
        """
        return self._experts_implementation != "batched_mm" or (
            tokens.is_cuda and torch.cuda.get_device_capability(tokens.device)[0] in (9, 10)
        )

    def runs_in_parts(self, num_tokens: int) -> bool:
        """Whether a layer calls `add_in_parts` in place of the module."""
        modules = chain((self,), self.experts.modules(), self.shared_experts.modules())
        return may_run_in_parts(num_tokens, self._tokens_of_a_part(), modules)

    def _tokens_of_a_part(self) -> int:
        is_quantized = getattr(type(self.experts), "weights_are_quantized", False)
        return token_parts.TOKENS_OF_A_QUANTIZED_PART if is_quantized else token_parts.TOKENS_OF_A_PART

    def add_in_parts(self, total: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Add `self(hidden_states)` to `total`, which is contiguous, in place. Both are (..., hidden).

        The router takes all tokens at once: a product of another size may round its logits in another way.
        """
        total, tokens = (states.reshape(-1, states.shape[-1]) for states in (total, hidden_states))
        _, top_k_weights, top_k_index = self.gate(tokens)
        for part in parts_of(len(tokens), self._tokens_of_a_part()):
            total[part] += self._combine(tokens[part], top_k_index[part], top_k_weights[part])
