"""Inputs for the compiled kernels, on a GPU."""

import math

import torch

from .cases import make_cached, offsets


def offsets_on_gpu(lengths):
    return offsets(lengths).cuda()


class Packed:
    """Random inputs of both operators over packed sequences on the GPU; `lengths` are those of keys and of queries."""

    def __init__(self, lengths, dtype=torch.bfloat16, head_dim=128, q_heads_per_kv=4, num_kv_heads=2, seed=0):
        keys, queries = lengths
        queries = keys if queries is None else queries
        self.generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=self.generator, device="cuda").to(dtype)

        self.index_query = normal(sum(queries), num_kv_heads, head_dim)
        self.index_key = normal(sum(keys), head_dim)
        self.query = normal(sum(queries), num_kv_heads * q_heads_per_kv, head_dim)
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
        **{"page_size": 128, "dtype": torch.bfloat16, "q_heads_per_kv": 4, **options},
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
