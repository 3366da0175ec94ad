"""Dense causal attention of new tokens over a cache, at the cost of flash attention and without a mask on a GPU.

Query i of a row sits at position `cache_seqlens - cache_leftpad - T + i` and attends to the keys up to its own. Three
ways compute that:

- Few new tokens: PyTorch's flash kernel for one query splits the keys over the whole GPU, and each token counts as a row
  of its own. The lengths stay on the device, so that a CUDA graph can capture the call.
- Many new tokens behind a long past, without gradients: cuDNN is 1.8 times as fast as PyTorch's flash kernel on Hopper
  (`benchmarks/results/cached_attention.txt`).
  But it knows no causal mask for more keys than queries, and spends 60 to 70 ms on the first call of every new shape. So
  queries and keys are cut into pieces of a few sizes. cuDNN takes each pair of pieces whole, and the results are merged.
- All else: PyTorch's flash kernel for packed sequences. Padding and unused slots become sequences of their own.

On the CPU, and in float32 or float64, a mask says what each query attends to; it is built for some queries at a time.

Dimensions: B rows, T new tokens, S slots of the cache, H_q and H_kv heads, D channels.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.utils import is_torchdynamo_compiling

from ..msa.sequences import cached_sequences, cu_seqlens_of_one, flat_rows
from ..runtime.sequence_layout import SequenceLayout
from .sdpa_gradients import finite_gradients

# Elements of the largest mask that exists at a time.
_MASK_ELEMENTS = 2**26

# Up to this many new tokens, each token reads the cache on its own. PyTorch's packed kernel reads it once, but with one
# thread block per head, which behind 128k keys takes as long as 40 separate tokens.
_FEW_TOKENS = 16

# cuDNN gets pieces of a power of two times these numbers of queries and of keys, at most the largest.
_QUERY_PIECE = 1024
_LARGEST_QUERY_PIECE = 32768
_KEY_PIECE = 8192

# cuDNN is used for a piece if queries * keys is at least this. One such call saves about a tenth of what the first call
# of a new shape costs (measured on an H200, torch 2.11).
_PIECE_SCORES = 2**27


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SequenceLayout,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attends to all keys of a row up to each query's own.

    Args:
        query (B, T, H_q, D): Queries of the new tokens, in working order.
        key (B, S, H_kv, D), value (B, S, H_kv, D): Slots of the cache, in working order. Unused slots must be finite,
            except on a GPU in half precision.
        layout: A layout with a cache.
        scaling: Factor of the scores.
        dropout: Probability of dropping an attention weight.

    Returns:
        (B, T, H_q, D) in the dtype of `query`. Rows of queries that are padding hold anything finite.
    """
    if not _flash_takes(query):
        return _masked(query, key, value, layout, scaling, dropout)
    states = (query, key, value)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states)
    if needs_grad or dropout > 0:
        return _packed(query, key, value, layout, scaling, dropout)
    if query.shape[1] <= _FEW_TOKENS:
        return _few_tokens(query, key, value, layout, scaling)
    if _cudnn_pays(query, key):
        return _in_pieces(query, key, value, layout, scaling)
    return _packed(query, key, value, layout, scaling)


def _flash_takes(query: torch.Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and _flash_is_on(query.device.index)
    )


@torch.compiler.assume_constant_result  # the compiler cannot trace either question
def _flash_is_on(device_index: int) -> bool:
    # `torch.nn.attention.sdpa_kernel` may have chosen another kernel.
    return torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(device_index) >= (8, 0)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scaling: float,
    is_causal: bool,
    dropout: float = 0.0,
    seqused_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash kernel on (total_q, H_q, D) and (total_k, H_kv, D): out and lse.

    `offsets` and `longest` are those of the queries' and of the keys' sequences. With `is_causal`, the last query of a
    sequence sees all its keys. `seqused_k` (sequences,) says how many keys of each sequence are in use.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *offsets, *longest, dropout, is_causal, False, scale=scaling, seqused_k=seqused_k
    )
    return out, lse


# --- few new tokens ----------------------------------------------------------------------------------------------


def _few_tokens(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SequenceLayout, scaling: float
) -> torch.Tensor:
    (batch, num_new), slots = query.shape[:2], key.shape[1]
    (key, value), distance = flat_rows((key, value))
    token = torch.arange(batch * num_new + 1, dtype=torch.int32, device=query.device)
    starts = token // num_new * distance
    if layout.cache_leftpad is not None:
        starts = starts + torch.nn.functional.pad(layout.cache_leftpad.repeat_interleave(num_new), (0, 1))
    # The number of keys comes from `seqused_k`; a token that is padding has none, and gives 0.
    used = (layout.cached_positions().flatten() + 1).clamp(min=0).int()
    out, _ = _flash(query.flatten(0, 1), key, value, (token, starts), (1, slots), scaling, False, seqused_k=used)
    return out.view_as(query)


# --- packed sequences --------------------------------------------------------------------------------------------


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SequenceLayout,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    num_new, slots = query.shape[1], key.shape[1]
    if torch.is_grad_enabled():
        key, value, distance = key.flatten(0, 1), value.flatten(0, 1), slots
    else:
        (key, value), distance = flat_rows((key, value))
    offsets = layout.packed_offsets(distance)
    offsets_q = offsets["cu_seqlens_q"]
    offsets_k = offsets["cu_seqlens_k"].clamp(max=len(key))  # nothing follows the last row's slots
    # The longest sequence without queries may be longer than `slots`; no query reads it.
    longest = (num_new, slots)
    out, _ = _flash(query.flatten(0, 1), key, value, (offsets_q, offsets_k), longest, scaling, True, dropout)
    return out.view_as(query)


# --- pieces ------------------------------------------------------------------------------------------------------


def _cudnn_pays(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether some piece may be large enough. The host knows only S, which may count slots that are not in use."""
    return (
        not is_torchdynamo_compiling()
        and query.shape[1] >= _QUERY_PIECE
        and query.shape[1] * key.shape[1] >= _PIECE_SCORES
        and query.shape[-1] <= 128
        and torch.cuda.get_device_capability(query.device) >= (9, 0)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SequenceLayout, scaling: float
) -> torch.Tensor:
    assert layout.cache_seqlens is not None
    out = torch.zeros_like(query)
    # Waits for the device to tell the lengths, which takes little time beside a call in pieces.
    rows = cached_sequences((key, value), query.shape[1], layout.cache_seqlens, layout.cache_leftpad, None)
    for row, padding, (keys, values) in rows:
        queries = query[row, padding:]
        past = len(keys) - len(queries)
        for piece in _query_pieces(len(queries)):
            end = past + piece.stop
            out[row, padding:][piece] = _piece(queries[piece], keys[:end], values[:end], scaling)
    return out


def _query_pieces(num_queries: int) -> Iterator[slice]:
    """Cuts queries into pieces of powers of two times `_QUERY_PIECE`, and a rest that is shorter than it."""
    start = 0
    while start < num_queries:
        left = num_queries - start
        size = min(left, _power_of_two_part(left, _QUERY_PIECE, _LARGEST_QUERY_PIECE) or left)
        yield slice(start, start + size)
        start += size


def _power_of_two_part(length: int, unit: int, most: int) -> int:
    """The largest power of two times `unit` within `length`, at most `most`; 0 where there is none."""
    units = min(length, most) // unit
    return unit << (units.bit_length() - 1) if units else 0


def _piece(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of (n, H_q, D) queries, which are the last n of the (S, H_kv, D) keys."""
    length, total = len(query), len(key)
    if length % _QUERY_PIECE or length * total < _PIECE_SCORES:
        return _causal(query, key, value, scaling)[0]
    past = total - length
    spans: list[slice] = []
    start = 0
    while size := _power_of_two_part(past - start, _KEY_PIECE, past):
        if length * size < _PIECE_SCORES:
            break
        spans.append(slice(start, start + size))
        start += size
    out, lse = _causal(query, key[start:], value[start:], scaling)
    for span in spans:
        _merge(out, lse, *_whole(query, key[span], value[span], scaling))
    return out


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of queries that are the last tokens of the keys: out (n, H_q, D) and lse (H_q, n)."""
    if len(query) == len(key) and len(query) % _QUERY_PIECE == 0 and len(query) ** 2 >= 2 * _PIECE_SCORES:
        return _whole(query, key, value, scaling, is_causal=True)
    longest = (len(query), len(key))
    out, lse = _flash(query, key, value, cu_seqlens_of_one(*longest, query.device), longest, scaling, True)
    return out, lse.view(query.shape[1], len(query))


def _whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_causal`, by cuDNN. Queries attend to every key. With `is_causal`, there are as many queries as keys."""
    states = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *states, None, True, 0.0, is_causal, False, scale=scaling
    )
    return out[0].transpose(0, 1), lse.view(query.shape[1], len(query))


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Adds attention over other keys to `out` (n, H_q, D) and `lse` (H_q, n), in place and in float32."""
    share = torch.sigmoid(other_lse - lse).T.unsqueeze(-1)
    torch.logaddexp(lse, other_lse, out=lse)
    for start in range(0, len(out), _QUERY_PIECE):  # float32 copies of some rows at a time
        rows = slice(start, start + _QUERY_PIECE)
        out[rows] = torch.lerp(out[rows].float(), other[rows].float(), share[rows]).to(out.dtype)


# --- with a mask -------------------------------------------------------------------------------------------------


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SequenceLayout, scaling: float, dropout: float
) -> torch.Tensor:
    num_new, num_keys, num_kv_heads = query.shape[1], key.shape[1], key.shape[2]
    q_heads_per_kv = query.shape[2] // num_kv_heads
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    # One new token that sees every key needs no mask. Only the host can know that.
    sees_all = (
        num_new == 1 and layout.num_keys == num_keys and layout.cache_leftpad is None and layout.key_order is None
    )
    if num_new == 1:
        # The query heads of a key/value head become rows of one head, so that each key is read once.
        rows = query.unflatten(2, (num_kv_heads, q_heads_per_kv)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        visible = None if sees_all else _visible(layout, num_keys, slice(0, 1))
        with finite_gradients(rows.shape[2], num_keys, rows, key, value):
            out = scaled_dot_product_attention(rows, key, value, visible, dropout, scale=scaling)
        return out.flatten(1, 2).unsqueeze(1)
    pieces = []
    step = max(1, _MASK_ELEMENTS // max(1, len(query) * num_keys))
    for start in range(0, num_new, step):
        visible = _visible(layout, num_keys, slice(start, start + step))
        rows = query[:, start : start + step].transpose(1, 2)
        # One key/value head at a time: its keys are expanded to the query heads without a copy.
        with finite_gradients(rows.shape[2], num_keys, rows, key, value):
            heads = [
                scaled_dot_product_attention(
                    rows[:, head * q_heads_per_kv : (head + 1) * q_heads_per_kv],
                    key[:, head : head + 1].expand(-1, q_heads_per_kv, -1, -1),
                    value[:, head : head + 1].expand(-1, q_heads_per_kv, -1, -1),
                    visible,
                    dropout,
                    scale=scaling,
                )
                for head in range(num_kv_heads)
            ]
        pieces.append(torch.cat(heads, dim=1).transpose(1, 2))
    return torch.cat(pieces, dim=1)


def _visible(layout: SequenceLayout, num_keys: int, queries: slice) -> torch.Tensor:
    """Boolean (B, 1, n, S): what the given queries attend to."""
    rank = layout.cached_ranks(num_keys)[:, None]
    # Rows of padding see their first slot, as a softmax over nothing is NaN.
    limit = layout.cached_positions()[:, queries, None].clamp(min=0)
    return ((rank >= 0) & (rank <= limit)).unsqueeze(1)
