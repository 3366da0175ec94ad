"""The runs of `ablation.py`: arms that differ in one thing, packs that all of them read, and one run from start to end."""

import argparse
import json
import pickle
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed

from configuration_minimax_m3 import MiniMaxM3VLConfig, small_config, tiny_config
from configuration_minimax_m3.layer_types import FULL_ATTENTION, LEARNED_SPARSE, STRUCTURED
from evaluate_pretraining import Evaluation
from evaluation_probes import coverage
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from pretrain import DEFAULTS
from pretraining_run import CurveLog, IndexerPhases, PackTrainer, StopAtNaN
from processing_minimax_m3 import MiniMaxM3VLProcessor
from processing_minimax_m3.pretraining import Packs, collate_packs, make_row
from processing_minimax_m3.pretraining.encoding import EncodedRow
from processing_minimax_m3.pretraining.packs import join_rows

TEXT = ("code", "text", "recall", "tools")
EVERYTHING = (*TEXT, "image", "video")


@dataclass(frozen=True)
class Arm:
    """What the runs of one name have in common.

    Args:
        attention (str): Layer type of all layers but the first, which has dense attention in all arms.
        modalities (tuple of str): The rows that its packs keep.
    """

    attention: str
    modalities: tuple[str, ...] = EVERYTHING


ARMS = {
    "dense": Arm(FULL_ATTENTION.name),
    "learned": Arm(LEARNED_SPARSE.name),
    "structured": Arm(STRUCTURED.name),
    "text only": Arm(LEARNED_SPARSE.name, TEXT),
    "image only": Arm(LEARNED_SPARSE.name, ("image",)),
    "video only": Arm(LEARNED_SPARSE.name, ("video",)),
}
JOINT = "learned"  # the arm whose modalities are compared with those of the arms that have one of them
INDEXER_LOSS_COEF = 1.0
SHORTEST_COVERED = 4  # times the tokens that a query selects: documents whose coverage is measured


def arm_config(arm: Arm, size: str | None = None, init_from: str = "") -> MiniMaxM3VLConfig:
    """The model of an arm.

    The small size is `small_config`, but a query selects 8 blocks of 64 keys, so that texts of 4096
    tokens are long. With a checkpoint to start from, it is the checkpoint's model with other layer types.
    """
    if init_from:
        config = MiniMaxM3VLConfig.from_pretrained(init_from)
        text = config.text_config
        text.layer_types = [FULL_ATTENTION.name] + [arm.attention] * (text.num_hidden_layers - 1)
        text.output_router_logits = True
        return config
    layers = 4
    fields: dict[str, Any] = {
        "layer_types": [FULL_ATTENTION.name] + [arm.attention] * (layers - 1),
        "output_router_logits": True,
    }
    if size != "tiny":
        fields |= {"index_block_size": 64, "index_topk_blocks": 8, "structured_local_blocks": 2}
        fields |= {"structured_anchor_blocks": 2, "structured_anchor_stride": 4, "structured_random_blocks": 4}
        return small_config(**fields)
    fields |= {"structured_local_blocks": 1, "structured_anchor_blocks": 1, "structured_random_blocks": 2}
    return tiny_config(text={"num_hidden_layers": layers, "vocab_size": 1024} | fields)


def check_start(arms: Iterable[str], init_from: str) -> None:
    """Raises `ValueError` if the arms cannot start with a checkpoint: its indexers would be lost, or an arm lacks them."""
    wanted = LEARNED_SPARSE.name
    found = MiniMaxM3VLConfig.from_pretrained(init_from).text_config.layer_types
    if found[0] != FULL_ATTENTION.name:
        raise ValueError(
            f"`--init_from` must have {FULL_ATTENTION.name} in its first layer, got {found} in {init_from}."
        )
    for name in arms:
        if ARMS[name].attention == wanted and set(found[1:]) != {wanted}:
            raise ValueError(
                f"`--init_from` must have indexers in all layers but the first for the arm {name!r}, so that all but the "
                f"first of its `layer_types` are {wanted}, got {found} in {init_from}."
            )


def check_rows_of_arms(arms: Iterable[str], tasks: Iterable[str]) -> None:
    """Raises `ValueError` if no task has rows that an arm keeps: its runs would have nothing to learn."""
    found = {make_row(task, "train", 0)["modality"] for task in tasks}
    for name in arms:
        if not found & set(ARMS[name].modalities):
            raise ValueError(
                f"`--tasks` must have rows of {', '.join(ARMS[name].modalities)} for the arm {name!r}, got rows of "
                f"{', '.join(sorted(found))} alone. Leave the arm out with `--arms`, or add a task."
            )


def covered_tokens(config: MiniMaxM3VLConfig) -> int:
    """Least tokens of a text in which the coverage of the selected blocks is measured."""
    text = config.text_config
    return SHORTEST_COVERED * text.index_topk_blocks * text.index_block_size


class PackWriter(Dataset):
    """Writes the rows of pack i to a file when item i is read, so that the workers of a loader write all packs."""

    def __init__(self, packs: Packs, folder: Path):
        self.packs, self.folder = packs, folder

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> int:
        rows = self.packs.rows(index)
        for row in rows:  # half the bytes; the vision tower computes in bfloat16 on a GPU
            row.images = [(patches.bfloat16(), grids) for patches, grids in row.images]
            row.videos = [(patches.bfloat16(), grids) for patches, grids in row.videos]
        with (self.folder / f"{index}.pickle").open("wb") as file:
            pickle.dump(rows, file, protocol=pickle.HIGHEST_PROTOCOL)
        return index


def write_packs(packs: Packs, folder: Path, workers: int) -> DataLoader:
    """An iterator whose items are the numbers of the packs that it has written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return DataLoader(PackWriter(packs, folder), batch_size=None, num_workers=min(workers, len(packs)))


class WrittenPacks(Dataset):
    """Packs from files, with the rows of some modalities alone. A pack that keeps no row becomes the one after it."""

    def __init__(self, folder: Path, num_packs: int, modalities: Sequence[str], padding: int):
        self.folder, self.num_packs, self.modalities, self.padding = folder, num_packs, modalities, padding

    def __len__(self) -> int:
        return self.num_packs

    def rows(self, index: int) -> list[EncodedRow]:
        """The kept rows of a pack."""
        for step in range(self.num_packs):
            with (self.folder / f"{(index + step) % self.num_packs}.pickle").open("rb") as file:
                rows = [row for row in pickle.load(file) if row.modality in self.modalities]
            if rows:
                break
        else:
            raise ValueError(f"no pack in {self.folder} has a row of {', '.join(self.modalities)}.")
        for row in rows:
            row.images = [(patches.float(), grids) for patches, grids in row.images]
            row.videos = [(patches.float(), grids) for patches, grids in row.videos]
        return rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_packs:
            raise IndexError(f"there are {self.num_packs} packs, got index {index}.")
        rows = self.rows(index)
        return join_rows(rows, sum(len(row.ids) for row in rows), self.padding)


class StopAfter(TrainerCallback):
    """Stops a run after a number of seconds. Unlike a time limit of `pretrain.py`, nothing goes on from there."""

    def __init__(self, seconds: float):
        self.seconds, self.started = seconds, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if time.perf_counter() - self.started > self.seconds:
            control.should_training_stop = True


def recall_by_length(model: Any, processor: MiniMaxM3VLProcessor, longest: int, rows: int) -> list[dict[str, Any]]:
    """The share of right numbers by length of the text, as `evaluate_pretraining.py` measures it.

    A model on a GPU is in bfloat16 afterwards.

    Args:
        model: The model.
        processor (MiniMaxM3VLProcessor): Its processor.
        longest (int): Most tokens of a text.
        rows (int): Texts of each length, with five questions each.
    """
    if model.device.type == "cuda":
        model.bfloat16()
    options = argparse.Namespace(longest=longest, recall_rows=rows, seed=1, workers=2, batch_tokens=2**17)
    return Evaluation(model.eval(), processor, options).recall()


def train_run(name: str, seed: int, data: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Trains one arm with one seed.

    Args:
        name (str): A name of `ARMS`.
        seed (int): Seed of the weights, if they are new. The packs are those of `data / str(seed)`.
        data (Path): Folder of the packs; "heldout" in it has those of the evaluations, for all seeds, and "processor"
            is the processor's folder.
        folder (Path): The folder of the run.
        options (dict): `size`, `init_from`, `learning_rate`, `steps`, `evaluations`, `eval_packs`, `seconds`,
            `warmup_share`, `pack_tokens`, `recall_to`, `recall_rows`.

    Returns:
        The record of the run: its curve as [step, training loss without that of the indexers], its evaluations, and
        what was measured at its end: the coverage of the selected blocks, and recall by length.
    """
    arm, started = ARMS[name], time.perf_counter()
    config = arm_config(arm, options["size"], options["init_from"])
    padding: Any = config.text_config.pad_token_id
    train = WrittenPacks(data / str(seed), options["steps"], arm.modalities, padding)
    heldout: Any = WrittenPacks(data / "heldout", options["eval_packs"], arm.modalities, padding)
    every = max(1, options["steps"] // options["evaluations"])
    settings: dict[str, Any] = DEFAULTS | {"max_steps": options["steps"], "eval_steps": every, "seed": seed}
    settings |= {"logging_steps": max(1, every // 10), "save_strategy": "no", "dataloader_num_workers": 0}
    settings["learning_rate"] = options["learning_rate"]
    training = TrainingArguments(str(folder), **settings, bf16=torch.cuda.is_available(), disable_tqdm=True)
    set_seed(seed)
    if options["init_from"]:
        model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
            options["init_from"], config=config, dtype=torch.float32
        )
    else:
        model = MiniMaxM3SparseForConditionalGeneration(config)
    callbacks: list[TrainerCallback] = [
        CurveLog(folder / "curves.jsonl", options["pack_tokens"]),
        StopAtNaN(),
        StopAfter(options["seconds"]),
    ]
    if arm.attention == LEARNED_SPARSE.name:
        callbacks.append(IndexerPhases(INDEXER_LOSS_COEF, round(options["warmup_share"] * options["steps"])))
    trainer = PackTrainer(
        model, training, data_collator=collate_packs, train_dataset=train, eval_dataset=heldout, callbacks=callbacks
    )
    trainer.train()
    logs = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    record = {
        "arm": name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
        "curve": [
            [log["step"], round(log["loss"] - INDEXER_LOSS_COEF * log.get("indexer_loss", 0.0), 5)]
            for log in logs
            if "loss" in log
        ],
        "evaluations": [
            {"step": log["step"]} | {key.removeprefix("eval_"): log[key] for key in log if key.startswith("eval_")}
            for log in logs
            if "eval_loss" in log
        ],
        "coverage": [],
        "recall": [],
    }
    if arm.attention != FULL_ATTENTION.name:
        length = covered_tokens(config)
        rows = (row for index in range(len(heldout)) for row in heldout.rows(index))
        documents = [row.ids for row in rows if len(row.ids) >= length and row.modality in TEXT]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=torch.cuda.is_available()):
            record["coverage"] = coverage(model.eval(), documents, [length], lambda: None)
    if options["recall_to"]:
        processor = MiniMaxM3VLProcessor.from_pretrained(data / "processor")
        record["recall"] = recall_by_length(model, processor, options["recall_to"], options["recall_rows"])
    (folder / "record.json").write_text(json.dumps(record) + "\n")
    return record
