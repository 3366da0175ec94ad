"""Which backend runs a call: what the extension supports, what `auto` takes, and which error a named backend raises.

No GPU is needed: tensors say that they are on one, and the binary is a stand-in.
"""

import warnings
from dataclasses import replace

import pytest
import torch

from modeling_minimax_m3.msa import (
    attention,
    available_backends,
    backends,
    cuda,
    extension,
    reference,
    select_blocks,
    structured,
)
from modeling_minimax_m3.msa.reference import (
    AttentionLseArgs,
    BlockSparseAttentionArgs,
    BlockSparseAttentionBackwardArgs,
    BlockSparseAttentionWithKVCacheArgs,
    SelectBlocksArgs,
    SelectBlocksWithKVCacheArgs,
)
from modeling_minimax_m3.msa.selection import SELECT_BLOCKS, SELECT_BLOCKS_WITH_KVCACHE

from .pretended_gpu import on_device

OFFSETS = {"cu_seqlens_q": None, "cu_seqlens_k": None}


def select_args(head_dim=128, block_size=128, topk=16, dtype=torch.bfloat16, **changed):
    tensors = {
        "index_query": on_device(8, 4, head_dim, dtype=dtype),
        "index_key": on_device(8, head_dim, dtype=dtype),
    }
    options = {"block_size": block_size, "topk": topk, "local_blocks": 1, "init_blocks": 0}
    return SelectBlocksArgs(**tensors | OFFSETS | options | changed)


def attention_args(
    head_dim=128, value_dim=None, block_size=128, topk=16, q_heads_per_kv=16, dtype=torch.bfloat16, **changed
):
    tensors = {
        "query": on_device(8, 2 * q_heads_per_kv, head_dim, dtype=dtype),
        "key": on_device(8, 2, head_dim, dtype=dtype),
        "value": on_device(8, 2, value_dim or head_dim, dtype=dtype),
        "block_indices": on_device(8, 2, topk, dtype=torch.int32),
    }
    options = {"block_size": block_size, "softmax_scale": 0.1}
    return BlockSparseAttentionArgs(**tensors | OFFSETS | options | changed)


def cached_attention_args(head_dim=128, q_heads_per_kv=16):
    cache = on_device(3, 40, 2, head_dim)
    return BlockSparseAttentionWithKVCacheArgs(
        query=on_device(3, 1, 2 * q_heads_per_kv, head_dim),
        key_cache=cache,
        value_cache=cache,
        block_indices=on_device(3, 1, 2, 16, dtype=torch.int32),
        cache_seqlens=None,
        cache_leftpad=None,
        block_table=None,
        block_size=128,
        softmax_scale=0.1,
    )


def cached_select_args(head_dim=128, topk=16, num_new=1, slots=40, paged=False):
    return SelectBlocksWithKVCacheArgs(
        index_query=on_device(3, num_new, 4, head_dim),
        index_key_cache=on_device(3, slots, head_dim),
        cache_seqlens=None,
        cache_leftpad=None,
        block_table=on_device(3, 2, dtype=torch.int32) if paged else None,
        block_size=128,
        topk=topk,
        local_blocks=1,
        init_blocks=0,
    )


@pytest.fixture
def any_device(monkeypatch):
    monkeypatch.setattr(extension, "device_reason", lambda index: None)


@pytest.fixture
def binary(monkeypatch, any_device):
    """A machine whose extension is ready; the value is the list of `build` arguments that it was loaded with."""
    builds = []
    monkeypatch.setattr(extension, "load", lambda build: builds.append(build))
    return builds


@pytest.fixture
def no_binary(monkeypatch, any_device):
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(extension, "load", lambda build: "the extension is not compiled")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_supported(any_device, head_dim, block_size, dtype):
    options = {"head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    for topk in (1, 64):
        assert SELECT_BLOCKS.unsupported(select_args(topk=topk, **options)) is None
        for q_heads_per_kv in (1, 2, 4, 8, 16):
            args = attention_args(topk=topk, q_heads_per_kv=q_heads_per_kv, **options)
            assert attention.BLOCK_SPARSE_ATTENTION.unsupported(args) is None


def test_what_is_supported_with_a_cache(any_device):
    assert SELECT_BLOCKS_WITH_KVCACHE.unsupported(cached_select_args()) is None
    assert attention.BLOCK_SPARSE_ATTENTION_WITH_KVCACHE.unsupported(cached_attention_args()) is None
    assert SELECT_BLOCKS_WITH_KVCACHE.unsupported(cached_select_args(slots=48, paged=True)) is None
    gathered = cached_select_args(slots=24, paged=True, num_new=17)
    assert SELECT_BLOCKS_WITH_KVCACHE.unsupported(gathered) is None


def test_strided_inputs_are_supported(any_device):
    query = on_device(16, 40, 256)[::2, 4:36, :128]
    assert attention.BLOCK_SPARSE_ATTENTION.unsupported(attention_args(query=query)) is None


UNSUPPORTED = {
    "float32": (SELECT_BLOCKS, select_args(dtype=torch.float32), "float32"),
    "head_dim": (SELECT_BLOCKS, select_args(head_dim=96), "96 for `index_query`"),
    "block_size": (SELECT_BLOCKS, select_args(block_size=32), "`block_size`.*32"),
    "index heads": (SELECT_BLOCKS, select_args(index_query=on_device(8, 65, 128)), "64 index heads.*65"),
    "topk": (SELECT_BLOCKS, select_args(topk=65), "64 blocks.*65"),
    "unaligned stride": (
        SELECT_BLOCKS,
        select_args(index_key=on_device(8, 132)[:, :128]),
        "`index_key`.*multiples of 8 elements",
    ),
    "unaligned start": (SELECT_BLOCKS, select_args(index_key=on_device(8, 256)[:, 1:129]), "`index_key`.*16 bytes"),
    "float64 attention": (attention.BLOCK_SPARSE_ATTENTION, attention_args(dtype=torch.float64), "float64"),
    "value's head_dim": (attention.BLOCK_SPARSE_ATTENTION, attention_args(value_dim=64), "64 for `value`"),
    "q_heads_per_kv": (attention.BLOCK_SPARSE_ATTENTION, attention_args(q_heads_per_kv=3), r"\(1, 2, 4, 8, 16\).* 3$"),
    "topk of attention": (attention.BLOCK_SPARSE_ATTENTION, attention_args(topk=65), "64 blocks.*65"),
    "q_heads_per_kv with a cache": (
        attention.BLOCK_SPARSE_ATTENTION_WITH_KVCACHE,
        cached_attention_args(q_heads_per_kv=32),
        "32$",
    ),
    "topk with a cache": (SELECT_BLOCKS_WITH_KVCACHE, cached_select_args(topk=65), "64 blocks.*65"),
    "page size": (SELECT_BLOCKS_WITH_KVCACHE, cached_select_args(slots=24, paged=True), "page size.*16.*24"),
    "CPU": (
        SELECT_BLOCKS,
        select_args(index_query=torch.zeros(8, 4, 128, dtype=torch.bfloat16)),
        "CUDA device.*cpu",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported(binary, case):
    operator, args, reason = UNSUPPORTED[case]
    assert backends.resolve_backend("auto", operator, args) == "torch"
    with pytest.raises(NotImplementedError, match=rf"(?s)`backend`='cuda' cannot run.*`{operator.name}`"):
        backends.resolve_backend("cuda", operator, args)
    with pytest.raises(NotImplementedError, match=reason.replace("$", r"\. Available here")):
        backends.resolve_backend("cuda", operator, args)
    assert not binary, "the call loaded the binary although the kernels do not support it"


def test_an_old_device_is_not_supported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    extension.device_reason.cache_clear()
    try:
        assert "7.5" in SELECT_BLOCKS.unsupported(select_args())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
        assert "7.5" in SELECT_BLOCKS.unsupported(select_args()), "the device is looked at once"
        extension.device_reason.cache_clear()
        assert SELECT_BLOCKS.unsupported(select_args()) is None
    finally:
        extension.device_reason.cache_clear()


def test_auto_takes_the_extension_but_builds_nothing(binary):
    assert backends.resolve_backend("auto", SELECT_BLOCKS, select_args()) == "cuda"
    assert binary == [False]


def test_a_named_extension_is_built(binary):
    assert backends.resolve_backend("cuda", SELECT_BLOCKS, select_args()) == "cuda"
    assert binary == [True]


def test_the_other_backends_are_taken_by_name(binary):
    for name in ("torch", "reference"):
        assert backends.resolve_backend(name, SELECT_BLOCKS, select_args()) == name
    assert not binary


def test_the_gradient_is_supported_where_the_attention_is(binary):
    operator = attention.BLOCK_SPARSE_ATTENTION_BACKWARD

    def backward_args(**changed):
        forward = attention_args(**changed)
        # A gradient of any layout: it is copied where the kernels could not read it.
        grad_out = on_device(32, 128, 8).permute(2, 0, 1)
        lse = on_device(*forward.query.shape[:2], dtype=torch.float32)
        return BlockSparseAttentionBackwardArgs(forward, grad_out, out=forward.query, lse=lse)

    assert backends.resolve_backend("auto", operator, backward_args()) == "cuda"
    for changed, reason in (
        ({"q_heads_per_kv": 3}, "1, 2, 4, 8, 16"),
        ({"query": on_device(8, 32, 132)[..., :128]}, "`query`"),
    ):
        args = backward_args(**changed)
        assert backends.resolve_backend("auto", operator, args) == "torch"
        assert reason in operator.unsupported(args)


def test_without_a_binary_auto_says_so_once(no_binary):
    with pytest.warns(UserWarning, match="`torch` backend: the extension is not compiled"):
        assert backends.resolve_backend("auto", SELECT_BLOCKS, select_args()) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve_backend("auto", SELECT_BLOCKS, select_args()) == "torch"


def test_where_the_extension_is_switched_off_auto_does_not_warn(no_binary, monkeypatch):
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve_backend("auto", SELECT_BLOCKS, select_args()) == "torch"


def test_without_a_binary_a_named_extension_raises(no_binary):
    with pytest.raises(NotImplementedError, match="the extension is not compiled.*Available here: torch, reference"):
        backends.resolve_backend("cuda", SELECT_BLOCKS, select_args())


def test_available_backends_lists_the_extension_where_it_can_run(monkeypatch):
    monkeypatch.setattr(extension, "unavailable", lambda: None)
    assert available_backends() == ("cuda", "torch", "reference")
    monkeypatch.setattr(extension, "unavailable", lambda: "there is no CUDA device")
    assert available_backends() == ("torch", "reference")


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_the_choice_is_not_part_of_a_traced_graph(inputs, monkeypatch, backend):
    torch._dynamo.reset()
    case = inputs.make_varlen([20, 9], block_size=8)

    def selected(index_query):
        return select_blocks(index_query, case.index_key, **case.lengths, block_size=8, topk=3, backend=backend) + 1

    compiled = torch.compile(selected, fullgraph=True, backend="aot_eager")
    ran = []
    monkeypatch.setattr(backends, "resolve_backend", lambda name, *_: ran.append(name) or "torch")
    expected = select_blocks(case.index_query, case.index_key, **case.lengths, block_size=8, topk=3, backend="torch")
    ran.clear()
    assert torch.equal(compiled(case.index_query), expected + 1)
    monkeypatch.setattr(backends, "resolve_backend", lambda name, *_: ran.append(name) or "reference")
    assert torch.equal(compiled(case.index_query).sort(-1).values, (expected + 1).sort(-1).values)
    assert ran == [backend, backend]


# --- memory ------------------------------------------------------------------------------------------------------


class Allocator:
    """Stands in for the extension: its calls raise `errors`, one after the other, then return "out"."""

    def __init__(self, monkeypatch, *errors, ooms=0):
        self.errors, self.ooms, self.calls = list(errors), ooms, 0
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": self.ooms} if self.ooms else {})

    def call(self, args):
        self.calls += 1
        if not self.errors:
            return "out"
        message, is_oom = self.errors.pop(0)
        self.ooms += is_oom
        raise RuntimeError(message)


def run_on_kernels(allocator, operator, args):
    return backends.run_on_backend("cuda", replace(operator, cuda=allocator.call), args)


STABLE_ABI = 'torch_call_dispatcher( "aten::new_empty", "", stack.data(), TORCH_ABI_VERSION) API call failed'


@pytest.mark.parametrize("earlier", [0, 3], ids=["first", "after others"])
def test_memory_that_ends_in_the_extension_raises_out_of_memory(binary, monkeypatch, earlier):
    allocator = Allocator(monkeypatch, (STABLE_ABI, True), (STABLE_ABI, True), ooms=earlier)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory in `select_blocks`") as raised:
        run_on_kernels(allocator, SELECT_BLOCKS, select_args())
    assert STABLE_ABI in str(raised.value.__cause__)


@pytest.mark.parametrize("earlier", [0, 3], ids=["first", "after others"])
def test_other_errors_of_the_extension_stay_as_they_are(binary, monkeypatch, earlier):
    allocator = Allocator(monkeypatch, (STABLE_ABI, False), (STABLE_ABI, False), ooms=earlier)
    with pytest.raises(RuntimeError) as raised:
        run_on_kernels(allocator, SELECT_BLOCKS, select_args())
    assert type(raised.value) is RuntimeError and str(raised.value) == STABLE_ABI


def test_memory_that_was_free_a_moment_later_suffices(binary, monkeypatch):
    allocator = Allocator(monkeypatch, (STABLE_ABI, True))
    assert run_on_kernels(allocator, SELECT_BLOCKS, select_args()) == "out" and allocator.calls == 2


def test_structured_lists_run_out_of_memory_too(binary, monkeypatch):
    pattern = structured.StructuredPattern(local_blocks=1, anchor_blocks=1, anchor_stride=1, random_blocks=1, seed=0)
    allocator = Allocator(monkeypatch, (STABLE_ABI, True), (STABLE_ABI, True))
    own_block = on_device(3, dtype=torch.int64)
    args = structured.structured_blocks_of_args(own_block, 2, 0, pattern, None, "cuda")
    with pytest.raises(torch.OutOfMemoryError, match="`structured_blocks_of`"):
        run_on_kernels(allocator, structured.STRUCTURED_BLOCKS_OF, args)


# --- many new tokens per row run as packed sequences --------------------------------------------------------------


@pytest.fixture
def packed_reference(monkeypatch):
    """Replaces the kernels of packed sequences by the definition; the value lists their calls."""
    calls = []

    def stand_in(module, name):
        def call(args):
            calls.append((name, args))
            return getattr(reference, name)(args)

        monkeypatch.setattr(module, name, call)

    stand_in(cuda.selection, "select_blocks")
    stand_in(cuda.attention, "block_sparse_attention")
    return calls


LONG_CHUNKS = {
    "one row": {"lengths": [50], "num_new": 17},
    "ragged rows": {"lengths": [50, 30, 21], "num_new": 20, "leftpad": [0, 4, 9]},
    "rows shorter than the chunk": {"lengths": [50, 5, 1], "num_new": 18, "leftpad": [0, 3, 7]},
    "everything is new": {"lengths": [19, 19], "num_new": 19},
}


def assert_same_as_reference(inputs, case, form):
    where = {"cache_leftpad": None, "block_table": None, **getattr(case, form)["where"]}
    index_query, index_key_cache = case.selection(form)[0]
    args = SelectBlocksWithKVCacheArgs(index_query, index_key_cache, **where, **case.options)
    assert torch.equal(cuda.select_blocks_with_kvcache(args), reference.select_blocks_with_kvcache(args))
    args = BlockSparseAttentionWithKVCacheArgs(
        *case.attention(form)[0], **where, block_size=case.block_size, softmax_scale=0.25
    )
    expected = reference.block_sparse_attention_with_kvcache(args)
    assert inputs.relative_error(cuda.block_sparse_attention_with_kvcache(args), expected) < 1e-6


@pytest.mark.parametrize("form", ["contiguous", "paged"])
@pytest.mark.parametrize("chunk", LONG_CHUNKS)
def test_long_chunks_mean_the_same(inputs, packed_reference, chunk, form):
    case = inputs.make_cached(**LONG_CHUNKS[chunk], block_size=8, spare_slots=5)
    for name in ("key", "value", "index_key"):  # the definition multiplies unused slots' values by a weight of 0
        getattr(case, form)[name].nan_to_num_(7.0)
    assert_same_as_reference(inputs, case, form)
    assert [name for name, _ in packed_reference] == ["select_blocks", "block_sparse_attention"]


def test_a_contiguous_cache_is_not_copied(inputs, packed_reference):
    case = inputs.make_cached([40, 25], 17, leftpad=[0, 6], block_size=8)
    cache = case.contiguous
    for name in ("key", "value", "index_key"):
        roomy = torch.zeros(3, 64, *cache[name].shape[2:])
        roomy[:2, : cache[name].shape[1]] = cache[name].nan_to_num(7.0)
        cache[name] = roomy[:2, : cache[name].shape[1]]  # rows lie 64 slots apart, more than the slots in view
    assert_same_as_reference(inputs, case, "contiguous")
    (_, select), (_, attend) = packed_reference
    assert select.index_key.data_ptr() == cache["index_key"].data_ptr()
    assert attend.key.data_ptr() == cache["key"].data_ptr()
    assert attend.value.data_ptr() == cache["value"].data_ptr()


def test_caches_of_different_strides_are_handled(inputs, packed_reference):
    case = inputs.make_cached([40, 25], 17, block_size=8)
    cache = case.contiguous
    for name in ("key", "value", "index_key"):
        cache[name] = cache[name].nan_to_num(7.0)
    cache["value"] = cache["value"].transpose(0, 1).contiguous().transpose(0, 1)  # slots apart, rows side by side
    assert_same_as_reference(inputs, case, "contiguous")


@pytest.mark.parametrize("most", [1, 2, 64])
def test_log_sum_over_all_keys_takes_as_many_calls_as_the_blocks_need(monkeypatch, most):
    """The kernels take a bounded number of blocks per query, and sequences are longer than that.

    One sequence is empty, and one has no keys for its first queries.
    """
    widths = []

    def attention(args):
        widths.append(args.block_indices.shape[-1])
        return reference.block_sparse_attention(args)

    monkeypatch.setattr(cuda.indexer_loss, "block_sparse_attention", attention)
    monkeypatch.setattr(cuda.support, "MAX_TOPK", most)
    generator = torch.Generator().manual_seed(0)
    cu_seqlens_q, cu_seqlens_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 9, 9, 15], [0, 9, 13, 17]))
    query, key = (torch.randn(n, heads, 8, generator=generator).double() for n, heads in ((15, 4), (17, 2)))
    args = AttentionLseArgs(query, key, None, cu_seqlens_q, cu_seqlens_k, block_size=4, softmax_scale=0.3)
    lse = cuda.attention_lse(args)
    assert widths == [width for width in (most,) * (5 // most) + (5 % most,) if width]
    expected = reference.attention_lse(args)
    assert torch.isneginf(expected).any()
    torch.testing.assert_close(lse, expected)
    no_keys = replace(args, key=key[:0], cu_seqlens_k=torch.zeros_like(cu_seqlens_k))
    assert cuda.attention_lse(no_keys).isneginf().all()
