"""A few steps of DistributedDataParallel over NCCL: run by `test_several_devices_gpu.py`, not by pytest.

`data_parallel_worker_gpu.py CHECKPOINT OUTPUT`: OUTPUT gets the losses, which backends ran, and whether all processes
ended with the same weights, as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from modeling_minimax_m3.msa import backends
from modeling_minimax_m3.text import MiniMaxM3VLForCausalLM

STEPS, ROWS, LENGTH = 4, 4, 300


def main(checkpoint: str, output: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    ran, resolve = set(), backends.resolve_backend

    def resolve_and_note(*args):
        ran.add(resolve(*args))
        return resolve(*args)

    backends.resolve_backend = resolve_and_note
    model = MiniMaxM3VLForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).cuda().train()
    # Master weights in float32, computed in bfloat16.
    parallel = DistributedDataParallel(model, device_ids=[torch.cuda.current_device()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(0), []
    rows = torch.randint(2, 400, (ROWS, LENGTH), generator=generator).cuda()
    for _ in range(STEPS):
        share = rows[rank * ROWS // world : (rank + 1) * ROWS // world]
        with torch.autocast("cuda", torch.bfloat16):
            loss = parallel(input_ids=share, labels=share).loss  # all rows have as many tokens: means of means
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total, torch.distributed.ReduceOp.AVG)
        losses.append(total.item())
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = weights.clone()
    torch.distributed.broadcast(first, 0)
    same = torch.tensor(int(torch.equal(first, weights)), device="cuda")
    torch.distributed.all_reduce(same, torch.distributed.ReduceOp.MIN)
    if rank == 0:
        found = {"losses": losses, "backend": sorted(ran), "same_weights": bool(same)}
        Path(output).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
