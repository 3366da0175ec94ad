"""What the operators mean, in plain loops and dicts, and builders of their inputs.

Nothing here calls the operators: the loops are an independent second reference, one row (a query and a head) at a
time, in float64. Test modules take these helpers as session fixtures, so that hypothesis tests can use them as well; those
of the compiled kernels are in `gpu`.

Letters: L length of a sequence, D head_dim, H heads, G query heads per key/value head.
"""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from modeling_minimax_m3.msa import extension

SELECTION_RTOL = 2.0**-20  # of the largest sum of |q_i k_i| over the visible keys


# --- one row: a query and a head ---------------------------------------------------------------------------------


def block_scores(query, keys, position, block_size):
    """Largest dot product of `query` (D,) with each block's keys s <= position, as {block id: score}."""
    scores = {}
    for s, product in enumerate((keys[: position + 1].double() @ query.double()).tolist()):
        block = s // block_size
        scores[block] = max(scores.get(block, -math.inf), product)
    return scores


def forced_blocks(position, block_size, local_blocks, init_blocks):
    """Ids of the blocks that are selected whatever their score, among those the query can see."""
    own = position // block_size
    local = {own - i for i in range(local_blocks)}
    initial = set(range(init_blocks))
    return {block for block in local | initial if 0 <= block <= own}


def best_others(scores, forced, topk):
    """Ids of the best-scoring blocks that are not forced, as many as `topk` leaves, ties to the lower id."""
    others = sorted((block for block in scores if block not in forced), key=lambda block: (-scores[block], block))
    return others[: max(topk - len(forced), 0)]


def select_row(query, keys, position, *, block_size, topk, local_blocks, init_blocks):
    if position < 0:
        return set()
    forced = forced_blocks(position, block_size, local_blocks, init_blocks)
    return forced | set(best_others(block_scores(query, keys, position, block_size), forced, topk))


def check_selected_row(ids, query, keys, position, *, block_size, topk, local_blocks, init_blocks, where):
    """Asserts that `ids`, a row as the operator returned it, is a right selection up to rounding of the scores."""
    chosen = [block for block in ids if block != -1]
    assert ids == chosen + [-1] * (topk - len(chosen)), f"{where}: not left-packed: {ids}"
    if position < 0:
        assert not chosen, f"{where}: a padding query selected {chosen}"
        return
    assert len(set(chosen)) == len(chosen), f"{where}: duplicates in {ids}"
    scores = block_scores(query, keys, position, block_size)
    assert set(chosen) <= set(scores), f"{where}: {ids} are not all visible from position {position}"
    assert len(chosen) == min(topk, len(scores)), f"{where}: {len(chosen)} of {len(scores)} blocks, topk {topk}"
    forced = forced_blocks(position, block_size, local_blocks, init_blocks)
    assert forced <= set(chosen), f"{where}: forced {forced} not all in {ids}"
    best = best_others(scores, forced, topk)
    if not best:
        return
    kth = scores[best[-1]]
    tolerance = SELECTION_RTOL * (keys[: position + 1].double() * query.double()).abs().sum(-1).max().item()
    for block, score in scores.items():
        if block in forced:
            continue
        if block in chosen:
            assert score >= kth - tolerance, f"{where}: chose block {block} at {score}, kth best is {kth}"
        else:
            assert score <= kth + tolerance, f"{where}: left out block {block} at {score}, kth best is {kth}"


def attend_row(query, keys, values, blocks, position, block_size, scale):
    """Softmax attention of `query` (D,) to the keys s <= position of `blocks`: out (D_v,) and the log-sum-exp."""
    attended = []
    for block in blocks:
        if block >= 0:
            attended += range(block * block_size, min((block + 1) * block_size, position + 1, len(keys)))
    if not attended:
        return torch.zeros(values.shape[-1], dtype=torch.float64), -math.inf
    logits = scale * (keys[attended].double() @ query.double())
    largest = logits.max()
    weights = (logits - largest).exp()
    return weights @ values[attended].double() / weights.sum(), (largest + weights.sum().log()).item()


# --- sequences, from the variable-length form and from caches ---------------------------------------------------


def varlen_sequences(cu_seqlens_q, cu_seqlens_k):
    """Yields (slice of the queries, slice of the keys) for each sequence."""
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for sequence in range(len(offsets_q) - 1):
        yield (
            slice(offsets_q[sequence], offsets_q[sequence + 1]),
            slice(offsets_k[sequence], offsets_k[sequence + 1]),
        )


def cache_rows(cache, cache_seqlens, cache_leftpad=None, block_table=None):
    """Lists each row's own tokens, in order, gathered slot by slot from a contiguous or paged cache."""
    rows = []
    for row, used in enumerate(cache_seqlens.tolist()):
        first = 0 if cache_leftpad is None else int(cache_leftpad[row])
        tokens = []
        for slot in range(first, used):
            if block_table is None:
                tokens.append(cache[row, slot])
            else:
                page_size = cache.shape[1]
                tokens.append(cache[int(block_table[row, slot // page_size]), slot % page_size])
        rows.append(torch.stack(tokens) if tokens else cache.new_zeros(0, *cache.shape[2:]))
    return rows


def check_selection(block_indices, index_query, index_key, *, cu_seqlens_q, cu_seqlens_k, **options):
    assert block_indices.dtype == torch.int32
    assert block_indices.shape == (*index_query.shape[:2], options["topk"])
    for sequence, (queries, keys) in enumerate(varlen_sequences(cu_seqlens_q, cu_seqlens_k)):
        own_queries, own_keys = index_query[queries], index_key[keys]
        for i in range(len(own_queries)):
            for head in range(index_query.shape[1]):
                check_selected_row(
                    block_indices[queries][i, head].tolist(),
                    own_queries[i, head],
                    own_keys,
                    len(own_keys) - len(own_queries) + i,
                    where=f"sequence {sequence}, query {i}, head {head}",
                    **options,
                )


def check_selection_with_kvcache(
    block_indices, index_query, index_key_cache, *, cache_seqlens, cache_leftpad=None, block_table=None, **options
):
    assert block_indices.dtype == torch.int32
    assert block_indices.shape == (*index_query.shape[:3], options["topk"])
    for row, keys in enumerate(cache_rows(index_key_cache, cache_seqlens, cache_leftpad, block_table)):
        num_queries = index_query.shape[1]
        for i in range(num_queries):
            for head in range(index_query.shape[2]):
                check_selected_row(
                    block_indices[row, i, head].tolist(),
                    index_query[row, i, head],
                    keys,
                    len(keys) - num_queries + i,
                    where=f"row {row}, query {i}, head {head}",
                    **options,
                )


def selected_sets(index_query, index_key, *, cu_seqlens_q, cu_seqlens_k, **options):
    """The exact selection in float64, as a list over queries of a list over heads of sets of ids."""
    selected = []
    for queries, keys in varlen_sequences(cu_seqlens_q, cu_seqlens_k):
        own_queries, own_keys = index_query[queries], index_key[keys]
        for i, heads in enumerate(own_queries):
            position = len(own_keys) - len(own_queries) + i
            selected.append([select_row(head, own_keys, position, **options) for head in heads])
    return selected


def attend(query, key, value, block_indices, *, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale=None):
    """Block-sparse attention in float64: out (total_q, H_q, D_v), lse (total_q, H_q)."""
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    lse = torch.zeros(query.shape[:2], dtype=torch.float64)
    for queries, keys in varlen_sequences(cu_seqlens_q, cu_seqlens_k):
        own_keys, own_values = key[keys], value[keys]
        offset = len(own_keys) - (queries.stop - queries.start)
        for i in range(queries.start, queries.stop):
            for head in range(query.shape[1]):
                kv_head = head // group
                out[i, head], lse[i, head] = attend_row(
                    query[i, head],
                    own_keys[:, kv_head],
                    own_values[:, kv_head],
                    block_indices[i, kv_head].tolist(),
                    offset + i - queries.start,
                    block_size,
                    scale,
                )
    return out, lse


def attend_with_kvcache(
    query,
    key_cache,
    value_cache,
    block_indices,
    *,
    cache_seqlens,
    cache_leftpad=None,
    block_table=None,
    block_size,
    softmax_scale=None,
):
    """Block-sparse attention of the newest T tokens of each row, in float64: out (B, T, H_q, D_v)."""
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = query.shape[2] // key_cache.shape[2]
    out = torch.zeros(*query.shape[:3], value_cache.shape[-1], dtype=torch.float64)
    all_keys = cache_rows(key_cache, cache_seqlens, cache_leftpad, block_table)
    all_values = cache_rows(value_cache, cache_seqlens, cache_leftpad, block_table)
    for row, (keys, values) in enumerate(zip(all_keys, all_values)):
        for i in range(query.shape[1]):
            for head in range(query.shape[2]):
                kv_head = head // group
                out[row, i, head], _ = attend_row(
                    query[row, i, head],
                    keys[:, kv_head],
                    values[:, kv_head],
                    block_indices[row, i, kv_head].tolist(),
                    len(keys) - query.shape[1] + i,
                    block_size,
                    scale,
                )
    return out


# --- inputs ------------------------------------------------------------------------------------------------------


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def random_block_indices(num_rows, num_heads, width, num_blocks, generator, empty_rows=True):
    """int32 (num_rows, num_heads, width): between 0 (or 1) and `width` distinct ids below `num_blocks`, unordered."""
    block_indices = torch.full((num_rows, num_heads, width), -1, dtype=torch.int32)
    for row in range(num_rows):
        for head in range(num_heads):
            order = torch.randperm(num_blocks, generator=generator)
            low = 0 if empty_rows else 1
            count = int(torch.randint(low, min(width, num_blocks) + 1, (), generator=generator)) if num_blocks else 0
            block_indices[row, head, :count] = order[:count].to(torch.int32)
    return block_indices


@dataclasses.dataclass
class Varlen:
    """Inputs of both operators in the variable-length form; `options` are those of the selection."""

    index_query: torch.Tensor
    index_key: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    options: dict
    generator: torch.Generator

    def randn_like(self, tensor):
        return torch.randn(tensor.shape, generator=self.generator).to(tensor.dtype)

    @property
    def lengths(self):
        return {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}

    @property
    def block_size(self):
        return self.options["block_size"]

    @property
    def qkv(self):
        return self.query, self.key, self.value

    def random_blocks(self, width=None, empty_rows=True):
        """Ids for every query, some of them in its future and some past the end of its sequence."""
        longest = int(self.cu_seqlens_k.diff().max()) if len(self.cu_seqlens_k) > 1 else 0
        num_blocks = -(-longest // self.block_size) + 1
        width = self.options["topk"] if width is None else width
        return random_block_indices(len(self.query), self.key.shape[1], width, num_blocks, self.generator, empty_rows)


def make_varlen(
    lengths_k,
    lengths_q=None,
    *,
    num_kv_heads=2,
    group=2,
    head_dim=16,
    index_dim=16,
    block_size=16,
    topk=3,
    local_blocks=1,
    init_blocks=0,
    dtype=torch.float32,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    lengths_q = lengths_k if lengths_q is None else lengths_q
    total_q, total_k = sum(lengths_q), sum(lengths_k)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Varlen(
        index_query=normal(total_q, num_kv_heads, index_dim),
        index_key=normal(total_k, index_dim),
        query=normal(total_q, num_kv_heads * group, head_dim),
        key=normal(total_k, num_kv_heads, head_dim),
        value=normal(total_k, num_kv_heads, head_dim),
        cu_seqlens_q=offsets(lengths_q),
        cu_seqlens_k=offsets(lengths_k),
        options={
            "block_size": block_size,
            "topk": topk,
            "local_blocks": local_blocks,
            "init_blocks": init_blocks,
        },
        generator=generator,
    )


def spread_over_cache(tokens, slots, leftpad):
    """A contiguous cache (B, slots, ...) with row b's tokens from slot leftpad[b] on and NaN in every other slot."""
    cache = tokens[0].new_full((len(tokens), slots, *tokens[0].shape[1:]), float("nan"))
    for row, own in enumerate(tokens):
        cache[row, leftpad[row] : leftpad[row] + len(own)] = own
    return cache


def spread_over_pages(tokens, page_size, block_table, num_pages):
    """A paged cache (num_pages, page_size, ...) with row b's tokens in the pages block_table[b], NaN elsewhere."""
    pages = tokens[0].new_full((num_pages, page_size, *tokens[0].shape[1:]), float("nan"))
    for row, own in enumerate(tokens):
        for first in range(0, len(own), page_size):
            of_page = own[first : first + page_size]
            pages[block_table[row][first // page_size], : len(of_page)] = of_page
    return pages


@dataclasses.dataclass
class Cached:
    """Inputs of the cache forms, contiguous and paged, and the same rows as one variable-length batch.

    Rows are named by their number of tokens, which includes the `num_new` newest; a row may have fewer, and then its
    first queries are padding.
    """

    index_query: torch.Tensor
    query: torch.Tensor
    contiguous: dict
    paged: dict
    index_key: list
    key: list
    value: list
    block_indices: torch.Tensor
    options: dict
    generator: torch.Generator

    @property
    def block_size(self):
        return self.options["block_size"]

    def selection(self, form):
        cache = getattr(self, form)
        return (self.index_query, cache["index_key"]), {**cache["where"], **self.options}

    def attention(self, form, block_indices=None):
        cache = getattr(self, form)
        block_indices = self.block_indices if block_indices is None else block_indices
        return (self.query, cache["key"], cache["value"], block_indices), {
            **cache["where"],
            "block_size": self.block_size,
        }


def make_cached(
    lengths,
    num_new,
    *,
    leftpad=None,
    spare_slots=3,
    page_size=8,
    num_kv_heads=2,
    group=2,
    head_dim=16,
    index_dim=16,
    block_size=16,
    topk=3,
    local_blocks=1,
    init_blocks=0,
    dtype=torch.float32,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = len(lengths)
    leftpad = [0] * batch if leftpad is None else leftpad
    tokens = {
        "index_key": [normal(length, index_dim) for length in lengths],
        "key": [normal(length, num_kv_heads, head_dim) for length in lengths],
        "value": [normal(length, num_kv_heads, head_dim) for length in lengths],
    }
    slots = max((pad + length for pad, length in zip(leftpad, lengths)), default=0) + spare_slots
    contiguous = {name: spread_over_cache(rows, slots, leftpad) for name, rows in tokens.items()}
    contiguous["where"] = {
        "cache_seqlens": torch.tensor([pad + length for pad, length in zip(leftpad, lengths)], dtype=torch.int32),
        "cache_leftpad": torch.tensor(leftpad, dtype=torch.int32),
    }

    # pages in random order, two of them nobody's; the table's unused entries hold what no cache could have as a page
    pages_of_row = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages_of_row) + 2
    free = torch.randperm(num_pages, generator=generator).tolist()
    block_table = torch.full((batch, max(pages_of_row) + 1), 2**31 - 1, dtype=torch.int32)
    for row, count in enumerate(pages_of_row):
        block_table[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    table = block_table.tolist()
    paged = {name: spread_over_pages(rows, page_size, table, num_pages) for name, rows in tokens.items()}
    paged["where"] = {
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "block_table": block_table,
    }

    num_blocks = -(-max(lengths) // block_size) + 1
    block_indices = random_block_indices(batch * num_new, num_kv_heads, topk, num_blocks, generator)
    return Cached(
        index_query=normal(batch, num_new, num_kv_heads, index_dim),
        query=normal(batch, num_new, num_kv_heads * group, head_dim),
        contiguous=contiguous,
        paged=paged,
        **tokens,
        block_indices=block_indices.unflatten(0, (batch, num_new)),
        options={
            "block_size": block_size,
            "topk": topk,
            "local_blocks": local_blocks,
            "init_blocks": init_blocks,
        },
        generator=generator,
    )


def relative_error(actual, expected, floor=1e-30):
    """Norm of the difference over the norm of `expected` (at least `floor`), in float64; NaN stays and fails `<`."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    return ((actual - expected).norm() / expected.norm().clamp_min(floor)).item()


# --- inputs and checks of the compiled kernels, on a GPU ---------------------------------------------------------


def offsets_on_gpu(lengths):
    return offsets(lengths).cuda()


class Packed:
    """Random inputs of both operators over packed sequences on the GPU; `lengths` are those of keys and of queries."""

    def __init__(self, lengths, dtype=torch.bfloat16, head_dim=128, group=4, num_kv_heads=2, seed=0):
        keys, queries = lengths
        queries = keys if queries is None else queries
        self.generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=self.generator, device="cuda").to(dtype)

        self.index_query = normal(sum(queries), num_kv_heads, head_dim)
        self.index_key = normal(sum(keys), head_dim)
        self.query = normal(sum(queries), num_kv_heads * group, head_dim)
        self.key = normal(sum(keys), num_kv_heads, head_dim)
        self.value = normal(sum(keys), num_kv_heads, head_dim)
        self.lengths = {"cu_seqlens_q": offsets_on_gpu(queries), "cu_seqlens_k": offsets_on_gpu(keys)}
        self.longest = max(keys)

    @property
    def qkv(self):
        return self.query, self.key, self.value

    def random_blocks(self, topk, block_size):
        """Up to `topk` ids per query and head in random order, some of them in the future or past the sequence."""
        rows, width = (len(self.query), self.key.shape[1]), -(-self.longest // block_size) + 1
        order = torch.rand((*rows, width), generator=self.generator, device="cuda").argsort(-1)[..., :topk]
        order = torch.nn.functional.pad(order, (0, topk - order.shape[-1]), value=-1)
        count = torch.randint(0, topk + 1, (*rows, 1), generator=self.generator, device="cuda")
        return order.masked_fill(torch.arange(topk, device="cuda") >= count, -1).to(torch.int32)


def cached_on_gpu(lengths, num_new, head_dim=128, block_size=128, topk=5, **options):
    """`make_cached` on the GPU, with a page of the cache as long as a block."""
    case = make_cached(
        lengths, num_new, head_dim=head_dim, index_dim=head_dim, block_size=block_size, topk=topk,
        **{"page_size": 128, "dtype": torch.bfloat16, "group": 4, **options},
    )  # fmt: skip
    case.index_query, case.query, case.block_indices = (
        tensor.cuda() for tensor in (case.index_query, case.query, case.block_indices)
    )
    for cache in (case.contiguous, case.paged):
        for name in ("index_key", "key", "value"):
            cache[name] = cache[name].cuda()
        cache["where"] = {name: tensor.cuda() for name, tensor in cache["where"].items()}
    return case


def strided(tensor):
    """The same values, with room between the rows and heads of the tensor."""
    roomy = torch.full([*(2 * size for size in tensor.shape[:-1]), tensor.shape[-1] + 8], math.nan, device="cuda")
    view = roomy.to(tensor.dtype)[tuple(slice(None, None, 2) for _ in tensor.shape[:-1])][..., : tensor.shape[-1]]
    return view.copy_(tensor)


def poison(*tensors):
    """Fills memory of these shapes and dtypes with garbage and frees it, so that the next outputs lie in it."""
    for tensor in tensors:
        torch.empty_like(tensor).fill_(math.nan if tensor.dtype.is_floating_point else 987654321)


def exact_block_scores(case, block_size):
    """For each sequence its queries, exact scores of its blocks (Lq, H, N), -inf in the future, and their tolerance."""
    found = []
    for queries, keys in varlen_sequences(*case.lengths.values()):
        if queries.start == queries.stop:
            continue
        query, key = case.index_query[queries].double(), case.index_key[keys].double()
        position = torch.arange(len(key) - len(query), len(key), device="cuda")[:, None, None]
        future = torch.arange(len(key), device="cuda") > position
        scores = torch.einsum("qhd,kd->qhk", query, key).masked_fill_(future, -math.inf)
        magnitude = torch.einsum("qhd,kd->qhk", query.abs(), key.abs()).masked_fill_(future, 0.0)
        tolerance = SELECTION_RTOL * magnitude.amax(-1, keepdim=True)
        del magnitude
        scores = torch.nn.functional.pad(scores, (0, -len(key) % block_size), value=-math.inf)
        found.append((queries, position // block_size, scores.unflatten(-1, (-1, block_size)).amax(-1), tolerance))
    return found


def assert_selection(selected, case, exact, topk, local_blocks, init_blocks):
    """Every chosen block scores at least the kth best and every omitted one at most that, up to rounding.

    `exact` is what `exact_block_scores` gives.
    """
    assert selected.shape == (*case.index_query.shape[:2], topk)
    assert selected.dtype == torch.int32
    wrong = torch.zeros(6, dtype=torch.bool, device="cuda")  # read once, as reading waits for the device
    for queries, own_block, scores, tolerance in exact:
        ids, num_blocks = selected[queries].long(), scores.shape[-1]
        # Ids that are no block's go to an extra column: -1, which is none, and the rest, which are wrong.
        outside = (ids < -1) | (ids >= num_blocks)
        chosen = torch.zeros((*ids.shape[:2], num_blocks + 1), dtype=torch.int64, device="cuda")
        chosen.scatter_add_(-1, ids.masked_fill(outside | (ids < 0), num_blocks), torch.ones_like(ids))
        chosen = chosen[..., :num_blocks]
        block = torch.arange(num_blocks, device="cuda")
        visible = (block <= own_block).expand_as(chosen)
        count = visible.sum(-1, keepdim=True).clamp(max=topk)
        forced = visible & ((block < init_blocks) | (block > own_block - local_blocks))
        others = scores.masked_fill(forced | ~visible, -math.inf)
        free = (count - forced.sum(-1, keepdim=True)).clamp(min=0)
        ranked = others.sort(-1, descending=True).values
        kth = ranked.gather(-1, (free - 1).clamp(min=0)).masked_fill(free == 0, math.inf)
        chosen, once_each = chosen.bool(), chosen <= 1
        left_out = visible & ~forced & ~chosen
        wrong |= torch.stack(
            [
                ~once_each.all(),
                outside.any() | (chosen & ~visible).any(),
                ((ids >= 0) != (torch.arange(topk, device="cuda") < count)).any(),
                (forced & ~chosen).any(),
                (chosen & ~forced & ~(others >= kth - tolerance)).any(),
                (left_out & ~(others <= kth + tolerance)).any(),
            ]
        )
    faults = (
        "a block twice", "a block in the future or none at all", "not left-packed, or not as many as there are",
        "a forced block is missing", "a block below the kth best", "a better block was left out",
    )  # fmt: skip
    assert not [fault for fault, found in zip(faults, wrong.tolist()) if found]


def assert_rows(out, expected, tolerance):
    """Within the tolerance in all, and no row of a head lost among the others."""
    assert relative_error(out, expected) < tolerance
    worst = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-3)
    assert worst.numel() == 0 or worst.max().item() < 10 * tolerance


# --- fixtures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    """Tensors of a few hundred tokens take longer to share among threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def brute():
    return SimpleNamespace(
        attend=attend,
        attend_with_kvcache=attend_with_kvcache,
        check_selection=check_selection,
        check_selection_with_kvcache=check_selection_with_kvcache,
        selected_sets=selected_sets,
    )


@pytest.fixture(scope="session")
def inputs():
    return SimpleNamespace(
        make_cached=make_cached,
        make_varlen=make_varlen,
        offsets=offsets,
        random_block_indices=random_block_indices,
        relative_error=relative_error,
    )


@pytest.fixture(scope="session")
def gpu():
    """What tests of the compiled kernels make their inputs and check their outputs with; the rest of it is in `inputs`."""
    return SimpleNamespace(
        assert_rows=assert_rows,
        assert_selection=assert_selection,
        block_scores=exact_block_scores,
        cached=cached_on_gpu,
        offsets=offsets_on_gpu,
        packed=Packed,
        poison=poison,
        strided=strided,
    )


@pytest.fixture(scope="module")
def compiled_kernels():
    """Builds the extension where it has to; the first kernel is not where a missing one should be found."""
    reason = extension.load(build=True)
    assert reason is None, reason


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Makes uninitialised tensors hold NaN, or a large number in integer ones, so that reading one shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
