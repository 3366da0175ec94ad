"""The cross-entropy of rows of logits, and its gradient in their place."""

import torch

from .support import KERNEL_DTYPES, is_vector_block, kernels_take

MAX_WIDTH = 2**30


def softmax_loss_reference_(logits: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """The definition of `softmax_loss_`."""
    target = targets[:, None]
    values = logits.float()
    log_normalizer = values.logsumexp(1, keepdim=True)
    losses = (log_normalizer - values.gather(1, target)).squeeze(1)
    # softmax minus one-hot, in place
    gradient = values.sub_(log_normalizer).exp_()
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    logits.copy_(gradient.div_(divisor))
    return losses


def softmax_loss_(logits: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row; its gradient, divided by `divisor`, overwrites the logits.

    The result is `logsumexp(logits) - logits[target]` in float32, the gradient `(softmax - one_hot) / divisor`, rounded
    once to the dtype of the logits. Nothing is recorded for autograd.

    A target that is no column is an error in PyTorch. The kernel cannot raise one: it makes the loss and the gradient
    of that row NaN, and neither reads nor writes outside the row.

    Args:
        logits (rows, width): In float16, bfloat16 or float32.
        targets (rows,): A column of each row, int64.
        divisor (): In float32, on the device of the logits, so that the host need not wait for it.

    Returns:
        The losses (rows,).
    """
    if kernels_take(logits, targets, divisor) and _are_supported(logits, targets, divisor):
        return torch.ops.minimax_m3_msa_cuda.softmax_loss_(logits, targets, divisor)
    return softmax_loss_reference_(logits, targets, divisor)


def _are_supported(logits: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor) -> bool:
    return (
        logits.dtype in KERNEL_DTYPES
        and logits.dim() == 2
        and 0 < logits.shape[1] <= MAX_WIDTH
        and logits.shape[1] % 8 == 0
        and is_vector_block(logits)
        and targets.dtype == torch.int64
        and targets.is_contiguous()
        and divisor.dtype == torch.float32
        and divisor.dim() == 0
    )
