"""Training steps of a tiny model with images, in one process or in several: run by `test_vision_scale_out.py`.

`vision_scale_out_worker.py ENGINE OUTPUT [FLAG ...]`: ENGINE is "ddp" (`DistributedDataParallel`, which waits for a
gradient of every parameter), "fsdp2" (`fully_shard` on every layer of the tower and of the language model) or "zero3"
(DeepSpeed, all weights cut). Flags: "frozen" (the tower and its projector are), "checkpointing". OUTPUT gets, as JSON,
the losses of all passes (the last is an evaluation) and the norm of the vision parameters at the end.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import set_seed

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

LEARNING_RATE, LENGTH = 3e-3, 24
ACCUMULATED = 2  # micro-batches of an optimizer step
IMAGE, VIDEO = {"images": [[1, 2, 4]]}, {"videos": [[2, 2, 2]]}
# What each of two processes gets in each micro-batch, and in the evaluation.
PASSES = [
    (IMAGE, {}),
    (IMAGE | VIDEO, IMAGE),
    ({}, VIDEO),
    ({}, {}),
    ({}, IMAGE | VIDEO),
    (VIDEO, {}),
    (IMAGE, {}),
]


def make_model(flags: list[str]) -> MiniMaxM3SparseForConditionalGeneration:
    set_seed(0)
    config = tiny_config(text={"num_hidden_layers": 2})
    model = MiniMaxM3SparseForConditionalGeneration(config)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_("frozen" not in flags)
    model.set_indexer_training(0.0)  # the language loss sends them no gradient
    if "checkpointing" in flags:
        model.activation_checkpointing_enable()
    return model


def make_inputs(config, seed: int, **media: list[list[int]]) -> dict[str, torch.Tensor]:
    """A row of random text with the placeholders of `media`, and their pixels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 400, (1, LENGTH), generator=generator)
    inputs, position = {}, 2
    vision = config.vision_config
    width = vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
    for kind, pixels, token in (("image", "pixel_values", config.image_token_id),
                                ("video", "pixel_values_videos", config.video_token_id)):  # fmt: skip
        if f"{kind}s" not in media:
            continue
        grid = torch.tensor(media[f"{kind}s"])
        patches = int(grid.prod(-1).sum())
        end = position + patches // vision.spatial_merge_size**2
        ids[0, position:end] = token
        position = end + 1
        inputs |= {pixels: torch.randn(patches, width, generator=generator), f"{kind}_grid_thw": grid}
    return inputs | {"input_ids": ids, "labels": ids.where(ids < 400, -100)}


def passes_of(rank: int, config) -> Iterator[dict[str, torch.Tensor]]:
    for number, shares in enumerate(PASSES):
        yield make_inputs(config, 2 * number + rank, **shares[rank])


def vision_norm(model: torch.nn.Module) -> float:
    parts = ("vision_tower", "multi_modal_projector")
    squares = [
        value.detach().square().sum() for name, value in model.named_parameters() if any(p in name for p in parts)
    ]
    return sum(square.full_tensor() if hasattr(square, "full_tensor") else square for square in squares).sqrt().item()


def in_one_process(flags: list[str]) -> tuple[list[float], float]:
    """The expected result of two processes."""
    model = make_model(flags).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for number, rows in enumerate(zip(passes_of(0, model.config), passes_of(1, model.config))):
        if number == len(PASSES) - 1:
            model.eval()
        pass_losses = [model(**inputs).loss / 2 for inputs in rows]
        losses.append(sum(loss.item() for loss in pass_losses))
        if model.training:
            sum(pass_losses).backward()
            if (number + 1) % ACCUMULATED == 0:
                optimizer.step()
                optimizer.zero_grad()
    return losses, vision_norm(model)


def with_torch(engine: str, flags: list[str]) -> tuple[list[float], float]:
    torch.distributed.init_process_group("gloo")
    model = make_model(flags).train()
    config, is_ddp = model.config, engine == "ddp"
    if is_ddp:
        wrapped = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        wrapped = model
        for layer in (*model.model.vision_tower.layers, *model.model.language_model.layers):
            fully_shard(layer)
        fully_shard(model.lm_head)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for number, inputs in enumerate(passes_of(torch.distributed.get_rank(), config)):
        if number == len(PASSES) - 1:
            wrapped.eval()
        is_last = (number + 1) % ACCUMULATED == 0
        if is_ddp:
            wrapped.require_backward_grad_sync = is_last  # as `no_sync` does
        with torch.set_grad_enabled(wrapped.training):
            loss = wrapped(**inputs).loss
        losses.append(mean_of_processes(loss))
        if wrapped.training:
            loss.backward()
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
    torch.distributed.barrier()
    return losses, vision_norm(model)


def with_zero3(flags: list[str]) -> tuple[list[float], float]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = make_model(flags).train()
    options = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATED,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # small weights are sharded too
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    losses = []
    for number, inputs in enumerate(passes_of(torch.distributed.get_rank(), model.config)):
        if number == len(PASSES) - 1:
            engine.eval()
        with torch.set_grad_enabled(engine.training):
            loss = engine(**inputs).loss
        losses.append(mean_of_processes(loss))
        if engine.training:
            engine.backward(loss * ACCUMULATED)  # it takes the mean over the micro-batches, where the others add
            engine.step()
    parts = [model.model.vision_tower, model.model.multi_modal_projector]
    with deepspeed.zero.GatheredParameters([value for part in parts for value in part.parameters()]):
        norm = vision_norm(model)
    torch.distributed.barrier()
    return losses, norm


def mean_of_processes(loss: torch.Tensor) -> float:
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).item()


if __name__ == "__main__":
    engine, output, *flags = sys.argv[1:]
    result = with_zero3(flags) if engine == "zero3" else with_torch(engine, flags)
    if int(os.environ["RANK"]) == 0:
        Path(output).write_text(json.dumps(result))
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a process that is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
