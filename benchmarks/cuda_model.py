"""Training steps of a small MiniMax-M3 beside stock's on a GPU: `python -m benchmarks.cuda_model [--output NAME]`.

About one billion parameters with the released vocabulary, bf16, gradient checkpointing and AdamW in both, batch 1.
Stock runs at growing lengths until it needs more memory than the card has. Ours runs at the longest length that stock
completes, and at eight times that length. Each length runs in a process of its own.
"""

import json
import subprocess
import sys
import time
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from .gpu import Run, parse_arguments, require_gpu
from .implementations import OURS, STOCK, classes, text_config
from .report import as_table

NUM_LAYERS, NUM_DENSE = 14, 2
GEOMETRY = {
    "hidden_size": 1024,
    "num_hidden_layers": NUM_LAYERS,
    "layer_types": ["full_attention"] * NUM_DENSE + ["minimax_m3_sparse"] * (NUM_LAYERS - NUM_DENSE),
    "mlp_layer_types": ["dense"] * NUM_DENSE + ["sparse"] * (NUM_LAYERS - NUM_DENSE),
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "index_n_heads": 2,
    "index_head_dim": 128,
    "index_block_size": 128,
    "index_topk_blocks": 16,
    "dense_intermediate_size": 4096,
    "intermediate_size": 512,
    "shared_intermediate_size": 512,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
}
LENGTHS = (8192, 12288, 16384, 20480)
STEPS = 3  # after one warm-up step
LONGER = 8  # the second length of ours, as a multiple of stock's longest
OUR_LENGTHS = {"stock's longest": 1, f"{LONGER} times that": LONGER}


def train(implementation: str, tokens: int) -> dict[str, Any]:
    """Runs a few training steps, and measures seconds per step, tokens per second and peak GiB."""
    config = text_config(implementation, MiniMaxM3VLTextConfig(**GEOMETRY))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = classes(implementation).MiniMaxM3VLForCausalLM(config).bfloat16()
    model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (1, tokens), device="cuda")
    seconds = []
    for _ in range(1 + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = sorted(seconds[1:])[STEPS // 2]
    return {
        "implementation": implementation,
        "tokens": tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": step,
        "tokens_per_second": tokens / step,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": loss.item(),
    }


def in_own_process(implementation: str, tokens: int) -> dict[str, Any] | None:
    """Runs `train` in a new process. None means that it ran out of memory."""
    command = [sys.executable, "-m", "benchmarks.cuda_model", "--only", implementation, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" not in done.stderr:
        raise RuntimeError(done.stderr[-2000:])
    return None


def tables(record: dict) -> str:
    """Speed and memory at each length, and for ours their ratios to stock at its longest length."""
    stock = [row for row in record["rows"] if row["implementation"] == STOCK]
    rows = []
    for row in record["rows"]:
        figures = row["tokens_per_second"], row["peak_gib"]
        longest = (stock[-1]["tokens_per_second"], stock[-1]["peak_gib"]) if stock else None
        ratios = ["-", "-"]
        if row["implementation"] == OURS and longest:
            ratios = [f"{figure / other:.3g}" for figure, other in zip(figures, longest)]
        rows.append([row["implementation"], str(row["tokens"]), f"{figures[0]:.0f}", f"{figures[1]:.1f}", *ratios])
    rows += [[*label.split(", "), "out of memory", "-", "-", "-"] for label in record["out_of_memory"]]
    size = f"{record['rows'][0]['parameters'] / 1e9:.2f}B parameters.\n\n" if record["rows"] else ""
    ratio_of = "over stock's at its longest"
    return size + as_table(["", "tokens", "tokens/s", "peak GiB", f"tokens/s {ratio_of}", f"GiB {ratio_of}"], rows)


def main() -> None:
    def add(parser) -> None:
        parser.add_argument(
            "--only", choices=(STOCK, OURS), help="measure one implementation and print a line of JSON"
        )
        parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="lengths to try with stock")

    arguments = parse_arguments("cuda_model", "Time training steps of a small model beside stock's.", add)
    if arguments.only:
        require_gpu()
        print(json.dumps(train(arguments.only, arguments.tokens[0])))
        return
    run = Run("cuda_model", arguments, tables)
    run.record |= {"rows": [], "out_of_memory": []}

    def case(implementation: str, tokens: int | str) -> None:
        ended = run.record["out_of_memory"]
        if implementation == STOCK and ended:
            return
        if implementation == OURS:
            of_stock = [row["tokens"] for row in run.record["rows"] if row["implementation"] == STOCK]
            if not of_stock:
                raise RuntimeError("stock completed no length, so there is no length for ours")
            tokens = OUR_LENGTHS[tokens] * of_stock[-1]
        row = in_own_process(implementation, tokens)
        if row is None:
            ended.append(f"{implementation}, {tokens}")
        else:
            run.record["rows"].append(row)

    run.cases([(STOCK, tokens) for tokens in arguments.tokens] + [(OURS, times) for times in OUR_LENGTHS], case)
    run.finish()


if __name__ == "__main__":
    main()
