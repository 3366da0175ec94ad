"""A model whose weights several processes share, beside the whole model: started by tests, not by pytest.

`tensor_parallel_worker.py CHECK FOLDER`: CHECK names a function of `CHECKS`. FOLDER holds a text model in float32, with
as many key/value heads as `torchrun` starts processes, or a number that these cannot share. `halves` also runs on GPUs.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import StaticCache
from transformers.distributed import DistributedConfig

from modeling_minimax_m3 import MiniMaxM3VLForCausalLM, mxfp8_config
from modeling_minimax_m3.fused import attention_input, experts, few_tokens
from modeling_minimax_m3.loading.fused_projections import joined
from modeling_minimax_m3.models.text import MiniMaxM3VLTextModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from fused.few_token_cases import pretend_kernels, record_calls

LENGTHS = (90, 61)
GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
GENERATION |= {"return_dict_in_generate": True, "output_logits": True}
PROCESSES = int(os.environ["WORLD_SIZE"])


def load_both(folder: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model in parts, and the whole one."""
    plan = {
        "tp_size": PROCESSES,
        **{name: options.pop(name) for name in list(options) if name.endswith(("plan", "size"))},
    }
    load = MiniMaxM3VLForCausalLM.from_pretrained
    parts = load(folder, dtype=torch.float32, distributed_config=DistributedConfig(**plan), **options)
    return parts.eval(), load(folder, dtype=torch.float32, **options).eval()


def make_rows(side: str) -> dict[str, torch.Tensor]:
    """Two rows of different lengths."""
    ids = torch.randint(2, 400, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(joined(found), expected, rtol=tolerance, atol=tolerance)


def check_weights(folder: str) -> None:
    """Each process holds its share of all projections but those of routers and index keys, and its heads' cache."""
    parts, whole = load_both(folder)
    expected = dict(whole.named_parameters())
    for name, parameter in parts.named_parameters():
        is_cut = not any(part in name for part in ("norm", "gate.weight", "indexer.k_proj"))
        held = parameter.to_local().numel() if is_cut else parameter.numel()
        assert held * (PROCESSES if is_cut else 1) == expected[name].numel(), name
        assert torch.equal(joined(parameter.detach()), expected[name]), name
    config = parts.config
    for cache in (None, StaticCache(config=config, max_cache_len=128)):
        output = parts.generate(**make_rows("left"), **GENERATION, **({} if cache is None else {"cache": cache}))
        cache = cache or getattr(output, "cache", None) or output.past_key_values
        assert {layer.keys.shape[1] for layer in cache.layers} == {config.num_key_value_heads // PROCESSES}


def check_logits(folder: str) -> None:
    """Of padded rows, with gradients and without, with a mask of heads, and of tokens that follow a cache."""
    parts, whole = load_both(folder)
    for side in ("left", "right"):
        rows = make_rows(side)
        real = rows["attention_mask"].bool()
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert_near(parts(**rows).logits[real], whole(**rows).logits[real])
    ids = make_rows("left")["input_ids"]
    heads, length = whole.config.num_attention_heads, ids.shape[1]
    allowed = torch.rand(2, heads, length, length, generator=torch.Generator().manual_seed(1)) < 0.7
    allowed = (allowed | torch.eye(length, dtype=torch.bool)).tril()
    with torch.no_grad():
        assert_near(
            parts(input_ids=ids, attention_mask=allowed).logits, whole(input_ids=ids, attention_mask=allowed).logits
        )
        ours, expected = (
            model(input_ids=ids, output_attentions=True, attn_implementation="eager").attentions
            for model in (parts, whole)
        )
        for found, weights in zip(ours, expected, strict=True):
            assert found.shape[1] == heads
            assert_near(found, weights)
    rows = make_rows("left")
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        ours, expected = (model.generate(**rows, **GENERATION, **options) for model in (parts, whole))
        assert torch.equal(ours.sequences, expected.sequences)
        assert_near(torch.stack(ours.logits), torch.stack(expected.logits))


def gradients(model: torch.nn.Module, passes: int = 2) -> dict[str, torch.Tensor]:
    """Summed over passes, with the losses of routers and indexers."""
    model.train()
    for step in range(passes):
        rows = make_rows("right" if step % 2 else "left")
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        model(**rows, labels=labels, output_router_logits=True).loss.backward()
    return {name: joined(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare_gradients(parts: torch.nn.Module, whole: torch.nn.Module) -> None:
    ours, expected = gradients(parts), gradients(whole)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm() + 1e-7, f"{name}: {error} of {expected[name].norm()}"


def check_gradients(folder: str) -> None:
    """Of two passes that are accumulated."""
    parts, whole = load_both(folder)
    for model in (parts, whole):
        model.set_indexer_training(0.5)
    compare_gradients(parts, whole)


def adapted(model: torch.nn.Module, names: list[str]) -> torch.nn.Module:
    """With LoRA on the layers of these names, of equal numbers for all processes."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names, exclude_modules=r".*indexer.*"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                value = torch.randn(parameter.shape, generator=generator) * 0.1
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.copy_(value)
    return model


def check_adapters(folder: str) -> None:
    """LoRA on the projections to heads, and on MLPs that a rule of the user's own leaves whole."""
    mlps = [f"model.layers.*.mlp.{name}" for name in ("gate_up_proj", "shared_experts.gate_up_proj")]
    names = ["q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj"]
    models = load_both(folder, tp_plan=dict.fromkeys(mlps, "replicate"))
    parts, whole = (adapted(model, names) for model in models)
    assert sum(".lora_A." in name for name, _ in parts.named_parameters()) == 5 * 4  # each layer has one MLP
    rows = make_rows("left")
    ours, expected = (model.eval().generate(**rows, **GENERATION) for model in (parts, whole))
    assert torch.equal(ours.sequences, expected.sequences)
    assert_near(torch.stack(ours.logits), torch.stack(expected.logits))
    compare_gradients(parts, whole)
    parts = adapted(load_both(folder)[0], ["gate_up_proj"])
    with pytest.raises(NotImplementedError, match="`target_modules` must not name gate_up_proj"):
        parts(**rows)
    parts = load_both(folder)[0]
    name = "model.layers.0.self_attn.q_proj"
    alone = torch.nn.Sequential(
        parts.get_submodule(name)
    )  # of which PEFT does not know that it is cut, as older versions
    parts.set_submodule(name, get_peft_model(alone, LoraConfig(target_modules=["0"])).base_model.model[0])
    with pytest.raises(NotImplementedError, match="`target_modules` must not name q_proj"):
        parts(**rows)


def count_sums(patch: pytest.MonkeyPatch, num_tokens: int = 1) -> list[int]:
    """How often a pass of so many tokens sums over the processes: a number for each such pass from now on."""
    counts: list[int] = []
    reduce, forward = distributed.all_reduce, MiniMaxM3VLTextModel.forward

    def all_reduce(*args, **kwargs):
        if counts:
            counts[-1] += 1
        return reduce(*args, **kwargs)

    def counting(self, input_ids, **kwargs):
        if input_ids.shape[1] == num_tokens:
            counts.append(0)
        return forward(self, input_ids, **kwargs)

    patch.setattr(distributed, "all_reduce", all_reduce)
    patch.setattr(MiniMaxM3VLTextModel, "forward", counting)
    return counts


def decode(model: torch.nn.Module) -> torch.Tensor:
    """Logits of a prompt's last token and of three that follow."""
    ids = make_rows("left")["input_ids"].to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        logits = [model(ids[:, :40], cache=cache).logits[:, -1:]]
        logits += [model(ids[:, place : place + 1], cache=cache).logits for place in range(40, 43)]
    return torch.cat(logits, dim=1)


def check_kernels(folder: str) -> None:
    """The kernels of few tokens, or their definitions here, take the parts; a layer sums twice over the processes."""
    parts, whole = load_both(folder)
    compare_kernels(parts, whole)
    seen = []
    watched = parts.model.layers[0].self_attn.q_proj
    with watched.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1])):
        compare_kernels(parts, whole, watched_attentions=1)
    assert set(seen) == {watched.out_features // PROCESSES}
    forward = watched.forward
    watched.forward = lambda x: forward(x) * 0
    with pytest.raises(AssertionError, match="not close"):  # the replacement is called
        compare_kernels(parts, whole, watched_attentions=1)


def check_kernels_of_experts(folder: str) -> None:
    """The same where each process has some of the experts."""
    compare_kernels(*load_both(folder, ep_size=PROCESSES))


def check_kernels_of_mxfp8(folder: str) -> None:
    """The same of weights in MXFP8."""
    compare_kernels(*load_both(folder, quantization_config=mxfp8_config()))


def take_float32(patch: pytest.MonkeyPatch) -> list[str]:
    """Definitions in place of the kernels of few tokens, in float32, in which no rounding changes a choice: the calls."""
    for module in (few_tokens, attention_input):
        patch.setattr(module, "HALF_DTYPES", (torch.float32,))
        patch.setattr(module, "is_vector_block", lambda tensor: True)  # float32 weights lie as in their file
    patch.setattr(few_tokens, "_is_read", lambda x, weight: True)
    return pretend_kernels(patch)


def compare_kernels(parts: torch.nn.Module, whole: torch.nn.Module, watched_attentions: int = 0) -> None:
    expected = decode(whole)
    config = parts.config
    with pytest.MonkeyPatch.context() as patch:
        calls = take_float32(patch)
        sums = count_sums(patch)
        found = decode(parts)
        steps = Counter(calls)
    assert steps["few_token_mlp with experts"] == 3 * config.mlp_layer_types.count("sparse")
    assert steps["few_token_mlp"] == 3 * config.mlp_layer_types.count("dense")
    assert steps["attention_input"] == 3 * (config.num_hidden_layers - watched_attentions)
    assert sums == [2 * config.num_hidden_layers] * 3
    assert_near(found, expected)


def check_kernels_of_many_tokens(folder: str) -> None:
    """The same around the grouped products of a prompt, with experts that are cut and with whole ones."""
    rows = make_rows("left")
    real = rows["attention_mask"].bool()
    calls: list[torch.Size] = []
    for options in ({}, {"ep_size": PROCESSES}):
        parts, whole = load_both(folder, **options)
        calls.clear()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            expected = whole(**rows).logits[real]
            patch.setattr(experts, "takes_experts", lambda *args: calls.append(args[1].shape) or True)
            sums = count_sums(patch, num_tokens=rows["input_ids"].shape[1])
            assert_near(parts(**rows).logits[real], expected)
        assert len(calls) == parts.config.mlp_layer_types.count("sparse")
        assert {shape.numel() for shape in calls} == {
            parts.model.layers[-1].mlp.experts.gate_up_proj.to_local().numel()
        }
        assert sums == [2 * parts.config.num_hidden_layers]


def check_halves(folder: str) -> None:
    """In bfloat16, with a model that chooses all blocks and experts. On GPUs the kernels run, and in CUDA graphs."""
    on_gpu = torch.cuda.is_available()
    load = MiniMaxM3VLForCausalLM.from_pretrained
    parts = load(folder, dtype=torch.bfloat16, distributed_config=DistributedConfig(tp_size=PROCESSES)).eval()
    whole = load(folder, dtype=torch.bfloat16).eval().to(parts.device)
    expected = decode(whole).float()
    with pytest.MonkeyPatch.context() as patch:
        calls = record_calls(patch) if on_gpu else pretend_kernels(patch)
        found = decode(parts).float()
    assert calls.count("few_token_mlp with experts") == 3 * parts.config.mlp_layer_types.count("sparse")
    assert calls.count("attention_input") == 3 * parts.config.num_hidden_layers
    error = (found - expected).norm() / expected.norm()
    assert error < 2e-2, error
    if on_gpu:
        replay = mock.create_autospec(torch.cuda.CUDAGraph.replay, side_effect=torch.cuda.CUDAGraph.replay)
        rows = {name: tensor.to(parts.device) for name, tensor in make_rows("left").items()}
        with mock.patch.dict(os.environ, MINIMAX_M3_CUDA_GRAPHS="0"):
            expected = parts.generate(**rows, **GENERATION)
        with mock.patch.object(torch.cuda.CUDAGraph, "replay", lambda graph: replay(graph)):
            found = parts.generate(**rows, **GENERATION)
        assert replay.call_count >= 3
        assert torch.equal(found.sequences, expected.sequences)


def check_parts_that_no_kernel_reads(folder: str) -> None:
    """Where the kernels cannot read the part of one process, all processes take the other path."""
    plan = DistributedConfig(tp_size=PROCESSES)
    options = {"quantization_config": mxfp8_config(), "dtype": torch.bfloat16, "distributed_config": plan}
    parts = MiniMaxM3VLForCausalLM.from_pretrained(folder, **options).eval()
    if distributed.get_rank() == 1:
        weight = parts.model.layers[-1].mlp.experts._parameters
        with torch.no_grad():
            weight["down_proj"].to_local()[:, :, :32] = 0
            weight["down_proj_scale_inv"].to_local()[:, :, 0] = 140
    with pytest.MonkeyPatch.context() as patch:
        calls = pretend_kernels(patch)
        assert decode(parts).isfinite().all()
    assert calls.count("few_token_mlp with experts") == 3 * (parts.config.mlp_layer_types.count("sparse") - 1)


def check_whole_shared_experts(folder: str) -> None:
    """Where shared experts stay whole, no process adds its copy to the sum of the routed ones."""
    parts, whole = load_both(folder)
    assert "model.layers.*.mlp.shared_experts.gate_up_proj" not in parts.tp_plan
    expected = decode(whole)
    with pytest.MonkeyPatch.context() as patch:
        take_float32(patch)
        patch.setattr(experts, "takes_experts", lambda *args: True)
        assert_near(decode(parts), expected)


def check_heads_that_cannot_be_shared(folder: str) -> None:
    """Each process keeps all heads then, as by the plan of stock Transformers."""
    parts, whole = load_both(folder)
    assert parts.config.num_key_value_heads % PROCESSES
    assert parts.tp_plan["model.layers.*.self_attn.q_proj"] == "colwise_gather_output"
    assert parts.model.layers[0].self_attn.processes is None
    rows = make_rows("left")
    ours, expected = (model.generate(**rows, **GENERATION) for model in (parts, whole))
    assert torch.equal(ours.sequences, expected.sequences)
    assert_near(torch.stack(ours.logits), torch.stack(expected.logits))


def check_rules_of_the_user(folder: str) -> None:
    """Rules of a user's own stay, and those that would cut only some projections by heads are refused."""
    attention = "model.layers.*.self_attn"
    parts, whole = load_both(folder, tp_plan={f"{attention}.q_proj": "colwise_gather_output"})
    assert parts.tp_plan[f"{attention}.k_proj"] == "colwise_gather_output"
    rows = make_rows("left")
    with torch.no_grad():
        real = rows["attention_mask"].bool()
        assert_near(parts(**rows).logits[real], whole(**rows).logits[real])
    with pytest.raises(ValueError, match="`tp_plan` must have all of these rules"):
        load_both(folder, tp_plan={f"{attention}.q_proj": "colwise"})


CHECKS = {name.removeprefix("check_"): function for name, function in globals().items() if name.startswith("check_")}


if __name__ == "__main__":
    CHECKS[sys.argv[1]](sys.argv[2])
    distributed.barrier()
    # Without the interpreter's clean-up: gloo's threads may still run then, and now and then abort a process that is
    # done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
