"""A few training steps of the tiny text model in one process or in several: started by tests, not by pytest.

`scale_out_worker.py ENGINE MODELS OUTPUT`: ENGINE is "trainer" (Trainer, with whatever accelerate made of the
environment), or "fsdp2" (PyTorch's `fully_shard`) or "zero3" (DeepSpeed), as accelerate applies them on GPUs; it does
not on a CPU. Or it is one of `PLANS`: a model that `from_pretrained` cuts by Transformers' plans, which is also asked
for logits, saved and loaded again. MODELS is the folder that the fixture `scale_out_models` made. OUTPUT gets the
losses and the gradients' norms of all steps, and what `RunMonitor` measured under `Trainer`, as JSON.

On GPUs the weights are float32 and are computed with in bfloat16, as the CUDA kernels need; on CPUs all is float32.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.distributed import DistributedConfig

from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.loading.fused_projections import joined
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.msa import backends
from modeling_minimax_m3.run_monitor import RunMonitor

monitored: list[dict] = []  # what `RunMonitor` measured in each step of a run of `Trainer`
STEPS, ROWS_PER_STEP, LENGTH = 4, 4, 300
LEARNING_RATE = 5e-3
# With AdamW's own 1e-8, gradients that are almost nothing but rounding errors would move weights as far as all others.
EPSILON = 1e-3
ON_GPU = torch.cuda.is_available()
# With `fsdp_size` each process has rows of its own, with `tp_size` both have the same ones.
PLANS = {
    "expert_parallel": {"fsdp_size": 2, "ep_size": 2},
    "expert_and_tensor_parallel": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "tensor_parallel": {"tp_size": 2, "tp_plan": "auto"},
}


def load_text_model(models: Path) -> PreTrainedModel:
    return MiniMaxM3VLForCausalLM.from_pretrained(models / "text", dtype=torch.float32)


def make_rows() -> list[dict[str, torch.Tensor]]:
    """Right-padded rows. Those of the second process are shorter, and of other tokens, so that both matter."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(STEPS * ROWS_PER_STEP):
        second = index % ROWS_PER_STEP >= ROWS_PER_STEP // 2
        length = (LENGTH // 2 if second else LENGTH) - 4 * index
        low, high = (100, 900) if second else (2, 100)
        mask = (torch.arange(LENGTH) < length).long()
        ids = torch.randint(low, high, (LENGTH,), generator=generator) * mask
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return rows


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def make_arguments(output: Path, sharing: int) -> TrainingArguments:
    """`sharing` devices have rows of their own."""
    return TrainingArguments(
        output_dir=str(output.parent),
        per_device_train_batch_size=ROWS_PER_STEP // 2,
        gradient_accumulation_steps=2 // sharing,  # the same micro-batches, on one device or on two
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        adam_epsilon=EPSILON,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=ON_GPU,
        use_cpu=not ON_GPU,
        ddp_find_unused_parameters=False,
    )


def note_backends() -> set[str]:
    """The set that gets the names of the backends that run from now on."""
    ran, resolve = set(), backends.resolve_backend

    def resolve_and_note(*args):
        ran.add(resolve(*args))
        return resolve(*args)

    backends.resolve_backend = resolve_and_note
    return ran


def with_trainer(model: PreTrainedModel, arguments: TrainingArguments) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, the result of all loops here."""
    trainer = InOrder(model, arguments, train_dataset=make_rows())
    RunMonitor(report=False, console=False, peak=1e12).attach(trainer)
    ran = note_backends()
    trainer.train()
    monitored.extend(entry for entry in trainer.state.log_history if "loss" in entry)
    assert ran == {"cuda" if ON_GPU else "torch"}, f"the sparse layers ran on {ran}"
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def shares_of_batches(rank: int, world: int) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of process `rank` of `world` in each step."""
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


def with_fsdp2(model: PreTrainedModel) -> list[tuple[float, float]]:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model.train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)
    steps = []
    for inputs in shares_of_batches(rank, world):
        loss = model(**inputs).loss
        (loss * world).backward()  # FSDP takes the mean of the devices' gradients
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((summed(loss), whole(norm).item()))
    torch.distributed.barrier()
    return steps


def with_zero3(model: PreTrainedModel) -> list[tuple[float, float]]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model.train()
    options = {
        "train_micro_batch_size_per_gpu": ROWS_PER_STEP // world,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        # small weights, the indexers' among them, are sharded too
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    assert model.lm_head.weight.numel() == 0  # it is sharded, and gathered for a call
    steps = []
    for inputs in shares_of_batches(rank, world):
        loss = engine(**inputs).loss
        engine.backward(loss * world)  # the mean of the devices' gradients is taken
        engine.step()
        steps.append((summed(loss), float(engine.get_global_grad_norm())))
    torch.distributed.barrier()
    return steps


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return joined(tensor)


def check_equal(parts: PreTrainedModel, model: PreTrainedModel) -> None:
    """All weights, to the bit, and logits, in float32."""
    weights, expected = parts.state_dict(), model.to(parts.device).state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(whole(weight), expected[name]), name
    inputs = {"input_ids": make_rows()[0]["input_ids"][None].to(parts.device)}
    with torch.no_grad():
        logits = parts.eval()(**inputs).logits
        torch.testing.assert_close(logits, model.eval()(**inputs).logits, rtol=0, atol=1e-4)  # sums in another order


def with_plan(engine: str, models: Path, output: Path) -> list[tuple[float, float]]:
    plan = PLANS[engine]
    options = {"dtype": torch.float32, "distributed_config": DistributedConfig(**plan)}
    composite = models / "composite"
    parts = MiniMaxM3SparseForConditionalGeneration.from_pretrained(composite, **options)
    check_equal(parts, MiniMaxM3SparseForConditionalGeneration.from_pretrained(composite, dtype=torch.float32))
    # not called before it is trained: a first call leaves the head gathered, and out of an optimizer that is made then
    model = MiniMaxM3VLForCausalLM.from_pretrained(models / "text", **options)
    for name in ("gate_up_proj", "down_proj"):
        experts = model.get_parameter(f"model.layers.2.mlp.experts.{name}")
        assert 2 * experts.to_local().numel() == experts.numel(), name
    if "fsdp_size" in plan or ON_GPU:
        steps = with_trainer(model, make_arguments(output, sharing=plan.get("fsdp_size", 1)))
        extract_model_from_parallel(model, keep_fp32_wrapper=False)  # its forward without Trainer's autocast
    else:
        steps = on_the_same_rows(model, make_arguments(output, sharing=1))
    model.save_pretrained(output.parent / "saved")  # all processes take part
    check_equal(model, MiniMaxM3VLForCausalLM.from_pretrained(output.parent / "saved"))
    torch.distributed.barrier()
    return steps


def on_the_same_rows(model: PreTrainedModel, arguments: TrainingArguments) -> list[tuple[float, float]]:
    """A loop of its own, because Accelerate takes no `tp_size` on a CPU."""
    model.train()
    monitor, state, control = RunMonitor(report=False, console=False, peak=1e12), TrainerState(), TrainerControl()
    monitor.on_train_begin(arguments, state, control, model=model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0, foreach=False)
    steps = []
    for micro_batches in zip(shares_of_batches(0, 2), shares_of_batches(1, 2)):
        total = 0.0
        for inputs in micro_batches:
            loss = model(**inputs).loss
            loss.backward()
            total += loss.item()
        # `clip_grad_norm_` does not take sharded tensors together with others
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = torch.stack([whole(gradient).norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_((1.0 / (norm + 1e-6)).clamp(max=1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total, norm.item()))
        state.global_step += 1
        logs = {"loss": total}
        monitor.on_log(arguments, state, control, logs=logs)
        monitored.append(logs)
    return steps


def with_accelerate(models: Path, output: Path) -> list[tuple[float, float]]:
    arguments = make_arguments(output, sharing=int(os.environ.get("WORLD_SIZE", 1)))
    model = load_text_model(models)  # after the arguments: of them ZeRO-3 knows to cut the weights as they are loaded
    steps = with_trainer(model, arguments)
    is_cut = isinstance(model.lm_head.weight, DTensor) or model.lm_head.weight.numel() == 0
    assert is_cut == any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return steps


def train(engine: str, models: Path, output: Path) -> list[tuple[float, float]]:
    if engine in PLANS:
        return with_plan(engine, models, output)
    if engine == "trainer":
        return with_accelerate(models, output)
    return {"fsdp2": with_fsdp2, "zero3": with_zero3}[engine](load_text_model(models))


if __name__ == "__main__":
    engine, models, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    losses, norms = zip(*train(engine, models, output))
    if int(os.environ.get("RANK", 0)) == 0:
        output.write_text(json.dumps({"losses": losses, "norms": norms, "monitored": monitored}))
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a
    # process that is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
