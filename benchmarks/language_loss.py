"""The language loss with and without logits on one GPU: `python -m benchmarks.language_loss [--output PATH]`.

Head and loss alone, forward and backward, bf16, the released vocabulary. The baseline, "plain", is Transformers'
`ForCausalLMLoss` on the logits of all tokens. The other rows are `causal_lm_loss`, once on a plain linear head, and
once on a head that it calls as a module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_minimax_m3.training.language_loss import causal_lm_loss

from .gpu import Run, parse_arguments
from .report import as_table

VOCABULARY = 200064
HIDDEN = (6144, 2048)  # the released size, and the size of a model of about 1B parameters
TOKENS = (8192, 32768)
REPEATS = 3


class CalledHead(nn.Linear):
    """A linear layer that `causal_lm_loss` does not recognise as one, as a layer with adapters."""


def plain_loss(head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ForCausalLMLoss(head(hidden_states), labels, VOCABULARY)


METHODS: dict[str, tuple[type[nn.Linear], Callable[..., torch.Tensor]]] = {
    "plain": (nn.Linear, plain_loss),
    "without logits": (nn.Linear, causal_lm_loss),
    "without logits, head as a module": (CalledHead, causal_lm_loss),
}


def measure(method: str, hidden: int, tokens: int, train_head: bool) -> dict[str, Any]:
    """Milliseconds, memory beyond weights and hidden states, and the results, or the reason of a failure."""
    head_class, loss_function = METHODS[method]
    generator = torch.Generator("cuda").manual_seed(0)
    head = head_class(hidden, VOCABULARY, bias=False, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=generator)
    head.weight.requires_grad_(train_head)
    states = torch.randn(1, tokens, hidden, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (1, tokens), device="cuda", generator=generator)
    before = torch.cuda.memory_allocated()
    times = []
    try:
        for _ in range(REPEATS + 1):
            head.weight.grad = states.grad = None
            torch.cuda.reset_peak_memory_stats()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            loss = loss_function(head, states, labels)
            loss.backward()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    return {
        "ms": sorted(times[1:])[REPEATS // 2],
        "GiB": (torch.cuda.max_memory_allocated() - before) / 2**30,
        "loss": loss.item(),
        "hidden gradient": states.grad.float().norm().item(),
        "head gradient": head.weight.grad.float().norm().item() if train_head else None,
    }


def disagreement(row: dict[str, Any], plain: dict[str, Any]) -> float:
    """The largest relative difference between two rows, of the loss and of the norms of its gradients."""
    names = [name for name in ("loss", "hidden gradient", "head gradient") if plain.get(name) is not None]
    return max(abs(row[name] / plain[name] - 1) for name in names)


def tables(record: dict) -> str:
    rows = []
    for row in record["rows"]:
        head = f"{row['hidden']}, {'trained' if row['train_head'] else 'frozen'}"
        figures = [row["failed"], "-"] if "failed" in row else [f"{row['ms']:.0f}", f"{row['GiB']:.1f}"]
        rows.append([head, str(row["tokens"]), row["method"], *figures])
    return f"bf16, vocabulary {VOCABULARY}.\n\n" + as_table(["head", "tokens", "loss", "ms", "GiB"], rows)


def main() -> None:
    arguments = parse_arguments("language_loss", "Time the language-modelling loss with and without logits.")
    run = Run("language_loss", arguments, tables)
    rows = run.record["rows"] = []

    def case(hidden: int, train_head: bool, tokens: int, method: str) -> None:
        setting = {"hidden": hidden, "train_head": train_head, "tokens": tokens}
        row = setting | {"method": method} | measure(method, hidden, tokens, train_head)
        others = [other for other in rows if setting.items() <= other.items() and "failed" not in other]
        if others and "failed" not in row and disagreement(row, others[0]) > 1e-3:
            raise RuntimeError(f"the results of {row} and {others[0]} disagree")
        rows.append(row)

    run.cases(
        [
            (hidden, train_head, tokens, method)
            for hidden in HIDDEN
            for train_head in (True, False)
            for tokens in TOKENS
            for method in METHODS
        ],
        case,
    )
    run.finish()


if __name__ == "__main__":
    main()
