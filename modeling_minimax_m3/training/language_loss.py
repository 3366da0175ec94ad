"""The language-modelling loss of both heads, without a tensor of all logits (tokens x vocabulary).

With a vocabulary of 200,064, the logits of 32k tokens take 12 GiB in bfloat16, and their cross-entropy keeps float32
copies of them. Here logits exist for a thousand tokens at a time. A plain linear head computes its gradients together
with its loss, and so does one whose weight FSDP2 gathers for the call. Any other head (with adapters, or with
quantized or tensor-parallel weights) is called as a module, never by its weight, and computes its logits again in the
backward.

Such heads rule out `torch.nn.functional.linear_cross_entropy` (new in PyTorch 2.13) and Liger's fused loss, which both
take the bare weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_torchdynamo_compiling

from ..fused.softmax_loss import softmax_loss_
from ..fused.support import has_hooks

# So many tokens fill a GPU's matrix units. With the released vocabulary, their logits take 0.4 GiB in bfloat16. Where
# no kernel overwrites them with their gradient, float32 copies take 1.5 GiB more.
CHUNK_TOKENS = 1024


def batch_share(
    labels: torch.Tensor,
    device: torch.device,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | float:
    """The share of an optimizer step's batch that this pass holds: 1 where it holds the whole batch.

    It weights a loss that is a mean over the tokens of a pass. The micro-batches of one step then add up to a mean
    over the step's tokens, as they do for the language loss.

    Args:
        labels, num_items_in_batch, ignore_index, shift_labels, **kwargs: As in `causal_lm_loss`.
        device (`torch.device`): Where the result goes.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    # A whole step may have nothing to learn. Its share is 0 then: 0 / 0 would make every router NaN.
    is_tensor = isinstance(num_items_in_batch, torch.Tensor)
    num_items = num_items_in_batch.clamp(min=1) if is_tensor else max(num_items_in_batch, 1)
    return (targets != ignore_index).sum().to(device) / _on(device, num_items)


def without_targets_of_padding(
    labels: torch.Tensor | None, attention_mask: Any, ignore_index: int = -100
) -> torch.Tensor | None:
    """`labels` (B, T) with `ignore_index` where a padding token would make the prediction.

    The last padding token to the left of a row stands before the row's first token. Its output means nothing, and the
    unpadded row has no such prediction: if it counted, the loss would depend on the padding. (`Trainer`'s
    `num_items_in_batch` counts labels, this one too, unless the label of a row's first token is -100.)

    Args:
        labels (`torch.Tensor`, *optional*): (B, T), not shifted, of the last T tokens.
        attention_mask (`torch.Tensor`, *optional*): (B, S) with 0 at padding. Masks of any other form change nothing.
        ignore_index (`int`): See `causal_lm_loss`.
    """
    if labels is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return labels
    is_padding = attention_mask[:, attention_mask.shape[1] - labels.shape[1] : -1] == 0
    return labels.masked_fill(F.pad(is_padding, (1, 0)).to(labels.device), ignore_index)


def causal_lm_loss(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    **kwargs: Any,
) -> torch.Tensor:
    """`ForCausalLMLoss` of Transformers on `lm_head(hidden_states)`, in memory that does not grow with the vocabulary.

    Args:
        lm_head (`nn.Module`): Maps (tokens, hidden) to (tokens, vocabulary).
        hidden_states (`torch.Tensor`): (B, T, hidden).
        labels (`torch.Tensor`): (B, T) ids, not shifted, `ignore_index` where nothing is to be predicted.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): Denominator of the summed loss. Default: the number
            of predictions in this call, so that the loss is their mean (NaN where there is none).
        ignore_index (`int`): See `labels`.
        shift_labels (`torch.Tensor`, *optional*): (B, T) labels that are shifted already. They replace `labels`.
        chunk_tokens (`int`): Tokens whose logits exist at the same time.
        **kwargs: Ignored, as Transformers' loss functions do.

    Returns:
        A float32 scalar.
    """
    # Each token predicts the one after it.
    targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    targets = targets.reshape(-1).to(hidden_states.device)
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    counted = targets != ignore_index
    if num_items_in_batch is None:
        num_items_in_batch = counted.sum()
    if not is_torchdynamo_compiling():  # while compiling, shapes may not depend on values
        # In many batches most tokens are prompts, padding and images, whose logits are not needed.
        kept = counted.nonzero().squeeze(1)
        hidden_states, targets = hidden_states.index_select(0, kept), targets[kept]

    num_items_in_batch = _on(hidden_states.device, num_items_in_batch)
    gathers_weight = _gathers_its_weight(lm_head)
    # The hooks of a head that gathers its weight run around `loss`, whatever that does. Those of any other head run when
    # the head is called, so the fused loss, which does not call it, would skip them.
    adds_nothing = "forward" not in vars(lm_head) and (gathers_weight or not has_hooks(lm_head))

    def loss(head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        if adds_nothing and _is_plain(lm_head, states):
            return _PlainHeadLoss.apply(states, lm_head.weight, targets, num_items_in_batch, chunk_tokens)
        total = _summed_loss(head, states, targets, ignore_index, chunk_tokens)
        # Divided inside the call: mixed precision of FSDP2 rounds the gradient of a module's output. That of the divided
        # loss is 1, which rounding keeps.
        return total / _on(total.device, num_items_in_batch)

    return _call_once(lm_head, loss, hidden_states) if gathers_weight else loss(lm_head, hidden_states)


def _on(device: torch.device, number: torch.Tensor | int) -> torch.Tensor | int:
    return number.to(device) if isinstance(number, torch.Tensor) else number


def _as_scalar(number: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    """The number in float32, on the device without waiting for it."""
    if isinstance(number, torch.Tensor):
        return number.float().reshape(())
    return torch.full((), number, dtype=torch.float32, device=device)


def _is_plain(lm_head: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether the head is a linear layer without bias whose whole weight is here, in a pass with gradients."""
    if is_torchdynamo_compiling() or not torch.is_grad_enabled() or _class_of(lm_head) is not nn.Linear:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:  # more than one backward
        return False
    weight = lm_head.weight
    return (
        lm_head.bias is None
        and type(weight.data) is torch.Tensor
        and not hasattr(weight, "ds_id")
        and weight.device == hidden_states.device
        and (weight.dtype == hidden_states.dtype or torch.is_autocast_enabled(weight.device.type))
        and _compute_dtype(hidden_states) in (torch.float32, torch.bfloat16)  # float16 would overflow
        and (hidden_states.requires_grad or weight.requires_grad)
    )


def _compute_dtype(states: torch.Tensor) -> torch.dtype:
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


class _PlainHeadLoss(torch.autograd.Function):
    """Loss of a linear head whose gradients are computed with it: three products with the weight instead of four."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        num_items: torch.Tensor | int,
        chunk_tokens: int,
    ) -> torch.Tensor:
        dtype = _compute_dtype(hidden_states)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden_states) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        divisor = _as_scalar(num_items, hidden_states.device)
        with torch.autocast(hidden_states.device.type, enabled=False):
            states, matrix = hidden_states.to(dtype), weight.to(dtype)
            for start in range(0, targets.shape[0], chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                logits = F.linear(states[chunk], matrix)
                total += softmax_loss_(logits, targets[chunk], divisor).sum()
                gradient = logits  # which the loss has overwritten
                if needs_hidden:
                    hidden_gradient[chunk] = gradient @ matrix
                if needs_weight and weight.dtype == dtype:
                    weight_gradient.addmm_(gradient.T, states[chunk])
                elif needs_weight:
                    weight_gradient += gradient.T @ states[chunk]
        ctx.gradients = hidden_gradient, weight_gradient
        return total / num_items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss without logits gives up its gradients in its first backward; pass `skip_logits=False` to "
                "the model for a loss that goes backward several times (`retain_graph=True`)"
            )
        # In place, and released: the head's gradient is as large as the head, and autograd would copy a kept one.
        gradients = [None if gradient is None else gradient.mul_(upstream) for gradient in ctx.gradients]
        ctx.gradients = None
        return *gradients, None, None, None


def _summed_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    chunk_tokens: int,
) -> torch.Tensor:
    def chunk_loss(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = head(states).float()
        return F.cross_entropy(logits, target.to(logits.device), ignore_index=ignore_index, reduction="sum")

    # Chunks have one size, so that none is too small for the device. There is always one, because data parallelism
    # waits for a gradient of the head's weight, in a pass without predictions too.
    num_chunks = max(1, -(-targets.shape[0] // chunk_tokens))
    chunk_tokens = max(1, -(-targets.shape[0] // num_chunks))
    *first, last = zip(hidden_states.split(chunk_tokens), targets.split(chunk_tokens))
    # The backward begins with the last chunk, so this one keeps its logits.
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in first]
    return torch.stack([*losses, chunk_loss(*last)]).sum()


def _gathers_its_weight(module: nn.Module) -> bool:
    """Whether calling the module is a collective operation: FSDP2 and DeepSpeed ZeRO-3 gather its weight in hooks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return _is_sharded(module) or any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the weights of the module."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # not there in every build of PyTorch

    return isinstance(module, FSDPModule)


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class of the module, or the one that it had before FSDP2 put a class of its own in front."""
    return type(module).__mro__[2] if _is_sharded(module) else type(module)


def _call_once(module: nn.Module, function: Callable[..., torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """`function(module's forward, states)` inside one call of `module`, whose hooks run once around all of it.

    Ranks have different numbers of tokens, and so of chunks. With a hook for each chunk, one rank would wait for
    another, and each chunk would gather the weight and reduce its gradient. A hook of the user's own gets the hidden
    states and the loss here, no logits.
    """
    forward = module.forward
    own = "forward" in vars(module)
    module.forward = lambda states: function(forward, states)
    try:
        return module(states)
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward
