"""A few training steps of the tiny text model in one process or in several: run by `test_scale_out.py`, not by pytest.

`scale_out_worker.py ENGINE OUTPUT`: ENGINE is "trainer" (Trainer, with whatever accelerate made of the environment),
"fsdp2" (PyTorch's `fully_shard`) or "zero3" (DeepSpeed), as accelerate applies them on GPUs; it does not on a CPU.
OUTPUT gets the losses as JSON.
"""

import json
import os
import sys
from collections.abc import Iterator
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


def shares_of_batches() -> Iterator[dict[str, torch.Tensor]]:
    """What this process passes to the model in each step."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = make_rows()
    for step in range(STEPS):
        batch = rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        counted = sum((row["labels"][1:] != -100).sum() for row in batch)
        share = batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]
        yield {name: torch.stack([row[name] for row in share]) for name in share[0]} | {"num_items_in_batch": counted}


def summed(loss: torch.Tensor) -> float:
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return total.item()


def with_fsdp2(output: Path) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    world = torch.distributed.get_world_size()
    model = make_model().train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for inputs in shares_of_batches():
        loss = model(**inputs).loss
        (loss * world).backward()  # FSDP takes the mean of the devices' gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(summed(loss))
    torch.distributed.barrier()
    return losses


def with_zero3(output: Path) -> list[float]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    world = torch.distributed.get_world_size()
    model = make_model().train()
    options = {
        "train_micro_batch_size_per_gpu": ROWS_PER_STEP // world,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        # small weights, the indexers' among them, are cut too
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    assert model.lm_head.weight.numel() == 0  # it is cut, and gathered for a call
    losses = []
    for inputs in shares_of_batches():
        loss = engine(**inputs).loss
        engine.backward(loss * world)  # the mean of the devices' gradients is taken
        engine.step()
        losses.append(summed(loss))
    torch.distributed.barrier()
    return losses


if __name__ == "__main__":
    engine, output = sys.argv[1], Path(sys.argv[2])
    losses = {"trainer": with_trainer, "fsdp2": with_fsdp2, "zero3": with_zero3}[engine](output)
    if int(os.environ.get("RANK", 0)) == 0:
        output.write_text(json.dumps(losses))
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a process that is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
