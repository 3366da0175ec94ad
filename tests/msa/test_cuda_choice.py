"""Which backend runs a call: what the extension supports, what `auto` takes, what a named backend says when it cannot.

No GPU is needed: tensors say that they are on one, and the binary is a stand-in.
"""

import warnings

import pytest
import torch

from modeling_minimax_m3.msa import (
    available_backends,
    backends,
    cuda,
    extension,
    reference,
    select_blocks,
    structured,
)


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on the first GPU."""

    device = property(lambda self: torch.device("cuda", 0))


def on_device(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).as_subclass(OnDevice)


def select_args(head_dim=128, block_size=128, topk=16, dtype=torch.bfloat16, **changed):
    tensors = {
        "index_query": on_device(8, 4, head_dim, dtype=dtype),
        "index_key": on_device(8, head_dim, dtype=dtype),
    } | changed
    return (*tensors.values(), None, None, block_size, topk, 1, 0)


def attention_args(head_dim=128, value_dim=None, block_size=128, topk=16, group=16, dtype=torch.bfloat16, **changed):
    tensors = {
        "query": on_device(8, 2 * group, head_dim, dtype=dtype),
        "key": on_device(8, 2, head_dim, dtype=dtype),
        "value": on_device(8, 2, value_dim or head_dim, dtype=dtype),
        "block_indices": on_device(8, 2, topk, dtype=torch.int32),
    } | changed
    return (*tensors.values(), None, None, block_size, 0.1)


def cached_attention_args(head_dim=128, group=16):
    query = on_device(3, 1, 2 * group, head_dim)
    cache = on_device(3, 40, 2, head_dim)
    return (query, cache, cache, on_device(3, 1, 2, 16, dtype=torch.int32), None, None, None, 128, 0.1)


def cached_select_args(head_dim=128, topk=16, num_new=1, slots=40, paged=False):
    block_table = on_device(3, 2, dtype=torch.int32) if paged else None
    query, cache = on_device(3, num_new, 4, head_dim), on_device(3, slots, head_dim)
    return (query, cache, None, None, block_table, 128, topk, 1, 0)


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
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.setattr(extension, "load", lambda build: "the extension is not compiled")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_supported(any_device, head_dim, block_size, dtype):
    options = {"head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    for topk in (1, 64):
        assert cuda.unsupported("select_blocks", select_args(topk=topk, **options)) is None
        for group in (1, 2, 4, 8, 16):
            args = attention_args(topk=topk, group=group, **options)
            assert cuda.unsupported("block_sparse_attention", args) is None


def test_what_is_supported_with_a_cache(any_device):
    assert cuda.unsupported("select_blocks_with_kvcache", cached_select_args()) is None
    assert cuda.unsupported("block_sparse_attention_with_kvcache", cached_attention_args()) is None
    assert cuda.unsupported("select_blocks_with_kvcache", cached_select_args(slots=48, paged=True)) is None
    gathered = cached_select_args(slots=24, paged=True, num_new=17)
    assert cuda.unsupported("select_blocks_with_kvcache", gathered) is None


def test_strided_inputs_are_supported(any_device):
    query = on_device(16, 40, 256)[::2, 4:36, :128]
    assert cuda.unsupported("block_sparse_attention", attention_args(query=query)) is None


UNSUPPORTED = {
    "float32": ("select_blocks", select_args(dtype=torch.float32), "float32"),
    "head_dim": ("select_blocks", select_args(head_dim=96), "96 for `index_query`"),
    "block_size": ("select_blocks", select_args(block_size=32), "`block_size`.*32"),
    "index heads": ("select_blocks", select_args(index_query=on_device(8, 65, 128)), "64 index heads.*65"),
    "topk": ("select_blocks", select_args(topk=65), "64 blocks.*65"),
    "unaligned stride": (
        "select_blocks",
        select_args(index_key=on_device(8, 132)[:, :128]),
        "`index_key`.*multiples of 8 elements",
    ),
    "unaligned start": ("select_blocks", select_args(index_key=on_device(8, 256)[:, 1:129]), "`index_key`.*16 bytes"),
    "float64 attention": ("block_sparse_attention", attention_args(dtype=torch.float64), "float64"),
    "value's head_dim": ("block_sparse_attention", attention_args(value_dim=64), "64 for `value`"),
    "group": ("block_sparse_attention", attention_args(group=3), r"\(1, 2, 4, 8, 16\).* 3$"),
    "topk of attention": ("block_sparse_attention", attention_args(topk=65), "64 blocks.*65"),
    "group with a cache": ("block_sparse_attention_with_kvcache", cached_attention_args(group=32), "32$"),
    "topk with a cache": ("select_blocks_with_kvcache", cached_select_args(topk=65), "64 blocks.*65"),
    "page size": ("select_blocks_with_kvcache", cached_select_args(slots=24, paged=True), "page size.*16.*24"),
    "CPU": (
        "select_blocks",
        select_args(index_query=torch.zeros(8, 4, 128, dtype=torch.bfloat16)),
        "CUDA device.*cpu",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported(binary, case):
    function, args, reason = UNSUPPORTED[case]
    assert backends.resolve_backend("auto", function, args) == "torch"
    with pytest.raises(NotImplementedError, match=rf"(?s)`backend`='cuda' cannot run.*`{function}`"):
        backends.resolve_backend("cuda", function, args)
    with pytest.raises(NotImplementedError, match=reason.replace("$", r"\. Available here")):
        backends.resolve_backend("cuda", function, args)
    assert not binary, "the binary was asked for although the call is not supported"


def test_an_old_device_is_not_supported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    extension.device_reason.cache_clear()
    try:
        assert "7.5" in cuda.unsupported("select_blocks", select_args())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
        assert "7.5" in cuda.unsupported("select_blocks", select_args()), "asked once per device"
        extension.device_reason.cache_clear()
        assert cuda.unsupported("select_blocks", select_args()) is None
    finally:
        extension.device_reason.cache_clear()


def test_auto_takes_the_extension_but_builds_nothing(binary):
    assert backends.resolve_backend("auto", "select_blocks", select_args()) == "cuda"
    assert binary == [False]


def test_a_named_extension_is_built(binary):
    assert backends.resolve_backend("cuda", "select_blocks", select_args()) == "cuda"
    assert binary == [True]


def test_the_other_backends_are_taken_by_name(binary):
    for name in ("torch", "reference"):
        assert backends.resolve_backend(name, "select_blocks", select_args()) == name
    assert not binary


def backward_args(grad_out, *forward_args):
    """`forward_args` as `attention_args` gives them."""
    query, key, value, *rest = forward_args
    return (grad_out, query, key, value, query, on_device(*query.shape[:2], dtype=torch.float32), *rest)


def test_the_gradient_is_supported_where_the_attention_is(binary):
    function = "block_sparse_attention_backward"
    # A gradient of any layout: it is copied where the kernels could not read it.
    grad_out = on_device(32, 128, 8).permute(2, 0, 1)
    assert backends.resolve_backend("auto", function, backward_args(grad_out, *attention_args())) == "cuda"
    for changed, reason in (
        ({"group": 3}, "1, 2, 4, 8, 16"),
        ({"query": on_device(8, 32, 132)[..., :128]}, "`query`"),
    ):
        args = backward_args(grad_out, *attention_args(**changed))
        assert backends.resolve_backend("auto", function, args) == "torch"
        assert reason in cuda.unsupported(function, args)


def test_without_a_binary_auto_says_so_once(no_binary):
    with pytest.warns(UserWarning, match="`torch` backend: the extension is not compiled"):
        assert backends.resolve_backend("auto", "select_blocks", select_args()) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve_backend("auto", "select_blocks", select_args()) == "torch"


def test_a_switched_off_extension_is_passed_by_silently(no_binary, monkeypatch):
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve_backend("auto", "select_blocks", select_args()) == "torch"


def test_without_a_binary_a_named_extension_raises(no_binary):
    with pytest.raises(NotImplementedError, match="the extension is not compiled.*Available here: torch, reference"):
        backends.resolve_backend("cuda", "select_blocks", select_args())


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
    """Stands in for the extension's `function`: its calls raise `errors`, one after the other, then return "out"."""

    def __init__(self, monkeypatch, function, *errors, ooms=0):
        self.errors, self.ooms, self.calls = list(errors), ooms, 0
        monkeypatch.setattr(cuda, function, self.call)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": self.ooms} if self.ooms else {})

    def call(self, *args):
        self.calls += 1
        if not self.errors:
            return "out"
        message, is_oom = self.errors.pop(0)
        self.ooms += is_oom
        raise RuntimeError(message)


STABLE_ABI = 'torch_call_dispatcher( "aten::new_empty", "", stack.data(), TORCH_ABI_VERSION) API call failed'


@pytest.mark.parametrize("earlier", [0, 3], ids=["first", "after others"])
def test_memory_that_ends_in_the_extension_is_told_as_such(binary, monkeypatch, earlier):
    Allocator(monkeypatch, "select_blocks", (STABLE_ABI, True), (STABLE_ABI, True), ooms=earlier)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory in `select_blocks`") as raised:
        backends.run_on_backend("cuda", "select_blocks", *select_args())
    assert STABLE_ABI in str(raised.value.__cause__)


@pytest.mark.parametrize("earlier", [0, 3], ids=["first", "after others"])
def test_other_errors_of_the_extension_stay_as_they_are(binary, monkeypatch, earlier):
    Allocator(monkeypatch, "select_blocks", (STABLE_ABI, False), (STABLE_ABI, False), ooms=earlier)
    with pytest.raises(RuntimeError) as raised:
        backends.run_on_backend("cuda", "select_blocks", *select_args())
    assert type(raised.value) is RuntimeError and str(raised.value) == STABLE_ABI


def test_memory_that_was_free_a_moment_later_suffices(binary, monkeypatch):
    allocator = Allocator(monkeypatch, "select_blocks", (STABLE_ABI, True))
    assert backends.run_on_backend("cuda", "select_blocks", *select_args()) == "out" and allocator.calls == 2


def test_structured_lists_run_out_of_memory_too(any_device, monkeypatch):
    pattern = structured.StructuredPattern(local_blocks=1, anchor_blocks=1, anchor_stride=1, random_blocks=1, seed=0)
    Allocator(monkeypatch, "structured_blocks_of", (STABLE_ABI, True), (STABLE_ABI, True))
    monkeypatch.setattr(structured, "resolve_backend", lambda *_: "cuda")
    with pytest.raises(torch.OutOfMemoryError, match="`structured_blocks_of`"):
        structured.structured_blocks_of(torch.zeros(3, dtype=torch.int64), 2, 0, pattern)


# --- many new tokens per row run as packed sequences --------------------------------------------------------------


@pytest.fixture
def packed_reference(monkeypatch):
    """Packed kernels replaced by the definition; whatever they were called with is in the list."""
    calls = []

    def stand_in(name):
        def call(*args):
            calls.append((name, args))
            return getattr(reference, name)(*args)

        monkeypatch.setattr(cuda, name, call)

    stand_in("select_blocks")
    stand_in("block_sparse_attention")
    return calls


LONG_CHUNKS = {
    "one row": {"lengths": [50], "num_new": 17},
    "ragged rows": {"lengths": [50, 30, 21], "num_new": 20, "leftpad": [0, 4, 9]},
    "rows shorter than the chunk": {"lengths": [50, 5, 1], "num_new": 18, "leftpad": [0, 3, 7]},
    "everything is new": {"lengths": [19, 19], "num_new": 19},
}


def assert_same_as_reference(inputs, case, form):
    where = getattr(case, form)["where"]
    rows = (where["cache_seqlens"], where.get("cache_leftpad"), where.get("block_table"))
    index_query, index_key_cache = case.selection(form)[0]
    options = tuple(case.options[name] for name in ("block_size", "topk", "local_blocks", "init_blocks"))
    selected = cuda.select_blocks_with_kvcache(index_query, index_key_cache, *rows, *options)
    assert torch.equal(selected, reference.select_blocks_with_kvcache(index_query, index_key_cache, *rows, *options))
    tensors = case.attention(form)[0]
    out = cuda.block_sparse_attention_with_kvcache(*tensors, *rows, case.block_size, 0.25)
    expected = reference.block_sparse_attention_with_kvcache(*tensors, *rows, case.block_size, 0.25)
    assert inputs.relative_error(out, expected) < 1e-6


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
    assert select[1].data_ptr() == cache["index_key"].data_ptr()
    assert attend[1].data_ptr() == cache["key"].data_ptr()
    assert attend[2].data_ptr() == cache["value"].data_ptr()


def test_caches_of_different_strides_are_handled(inputs, packed_reference):
    case = inputs.make_cached([40, 25], 17, block_size=8)
    cache = case.contiguous
    for name in ("key", "value", "index_key"):
        cache[name] = cache[name].nan_to_num(7.0)
    cache["value"] = cache["value"].transpose(0, 1).contiguous().transpose(0, 1)  # slots apart, rows side by side
    assert_same_as_reference(inputs, case, "contiguous")


@pytest.mark.parametrize("most", [1, 2, 64])
def test_log_sum_over_all_keys_takes_as_many_calls_as_the_blocks_need(monkeypatch, most):
    """The kernels take so many blocks a query; sequences are longer, empty, and without keys for their first queries."""
    calls = []

    def attention(query, key, value, block_indices, *rest):
        calls.append(block_indices.shape[-1])
        return reference.block_sparse_attention(query, key, value, block_indices, *rest)

    monkeypatch.setattr(cuda, "block_sparse_attention", attention)
    monkeypatch.setattr(cuda, "MAX_TOPK", most)
    generator = torch.Generator().manual_seed(0)
    lengths = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 9, 9, 15], [0, 9, 13, 17])]
    query, key = (torch.randn(n, heads, 8, generator=generator).double() for n, heads in ((15, 4), (17, 2)))
    lse = cuda.attention_lse(query, key, None, *lengths, 4, 0.3)
    assert calls == [width for width in (most,) * (5 // most) + (5 % most,) if width]
    expected = reference.attention_lse(query, key, None, *lengths, 4, 0.3)
    assert torch.isneginf(expected).any()
    torch.testing.assert_close(lse, expected)
    assert cuda.attention_lse(query, key[:0], None, lengths[0], torch.zeros_like(lengths[1]), 4, 0.3).isneginf().all()
