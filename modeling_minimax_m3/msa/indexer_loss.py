"""`indexer_kl_loss`: how far the indexer's attention is from the main attention. Operators, gradient, dispatch."""

import math

import torch
from torch._subclasses.fake_tensor import is_fake

from . import checks, cuda, derivatives, extension, reference
from .backends import check_backend, resolve_backend, run_on_backend
from .sequences import compute_dtype


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

        p(s) = mean over the query heads of group h of exp(softmax_scale * query . key[s] - lse)
        r(s) = softmax of index_scale * index_query . index_key[s]
        kl   = sum over s of p(s) * (log p(s) - log r(s))

    Differentiable in `index_query` and `index_key`, with r(s) - p(s) as the gradient of the scaled index scores: p
    counts as a constant that sums to one. `query`, `key` and `lse` get no gradient.

    On the `cuda` backend, lists of blocks keep p for the gradient, in float16: 2 * H_kv * topk * block_size bytes a query,
    1 GiB a call at most.

    Args:
        index_query (total_q, H_idx, D_idx), index_key (total_k, D_idx): The indexer's queries, one head per key/value
            head, and keys; same dtype.
        query (total_q, H_q, D), key (total_k, H_kv, D): The main attention's, in the dtype of `index_query`.
        block_indices (total_q, H_kv, topk): int32, as for `block_sparse_attention`; or None for all keys s <= t.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size: As in `block_sparse_attention`.
        lse (total_q, H_q): The log-sum-exp that `block_sparse_attention` returns for the same keys and scale, float32
            (float64 for float64 inputs). None: computed, which costs another pass over the keys.
        softmax_scale, index_scale: Factors of the scores; None means 1 / sqrt(D) and 1 / sqrt(D_idx).
        backend: "auto", "cuda", "torch" or "reference".

    Returns:
        (total_q, H_idx), float32 (float64 for float64 inputs), in nats; 0 for rows without any key.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
        NotImplementedError: the named backend cannot run the call, or has not the derivatives that it is asked for.
    """
    checks.check_at_least("block_size", block_size, 1)
    checks.check_tensor("index_query", index_query, ("total_q", "H_idx", "D_idx"), checks.FLOATING_DTYPES)
    dtype, device = (index_query.dtype,), index_query.device
    total_q, num_index_heads, index_dim = index_query.shape
    checks.check_tensor("index_key", index_key, ("total_k", index_dim), dtype, device)
    checks.check_tensor("query", query, (total_q, "H_q", "D"), dtype, device)
    checks.check_tensor("key", key, (index_key.shape[0], num_index_heads, query.shape[-1]), dtype, device)
    checks.check_head_groups(query, num_index_heads)
    named = {"index_query": index_query, "index_key": index_key, "query": query, "key": key}
    if block_indices is not None:
        checks.check_tensor("block_indices", block_indices, (total_q, num_index_heads, "topk"), (torch.int32,), device)
        named["block_indices"] = block_indices
    if lse is not None:
        checks.check_tensor("lse", lse, tuple(query.shape[:2]), (compute_dtype(query),), device)
    for name, tensor in named.items():
        checks.check_unit_stride(name, tensor)
    checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, device)
    checks.check_max_seqlens(max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k)
    softmax_scale = checks.scale("softmax_scale", softmax_scale, query)
    index_scale = checks.scale("index_scale", index_scale, index_query)
    check_backend(backend)

    query, key = query.detach(), key.detach()
    if lse is None:
        lse = torch.ops.minimax_m3_msa.attention_lse(
            query, key, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, backend
        )
    args = (
        index_query, index_key, query, key, lse.detach(), block_indices, cu_seqlens_q, cu_seqlens_k, block_size,
        softmax_scale, index_scale,
    )  # fmt: skip
    if derivatives.are_beyond_backward(index_query, index_key):
        return derivatives.by_definition("indexer_kl_loss", backend, args[:5], *args[5:])[0]
    has_gradient = torch.is_grad_enabled() and (index_query.requires_grad or index_key.requires_grad)
    saved_tokens = 0
    if has_gradient and block_indices is not None and _is_for_extension(backend, args):
        saved_tokens = cuda.saved_tokens(block_indices, block_size)
    return torch.ops.minimax_m3_msa.indexer_kl_loss(*args, saved_tokens, backend)[0]


def _is_for_extension(backend: str, args: tuple) -> bool:
    """Whether the extension will run the loss. While a graph is traced, this is told by device and dtype alone, as there
    are no addresses; where it is wrong, memory for what nobody keeps is held until the gradient."""
    index_query = args[0]
    if torch.compiler.is_compiling() or is_fake(index_query):
        if index_query.device.type != "cuda" or index_query.dtype not in cuda.DTYPES:
            return False
        return backend == "cuda" or (backend == "auto" and _has_extension())
    return resolve_backend(backend, "indexer_kl_loss", args) == "cuda"


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
    checks.check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    if block_indices is not None:
        checks.check_block_indices_values(block_indices)
    return run_on_backend(
        backend, "attention_lse", query, key, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale
    )


@_attention_lse.register_fake
def _(query, key, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, backend):
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
    checks.check_cu_seqlens_values(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    if block_indices is not None:
        checks.check_block_indices_values(block_indices)
    args = (
        index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale,
        index_scale,
    )  # fmt: skip
    saved_probs = _empty_probs(index_query, block_indices, block_size, saved_tokens)
    backend = resolve_backend(backend, "indexer_kl_loss", args)
    if backend != "cuda":
        saved_probs.fill_(math.nan)  # should the gradient run there after all, it must not pass unnoticed
    kl, index_lse = run_on_backend(backend, "indexer_kl_loss", *args, cuda_only=(saved_probs,))
    return kl, index_lse, saved_probs


def _empty_probs(
    index_query: torch.Tensor, block_indices: torch.Tensor | None, block_size: int, saved_tokens: int
) -> torch.Tensor:
    """Room for what the extension keeps for the gradient, see `cuda.saved_tokens`."""
    topk = 0 if block_indices is None else block_indices.shape[-1]
    return index_query.new_empty((saved_tokens, index_query.shape[1], topk, block_size), dtype=torch.float16)


@_indexer_kl_loss.register_fake
def _(
    index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale,
    index_scale, saved_tokens, backend,
):  # fmt: skip
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
    return run_on_backend(
        backend, "indexer_kl_loss_backward", grad_kl, index_query, index_key, query, key, lse, index_lse,
        block_indices, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, index_scale, cuda_only=(saved_probs,),
    )  # fmt: skip


@_indexer_kl_loss_backward.register_fake
def _(
    grad_kl, index_query, index_key, query, key, lse, index_lse, saved_probs, block_indices, cu_seqlens_q,
    cu_seqlens_k, block_size, softmax_scale, index_scale, backend,
):  # fmt: skip
    return index_query.new_empty(index_query.shape), index_key.new_empty(index_key.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, block_size, softmax_scale, index_scale, _, backend = inputs
    *states, block_indices, cu_seqlens_q, cu_seqlens_k = tensors  # lse is the last of the states
    _, index_lse, saved_probs = output
    ctx.mark_non_differentiable(index_lse, saved_probs)
    ctx.set_materialize_grads(False)  # or zeros of the size of `saved_probs` would come back
    ctx.save_for_backward(*states, index_lse, saved_probs, block_indices, cu_seqlens_q, cu_seqlens_k)
    ctx.options = block_size, softmax_scale, index_scale, backend


def _backward(ctx, grad_kl, grad_index_lse, grad_saved_probs):
    if grad_kl is None:
        return (None,) * 13
    grads = torch.ops.minimax_m3_msa.indexer_kl_loss_backward(grad_kl, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 11


_indexer_kl_loss.register_autograd(_backward, setup_context=_setup_context)


def _setup_context_of_backward(ctx, inputs, output) -> None:
    grad_kl, index_query, index_key, query, key, lse, _, _, *where = inputs
    block_indices, cu_seqlens_q, cu_seqlens_k, *ctx.options = where
    ctx.save_for_backward(grad_kl, index_query, index_key, query, key, lse, block_indices, cu_seqlens_q, cu_seqlens_k)


def _backward_of_backward(ctx, *grad_grads):
    grad_kl, index_query, index_key, *constant = ctx.saved_tensors
    *options, backend = ctx.options
    derivatives.check_has_definition("indexer_kl_loss", backend)
    grads = derivatives.gradient_of_gradient(
        lambda *states: reference.indexer_kl_loss(*states, *constant, *options)[0],
        grad_kl,
        (index_query, index_key),
        grad_grads,
    )
    return *grads, *[None] * 12


_indexer_kl_loss_backward.register_autograd(_backward_of_backward, setup_context=_setup_context_of_backward)
