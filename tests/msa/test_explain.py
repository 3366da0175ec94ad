"""`explain` and MINIMAX_M3_MSA_LOG: which backend and kernels run a call, and why."""

import functools
import logging
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_minimax_m3 import msa
from modeling_minimax_m3.msa import (
    attention,
    backends,
    call_log,
    extension,
    indexer_loss,
    kernel_build,
    selection,
    structured,
)
from modeling_minimax_m3.msa.reference import SelectBlocksArgs
from modeling_minimax_m3.msa.selection import SELECT_BLOCKS

from ..forked_processes import run_python
from .pretended_gpu import on_device

MODULES = (attention, indexer_loss, selection, structured)
NOT_ON_CUDA = "the tensors must be on a CUDA device, they are on cpu"
PATTERN = {"local_blocks": 1, "anchor_blocks": 1, "anchor_stride": 2, "random_blocks": 1, "seed": 0}


def calls(inputs):
    """Arguments of every function that `explain` knows, and the form in which it runs."""
    case, cached = inputs.make_varlen([20, 9], block_size=8), inputs.make_cached([20, 9], 2, block_size=8)
    chunk = inputs.make_cached([40, 30], 17, block_size=8)
    block_indices, lengths = case.random_blocks(), {**case.lengths, "block_size": 8}
    loss = (case.index_query, case.index_key, case.query, case.key)
    return [
        (msa.select_blocks, (case.index_query, case.index_key), lengths, "packed"),
        (msa.block_sparse_attention, (*case.qkv, block_indices), {**lengths, "return_lse": True}, "packed"),
        (msa.indexer_kl_loss, (*loss, block_indices), lengths, "packed"),
        (msa.indexer_kl_loss, (*loss, None), lengths, "packed"),
        (msa.select_blocks_with_kvcache, *cached.selection("contiguous"), "decode"),
        (msa.select_blocks_with_kvcache, *chunk.selection("paged"), "packed"),
        (msa.block_sparse_attention_with_kvcache, *cached.attention("paged"), "decode"),
        (msa.block_sparse_attention_with_kvcache, *chunk.attention("contiguous"), "packed"),
        (msa.structured_blocks, (), {**lengths, **PATTERN, "num_kv_heads": 2, "layer_idx": 0}, "by position"),
        (msa.structured_blocks_of, (torch.arange(9), 2, 0, msa.StructuredPattern(**PATTERN)), {}, "by position"),
    ]


class NoOperator(TorchDispatchMode):
    """Fails where an operator of this package is called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "minimax_m3_msa", f"{func} ran"
        return func(*args, **(kwargs or {}))


def test_every_function_on_a_cpu(inputs):
    for function, args, kwargs, form in calls(inputs):
        with NoOperator():
            found = msa.explain(function, *args, **kwargs)
        assert found == msa.Explanation("torch", f"PyTorch, {form}", NOT_ON_CUDA)
        assert msa.explain(function.__name__, *args, **kwargs, backend="torch") == msa.Explanation(
            "torch", f"PyTorch, {form}", "the call names `backend`='torch'"
        )
        assert msa.explain(function, *args, **kwargs, backend="reference") == msa.Explanation(
            "reference", "definition", "the call names `backend`='reference'"
        )


def test_every_function_that_takes_a_backend_is_known(inputs):
    known = {function for function, *_ in calls(inputs)}
    others = {"Explanation", "StructuredPattern", "available_backends", "explain"}
    assert {function.__name__ for function in known} == set(msa.__all__) - others


def test_errors_are_those_of_the_call(inputs):
    for function, args, kwargs, _ in calls(inputs):
        for wrong in ({"backend": "triton"}, {"backend": "cuda"}):
            with pytest.raises((ValueError, NotImplementedError)) as of_call:
                function(*args, **kwargs | wrong)
            with pytest.raises(type(of_call.value)) as of_explain:
                msa.explain(function, *args, **kwargs | wrong)
            # Without a given lse, the loss computes that first.
            message = str(of_call.value).replace("attention_lse", "indexer_kl_loss")
            assert str(of_explain.value) == message
    case = inputs.make_varlen([20])
    with pytest.raises(ValueError, match="`index_key` must have shape"):
        msa.explain(msa.select_blocks, case.index_query, case.key, **case.lengths)
    with pytest.raises(TypeError, match="`select_blocks`: missing a required argument: 'cu_seqlens_q'"):
        msa.explain(msa.select_blocks, case.index_query, case.index_key)


@pytest.mark.parametrize(
    "function",
    ["select", None, torch.add, msa.available_backends],
    ids=["a wrong name", "nothing", "of torch", "no operator"],
)
def test_other_functions_are_refused(function):
    with pytest.raises(ValueError, match="`function` must be one of select_blocks, .*, got "):
        msa.explain(function)


def test_other_derivatives_run_the_definition(inputs):
    case = inputs.make_varlen([20])
    block_indices, found = case.random_blocks(), []

    def attend(query, backend="auto"):
        args, kwargs = (query, case.key, case.value, block_indices), {**case.lengths, "backend": backend}
        found.append(msa.explain(msa.block_sparse_attention, *args, **kwargs))
        return query.sum()

    torch.func.grad(attend)(case.query)
    assert (found[0].backend, found[0].kernel) == ("reference", "definition")
    assert "torch.func" in found[0].reason
    with pytest.raises(NotImplementedError, match="only first-order"):
        torch.func.grad(attend)(case.query, "cuda")


def test_explaining_is_not_traced(inputs):
    torch._dynamo.reset()
    case = inputs.make_varlen([20])

    def step(index_query):
        found = msa.explain(msa.select_blocks, index_query, case.index_key, **case.lengths)
        return index_query * 2, found.backend

    doubled, backend = torch.compile(step, backend="aot_eager")(case.index_query)
    assert torch.equal(doubled, case.index_query * 2) and backend == "torch"


# --- where tensors are on a GPU, or say so -----------------------------------------------------------------------


def explain_select(head_dim=128, **kwargs):
    offsets = on_device(2, dtype=torch.int32)
    query, key = on_device(8, 4, head_dim), on_device(8, head_dim)
    return msa.explain(msa.select_blocks, query, key, cu_seqlens_q=offsets, cu_seqlens_k=offsets, **kwargs)


def explain_decode():
    cache_seqlens = on_device(3, dtype=torch.int32)
    query, cache = on_device(3, 1, 4, 128), on_device(3, 40, 128)
    return msa.explain(msa.select_blocks_with_kvcache, query, cache, cache_seqlens=cache_seqlens)


def explain_attend():
    offsets = on_device(2, dtype=torch.int32)
    query, key, ids = on_device(8, 16, 128), on_device(8, 1, 128), on_device(8, 1, 16, dtype=torch.int32)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    return msa.explain(msa.block_sparse_attention, query, key, key, ids, **lengths)


def explain_structured():
    pattern = msa.StructuredPattern(**PATTERN)
    return msa.explain(msa.structured_blocks_of, on_device(9, dtype=torch.int64), 2, 0, pattern)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(extension, "device_reason", lambda index: None)


@pytest.fixture
def csrc_with_sm100(tmp_path):
    """Folders as in `csrc`, and kernels of sm_100 for selection alone."""
    for folder in kernel_build.CSRC.glob("sm*/*"):
        (tmp_path / folder.relative_to(kernel_build.CSRC)).mkdir(parents=True)
    (tmp_path / "sm100" / "selection").mkdir(parents=True)
    return tmp_path


def test_kernels_of_a_gpu(hopper, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda build: None)
    supported = "the kernels support the call"
    assert explain_select() == explain_select(backend="cuda") == msa.Explanation("cuda", "sm90, packed", supported)
    assert explain_decode() == msa.Explanation("cuda", "sm80, decode", supported)
    assert explain_select(head_dim=96).backend == "torch"
    assert "96 for `index_query`" in explain_select(head_dim=96).reason
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "portable")
    assert explain_select().kernel == "sm80, packed"


@pytest.mark.parametrize(
    "capability, with_sm100, select, attend",
    [
        ((8, 0), False, "sm80", "sm80"),
        ((8, 0), True, "sm80", "sm80"),
        ((8, 9), True, "sm80", "sm80"),
        ((9, 0), False, "sm90", "sm90"),
        ((9, 0), True, "sm90", "sm90"),
        ((10, 0), False, "sm80", "sm80"),
        ((10, 0), True, "sm100", "sm80"),
        ((10, 3), True, "sm80", "sm80"),
    ],
)
def test_the_family_follows_the_folders(hopper, monkeypatch, csrc_with_sm100, capability, with_sm100, select, attend):
    csrc = csrc_with_sm100 if with_sm100 else kernel_build.CSRC
    monkeypatch.setattr(kernel_build, "kernel_family", functools.partial(kernel_build.kernel_family, csrc=csrc))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(extension, "load", lambda build: None)
    assert explain_select().kernel == f"{select}, packed"
    assert explain_attend().kernel == f"{attend}, packed"
    assert explain_decode().kernel == "sm80, decode"
    assert explain_structured().kernel == "sm80, by position"
    # The fixture `kernels` asks for any kernels of the architecture.
    assert kernel_build.kernel_family(capability) == select
    monkeypatch.setenv("MINIMAX_M3_MSA_CUDA", "portable")
    assert explain_select().kernel == "sm80, packed"


def test_a_family_with_decoding_kernels_decodes(hopper, monkeypatch, csrc_with_sm100):
    (csrc_with_sm100 / "sm90" / "decode").mkdir()
    monkeypatch.setattr(
        kernel_build, "kernel_family", functools.partial(kernel_build.kernel_family, csrc=csrc_with_sm100)
    )
    monkeypatch.setattr(extension, "load", lambda build: None)
    assert explain_decode().kernel == "sm90, decode"


def test_every_folder_of_kernels_belongs_to_an_operator():
    """A family that has a folder which no operator names would run it unseen.

    `grouped_product` belongs to the fused operators (`fused/experts.py`), which ask for it by its name.
    """
    operators = [
        value for module in MODULES for value in vars(module).values() if isinstance(value, backends.Operator)
    ]
    named = {kind for operator in operators for kind in operator.kernels} | {"decode", "grouped_product"}
    for family in kernel_build.CSRC.glob("sm[0-9]*"):
        with_kernels = {path.relative_to(family).parts[0] for path in family.rglob("*.cu")}
        assert with_kernels <= named, family


def test_nothing_is_built_and_nobody_is_warned(hopper, monkeypatch):
    builds = []
    monkeypatch.setattr(extension, "load", lambda build: builds.append(build) or "the extension is not compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain_select() == msa.Explanation("torch", "PyTorch, packed", "the extension is not compiled")
    with pytest.raises(NotImplementedError, match="the extension is not compiled"):
        explain_select(backend="cuda")
    assert builds == [False, False]


# --- the log -----------------------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch, caplog):
    """Switches the log on; the value is a function that returns and forgets the lines so far."""
    monkeypatch.setattr(call_log, "_logged", set())
    monkeypatch.setenv("MINIMAX_M3_MSA_LOG", "1")

    def lines():
        found = [record.getMessage() for record in caplog.records if record.name == "modeling_minimax_m3.msa"]
        caplog.clear()
        return found

    yield lines
    logging.getLogger("modeling_minimax_m3.msa").setLevel(logging.NOTSET)


def select(inputs, lengths, dtype=torch.float32, **kwargs):
    case = inputs.make_varlen(lengths, dtype=dtype)
    msa.select_blocks(case.index_query, case.index_key, **case.lengths, **kwargs)


def test_each_form_of_call_is_logged_once(inputs, log):
    for lengths in ([20], [20], [9, 30]):
        select(inputs, lengths)
    assert log() == [f"select_blocks (float32, cpu) runs on `torch` (PyTorch, packed): {NOT_ON_CUDA}"]
    select(inputs, [20], torch.float64)
    select(inputs, [20], backend="reference")
    select(inputs, [20], backend="reference")
    assert log() == [
        f"select_blocks (float64, cpu) runs on `torch` (PyTorch, packed): {NOT_ON_CUDA}",
        "select_blocks (float32, cpu) runs on `reference` (definition): the call names `backend`='reference'",
    ]


def test_gradients_are_logged_too(inputs, log):
    case = inputs.make_varlen([20])
    leaves = [tensor.requires_grad_() for tensor in (case.index_query, case.index_key)]
    msa.indexer_kl_loss(*leaves, case.query, case.key, None, **case.lengths).sum().backward()
    assert [line.partition(" ")[0] for line in log()] == [
        "attention_lse",
        "indexer_kl_loss",
        "indexer_kl_loss_backward",
    ]


def test_a_fallback_is_logged_with_its_reason(hopper, monkeypatch, log):
    monkeypatch.setattr(extension, "load", lambda build: "the extension is not compiled")
    monkeypatch.setattr(backends, "_warned", {"the extension is not compiled"})
    args = SelectBlocksArgs(on_device(8, 4, 128), on_device(8, 128), None, None, 128, 16, 1, 0)
    assert backends.resolve_backend("auto", SELECT_BLOCKS, args) == "torch"
    assert log() == [
        "select_blocks (bfloat16, cuda:0) runs on `torch` (PyTorch, packed): the extension is not compiled"
    ]


def test_calls_in_a_compiled_graph_are_logged(inputs, log):
    torch._dynamo.reset()
    case = inputs.make_varlen([20])

    def step(index_query):
        return msa.select_blocks(index_query, case.index_key, **case.lengths) + 1

    torch.compile(step, fullgraph=True, backend="aot_eager")(case.index_query)
    assert len(log()) == 1


def test_nothing_is_logged_where_the_log_is_off(inputs, log, monkeypatch):
    for value in ("0", ""):
        monkeypatch.setenv("MINIMAX_M3_MSA_LOG", value)
        select(inputs, [20])
    assert log() == []


def test_lines_go_to_stderr(tmp_path):
    code = """
import torch
from modeling_minimax_m3 import msa
offsets = torch.tensor([0, 5], dtype=torch.int32)
for _ in range(2):
    msa.select_blocks(torch.randn(5, 2, 16), torch.randn(5, 16), cu_seqlens_q=offsets, cu_seqlens_k=offsets)
"""
    done = run_python("-c", code, folder=tmp_path, MINIMAX_M3_MSA_LOG="1")
    assert done.returncode == 0, done.stderr
    line = f"modeling_minimax_m3.msa: select_blocks (float32, cpu) runs on `torch` (PyTorch, packed): {NOT_ON_CUDA}"
    assert done.stderr.splitlines() == [line]
    assert done.stdout == ""
