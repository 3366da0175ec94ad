"""Dense causal attention of the full-attention layers on a sequence layout, without a query x key mask.

`attn_implementation` chooses the implementation, as everywhere in Transformers. "sdpa" runs each sequence with
`is_causal`. A flash implementation gets the offsets of the sequences. "eager" gets a mask, and so does every
implementation that takes nothing else.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import is_torchdynamo_compiling

from ..runtime.sequence_layout import SequenceLayout
from .cached_attention import cached_attention
from .packed_causal_attention import packed_causal_attention
from .sdpa_gradients import finite_gradients


def dense_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SequenceLayout,
    implementation: str,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends to all keys before and at each query.

    Args:
        module (`nn.Module`): The calling layer, as Transformers' attention functions want it.
        query (`torch.Tensor`): (B, T, H_q, D).
        key (`torch.Tensor`): (B, S, H_kv, D); with a cache, S counts the cached tokens too.
        value (`torch.Tensor`): (B, S, H_kv, D_v).
        layout (`SequenceLayout`): Where the sequences lie.
        implementation (`str`): Name of the attention implementation.
        scaling (`float`): Factor of the scores.
        dropout (`float`): Probability of dropping an attention weight.
        **kwargs: Passed to the implementation.

    Returns:
        (B, T, H_q, D_v), and the attention weights (B, H_q, T, S) where the implementation returns them.
    """
    if implementation == "sdpa" and layout.allowed is None:
        return _sdpa(query, key, value, layout, scaling, dropout), None
    # Flash implementations know nothing of the unused slots of a static cache.
    if "flash" in implementation and layout.allowed is None:
        if layout.is_cached and layout.num_keys is None:
            return _sdpa(query, key, value, layout, scaling, dropout), None
        mask = layout.padding_mask
        if not layout.is_cached and layout.query_order is None:
            mask, offsets = None, layout.cu_seqlens
            kwargs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
            kwargs |= {"max_length_q": layout.max_seqlen, "max_length_k": layout.max_seqlen}
        states = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        flash_attention = ALL_ATTENTION_FUNCTIONS[implementation]
        return flash_attention(module, *states, mask, dropout=dropout, scaling=scaling, **kwargs)

    attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    # In the caller's order, so that the weights that come back are those that the output was computed from.
    visible = layout.restore_weights(layout.visibility(key.shape[1])[0])
    mask = visible if implementation == "sdpa" else _additive(visible, query.dtype)
    states = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    with finite_gradients(query.shape[1], key.shape[1], *states):
        return attention_function(module, *states, mask, dropout=dropout, scaling=scaling, **kwargs)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # The mask is added to the scores, and the softmax runs in float32. The sum has to stay finite in both: a row of
    # padding, which sees nothing, is NaN otherwise.
    hidden = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SequenceLayout,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[2] != key.shape[2]}
    query, key, value = layout.order_queries(query), layout.order_keys(key), layout.order_keys(value)
    if layout.is_cached:
        return layout.restore_order(cached_attention(query, key, value, layout, scaling, dropout))
    if layout.is_uniform or layout.query_order is not None:
        # Padding was moved behind the real tokens, so it lies in their future.
        states = (states.transpose(1, 2) for states in (query, key, value))
        out = scaled_dot_product_attention(*states, is_causal=True, **options).transpose(1, 2)
        return layout.restore_order(out)
    flat = [states.flatten(0, 1) for states in (query, key, value)]
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        out = torch.ops.aten._flash_attention_forward(
            *flat, layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen, dropout, True, False,
            scale=scaling,
        )[0]  # fmt: skip
    elif is_torchdynamo_compiling():
        if dropout > 0:
            raise NotImplementedError(
                f"`attention_dropout` must be 0.0 to compile a forward of packed sequences here, got {dropout}"
            )
        flat_query, flat_key, flat_value = flat
        out = packed_causal_attention(flat_query, flat_key, flat_value, layout.cu_seqlens, scaling)
    else:
        bounds = layout.sequence_bounds
        pieces = [
            scaled_dot_product_attention(
                *(states[start:end].transpose(0, 1) for states in flat), is_causal=True, **options
            ).transpose(0, 1)
            for start, end in pairwise(bounds)
            if end > start
        ]
        out = torch.cat(pieces)
    return out.unflatten(0, query.shape[:2])
