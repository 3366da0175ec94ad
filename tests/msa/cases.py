"""Random inputs of the operators: packed sequences, and the same kind of rows in contiguous and paged caches."""

import dataclasses

import torch

from modeling_minimax_m3.msa.explanation import checked_call


def op_arguments(function, *args, **kwargs):
    """What a call of a public function passes to its operator among `torch.ops.minimax_m3_msa`."""
    _, arguments, backend = checked_call(function, *args, **kwargs)
    return (*arguments.values(), backend)


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
    q_heads_per_kv=2,
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
        query=normal(total_q, num_kv_heads * q_heads_per_kv, head_dim),
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
    q_heads_per_kv=2,
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
        query=normal(batch, num_new, num_kv_heads * q_heads_per_kv, head_dim),
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
