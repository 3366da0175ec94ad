"""The language-modelling loss: it equals the plain loss on all logits, and never holds all logits."""

import copy
import os
import tempfile
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM
from modeling_minimax_m3.fused import softmax_loss
from modeling_minimax_m3.msa import extension
from modeling_minimax_m3.training import language_loss
from modeling_minimax_m3.training.language_loss import _PlainHeadLoss, batch_share, causal_lm_loss

from ..forked_processes import fork_server

BATCH, TOKENS, HIDDEN, VOCABULARY = 3, 50, 16, 97


class OtherHead(nn.Linear):
    """A head of another class, like those of adapters and quantization, which is called as a module."""


def make_case(dtype=torch.float32, head_class=nn.Linear):
    torch.manual_seed(0)
    head = head_class(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
    hidden_states = torch.randn(BATCH, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (BATCH, TOKENS))
    labels[0, :20] = -100  # a prompt
    labels[1, 40:] = -100  # padding
    labels[2] = -100  # nothing to learn in the whole row
    labels[2, 7] = 5
    return head, hidden_states, labels


def plain_loss(head, hidden_states, labels, **kwargs):
    return ForCausalLMLoss(head(hidden_states), labels, VOCABULARY, **kwargs)


def plain_loss_of_any_vocabulary(head, hidden_states, labels, **kwargs):
    return ForCausalLMLoss(head(hidden_states), labels, head.out_features, **kwargs)


def gradients(loss_function, head, hidden_states, labels, **kwargs):
    head.zero_grad()
    hidden_states.grad = None
    loss = loss_function(head, hidden_states, labels, **kwargs)
    loss.backward()
    return loss.detach(), hidden_states.grad, head.weight.grad


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def tokens_of(config, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, config.get_text_config().vocab_size - 64, (batch, length), generator=generator)


# ---- the function -------------------------------------------------------------------------------------------------


head_classes = pytest.mark.parametrize("head_class", [nn.Linear, OtherHead])


@head_classes
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("num_items", [None, 123, torch.tensor(123)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_equal_the_plain_loss(head_class, chunk_tokens, num_items):
    case = make_case(head_class=head_class)
    expected = gradients(plain_loss, *case, num_items_in_batch=num_items)
    actual = gradients(causal_lm_loss, *case, num_items_in_batch=num_items, chunk_tokens=chunk_tokens)
    for got, wanted in zip(actual, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_labels_that_are_shifted_already_and_another_ignored_id():
    head, hidden_states, labels = make_case()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = causal_lm_loss(head, hidden_states, labels)
    torch.testing.assert_close(causal_lm_loss(head, hidden_states, None, shift_labels=shifted), expected)
    renamed = labels.masked_fill(labels == -100, 3)
    wanted = plain_loss(head, hidden_states, renamed, ignore_index=3)
    torch.testing.assert_close(causal_lm_loss(head, hidden_states, renamed, ignore_index=3, chunk_tokens=9), wanted)


@head_classes
def test_bfloat16_is_no_less_accurate_than_the_plain_loss(head_class):
    head, hidden_states, labels = make_case(torch.bfloat16, head_class)

    def measure(loss_function, dtype, **kwargs):
        states = hidden_states.detach().to(dtype).requires_grad_()
        return gradients(loss_function, copy.deepcopy(head).to(dtype), states, labels, **kwargs)

    truth = measure(plain_loss, torch.float64)
    plain = measure(plain_loss, torch.bfloat16)
    chunked = measure(causal_lm_loss, torch.bfloat16, chunk_tokens=8)
    for ours, theirs, wanted in zip(chunked, plain, truth):
        assert error(ours, wanted) <= 2 * error(theirs, wanted) + 1e-6
        assert error(ours, wanted) < 2e-2


@head_classes
def test_autocast(head_class):
    case = make_case(head_class=head_class)
    expected = gradients(plain_loss, *case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(causal_lm_loss, *case, chunk_tokens=8)
    assert {part.dtype for part in actual} == {torch.float32}
    errors = [error(got, wanted) for got, wanted in zip(actual, expected)]
    assert max(errors) < 2e-2
    assert min(errors[1:]) > 1e-4  # the products did run in bfloat16


@pytest.mark.parametrize("frozen", ["head", "states"])
@head_classes
def test_gradients_go_where_they_are_wanted(head_class, frozen):
    head, hidden_states, labels = make_case(head_class=head_class)
    _, hidden_gradient, weight_gradient = gradients(plain_loss, head, hidden_states, labels)
    head.weight.requires_grad_(frozen != "head")
    hidden_states.requires_grad_(frozen != "states")
    _, *actual = gradients(causal_lm_loss, head, hidden_states, labels, chunk_tokens=8)
    expected = [None if frozen == "states" else hidden_gradient, None if frozen == "head" else weight_gradient]
    for got, wanted in zip(actual, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_types_that_do_not_fit_are_an_error():
    head, hidden_states, labels = make_case()
    with pytest.raises(RuntimeError, match="dtype"):
        causal_lm_loss(head.bfloat16(), hidden_states, labels)


def test_second_backward():
    head, hidden_states, labels = make_case()
    loss = causal_lm_loss(head, hidden_states, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        loss.backward()


@head_classes
def test_nothing_to_predict(head_class):
    head, hidden_states, _ = make_case(head_class=head_class)
    labels = torch.full((BATCH, TOKENS), -100)
    assert causal_lm_loss(head, hidden_states, labels).isnan()  # the mean of nothing, as in the plain loss
    loss, hidden_gradient, weight_gradient = gradients(
        causal_lm_loss, head, hidden_states, labels, num_items_in_batch=9
    )
    # gradients of zero, not none at all: data parallelism waits for every parameter
    assert loss == 0
    assert not hidden_gradient.any()
    assert not weight_gradient.any()


class LargestTensor(TorchDispatchMode):
    """Records the size, in elements, of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@head_classes
def test_no_tensor_holds_the_logits_of_all_tokens(head_class):
    tokens, vocabulary, chunk_tokens = 512, 640, 32
    head = head_class(8, vocabulary, bias=False)
    hidden_states = torch.randn(1, tokens, 8, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))
    with LargestTensor() as plain:
        ForCausalLMLoss(head(hidden_states), labels, vocabulary).backward()
    with LargestTensor() as chunked:
        causal_lm_loss(head, hidden_states, labels, chunk_tokens=chunk_tokens).backward()
    assert plain.elements == tokens * vocabulary
    assert chunked.elements == chunk_tokens * vocabulary


def test_compiles_into_one_graph():
    head, hidden_states, labels = make_case()
    expected = gradients(causal_lm_loss, head, hidden_states, labels, chunk_tokens=64)
    compiled = torch.compile(causal_lm_loss, fullgraph=True, backend="aot_eager")
    actual = gradients(compiled, head, hidden_states, labels, chunk_tokens=64)
    for got, wanted in zip(actual, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


class TestKernel:
    """The plain head's loss on a GPU, whose chunks of logits the kernel overwrites with their gradient."""

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch):
        """The number of rows of each call of the kernel."""
        assert extension.load(build=True) is None
        kernel, rows = torch.ops.minimax_m3_msa_cuda.softmax_loss_, []

        def counted(logits, targets, divisor):
            rows.append(logits.shape[0])
            return kernel(logits, targets, divisor)

        monkeypatch.setattr(torch.ops.minimax_m3_msa_cuda, "softmax_loss_", counted)
        return rows

    @staticmethod
    def make(dtype=torch.bfloat16, vocabulary=20008):
        torch.manual_seed(0)
        head = nn.Linear(128, vocabulary, bias=False, device="cuda", dtype=dtype)
        states = (2 * torch.randn(2, 200, 128, device="cuda")).to(dtype).requires_grad_()
        labels = torch.randint(vocabulary, (2, 200), device="cuda")
        labels[0, :20] = -100
        return head, states, labels

    @pytest.mark.parametrize("num_items", [None, 123, torch.tensor(123)], ids=["mean", "int", "tensor"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_loss_and_gradients(self, calls, monkeypatch, num_items, autocast):
        head, states, labels = self.make(torch.float32 if autocast else torch.bfloat16)

        def measure(loss_function, case=(head, states, labels), **kwargs):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast and case[0].weight.dtype != torch.float64):
                results = gradients(loss_function, *case, num_items_in_batch=num_items, **kwargs)
            return [result.clone() for result in results]

        exact = copy.deepcopy(head).double(), states.detach().double().requires_grad_(), labels
        truth = measure(plain_loss_of_any_vocabulary, exact)
        ours = measure(causal_lm_loss, chunk_tokens=64)
        assert calls == [64, 64, 64, 64, 64, 59]
        again = measure(causal_lm_loss, chunk_tokens=64)
        assert all(torch.equal(first, second) for first, second in zip(ours, again))
        calls.clear()
        monkeypatch.setattr(softmax_loss, "kernels_take", lambda *tensors: False)
        theirs = measure(causal_lm_loss, chunk_tokens=64)
        assert not calls
        for with_kernel, without, wanted in zip(ours, theirs, truth):
            assert with_kernel.dtype == without.dtype
            assert error(with_kernel, wanted) <= 1.5 * error(without, wanted) + 1e-6
            assert error(with_kernel, wanted) < 2e-2

    def test_a_vocabulary_that_the_kernel_does_not_take(self, calls):
        case = self.make(vocabulary=20001)
        expected = gradients(plain_loss_of_any_vocabulary, *case)
        expected = [result.clone() for result in expected]
        for got, wanted in zip(gradients(causal_lm_loss, *case, chunk_tokens=64), expected):
            assert error(got, wanted) < 2e-2
        assert not calls

    @pytest.mark.parametrize("is_tensor", [False, True], ids=["int", "tensor"])
    def test_the_host_does_not_wait(self, calls, is_tensor):
        head, states, labels = self.make()
        num_items = torch.tensor(400, device="cuda") if is_tensor else 400
        inputs = states.flatten(0, 1), head.weight, labels.flatten().clamp(min=0), num_items, 64
        _PlainHeadLoss.apply(*inputs)  # what a first call sets up may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            _PlainHeadLoss.apply(*inputs).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(calls) == 14


# ---- the models ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[MiniMaxM3VLForCausalLM, MiniMaxM3SparseForConditionalGeneration])
def model(request):
    torch.manual_seed(0)
    config = tiny_config(text={"num_hidden_layers": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1})
    return request.param(config if "Conditional" in request.param.__name__ else config.text_config)


def loss_gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    return output, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_same_training(model, **inputs):
    """The loss without logits, training's default, equals the loss on logits, and so do the gradients."""
    with_logits, expected = loss_gradients(model, **inputs, skip_logits=False)
    without, actual = loss_gradients(model, **inputs)
    assert with_logits.logits is not None
    assert without.logits is None
    torch.testing.assert_close(without.loss, with_logits.loss, rtol=1e-6, atol=0)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_training_does_without_logits(model, monkeypatch):
    monkeypatch.setitem(causal_lm_loss.__kwdefaults__, "chunk_tokens", 16)
    input_ids = tokens_of(model.config, 2, 40)
    mask = torch.ones_like(input_ids)
    mask[1, 30:] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    assert_same_training(model.train(), input_ids=input_ids, attention_mask=mask, labels=labels)


def test_evaluation_has_logits_unless_told_otherwise(model):
    model.eval()
    input_ids = tokens_of(model.config, 1, 12)
    evaluated = model(input_ids=input_ids, labels=input_ids)
    assert evaluated.logits.shape == (1, 12, model.config.get_text_config().vocab_size)
    alone = model(input_ids=input_ids, labels=input_ids, skip_logits=True)
    assert alone.logits is None
    torch.testing.assert_close(alone.loss, evaluated.loss)
    model.skip_logits = True
    assert model(input_ids=input_ids, labels=input_ids).logits is None
    assert model(input_ids=input_ids).logits is not None
    assert model(input_ids=input_ids, labels=input_ids, skip_logits=False).logits is not None
    model.skip_logits = False
    assert model.train()(input_ids=input_ids, labels=input_ids).logits is not None


def test_loss_alone_needs_labels(model):
    with pytest.raises(ValueError, match="skip_logits=True` asks for the loss alone, which needs `labels`"):
        model(input_ids=tokens_of(model.config, 1, 5), skip_logits=True)


def test_loss_function_of_ones_own_gets_logits(model):
    model.train()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + vocab_size
    input_ids = tokens_of(model.config, 1, 5)
    output = model(input_ids=input_ids, labels=input_ids)
    assert output.logits is not None
    assert output.loss > model.config.get_text_config().vocab_size
    with pytest.raises(ValueError, match="loss_function"):
        model(input_ids=input_ids, labels=input_ids, skip_logits=True)


def test_labels_of_another_shape(model):
    input_ids = tokens_of(model.config, 1, 9)
    for mode in (model.train(), model.eval()):
        with pytest.raises(ValueError, match=r"shape \(1, 1\), got \(1, 9\).*logits_to_keep"):
            mode(input_ids=input_ids, labels=input_ids, logits_to_keep=1)


def test_heads_that_are_adapted_resized_or_tied():
    from peft import LoraConfig, get_peft_model

    config = tiny_config(text={"num_hidden_layers": 2, "tie_word_embeddings": True}).text_config
    input_ids = tokens_of(config, 2, 30)
    inputs = {"input_ids": input_ids, "labels": input_ids}
    torch.manual_seed(0)
    tied = MiniMaxM3VLForCausalLM(copy.deepcopy(config))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert_same_training(tied.train(), **inputs)

    config.tie_word_embeddings = False
    resized = MiniMaxM3VLForCausalLM(config)
    resized.resize_token_embeddings(config.vocab_size + 8, mean_resizing=False)
    assert_same_training(resized.train(), **inputs)

    for kind in ({}, {"use_dora": True}):
        adapters = LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False, **kind)
        adapted = get_peft_model(copy.deepcopy(resized), adapters)
        assert_same_training(adapted.train(), **inputs)
    saved = get_peft_model(adapted.unload(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert_same_training(saved.train(), **inputs)


# ---- parts of a batch ---------------------------------------------------------------------------------------------


def test_share_of_a_batch():
    labels = torch.tensor([[7, -100, 3, 4], [5, 6, -100, -100]])  # predicts 3, 4 and 6
    cpu = torch.device("cpu")
    assert batch_share(labels, cpu) == 1
    assert batch_share(labels, cpu, num_items_in_batch=12, use_cache=False) == 0.25
    assert batch_share(labels, cpu, num_items_in_batch=torch.tensor(6)) == 0.5
    assert batch_share(labels, cpu, num_items_in_batch=10, shift_labels=labels) == 0.5


@pytest.mark.parametrize("pads", [False, True], ids=["prompts", "pads"])
@pytest.mark.parametrize("num_items", [0, torch.tensor(0), 5], ids=["none", "none, tensor", "elsewhere"])
def test_nothing_to_learn_leaves_every_gradient_finite(model, pads, num_items):
    """A micro-batch, or a whole step, without a label: a NaN in one gradient would spoil all weights by clipping."""
    model.set_indexer_training(0.1)
    model.train()
    rows = tokens_of(model.config, 2, 20)
    outputs = model(
        input_ids=rows,
        attention_mask=torch.full_like(rows, not pads),
        labels=torch.full_like(rows, -100),
        num_items_in_batch=num_items,
        output_router_logits=True,
    )
    outputs.loss.backward()
    assert outputs.aux_loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_micro_batches_add_up_to_the_batch(model):
    model.train()
    rows = tokens_of(model.config, 1, 40).expand(4, -1)  # the balance of the experts is that of each micro-batch
    num_items = 4 * 39
    _, expected = loss_gradients(model, input_ids=rows, labels=rows)
    expected = {name: value.clone() for name, value in expected.items()}
    model.zero_grad()
    for part in rows.split([1, 3]):
        model(input_ids=part, labels=part, num_items_in_batch=num_items).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)


# ---- sharded heads ------------------------------------------------------------------------------------------------


def test_head_that_gathers_its_weight_is_called_once(monkeypatch):
    head, hidden_states, labels = make_case()
    expected = gradients(causal_lm_loss, head, hidden_states, labels)
    calls = []
    head.register_forward_hook(lambda *args: calls.append(args))
    head.weight.ds_id = 0  # how DeepSpeed marks a parameter that it has sharded
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    actual = gradients(causal_lm_loss, head, hidden_states, labels, chunk_tokens=5)
    assert len(calls) == 1
    assert "forward" not in vars(head)
    for got, wanted in zip(actual, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("change", ["forward hook", "hook of all modules", "bias", "no gradient", "float64"])
def test_heads_that_are_not_plain_are_called(change, request):
    head, hidden_states, labels = make_case()
    calls = []
    if "hook" in change:
        register = nn.modules.module.register_module_forward_hook if "all" in change else head.register_forward_hook
        hook = register(lambda module, args, output: calls.append(1) or 2 * output if module is head else None)
        request.addfinalizer(hook.remove)
    elif change == "bias":
        head.bias = nn.Parameter(torch.randn(VOCABULARY))
    elif change == "float64":
        head, hidden_states = head.double(), hidden_states.detach().double().requires_grad_()
    with torch.set_grad_enabled(change != "no gradient"):
        expected = plain_loss(head, hidden_states, labels)
        torch.testing.assert_close(causal_lm_loss(head, hidden_states, labels, chunk_tokens=9), expected)
    assert len(calls) == (2 + 67 // 9 if "hook" in change else 0)


def run_rank(rank: int, world_size: int, folder: str, dtype: torch.dtype, frozen: bool) -> None:
    """One process: a sharded head on tokens of its own, in another number of chunks than the other process has."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
    )
    head, hidden_states, labels = make_case(dtype)
    head.weight.requires_grad_(not frozen)
    _, of_states, of_weight = gradients(causal_lm_loss, head, hidden_states, labels)
    policy = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=dtype)
    fully_shard(head, mesh=torch.distributed.init_device_mesh("cpu", (world_size,)), mp_policy=policy)
    mine = slice(0, 2) if rank == 0 else slice(2, 3)  # 68 predictions and one
    states = hidden_states.detach()[mine].requires_grad_()
    num_items = (labels[:, 1:] != -100).sum()
    with mock.patch.object(language_loss, "_summed_loss", side_effect=AssertionError("computed the logits twice")):
        loss = causal_lm_loss(head, states, labels[mine], num_items_in_batch=num_items, chunk_tokens=5)
    loss.backward()
    assert "forward" not in vars(head)
    found, expected = states.grad.double(), of_states[mine].double()
    # `output_dtype` rounds the loss, and nothing that all gradients are multiplied by: 1 / 69 would change by 0.2%.
    assert abs((found * expected).sum() / expected.square().sum() - 1) < 5e-4
    torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-6)
    if frozen:
        assert head.weight.grad is None
    else:  # FSDP averages over ranks, where the one process adds
        whole = head.weight.grad.full_tensor() * world_size
        torch.testing.assert_close(whole, of_weight, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-6)
    torch.distributed.barrier()
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a process that is done.
    os._exit(0)


@pytest.mark.parametrize(
    ("dtype", "frozen"), [(torch.float32, False), (torch.bfloat16, True)], ids=["trained", "frozen"]
)
def test_fsdp_ranks_with_different_numbers_of_chunks(dtype, frozen):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder, fork_server():
        arguments = (2, folder, dtype, frozen)
        torch.multiprocessing.start_processes(run_rank, arguments, nprocs=2, start_method="forkserver")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize("head", ["text", "composite"])
def test_padding_does_not_change_the_loss(head, skip_logits, side):
    """The last padding token to the left of a row predicts nothing, though the row's first token follows it."""
    torch.manual_seed(0)
    config = tiny_config()
    model = (
        MiniMaxM3VLForCausalLM(config.text_config)
        if head == "text"
        else MiniMaxM3SparseForConditionalGeneration(config)
    ).train()
    rows = [tokens_of(model.config, 1, length, seed=length) for length in (23, 40)]
    alone = [model(row, labels=row, skip_logits=skip_logits).loss * (row.shape[1] - 1) for row in rows]
    expected = sum(alone) / (22 + 39)
    pads = torch.full((1, 17), 1)
    short = torch.cat((pads, rows[0]) if side == "left" else (rows[0], pads), dim=1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, slice(17) if side == "left" else slice(23, None)] = 0
    tokens = torch.cat((short, rows[1]))
    labels = tokens.masked_fill(mask == 0, -100)
    loss = model(tokens, attention_mask=mask, labels=labels, skip_logits=skip_logits).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
