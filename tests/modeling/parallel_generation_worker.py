"""`generate` of a model that several processes share by a plan of Transformers: started by tests, not by pytest.

`parallel_generation_worker.py PLAN CHECKPOINT INPUTS`: PLAN is one of `PLANS`, CHECKPOINT the folder of the composite
model, INPUTS a file of inputs that `torch.save` wrote. Each process checks its tokens against those of the whole model.
"""

import os
import sys

import torch
from transformers.distributed import DistributedConfig

from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from modeling_minimax_m3.models import text_generation
from modeling_minimax_m3.runtime import captured_decoding as captured

PLANS = {
    "tensor_parallel": {"tp_size": 2, "tp_plan": "auto"},
    "expert_and_tensor_parallel": {"tp_size": 2, "ep_size": 2},
    "tokens_exchanged": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
}
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
OPTIONS |= {"return_dict_in_generate": True, "output_logits": True}
ON_GPU = torch.cuda.is_available()


def check_equal(output, expected) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-3)


def check_pieces(parts, inputs, expected) -> None:
    """However the prompt is divided, all processes make the same passes."""
    passes = []
    parts.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    for options in ({"prefill_chunk_size": 7}, {"prefill_chunk_size": 9, "prompt_lookup_num_tokens": 3}):
        passes.clear()
        check_equal(parts.generate(**inputs, **OPTIONS, **options), expected)
        assert passes[:2] == [options["prefill_chunk_size"]] * 2
    text_generation._PREFILL_TOKENS, text_generation._UNDIVIDED_DEVICES = 16, ()
    passes.clear()
    check_equal(parts.generate(**inputs, **OPTIONS), expected)
    assert passes[:2] == [16, 16]


def check_captured(parts, inputs, expected, plan) -> None:
    """On GPUs, decoding steps are captured with their collectives, except where the host reads what is exchanged."""
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    torch.cuda.CUDAGraph.replay = lambda graph: replays.append(graph) or replay(graph)
    obstacle = captured.obstacle_of_model(parts)
    if ON_GPU:
        assert (obstacle is None) == (plan != "tokens_exchanged"), obstacle
    for options in ({}, {"cache_implementation": "static"}):
        replays.clear()
        if obstacle:
            options |= {"disable_compile": True}  # a static cache would have the pass compiled
        check_equal(parts.generate(**inputs, **OPTIONS, **options), expected)
        assert bool(replays) == (obstacle is None), len(replays)
    torch.cuda.CUDAGraph.replay = replay


def main(plan: str, checkpoint: str, path: str) -> None:
    config = DistributedConfig(**PLANS[plan])
    load = MiniMaxM3SparseForConditionalGeneration.from_pretrained
    parts = load(checkpoint, dtype=torch.float32, distributed_config=config).eval()
    whole = load(checkpoint, dtype=torch.float32).eval().to(parts.device)
    inputs = {name: tensor.to(parts.device) for name, tensor in torch.load(path).items()}
    expected = whole.generate(**inputs, **OPTIONS)
    check_captured(parts, inputs, expected, plan)
    check_pieces(parts, inputs, expected)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a process that is
    # done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
