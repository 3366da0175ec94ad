"""A few training steps of the tiny text model in one process or in several: run by `test_scale_out.py`, not by pytest.

`scale_out_worker.py ENGINE OUTPUT`: ENGINE is "trainer" (Trainer, with whatever accelerate made of the environment),
"fsdp2" (PyTorch's `fully_shard`) or "zero3" (DeepSpeed), as accelerate applies them on GPUs; it does not on a CPU. Or it
is one of `PLANS`: a model that `from_pretrained` cuts by Transformers' plans, which is also asked for logits, saved and
loaded again. OUTPUT gets the losses as JSON.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.text import MiniMaxM3VLForCausalLM

STEPS, ROWS_PER_STEP, LENGTH = 4, 4, 56
LEARNING_RATE = 3e-3
TEXT = {"output_router_logits": True, "indexer_loss_coef": 0.1, "num_hidden_layers": 3}
# With `fsdp_size` each process has rows of its own, with `tp_size` both have the same ones.
PLANS = {
    "expert_parallel": {"fsdp_size": 2, "ep_size": 2},
    "expert_and_tensor_parallel": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "tensor_parallel": {"tp_size": 2, "tp_plan": "auto"},
}


def make_model() -> MiniMaxM3VLForCausalLM:
    set_seed(0)
    return MiniMaxM3VLForCausalLM(tiny_config(text=TEXT).text_config)


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


def with_trainer(output: Path, model: PreTrainedModel | None = None) -> list[float]:
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
    trainer = InOrder(model or make_model(), arguments, train_dataset=make_rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def shares_of_batches(rank: int, world: int) -> Iterator[dict[str, torch.Tensor]]:
    """What process `rank` of `world` passes to the model in each step."""
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
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = make_model().train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for inputs in shares_of_batches(rank, world):
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
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
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
    for inputs in shares_of_batches(rank, world):
        loss = engine(**inputs).loss
        engine.backward(loss * world)  # the mean of the devices' gradients is taken
        engine.step()
        losses.append(summed(loss))
    torch.distributed.barrier()
    return losses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cut(model: PreTrainedModel, plan: dict, folder: Path) -> PreTrainedModel:
    """`model` saved, by the first process, and loaded as the plan has it."""
    model.save_pretrained(folder)
    torch.distributed.barrier()
    return type(model).from_pretrained(folder, distributed_config=DistributedConfig(**plan))


def check_equal(parts: PreTrainedModel, model: PreTrainedModel) -> None:
    """All weights, to the bit, and logits."""
    weights, expected = parts.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(whole(weight), expected[name]), name
    inputs = {"input_ids": make_rows()[0]["input_ids"][None]}
    with torch.no_grad():
        logits = parts.eval()(**inputs).logits
        torch.testing.assert_close(logits, model.eval()(**inputs).logits, rtol=0, atol=1e-5)  # sums in another order


def with_plan(engine: str, output: Path) -> list[float]:
    torch.distributed.init_process_group("gloo")
    plan = PLANS[engine]
    set_seed(0)
    # The weights of this one have other names on disk, and are fused on loading.
    composite = MiniMaxM3SparseForConditionalGeneration(tiny_config(text=TEXT))
    check_equal(cut(composite, plan, output.parent / "composite"), composite)
    model = cut(make_model(), plan, output.parent / "text")
    for name in ("gate_up_proj", "down_proj"):
        experts = model.get_parameter(f"model.layers.2.mlp.experts.{name}")
        assert 2 * experts.to_local().numel() == experts.numel(), name
    losses = with_trainer(output, model) if "fsdp_size" in plan else on_the_same_rows(model)
    model.save_pretrained(output.parent / "saved")  # all processes take part
    check_equal(model, MiniMaxM3VLForCausalLM.from_pretrained(output.parent / "saved"))
    torch.distributed.barrier()
    return losses


def on_the_same_rows(model: PreTrainedModel) -> list[float]:
    """In a loop of its own: Accelerate does not take a `tp_size` on a CPU."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
    losses = []
    for micro_batches in zip(shares_of_batches(0, 2), shares_of_batches(1, 2)):
        losses.append(0.0)
        for inputs in micro_batches:
            loss = model(**inputs).loss
            loss.backward()
            losses[-1] += loss.item()
        # `clip_grad_norm_` does not take tensors that are cut together with tensors that are not
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = torch.stack([whole(gradient).norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_((1.0 / (norm + 1e-6)).clamp(max=1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


if __name__ == "__main__":
    engine, output = sys.argv[1], Path(sys.argv[2])
    if engine in PLANS:
        losses = with_plan(engine, output)
    else:
        losses = {"trainer": with_trainer, "fsdp2": with_fsdp2, "zero3": with_zero3}[engine](output)
    if int(os.environ.get("RANK", 0)) == 0:
        output.write_text(json.dumps(losses))
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a process that is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
