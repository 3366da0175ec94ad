"""Train only the indexers of a small model, and show what they learn.

    python examples/train_indexer.py --output FOLDER

This takes some minutes on one CPU core and downloads nothing. It writes `indexer_training.json` and
`indexer_training.png` to the folder.

1. The model learns a lookup task with dense attention (`indexer_warmup`). In its documents, each token belongs to a
   class and carries a value. Each document draws the value of each class at random. So attention has to find earlier
   tokens of the class that comes next.
2. Everything but the indexers is frozen. `indexer_warmup` trains the indexers, from random weights, over all keys.
3. The warm-up ends. Attention is sparse, and the indexers' loss runs only over the chosen blocks.

The script measures the share of the dense attention's probability that lies in the chosen blocks, on documents that no
training step saw, for queries that must leave blocks out. It compares this share with two other choices of as many
blocks. The oracle knows the probabilities and takes the best blocks. The choice "best keys" is the choice of an
indexer whose scores are the attention's own: an indexer ranks a block by its best key, while the oracle ranks it by
the sum over its keys.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from matplotlib.figure import Figure
from torch import nn

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, msa
from replace_when_done import replace_when_done

TOKENS, BATCH = 512, 4
TOPICS, CLASSES, VALUES = 24, 4, 4  # classes in a topic, values of a class
TOPICS_OF_DOCUMENT, SEGMENT = 5, 32  # topics of a document, and tokens after which the topic changes
FIRST_TOKEN = 2


def documents(count: int, generator: torch.Generator) -> torch.Tensor:
    """Makes token ids (count, TOKENS).

    A token stands for a class and for the value of this class in this document. Within a segment, each class is
    followed by one of two other classes of the topic. So the next class is uncertain, but its value can be looked up.

    Args:
        count (int): Number of documents.
        generator (torch.Generator): Source of the random numbers.
    """
    language = torch.Generator().manual_seed(0)  # the same in every call
    followers = torch.stack(
        [
            torch.cat([topic * CLASSES + torch.randperm(CLASSES, generator=language) for topic in range(TOPICS)])
            for _ in range(2)
        ]
    )
    values = torch.randint(VALUES, (count, TOPICS * CLASSES), generator=generator)
    topics = torch.stack([torch.randperm(TOPICS, generator=generator)[:TOPICS_OF_DOCUMENT] for _ in range(count)])
    row = torch.arange(count)
    classes = []
    for position in range(TOKENS):
        if position % SEGMENT == 0:
            topic = topics[row, torch.randint(TOPICS_OF_DOCUMENT, (count,), generator=generator)]
            current = topic * CLASSES + torch.randint(CLASSES, (count,), generator=generator)
        else:
            current = followers[torch.randint(2, (count,), generator=generator), current]
        classes.append(current)
    sequence = torch.stack(classes, dim=1)
    return FIRST_TOKEN + sequence * VALUES + values.gather(1, sequence)


def make_model() -> MiniMaxM3VLForCausalLM:
    """A model of two sparse layers. A query attends to 4 of up to 32 blocks of 16 keys for each key/value head."""
    text = {
        "vocab_size": FIRST_TOKEN + TOPICS * CLASSES * VALUES + 64,
        "num_hidden_layers": 2,
        "layer_types": ["minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "index_head_dim": 64,
        "initializer_range": 0.05,
        "pad_token_id": 0,
    }
    return MiniMaxM3VLForCausalLM(tiny_config(text=text).text_config)


def train(
    model: nn.Module, steps: int, rate: float, generator: torch.Generator, report: Callable[[int, Any], None]
) -> None:
    """Trains the trainable parameters on fresh documents. Calls `report(step, output)` before each update."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0) * max(0.05, 1 - step / max(1, steps))
    )
    model.train()
    for step in range(steps):
        tokens = documents(BATCH, generator)
        outputs = model(tokens, labels=tokens)
        report(step, outputs)
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def coverage(model: MiniMaxM3VLForCausalLM, tokens: torch.Tensor) -> dict[str, float]:
    """Measures the share of the dense attention's probability in the blocks of several choices.

    The choices are the indexers', an oracle's, the attention's own best keys, and the query's own block, which every
    choice includes. Shares are means over sparse layers, key/value heads, and the queries that see more blocks than
    they choose.

    Args:
        model (MiniMaxM3VLForCausalLM): The model.
        tokens (B, T): Token ids of documents.

    Returns:
        The share of each choice by its name, and "of oracle", the indexers' share over the oracle's.
    """
    config = model.config
    size, topk = config.index_block_size, config.index_topk_blocks
    batch, length = tokens.shape
    warmup, implementation = config.indexer_warmup, config._attn_implementation
    config.indexer_warmup = True
    model.set_attn_implementation("eager")
    indexed, handles = [], []
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            hook = layer.self_attn.indexer.register_forward_hook(lambda module, args, output: indexed.append(output))
            handles.append(hook)
    attentions = model.eval()(tokens, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    config.indexer_warmup = warmup
    model.set_attn_implementation(implementation)

    offsets = torch.arange(batch + 1, dtype=torch.int32) * length
    own_block = torch.arange(length) // size
    late = own_block >= topk  # queries that see more blocks than they can choose
    own_block = own_block[late][None, :, None, None].expand(batch, -1, config.num_key_value_heads, 1)
    shares = {"indexer": [], "oracle": [], "best keys": [], "own block": []}
    sparse = [i for i, kind in enumerate(config.layer_types) if kind == "minimax_m3_sparse"]
    for layer, (index_query, index_key) in zip(sparse, indexed):
        weights = attentions[layer].unflatten(1, (config.num_key_value_heads, -1)).mean(2).transpose(1, 2)[:, late]
        weights = weights.unflatten(-1, (-1, size))  # (B, T, H_kv, blocks, keys)
        mass = weights.sum(-1)
        chosen = msa.select_blocks(
            index_query.flatten(0, 1),
            index_key.flatten(0, 1),
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            block_size=size,
            topk=topk,
        ).view(batch, length, -1, topk)
        choices = {
            "indexer": chosen[:, late].long(),
            "oracle": mass.scatter(-1, own_block, 2.0).topk(topk, dim=-1).indices,
            "best keys": weights.amax(-1).scatter(-1, own_block, 2.0).topk(topk, dim=-1).indices,
            "own block": own_block,
        }
        for name, blocks in choices.items():
            shares[name].append(mass.gather(-1, blocks).sum(-1).mean().item())
    means = {name: sum(values) / len(values) for name, values in shares.items()}
    return means | {"of oracle": means["indexer"] / means["oracle"]}


def plot(history: list[dict], warmup_steps: int, path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([entry["step"] for entry in history], [entry["kl"] for entry in history])
    left.set(title="loss of the indexers", xlabel="step", ylabel="KL divergence, nats", ylim=(0, None))
    measured = [entry for entry in history if "indexer" in entry]
    steps = [entry["step"] for entry in measured]
    for name, style in (("oracle", "k--"), ("best keys", "C2:"), ("indexer", "C0o-"), ("own block", "k:")):
        right.plot(steps, [100 * entry[name] for entry in measured], style, label=name, markersize=3)
    right.set(title="attention in 4 of up to 32 blocks", xlabel="step", ylabel="% of probability", ylim=(0, 100))
    for panel in (left, right):
        panel.axvline(warmup_steps, color="0.6", linewidth=0.8)
        panel.annotate(" sparse", (warmup_steps, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color="0.4")
    right.legend(loc="center right", fontsize=8)
    with replace_when_done(path) as unfinished:
        figure.savefig(unfinished)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the indexers of a small frozen model and show what they learn."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model-steps", type=int, default=700, help="training steps of the model itself")
    parser.add_argument("--warmup-steps", type=int, default=300, help="steps of the indexers over all keys")
    parser.add_argument("--sparse-steps", type=int, default=100, help="steps of the indexers over the chosen blocks")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    held_out = documents(8, generator)

    model = make_model()
    model.set_indexer_training(0.0, warmup=True)

    def report_model(step, outputs):
        if step % 100 == 0 or step == arguments.model_steps - 1:
            print(
                f"model  step {step:4d}  loss {outputs.loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True
            )

    train(model, arguments.model_steps, 4e-3, generator, report_model)

    model.requires_grad_(False)
    history = []

    def report_indexer(step, outputs):
        entry = {"step": len(history), "kl": round(outputs.indexer_loss.item(), 5)}
        if entry["step"] % 25 == 0:
            entry |= measure(entry["step"], entry["kl"])
        history.append(entry)

    def measure(step, kl):
        shares = {name: round(share, 5) for name, share in coverage(model, held_out).items()}
        model.train()
        print(
            f"indexer step {step:3d}  kl {kl:.4f}  indexer {shares['indexer']:.3f}  oracle {shares['oracle']:.3f}  "
            f"best keys {shares['best keys']:.3f}  own block {shares['own block']:.3f}  "
            f"indexer / oracle {shares['of oracle']:.1%}  {time.monotonic() - start:.0f} s",
            flush=True,
        )
        return shares

    for steps, is_warmup in ((arguments.warmup_steps, True), (arguments.sparse_steps, False)):
        model.set_indexer_training(1.0, warmup=is_warmup)
        train(model, steps, 3e-3, generator, report_indexer)
    history[-1] |= measure(len(history), history[-1]["kl"])
    plot(history, arguments.warmup_steps, arguments.output / "indexer_training.png")
    rows = ",\n".join(json.dumps(entry) for entry in history)
    with replace_when_done(arguments.output / "indexer_training.json") as unfinished:
        unfinished.write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
