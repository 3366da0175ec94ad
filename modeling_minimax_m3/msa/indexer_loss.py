"""`indexer_kl_loss`: how far the indexer's attention is from the main attention. Checks, operators, gradient."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from . import checks, cuda, derivatives, extension, portable, reference
from .backends import Operator, check_backend, resolve_backend, run_on_backend, run_on_resolved
from .reference import AttentionLseArgs, IndexerKLLossArgs, IndexerKLLossBackwardArgs
from .sequences import compute_dtype

ATTENTION_LSE = Operator(
    name="attention_lse",
    reference=reference.attention_lse,
    portable=portable.attention_lse,
    cuda=cuda.attention_lse,
    unsupported=cuda.attention_lse_unsupported,
    kernels=("forward_query_major", "forward_kv_major"),
)
INDEXER_KL_LOSS = Operator(
    name="indexer_kl_loss",
    reference=reference.indexer_kl_loss,
    portable=portable.indexer_kl_loss,
    cuda=cuda.indexer_kl_loss,
    unsupported=cuda.indexer_kl_loss_unsupported,
    kernels=("indexer_loss",),
    missing=cuda.indexer_kl_loss_missing,
)
INDEXER_KL_LOSS_BACKWARD = Operator(
    name="indexer_kl_loss_backward",
    reference=reference.indexer_kl_loss_backward,
    portable=portable.indexer_kl_loss_backward,
    cuda=cuda.indexer_kl_loss_backward,
    unsupported=cuda.indexer_kl_loss_backward_unsupported,
    kernels=("indexer_loss",),
    missing=cuda.indexer_kl_loss_backward_missing,
)


def indexer_kl_loss(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor | None,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    lse: torch.Tensor | None = None,
    block_size: int = 128,
    softmax_scale: float | None = None,
    index_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """KL divergence of the indexer's softmax from the main attention's, for every query and index head.

    The keys s that query t and index head h attend to are those of its blocks, or all s <= t. Over them

        p(s) = mean over the query heads of key/value head h of exp(softmax_scale * query . key[s] - lse)
        r(s) = softmax of index_scale * index_query . index_key[s]
        kl   = sum over s of p(s) * (log p(s) - log r(s))

    Differentiable in `index_query` and `index_key`, with r(s) - p(s) as the gradient of the scaled index scores: p
    counts as a constant that sums to one. `query`, `key` and `lse` get no gradient.

    On the `cuda` backend, a loss over lists of blocks saves p for the gradient in float16. This takes
    2 * H_kv * topk * block_size bytes per query, and at most 1 GiB per call.

    Args:
        index_query (total_q, H_idx, D_idx): The indexer's queries, one head per key/value head.
        index_key (total_k, D_idx): The indexer's keys; same dtype.
        query (total_q, H_q, D): The main attention's queries, in the dtype of `index_query`.
        key (total_k, H_kv, D): The main attention's keys, in the dtype of `index_query`.
        block_indices ((total_q, H_kv, topk) or None): int32, as in `block_sparse_attention`; None: all keys s <= t.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size: As in `block_sparse_attention`.
        lse ((total_q, H_q) or None): The log-sum-exp that `block_sparse_attention` returns for the same keys and
            scale, float32 (float64 for float64 inputs). None: computed, which costs another pass over the keys.
        softmax_scale, index_scale (float or None): Factors of the scores; None means 1 / sqrt(D) and 1 / sqrt(D_idx).
        backend (str): "auto", "cuda", "torch" or "reference".

    Returns:
        (total_q, H_idx), float32 (float64 for float64 inputs), in nats; 0 for rows without any key.

    Raises:
        ValueError, TypeError: An argument's shape, dtype, device or value is not as above.
        NotImplementedError: The named backend cannot run the call, or lacks the derivatives that the call needs.
    """
    args = indexer_kl_loss_args(
        index_query, index_key, query, key, block_indices, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        lse, block_size, softmax_scale, index_scale, backend,
    )  # fmt: skip
    if lse is None:
        of_attention = AttentionLseArgs(
            args.query, args.key, args.block_indices, args.cu_seqlens_q, args.cu_seqlens_k, args.block_size,
            args.softmax_scale,
        )  # fmt: skip
        args = replace(args, lse=torch.ops.minimax_m3_msa.attention_lse(*of_attention.values(), backend))
    if derivatives.are_beyond_backward(*args.differentiable):
        return derivatives.by_definition(INDEXER_KL_LOSS, backend, args)[0]
    has_gradient = torch.is_grad_enabled() and (index_query.requires_grad or index_key.requires_grad)
    saved_tokens = 0
    if has_gradient and args.block_indices is not None and _is_for_extension(backend, args):
        saved_tokens = cuda.saved_tokens(args.block_indices, args.block_size)
    return torch.ops.minimax_m3_msa.indexer_kl_loss(
        args.index_query, args.index_key, args.query, args.key, args.lse, args.block_indices, args.cu_seqlens_q,
        args.cu_seqlens_k, args.block_size, args.softmax_scale, args.index_scale, saved_tokens, backend,
    )[0]  # fmt: skip


def indexer_kl_loss_args(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    lse: torch.Tensor | None,
    block_size: int,
    softmax_scale: float | None,
    index_scale: float | None,
    backend: str,
) -> IndexerKLLossArgs:
    """Checks the arguments of a call of `indexer_kl_loss`. A meta tensor stands in for an `lse` that is None."""
    checks.check_at_least("block_size", block_size, 1)
    checks.check_tensor("index_query", index_query, ("total_q", "H_idx", "D_idx"), checks.FLOATING_DTYPES)
    dtype, device = (index_query.dtype,), index_query.device
    total_q, num_index_heads, index_dim = index_query.shape
    checks.check_tensor("index_key", index_key, ("total_k", index_dim), dtype, device)
    checks.check_tensor("query", query, (total_q, "H_q", "D"), dtype, device)
    checks.check_tensor("key", key, (index_key.shape[0], num_index_heads, query.shape[-1]), dtype, device)
    checks.check_q_heads_per_kv(query, num_index_heads)
    named = {"index_query": index_query, "index_key": index_key, "query": query, "key": key}
    if block_indices is not None:
        checks.check_tensor("block_indices", block_indices, (total_q, num_index_heads, "topk"), (torch.int32,), device)
        named["block_indices"] = block_indices
    if lse is None:
        lse = torch.empty(query.shape[:2], dtype=compute_dtype(query), device="meta")
    else:
        checks.check_tensor("lse", lse, tuple(query.shape[:2]), (compute_dtype(query),), device)
    for name, tensor in named.items():
        checks.check_unit_stride(name, tensor)
    checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, device)
    checks.check_max_seqlens(max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k)
    main_scale = checks.scale("softmax_scale", softmax_scale, query)
    scale_of_index = checks.scale("index_scale", index_scale, index_query)
    check_backend(backend)
    return IndexerKLLossArgs(
        index_query, index_key, query.detach(), key.detach(), lse.detach(), block_indices, cu_seqlens_q, cu_seqlens_k,
        block_size, main_scale, scale_of_index,
    )  # fmt: skip


def _is_for_extension(backend: str, args: IndexerKLLossArgs) -> bool:
    """Whether the extension will run the loss.

    A tensor that is traced has no address, so that its device and dtype alone give the answer. Where that answer is
    wrong, the call holds memory for probabilities until its gradient, which does not read them.
    """
    index_query = args.index_query
    if torch.compiler.is_compiling() or is_fake(index_query):
        if index_query.device.type != "cuda" or index_query.dtype not in cuda.DTYPES:
            return False
        return backend == "cuda" or (backend == "auto" and _has_extension())
    return resolve_backend(backend, INDEXER_KL_LOSS, args) == "cuda"


@torch.compiler.assume_constant_result
def _has_extension() -> bool:
    return extension.load(build=False) is None


@torch.library.custom_op("minimax_m3_msa::attention_lse", mutates_args=())
def _attention_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> torch.Tensor:
    args = AttentionLseArgs(query, key, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale)
    checks.check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    if block_indices is not None:
        checks.check_block_indices_values(block_indices)
    return run_on_backend(backend, ATTENTION_LSE, args)


@_attention_lse.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    backend: str,
) -> torch.Tensor:
    return query.new_empty(query.shape[:2], dtype=compute_dtype(query))


@torch.library.custom_op("minimax_m3_msa::indexer_kl_loss", mutates_args=())
def _indexer_kl_loss(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
    saved_tokens: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    saved_probs = _empty_probs(index_query, block_indices, block_size, saved_tokens)
    args = IndexerKLLossArgs(
        index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale,
        index_scale, saved_probs,
    )  # fmt: skip
    checks.check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    if block_indices is not None:
        checks.check_block_indices_values(block_indices)
    resolved = resolve_backend(backend, INDEXER_KL_LOSS, args)
    if resolved != "cuda":
        saved_probs.fill_(math.nan)  # a gradient that runs on the kernels after all shows that nothing was saved
    kl, index_lse = run_on_resolved(resolved, INDEXER_KL_LOSS, args)
    return kl, index_lse, saved_probs


def _empty_probs(
    index_query: torch.Tensor, block_indices: torch.Tensor | None, block_size: int, saved_tokens: int
) -> torch.Tensor:
    """A buffer for the probabilities that the extension saves for the gradient, see `cuda.saved_tokens`."""
    topk = 0 if block_indices is None else block_indices.shape[-1]
    return index_query.new_empty((saved_tokens, index_query.shape[1], topk, block_size), dtype=torch.float16)


@_indexer_kl_loss.register_fake
def _(
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
    saved_tokens: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kl = index_query.new_empty(index_query.shape[:2], dtype=compute_dtype(index_query))
    return kl, torch.empty_like(kl), _empty_probs(index_query, block_indices, block_size, saved_tokens)


@torch.library.custom_op("minimax_m3_msa::indexer_kl_loss_backward", mutates_args=())
def _indexer_kl_loss_backward(
    grad_kl: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    index_lse: torch.Tensor,
    saved_probs: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    forward = IndexerKLLossArgs(
        index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale,
        index_scale, saved_probs,
    )  # fmt: skip
    return run_on_backend(backend, INDEXER_KL_LOSS_BACKWARD, IndexerKLLossBackwardArgs(forward, grad_kl, index_lse))


@_indexer_kl_loss_backward.register_fake
def _(
    grad_kl: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    index_lse: torch.Tensor,
    saved_probs: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    softmax_scale: float,
    index_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return index_query.new_empty(index_query.shape), index_key.new_empty(index_key.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    (
        index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale,
        index_scale, _, backend,
    ) = inputs  # fmt: skip
    _, index_lse, saved_probs = output
    ctx.mark_non_differentiable(index_lse, saved_probs)
    ctx.set_materialize_grads(False)  # or zeros of the size of `saved_probs` would come back
    ctx.save_for_backward(
        index_query, index_key, query, key, lse, index_lse, saved_probs, block_indices, cu_seqlens_q, cu_seqlens_k
    )
    ctx.options = block_size, softmax_scale, index_scale, backend


def _backward(
    ctx: Any, grad_kl: torch.Tensor | None, grad_index_lse: None, grad_saved_probs: None
) -> tuple[torch.Tensor | None, ...]:
    if grad_kl is None:
        return (None,) * 13
    grads = torch.ops.minimax_m3_msa.indexer_kl_loss_backward(grad_kl, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 11


_indexer_kl_loss.register_autograd(_backward, setup_context=_setup_context)


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (
        grad_kl, index_query, index_key, query, key, lse, _, _, block_indices, cu_seqlens_q, cu_seqlens_k,
        *ctx.options,
    ) = inputs  # fmt: skip
    ctx.save_for_backward(grad_kl, index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k)


def _backward_of_backward(ctx: Any, *grad_grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grad_kl, *tensors = ctx.saved_tensors
    *options, backend = ctx.options
    args = IndexerKLLossArgs(*tensors, *options)
    derivatives.check_has_definition(INDEXER_KL_LOSS.name, backend)

    def kl_of(index_query: torch.Tensor, index_key: torch.Tensor) -> torch.Tensor:
        return reference.indexer_kl_loss(replace(args, index_query=index_query, index_key=index_key))[0]

    grads = derivatives.gradient_of_gradient(kl_of, grad_kl, args.differentiable, grad_grads)
    return *grads, *[None] * 12


_indexer_kl_loss_backward.register_autograd(_backward_of_backward, setup_context=_setup_context_of_backward)
