"""A whole model at work on one GPU, ours and stock's: `python -m benchmarks.model_step [--output NAME]`.

Four layers of the released geometry (one dense, three sparse with 128 experts), bf16, batch 1, random weights. Timed are
what a user calls: a token of `generate`, a prefill, and a later turn of a chat, which reads new tokens behind cached ones.
Each implementation runs in a process of its own. The floor of a token is the time to read the bytes that it uses, at the
rate of a large sum in the same run. The floor of a prefill is that of its matrix products at the rate of a large one.
"""

import gc
import json
import subprocess
import sys
import time
from typing import Any

import torch
from transformers import DynamicCache

from configuration_minimax_m3 import MiniMaxM3VLTextConfig
from configuration_minimax_m3.presets import released_config

from .gpu import Run, parse_arguments, require_gpu
from .implementations import OURS, STOCK, classes, text_config
from .report import as_table

NUM_LAYERS, NUM_DENSE = 4, 1
# work, new tokens, tokens behind which they come
CASES = (
    ("token of generate", 1, 8192),
    ("token of generate, static cache", 1, 8192),
    ("token of generate", 1, 131072),
    ("later turn", 4096, 32768),
    ("later turn", 1024, 131072),
    ("prefill", 8192, 0),
    ("prefill", 32768, 0),
)
STOCK_CASES = (CASES[0], CASES[5])  # of the others, stock needs minutes or more memory than the card has
CHUNK = 32768  # in which the tokens before a case are read


def config() -> MiniMaxM3VLTextConfig:
    released = released_config().text_config.to_dict()
    released |= {"num_hidden_layers": NUM_LAYERS}
    for name in ("layer_types", "mlp_layer_types"):
        released[name] = released[name][:NUM_DENSE] + released[name][-(NUM_LAYERS - NUM_DENSE) :]
    return MiniMaxM3VLTextConfig(**released)


def build(implementation: str) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = classes(implementation).MiniMaxM3VLForCausalLM(text_config(implementation, config()))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def synchronized_ms(function) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def measure(model: Any, work: str, new: int, past: int) -> float:
    """Milliseconds: of a token of `generate`, the median over 64; of a pass, the median of three after one."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 200_000, (1, past + new), device="cuda")
    if work.startswith("token"):
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if "static" in work:
            options |= {"cache_implementation": "static"}
        clock = Clock()
        model.generate(tokens, max_new_tokens=96, logits_processor=[clock], **options)
        return clock.median_ms(last=64)
    cache = DynamicCache(config=model.config)
    for start in range(0, past, CHUNK):
        model(tokens[:, start : min(start + CHUNK, past)], logits_to_keep=1, **{cache_name(): cache})

    def run() -> None:
        model(tokens[:, past:], logits_to_keep=1, **{cache_name(): cache})

    times = []
    for _ in range(4):
        times.append(synchronized_ms(run))
        cache.crop(-new)
    return sorted(times[1:])[1]


class Clock:
    """A logits processor that notes when each token is due, after the GPU has finished it."""

    def __init__(self):
        self._times = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        self._times.append(time.perf_counter())
        return scores

    def median_ms(self, last: int) -> float:
        steps = sorted(1e3 * (b - a) for a, b in zip(self._times[-last - 1 :], self._times[-last:]))
        return steps[len(steps) // 2]


def cache_name() -> str:
    from modeling_minimax_m3.runtime.transformers_versions import CACHE_NAME

    return CACHE_NAME


def floor_ms(machine: dict[str, float], new: int, past: int) -> float:
    """Milliseconds of the bytes that a token uses, or of the matrix products of a pass over several."""
    c = config()
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    indexer = c.hidden_size * c.index_head_dim * (c.index_n_heads + 1)
    expert = 3 * c.hidden_size * c.intermediate_size
    num_sparse = NUM_LAYERS - NUM_DENSE
    weights = NUM_LAYERS * attention + NUM_DENSE * 3 * c.hidden_size * c.dense_intermediate_size
    weights += num_sparse * (indexer + c.num_experts_per_tok * expert + 3 * c.hidden_size * c.shared_intermediate_size)
    head = c.hidden_size * c.vocab_size
    kv_bytes = 2 * 2 * c.num_key_value_heads * c.head_dim
    if new == 1:
        selected = min(past, c.index_topk_blocks * c.index_block_size)
        cached = NUM_DENSE * past * kv_bytes + num_sparse * (past * 2 * c.index_head_dim + selected * kv_bytes)
        return 1e3 * (2 * (weights + head) + cached) / machine["read_bytes_per_second"]
    pairs = new * past + new * (new + 1) / 2
    selected_pairs = min(pairs, new * c.index_topk_blocks * c.index_block_size)
    dense_flops = 4 * c.num_attention_heads * c.head_dim * (NUM_DENSE * pairs + num_sparse * selected_pairs)
    index_flops = 2 * c.index_n_heads * c.index_head_dim * num_sparse * pairs
    return (2 * new * weights + 2 * head + dense_flops + index_flops) / machine["matmul_tflops"] / 1e9


def run_all(implementation: str, seconds: float) -> None:
    """Prints a line of JSON for each case."""
    started = time.monotonic()
    model = build(implementation)
    for work, new, past in CASES if implementation == OURS else STOCK_CASES:
        if time.monotonic() - started > seconds:
            break
        try:
            print(json.dumps([work, new, past, measure(model, work, new, past)]), flush=True)
        except Exception as reason:
            print(json.dumps([work, new, past, f"{type(reason).__name__}: {reason}"[:300]]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def tables(record: dict) -> str:
    rows = []
    for work, new, past in CASES:
        found = {row["implementation"]: row["ms"] for row in record["rows"] if row["case"] == [work, new, past]}
        floor = floor_ms(record["machine"], new, past)
        ours, stock = found.get(OURS), found.get(STOCK)
        figures = [f"{ms:.2f}" if isinstance(ms, float) else "-" for ms in (ours, stock)]
        ratio = f"{ours / floor:.2f}" if isinstance(ours, float) else "-"
        rows.append([work, str(new), str(past), *figures, f"{floor:.2f}", ratio])
    return as_table(["", "new tokens", "cached", "ours, ms", "stock, ms", "floor, ms", "ours over floor"], rows)


def main() -> None:
    def add(parser) -> None:
        parser.add_argument("--only", choices=(STOCK, OURS), help="measure one implementation and print lines of JSON")

    arguments = parse_arguments("model_step", "Time a whole model beside stock's.", add)
    if arguments.only:
        require_gpu()
        run_all(arguments.only, arguments.seconds)
        return
    run = Run("model_step", arguments, tables)
    run.record["rows"] = []

    def case(implementation: str) -> None:
        command = [sys.executable, "-m", "benchmarks.model_step", "--only", implementation]
        command += ["--seconds", str(arguments.seconds)]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in filter(lambda line: line.startswith("["), done.stdout.splitlines()):
            *found, ms = json.loads(line)
            run.record["rows"].append({"implementation": implementation, "case": found, "ms": ms})
            if isinstance(ms, str):
                run.record["failed"][f"{implementation}: {', '.join(map(str, found))}"] = ms
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])

    run.cases([(OURS,), (STOCK,)], case)
    run.finish()


if __name__ == "__main__":
    main()
