"""A few training steps of the tiny text model in one process or in several: run by `test_scale_out.py`, not by pytest.

`scale_out_worker.py ENGINE OUTPUT`: ENGINE is "trainer" (Trainer, with whatever accelerate made of the environment) or
"fsdp2" (PyTorch's `fully_shard`, as accelerate applies it on GPUs; it does not on a CPU). OUTPUT gets the losses as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.text import MiniMaxM3VLForCausalLM

STEPS, ROWS_PER_STEP, LENGTH = 4, 4, 56
LEARNING_RATE = 3e-3


def make_model() -> MiniMaxM3VLForCausalLM:
    set_seed(0)
    text = {"output_router_logits": True, "indexer_loss_coef": 0.1, "num_hidden_layers": 3}
    return MiniMaxM3VLForCausalLM(tiny_config(text=text).text_config)


def make_rows() -> list[dict[str, torch.Tensor]]:
    """Right-padded rows of different lengths, so that devices have different numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(STEPS * ROWS_PER_STEP):
        mask = (torch.arange(LENGTH) < LENGTH - 2 * index).long()
        ids = torch.randint(2, 400, (LENGTH,), generator=generator) * mask
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return rows


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def with_trainer(output: Path) -> list[float]:
    world = int(os.environ.get("WORLD_SIZE", 1))
    arguments = TrainingArguments(
        output_dir=str(output.parent),
        per_device_train_batch_size=ROWS_PER_STEP // 2,
        gradient_accumulation_steps=2 // world,  # the same micro-batches, on one device or on two
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    trainer = InOrder(make_model(), arguments, train_dataset=make_rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_fsdp2(output: Path) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = make_model().train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rows, losses = make_rows(), []
    for step in range(STEPS):
        batch = rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        counted = sum((row["labels"][1:] != -100).sum() for row in batch)
        share = batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]
        inputs = {name: torch.stack([row[name] for row in share]) for name in share[0]}
        loss = model(**inputs, num_items_in_batch=counted).loss
        (loss * world).backward()  # FSDP takes the mean of the devices' gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    torch.distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    engine, output = sys.argv[1], Path(sys.argv[2])
    losses = {"trainer": with_trainer, "fsdp2": with_fsdp2}[engine](output)
    if int(os.environ.get("RANK", 0)) == 0:
        output.write_text(json.dumps(losses))
