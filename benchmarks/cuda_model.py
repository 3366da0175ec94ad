"""Training steps of a small MiniMax-M3 beside stock's on a GPU: `python -m benchmarks.cuda_model [--output NAME]`.

About one billion parameters with the released vocabulary, bf16, gradient checkpointing and AdamW in both, batch 1. Stock
is run at growing lengths until the card's memory ends; ours at the last length that stock manages, and at eight times
that length, whose memory is compared with stock's. Each length runs in a process of its own.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from .implementations import OURS, STOCK, classes, text_config
from .measure import environment

RESULTS = Path(__file__).parent / "results"
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
STEPS = 3  # after one to warm up
LONGER = 8  # how many times stock's length ours is to train in the same memory


def train(implementation: str, tokens: int) -> dict[str, Any]:
    """Seconds of a step, tokens per second and peak GiB of a few training steps."""
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
    """`train` in a new process; None where memory ended."""
    command = [sys.executable, "-m", "benchmarks.cuda_model", "--only", implementation, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"{implementation}, {tokens} tokens: {row['tokens_per_second']:.0f} tokens/s, {row['peak_gib']:.1f} GiB")
        return row
    if "OutOfMemoryError" not in done.stderr:
        raise SystemExit(done.stderr)
    print(f"{implementation}, {tokens} tokens: out of memory", flush=True)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps beside stock's on a GPU.")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda_model", help="results go to this .json and .md")
    parser.add_argument("--only", choices=(STOCK, OURS), help="measure one implementation and print a line of JSON")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 12288, 16384], help="lengths to try for stock")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the CUDA benchmark needs a GPU, and this machine has none")
    if arguments.only:
        print(json.dumps(train(arguments.only, arguments.tokens[0])))
        return
    rows = []
    for tokens in arguments.tokens:
        row = in_own_process(STOCK, tokens)
        if row is None:
            break
        rows.append(row)
    longest = rows[-1]["tokens"]
    rows += [row for tokens in (longest, LONGER * longest) if (row := in_own_process(OURS, tokens))]
    machine = {
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "-m", "benchmarks.cuda_model", *sys.argv[1:]]),
    }
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, transformers {machine['transformers']}, {machine['date']}; "
        f"{rows[0]['parameters'] / 1e9:.2f}B parameters.",
        "",
        "| | tokens | tokens/s | peak GiB |",
        "| --- | --- | --- | --- |",
        *(
            f"| {r['implementation']} | {r['tokens']} | {r['tokens_per_second']:.0f} | {r['peak_gib']:.1f} |"
            for r in rows
        ),
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
