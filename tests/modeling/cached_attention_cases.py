"""Caches and new tokens of every layout, and their attention by loops over rows in float64."""

import torch

from modeling_minimax_m3.runtime.sequence_layout import SequenceLayout


def random_case(
    used,
    num_new,
    *,
    leftpad=None,
    capacity=None,
    spare=0,
    heads=(8, 2),
    head_dim=64,
    dtype=torch.bfloat16,
    device="cuda",
):
    """Query, key, value and layout. `capacity`: slots of a static cache. `spare`: slots of a buffer that nobody sees."""
    generator = torch.Generator(device).manual_seed(num_new + sum(used))
    batch, slots = len(used), capacity or max(used)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    query = random(batch, num_new, heads[0], head_dim)
    key, value = (random(batch, slots + spare, heads[1], head_dim)[:, :slots] for _ in range(2))
    if dtype != torch.float32:  # a mask cannot keep NaN out
        for row, length in enumerate(used):
            key[row, length:], value[row, length:] = torch.nan, torch.nan
    layout = SequenceLayout(batch, num_new, cache_seqlens=torch.tensor(used, dtype=torch.int32, device=device))
    if leftpad is not None:
        layout.cache_leftpad = torch.tensor(leftpad, dtype=torch.int32, device=device)
    elif capacity is None and len(set(used)) == 1:
        layout.num_keys = slots
    return query, key, value, layout


def by_rows(query, key, value, layout, scaling):
    """(B, T, H_q, D) in float64, and which of the queries are no padding, (B, T)."""
    out = torch.zeros_like(query, dtype=torch.float64)
    real = torch.zeros(query.shape[:2], dtype=torch.bool, device=query.device)
    group = query.shape[2] // key.shape[2]
    leftpad = [0] * len(query) if layout.cache_leftpad is None else layout.cache_leftpad.tolist()
    for row, (start, end) in enumerate(zip(leftpad, layout.cache_seqlens.tolist())):
        keys, values = (x[row, start:end].double().repeat_interleave(group, dim=1) for x in (key, value))
        count = min(query.shape[1], end - start)
        if count <= 0:
            continue
        queries = query[row, -count:].double()
        scores = torch.einsum("thd,shd->hts", queries, keys) * scaling
        position = torch.arange(end - start - count, end - start, device=query.device)
        scores.masked_fill_(torch.arange(end - start, device=query.device) > position[:, None], -torch.inf)
        out[row, -count:] = torch.einsum("hts,shd->thd", scores.softmax(-1), values)
        real[row, -count:] = True
    return out, real


CASES = {
    "one row": {"used": [700]},
    "growing buffer": {"used": [700, 700], "spare": 211},
    "static": {"used": [700, 700], "capacity": 1024},
    "ragged": {"used": [700, 333, 650], "capacity": 800},
    "left padding": {"used": [700, 700, 700], "leftpad": [0, 123, 640], "spare": 11},
    "nothing but padding": {"used": [700, 700], "leftpad": [0, 700]},
}
