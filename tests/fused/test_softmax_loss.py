"""Cross-entropy with its gradient in the logits' place: its definition, which calls the kernel takes, and the kernel."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_minimax_m3.fused import softmax_loss
from modeling_minimax_m3.fused.softmax_loss import softmax_loss_, softmax_loss_reference_

VOCABULARY = 200064
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Of the gradient after one rounding, relative to its norm.
TOLERANCES = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6}

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]


def make(rows, width, dtype=torch.float32, *, seed=0, scale=4.0, shift=0.0, divisor=37.0, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(rows, width, generator=generator, device=device) * scale + shift
    targets = torch.randint(width, (rows,), generator=generator, device=device)
    if rows > 1:
        targets[0], targets[-1] = 0, width - 1
    return logits.to(dtype), targets, torch.tensor(divisor, device=device)


def naive(logits, targets, divisor):
    """The loss and its gradient in float64."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return losses.detach(), gradient / divisor.double()


def loss_and_gradient(function, logits, targets, divisor):
    gradient = logits.clone()
    return function(gradient, targets, divisor), gradient


def gradient_error(gradient, expected, divisor):
    """Relative to the norm; where every target is almost certain, to that of a row whose target is unlikely."""
    assert gradient.shape == expected.shape
    return ((gradient.double() - expected).norm() / expected.norm().clamp_min(1 / divisor.item())).item()


def assert_same_losses(losses, expected):
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)


def special_logits(width, dtype, device="cpu"):
    """Rows with infinity, NaN and far outliers in all sorts of places, and targets on and beside those places."""
    inf, nan, largest = math.inf, math.nan, torch.finfo(dtype).max
    last = width - 1
    changes = [
        {0: inf},
        {0: inf, last: inf},
        {last: -inf},
        {0: nan},
        {last: nan},
        {0: inf, last: nan},
        {0: inf, last: -inf},
        {0: 500.0},
        {last: largest},
        {0: -largest},
        {0: largest, last: -largest},
    ]
    background = torch.randn(width, generator=torch.Generator().manual_seed(0))
    nothing = torch.full((width,), -inf)
    rows = [(start, change) for change in changes for start in (background, nothing)]
    rows += [(nothing, {}), (torch.zeros(width), {}), (torch.full((width,), inf), {})]
    logits = torch.stack([start for start, _ in rows])
    for row, (_, change) in zip(logits, rows):
        for column, value in change.items():
            row[column] = value
    targets = torch.tensor([0, 3, last]).repeat_interleave(len(rows))
    return logits.repeat(3, 1).to(device, dtype), targets.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divisor", [1.0, 37.0])
def test_reference_is_the_formula(dtype, divisor):
    inputs = make(17, 97, dtype, divisor=divisor)
    losses, gradient = loss_and_gradient(softmax_loss_reference_, *inputs)
    expected_losses, expected_gradient = naive(*inputs)
    assert_same_losses(losses, expected_losses)
    assert gradient_error(gradient, expected_gradient, inputs[2]) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_runs_the_reference(dtype):
    inputs = make(5, 64, dtype)
    for actual, expected in zip(
        loss_and_gradient(softmax_loss_, *inputs), loss_and_gradient(softmax_loss_reference_, *inputs)
    ):
        assert torch.equal(actual, expected)


def test_no_rows():
    logits, targets, divisor = make(3, 16)
    assert softmax_loss_(logits[:0], targets[:0], divisor).shape == (0,)


def test_which_tensors_the_kernel_takes(monkeypatch):
    logits, targets, divisor = make(4, 64, torch.bfloat16)

    def is_supported(logits=logits, targets=targets, divisor=divisor):
        return softmax_loss._are_supported(logits, targets, divisor)

    assert is_supported()
    assert is_supported(logits=logits.float()) and is_supported(logits=logits.half())
    assert not is_supported(logits=logits.double())
    assert not is_supported(logits=logits[:, :56]), "rows of a wider tensor"
    assert not is_supported(logits=logits.flatten()[4:68].view(1, 64)), "no multiple of 16 bytes"
    assert not is_supported(logits=logits[:, :60].contiguous()), "width 60"
    assert not is_supported(logits=logits[:, :0])
    assert not is_supported(targets=targets.int())
    assert not is_supported(targets=targets.repeat_interleave(2)[::2])
    assert not is_supported(divisor=divisor.double())
    assert not is_supported(divisor=divisor[None])
    calls = []
    monkeypatch.setattr(softmax_loss, "kernels_take", lambda *tensors: True)
    monkeypatch.setattr(
        torch.ops.minimax_m3_msa_cuda, "softmax_loss_", lambda *args: calls.append(args), raising=False
    )
    softmax_loss_(logits, targets, divisor)
    assert calls == [(logits, targets, divisor)]


class TestKernel:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows", [1, 2, 3, 17, 1000])
    # a step of a thread block is 16,384 columns
    @pytest.mark.parametrize("width", [8, 40, 4104, 16376, 16384, 16392, 40968])
    def test_values(self, width, rows, dtype):
        logits, targets, divisor = make(rows, width, dtype, seed=rows + width, device="cuda")
        around = torch.full((rows * width + 128,), -7.25, dtype=dtype, device="cuda")
        gradient = around[64:-64].view(rows, width)
        gradient.copy_(logits)
        assert softmax_loss._are_supported(gradient, targets, divisor)
        torch.empty(rows, device="cuda").fill_(math.nan)  # the losses lie in this memory
        losses = softmax_loss_(gradient, targets, divisor)
        assert (around[:64] == -7.25).all() and (around[-64:] == -7.25).all()

        expected_losses, expected_gradient = naive(logits, targets, divisor)
        _, stepwise = loss_and_gradient(softmax_loss_reference_, logits, targets, divisor)
        assert_same_losses(losses, expected_losses)
        error = gradient_error(gradient, expected_gradient, divisor)
        assert error < TOLERANCES[dtype]
        assert error <= 1.5 * gradient_error(stepwise, expected_gradient, divisor) + 3e-7
        again = loss_and_gradient(softmax_loss_, logits, targets, divisor)
        assert torch.equal(again[0], losses) and torch.equal(again[1], gradient)

    @pytest.mark.parametrize("shift", [0.0, 1000.0, -500.0])
    @pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_small_and_large_logits(self, dtype, scale, shift):
        inputs = make(33, 20008, dtype, scale=scale, shift=shift, divisor=1.0, device="cuda")
        losses, gradient = loss_and_gradient(softmax_loss_, *inputs)
        expected_losses, expected_gradient = naive(*inputs)
        assert_same_losses(losses, expected_losses)
        assert gradient_error(gradient, expected_gradient, inputs[2]) < TOLERANCES[dtype]

    @pytest.mark.parametrize("seed", range(3))
    def test_released_vocabulary(self, seed, needs_memory):
        needs_memory(16)
        inputs = make(1024, VOCABULARY, torch.bfloat16, seed=seed, divisor=8192.0, device="cuda")
        losses, gradient = loss_and_gradient(softmax_loss_, *inputs)
        expected_losses, expected_gradient = naive(*inputs)
        assert_same_losses(losses, expected_losses)
        assert gradient_error(gradient, expected_gradient, inputs[2]) < TOLERANCES[torch.bfloat16]
        del expected_gradient
        again = loss_and_gradient(softmax_loss_, *inputs)
        assert torch.equal(again[0], losses) and torch.equal(again[1], gradient)

    @pytest.mark.parametrize("width", [8, 16392])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_special_values(self, dtype, width):
        logits, targets = special_logits(width, dtype, "cuda")
        for number in (1.0, -2.0, math.inf, math.nan):
            divisor = torch.tensor(number, device="cuda")
            losses, gradient = loss_and_gradient(softmax_loss_, logits, targets, divisor)
            # float64, in which the reference's formula loses nothing beside the largest numbers
            values = logits.double()
            log_normalizer = values.logsumexp(1, keepdim=True)
            expected = (log_normalizer - values.gather(1, targets[:, None])).squeeze(1).float()
            torch.testing.assert_close(losses, expected, equal_nan=True)
            share = (values - log_normalizer).exp()
            share.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], -1, dtype=torch.float64))
            torch.testing.assert_close(gradient, (share / divisor).to(dtype), equal_nan=True)

    def test_targets_that_are_no_columns(self):
        logits, targets, divisor = make(6, 4104, torch.bfloat16, device="cuda")
        expected = loss_and_gradient(softmax_loss_, logits[-1:].clone(), targets[-1:], divisor)
        targets[:5] = torch.tensor([-1, 4104, -100, 2**31 + 3, 2**62], device="cuda")
        losses, gradient = loss_and_gradient(softmax_loss_, logits, targets, divisor)
        assert losses[:5].isnan().all() and gradient[:5].isnan().all()
        assert torch.equal(losses[5:], expected[0]) and torch.equal(gradient[5:], expected[1])

    def test_other_tensors_take_the_reference(self):
        logits, targets, divisor = make(17, 128, torch.bfloat16, device="cuda")
        for part in (logits[:, :64], logits[:, :60].contiguous()):
            expected = loss_and_gradient(softmax_loss_reference_, part, targets % 60, divisor)
            wide = torch.zeros_like(logits)
            place = wide[:, : part.shape[1]]
            place.copy_(part)
            assert torch.equal(softmax_loss_(place, targets % 60, divisor), expected[0])
            assert torch.equal(place, expected[1])
            assert not wide[:, part.shape[1] :].any()

    def test_no_rows(self):
        logits, targets, divisor = make(3, 64, torch.bfloat16, device="cuda")
        assert softmax_loss_(logits[:0], targets[:0], divisor).shape == (0,)

    def test_more_than_2_to_the_31_elements(self, needs_memory):
        needs_memory(12)
        rows = 2**31 // VOCABULARY + 2
        logits = torch.zeros(rows, VOCABULARY, dtype=torch.bfloat16, device="cuda")
        last, targets, divisor = make(1, VOCABULARY, torch.bfloat16, device="cuda")
        logits[-1:] = last
        losses = softmax_loss_(logits, targets.repeat(rows), divisor)
        expected = softmax_loss_(last, targets, divisor)
        assert torch.equal(losses[-1:], expected) and torch.equal(logits[-1:], last)
        torch.testing.assert_close(losses[:-1], torch.full_like(losses[:-1], math.log(VOCABULARY)))

    def test_captured_in_a_graph_and_repeated(self):
        source, targets, divisor = make(19, 4104, torch.bfloat16, device="cuda")
        work = torch.empty_like(source)
        loss_and_gradient(softmax_loss_, source, targets, divisor)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work.copy_(source)
            losses = softmax_loss_(work, targets, divisor)
            second = softmax_loss_(work, targets, divisor)  # reads what the one before wrote
        for seed in range(3):
            source.copy_(make(19, 4104, torch.bfloat16, seed=seed, device="cuda")[0])
            graph.replay()
            expected_losses, gradient = loss_and_gradient(softmax_loss_, source, targets, divisor)
            torch.cuda.synchronize()
            assert torch.equal(losses, expected_losses)
            assert torch.equal(second, softmax_loss_(gradient, targets, divisor))
            assert torch.equal(work, gradient)

    def test_schema(self):
        torch.library.opcheck(
            torch.ops.minimax_m3_msa_cuda.softmax_loss_.default,
            make(5, 64, torch.bfloat16, device="cuda"),
            test_utils="test_schema",
        )
