"""`RunMonitor` on a GPU: it never waits for the device within a step, and knows its peak."""

import warnings

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.monitoring.pass_flops import peak_flops
from modeling_minimax_m3.monitoring.tallies import PassTallies
from modeling_minimax_m3.run_monitor import RunMonitor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# A shape that the CUDA kernels take.
TEXT = {
    "head_dim": 64,
    "index_head_dim": 64,
    "hidden_size": 128,
    "index_block_size": 64,
    "index_topk_blocks": 2,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "output_router_logits": True,
}


def make_model() -> MiniMaxM3VLForCausalLM:
    torch.manual_seed(0)
    return MiniMaxM3VLForCausalLM(tiny_config(text=TEXT).text_config).to("cuda", torch.bfloat16).train()


def count_waits(model, inputs) -> int:
    """How often the host waits for the device in a pass and its backward."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs, use_cache=False).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


@pytest.mark.parametrize("wants_mass", [False, True])
def test_a_pass_waits_no_more_often(wants_mass):
    model = make_model()
    ids = torch.randint(5, 400, (1, 600), device="cuda")
    position_ids = torch.cat([torch.arange(400), torch.arange(200)])[None].cuda()
    inputs = {"input_ids": ids, "labels": ids, "position_ids": position_ids}
    count_waits(model, inputs)  # kernels are loaded, memory is allocated
    expected = count_waits(model, inputs)
    tallies = PassTallies(model)
    count_waits(model, inputs)  # first sums
    tallies.wants_mass = wants_mass
    assert count_waits(model, inputs) == expected
    names = [f"{kind}_{number}" for number in tallies.sparse_layers for kind in ("mass", "mass_count")]
    sums = tallies.read(["tokens", "learned", *names], True, torch.device("cuda"))
    assert sums[:2] == [1200, 1198]
    assert any(sums[2:]) == wants_mass


def test_a_run_in_bfloat16(tmp_path):
    rows = [{"input_ids": [5 + (i + j) % 400 for i in range(500)]} for j in range(8)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, bf16=True, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = Trainer(make_model().float(), arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening())
    RunMonitor(report=False).attach(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for log in logs:
        assert 0 < log["peak_memory_gib"] < 10
        assert 0 < log["selected_mass"] < 1 and 0 < log["expert_entropy"] <= 1
        if peak_flops(torch.device("cuda"), torch.bfloat16) is not None:
            assert 0 < log["mfu"] < 1
