"""The language-modelling loss with and without logits on one GPU: `python -m benchmarks.language_loss [--output NAME]`.

Head and loss alone, forward and backward, bf16, the released vocabulary. Plain is Transformers' `ForCausalLMLoss` on the
logits of all tokens; the others are `causal_lm_loss`, on a plain linear head, and on one that it calls as a module.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_minimax_m3.language_loss import causal_lm_loss

from .measure import environment

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 200064
HIDDEN = (6144, 2048)  # the released size, and that of a model of about 1B parameters
TOKENS = (8192, 32768)
REPEATS = 3


class CalledHead(nn.Linear):
    """A linear layer that is not known to be one, as with adapters."""


def plain_loss(head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ForCausalLMLoss(head(hidden_states), labels, VOCABULARY)


METHODS: dict[str, tuple[type[nn.Linear], Callable[..., torch.Tensor]]] = {
    "plain": (nn.Linear, plain_loss),
    "without logits": (nn.Linear, causal_lm_loss),
    "without logits, head as a module": (CalledHead, causal_lm_loss),
}


def measure(method: str, hidden: int, tokens: int, train_head: bool) -> dict[str, Any]:
    """Milliseconds, memory beyond weights and hidden states, and what came out, or why nothing did."""
    head_class, loss_function = METHODS[method]
    torch.cuda.empty_cache()
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
    """Largest relative difference of the loss and of the gradients' norms from the plain loss's."""
    names = [name for name in ("loss", "hidden gradient", "head gradient") if plain.get(name) is not None]
    return max(abs(row[name] / plain[name] - 1) for name in names)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| head | tokens | loss | ms | GiB |", "| --- | ---: | --- | ---: | ---: |"]
    for row in rows:
        head = f"{row['hidden']}, {'trained' if row['train_head'] else 'frozen'}"
        figures = row.get("failed") or f"{row['ms']:.0f} | {row['GiB']:.1f}"
        lines.append(f"| {head} | {row['tokens']} | {row['method']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the language-modelling loss with and without logits on a GPU.")
    parser.add_argument("--output", type=Path, default=RESULTS / "language_loss", help="file without its ending")
    output = parser.parse_args().output
    rows = []
    for hidden in HIDDEN:
        for train_head in (True, False):
            for tokens in TOKENS:
                plain = None
                for method in METHODS:
                    row = {"hidden": hidden, "train_head": train_head, "tokens": tokens, "method": method}
                    rows.append(row | measure(method, hidden, tokens, train_head))
                    plain = plain or rows[-1]
                    if "failed" not in rows[-1] and "failed" not in plain and disagreement(rows[-1], plain) > 1e-3:
                        raise RuntimeError(f"{rows[-1]} disagrees with {plain}")
                    print(rows[-1], flush=True)
    report = {"environment": environment(), "device": torch.cuda.get_device_name()}
    report |= {"command": shlex.join(["python", "-m", "benchmarks.language_loss", *sys.argv[1:]]), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    title = (
        f"# Language-modelling loss, forward and backward\n\n{report['device']}, bf16, vocabulary {VOCABULARY}.\n\n"
    )
    output.with_suffix(".md").write_text(title + table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
