"""Compare small models that differ only in their attention, trained on the same tokens: loss and long-range recall.

    python examples/trained_comparison/compare.py train structured --output structured.json     # and every other arm
    python examples/trained_comparison/compare.py plot dense.json learned.json structured.json --picture recall.png

An arm is a model with dense, learned, structured or mixed attention. The text is made up. Most of it is local
structure: runs of 16 tokens that count up, each by a step of its own, so that two tokens of a run determine the next
ones. Facts and questions stand between these tokens. A fact is one token that stands for a name and its value. A
question is the name of an earlier fact, and the model has to predict the value after it. The text states a value only
in its fact. So a question needs the block that holds its fact, anywhere before the question, while local structure
needs only a window.

The indexers' loss trains the indexers. In the first part of the steps, learned layers attend to all blocks. The mixed
arms have a learned or a dense layer after structured ones. All arms see the same batches in the same order. On a GPU,
a step is captured once as a CUDA graph and replayed.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import torch

from benchmarks.measure import environment
from configuration_minimax_m3 import MiniMaxM3VLTextConfig
from plot_selection import SelectionRecorder, plot_selections

LAYERS = 4
ARMS = {  # the layer types of each arm
    "dense": ["full_attention"] * LAYERS,
    "learned": ["minimax_m3_sparse"] * LAYERS,
    "structured": ["minimax_m3_structured"] * LAYERS,
    "mixed": ["minimax_m3_structured"] * (LAYERS - 1) + ["minimax_m3_sparse"],
    "mixed-dense": ["minimax_m3_structured"] * (LAYERS - 1) + ["full_attention"],
}
WARM_UP_SHARE = 0.25  # share of the steps in which learned layers attend to all blocks
EAGER_STEPS = 3  # steps before a capture
KEPT_TOKENS = 128  # tokens of a sequence whose selection is kept for a picture


@dataclass(frozen=True)
class Task:
    """The sizes of the made-up text."""

    tokens: int = 4096
    run: int = 16  # tokens of a run
    plain: int = 64  # number of different tokens in runs
    names: int = 8
    values: int = 8
    facts: int = 8  # per sequence, each with a different name
    questions: int = 240  # per sequence

    @property
    def vocabulary(self) -> int:
        return self.plain + self.names + self.values + self.names * self.values

    def sample(self, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Makes a batch on the generator's device.

        Args:
            batch (int): Number of sequences.
            generator (torch.Generator): Source of the random numbers.

        Returns:
            Tensors of shape (batch, tokens), by name. `ids` are the tokens. `targets` are the tokens to predict, -100
            where the text does not determine them. `answer` is True where the target is the answer to a question.
            `distance` is the number of tokens from a question back to its fact, 0 elsewhere.
        """
        device = generator.device

        def draw(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator, device=device)

        runs = self.tokens // self.run
        place = torch.arange(self.run, device=device)
        ids = (draw(self.plain, batch, runs, 1) + draw(8, batch, runs, 1).add(1) * place) % self.plain
        ids = ids.flatten(1)
        is_known = ((place >= 1) & (place < self.run - 1)).repeat(batch, runs)

        # Each fact and each question has a stretch of 8 tokens for itself, so that none overlap.
        stretches = torch.rand(batch, self.tokens // 8, generator=generator, device=device).argsort(1)
        where = 8 * stretches[:, : self.facts + self.questions]
        where = where + draw(8, *where.shape)
        facts, questions = where[:, : self.facts].sort(1).values, where[:, self.facts :].contiguous()
        name = torch.rand(batch, self.names, generator=generator, device=device).argsort(1)[:, : self.facts]
        value = draw(self.values, batch, self.facts)
        known = torch.searchsorted(facts, questions)  # facts before each question
        which = (torch.rand(questions.shape, generator=generator, device=device) * known).long()
        ids.scatter_(1, facts, self.plain + self.names + self.values + name * self.values + value)
        has_fact = known > 0
        names = torch.where(has_fact, self.plain + name.gather(1, which), ids.gather(1, questions))
        ids.scatter_(1, questions, names)

        is_plain = ids < self.plain
        is_known &= is_plain & is_plain.roll(1, 1) & is_plain.roll(-1, 1)
        targets = torch.where(is_known, ids.roll(-1, 1), -100)
        answers = self.plain + self.names + value.gather(1, which)
        targets.scatter_(1, questions, torch.where(has_fact, answers, targets.gather(1, questions)))
        answer = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, questions, has_fact)
        distance = torch.zeros_like(ids).scatter_(1, questions, questions - facts.gather(1, which))
        return {"ids": ids, "targets": targets, "answer": answer, "distance": distance}


def make_config(arm: str, task: Task, options: argparse.Namespace) -> MiniMaxM3VLTextConfig:
    """Four layers of the arm's types with dense MLPs. Heads have 64 channels, and two share a key/value head."""
    anchors = options.blocks // 4
    heads = options.hidden // 64
    return MiniMaxM3VLTextConfig(
        vocab_size=task.vocabulary,
        hidden_size=options.hidden,
        dense_intermediate_size=2 * options.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=task.tokens,
        layer_types=ARMS[arm],
        mlp_layer_types=["dense"] * LAYERS,
        rope_parameters={"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
        index_n_heads=heads // 2,
        index_head_dim=64,
        index_block_size=options.block_size,
        index_topk_blocks=options.blocks,
        structured_local_blocks=2,
        structured_anchor_blocks=anchors,
        structured_anchor_stride=4,
        structured_random_blocks=options.blocks - 2 - anchors,
        indexer_loss_coef=1.0 if "minimax_m3_sparse" in ARMS[arm] else 0.0,
        msa_backend=options.backend,
        bos_token_id=0,
        eos_token_id=0,
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 20th, then linear decay to a tenth."""
    warm_up = max(1, steps // 20)
    return peak * min((step + 1) / warm_up, 1.0 - 0.9 * (step - warm_up) / max(1, steps - warm_up))


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task, options: argparse.Namespace, device: str) -> dict:
    """On fresh text: the loss of runs and of answers in nats, and the share of right answers by distance in blocks."""
    generator = torch.Generator(device).manual_seed(12345)
    num_blocks = task.tokens // options.block_size
    buckets = [edge for edge in (0, 2, 8, 16, 32) if edge < num_blocks] + [num_blocks]
    right, total = torch.zeros(len(buckets) - 1, device=device), torch.zeros(len(buckets) - 1, device=device)
    loss, count = torch.zeros(2, device=device), torch.zeros(2, device=device)
    bounds = torch.tensor(buckets[1:], device=device) * options.block_size
    model.eval()
    for _ in range(options.evaluation_batches):
        sample = task.sample(options.batch, generator)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(sample["ids"], use_cache=False).logits.float()
        targets, answer = sample["targets"], sample["answer"]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        for i, chosen in enumerate(((targets >= 0) & ~answer, answer)):
            loss[i] += losses[chosen].sum()
            count[i] += chosen.sum()
        bucket = torch.bucketize(sample["distance"][answer], bounds, right=True)
        total += torch.bincount(bucket, minlength=len(total))
        right += torch.bincount(bucket, weights=(logits.argmax(-1) == targets)[answer].float(), minlength=len(total))
    model.train()
    return {
        "run_loss": (loss[0] / count[0]).item(),
        "answer_loss": (loss[1] / count[1]).item(),
        "recall": {
            f"{low}-{high}": round((r / max(n, 1)).item(), 4)
            for low, high, r, n in zip(buckets, buckets[1:], right, total.tolist())
        },
    }


class Trainer:
    """A model, its optimizer, and a training step on the batch in `ids` and `labels`."""

    def __init__(self, config: MiniMaxM3VLTextConfig, batch: int, tokens: int, device: str):
        from modeling_minimax_m3 import MiniMaxM3VLForCausalLM

        torch.manual_seed(0)
        self.device = device
        self.model = MiniMaxM3VLForCausalLM(config).to(device).train()
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.rate, betas=(0.9, 0.95), weight_decay=0.1, capturable=device == "cuda"
        )
        self.ids, self.labels = (torch.zeros(batch, tokens, dtype=torch.long, device=device) for _ in range(2))
        self.sums = torch.zeros(3, device=device)  # language loss, indexers' loss, number of steps
        self.restart()

    def restart(self) -> None:
        """Drops the captured step. Call it after a change of the model's configuration."""
        self.graph, self.eager_steps = None, 0

    def _step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda", cache_enabled=False):
            outputs = self.model(self.ids, labels=self.labels, use_cache=False, skip_logits=False)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss = outputs.loss.detach()
        indexer_loss = torch.zeros_like(loss) if outputs.indexer_loss is None else outputs.indexer_loss.detach()
        weight = self.model.config.indexer_loss_coef
        self.sums += torch.stack((loss - weight * indexer_loss, indexer_loss, torch.ones_like(loss)))

    def step(self, sample: dict[str, torch.Tensor], rate: float) -> None:
        self.ids.copy_(sample["ids"])
        self.labels[:, 1:].copy_(sample["targets"][:, :-1])  # a label is the token at its own position
        self.rate.fill_(rate)
        if self.graph is not None:
            self.graph.replay()
            return
        if self.device == "cpu":
            self._step()
            self.optimizer.zero_grad()
            return
        if self.eager_steps == EAGER_STEPS:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
            self.graph.replay()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
            self.optimizer.zero_grad()
        torch.cuda.current_stream().wait_stream(stream)
        self.eager_steps += 1


def kept_selection(model: torch.nn.Module, task: Task, device: str) -> list:
    """The block ids that some tokens of one fresh sequence select: for each layer [token][head][place]."""
    sample = task.sample(1, torch.Generator(device).manual_seed(54321))
    with (
        SelectionRecorder() as recorder,
        torch.no_grad(),
        torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
    ):
        model.eval()(sample["ids"], use_cache=False)
    model.train()
    return [selection[:: task.tokens // KEPT_TOKENS].tolist() for selection in recorder.selections]


def train(arm: str, arguments: argparse.Namespace) -> dict:
    """Trains one arm and returns its record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = Task(tokens=arguments.tokens, questions=arguments.questions)
    config = make_config(arm, task, arguments)
    trainer = Trainer(config, arguments.batch, task.tokens, device)
    model, config = trainer.model, trainer.model.config
    generator = torch.Generator(device).manual_seed(1)
    record = {"arm": arm, "task": asdict(task), "options": vars(arguments) | {"output": str(arguments.output)}}
    record |= {"machine": environment(), "curve": [], "evaluations": []}
    warm_up_steps = int(WARM_UP_SHARE * arguments.steps) if config.indexer_loss_coef > 0 else 0
    if warm_up_steps:
        config.index_topk_blocks = task.tokens // arguments.block_size
    started = time.perf_counter()
    for step in range(arguments.steps):
        if step == warm_up_steps and step > 0:
            config.index_topk_blocks = arguments.blocks
            trainer.restart()
        trainer.step(task.sample(arguments.batch, generator), learning_rate(step, arguments.steps, arguments.peak))
        is_last = step + 1 == arguments.steps
        if (step + 1) % arguments.log_every == 0 or is_last:
            loss, indexer_loss, count = trainer.sums.tolist()
            trainer.sums.zero_()
            spent = time.perf_counter() - started
            record["curve"].append([step + 1, round(loss / count, 5), round(indexer_loss / count, 5), round(spent, 2)])
            if arguments.seconds and spent > arguments.seconds:
                is_last = True
        if is_last or (step + 1) % arguments.evaluate_every == 0:
            paused = time.perf_counter()
            found = evaluate(model, task, arguments, device)
            record["evaluations"].append({"step": step + 1, **found})
            print(arm, record["curve"][-1], json.dumps(found), flush=True)
            started += time.perf_counter() - paused  # evaluation does not count as training time
        if is_last:
            break
    if arm == "learned":
        record["selection"] = kept_selection(model, task, device)
    return record


def plot(paths: list[Path], picture: Path, selection_picture: Path | None) -> None:
    """Draws losses over steps and recall by distance after the last step; if wanted, the learned arm's selection too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    losses, recall = figure.subplots(1, 2)
    records = [json.loads(path.read_text()) for path in paths]
    for i, record in enumerate(records):
        losses.plot([row[0] for row in record["curve"]], [row[1] for row in record["curve"]], label=record["arm"])
        found = record["evaluations"][-1]["recall"]
        width = 0.8 / len(records)
        places = [j + width * (i - (len(records) - 1) / 2) for j in range(len(found))]
        recall.bar(places, list(found.values()), width=width, label=record["arm"])
    losses.set(xlabel="step", ylabel="loss, nats per counted token", yscale="log", title="training")
    recall.set(xlabel="distance to the fact, blocks", ylabel="share of right answers", title="recall on fresh text")
    recall.set_xticks(range(len(found)), found)
    recall.axhline(1 / records[0]["task"]["values"], color="grey", linewidth=1, linestyle=":")
    losses.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    if selection_picture is not None:
        (record,) = (record for record in records if "selection" in record)
        selections = {i: torch.tensor(record["selection"][i], dtype=torch.int32) for i in (0, LAYERS - 1)}
        tokens_in_block = KEPT_TOKENS * record["options"]["block_size"] // record["task"]["tokens"]
        plot_selections(selections, tokens_in_block, selection_picture)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train small models that differ in their attention only.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train one model and write its record")
    training.add_argument("arm", choices=ARMS)
    training.add_argument("--output", type=Path, required=True, help="JSON file for the record")
    training.add_argument("--steps", type=int, default=1500)
    training.add_argument("--seconds", type=float, default=0, help="stop after this many seconds; 0 never stops")
    training.add_argument("--batch", type=int, default=4)
    training.add_argument("--tokens", type=int, default=Task.tokens, help="tokens of a sequence")
    training.add_argument("--questions", type=int, default=Task.questions, help="questions in a sequence")
    training.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 128")
    training.add_argument("--block-size", type=int, default=64, help="keys of a block")
    training.add_argument("--blocks", type=int, default=8, help="key blocks of a query in sparse layers")
    training.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    training.add_argument("--backend", default="auto")
    training.add_argument("--log-every", type=int, default=20)
    training.add_argument("--evaluate-every", type=int, default=500)
    training.add_argument("--evaluation-batches", type=int, default=8)
    plotting = commands.add_parser("plot", help="draw the records of several arms")
    plotting.add_argument("records", type=Path, nargs="+")
    plotting.add_argument("--picture", type=Path, required=True)
    plotting.add_argument("--selection-picture", type=Path, help="also draw which blocks the learned arm selects")
    arguments = parser.parse_args()
    if arguments.command == "plot":
        plot(arguments.records, arguments.picture, arguments.selection_picture)
        return
    record = train(arguments.arm, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
