"""The indexers' loss in the logs of `Trainer`; tests/training/test_trainer.py has its values."""

import torch
from transformers import Trainer, TrainingArguments

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.trainer_logging import IndexerLossLogging


class IndexerTrainer(IndexerLossLogging, Trainer):
    pass


def test_a_prediction_before_training_is_not_taken_for_it(tmp_path):
    text = {"num_hidden_layers": 2, "indexer_loss_coef": 0.1}
    model = MiniMaxM3VLForCausalLM(tiny_config(text=text).text_config)
    rows = [{"input_ids": torch.arange(2, 26), "labels": torch.arange(2, 26)}] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = IndexerTrainer(model, arguments, train_dataset=rows)
    trainer.predict(rows)
    trainer.train()
    names = [name for entry in trainer.state.log_history for name in entry if "indexer_loss" in name]
    assert names == ["indexer_loss"]
