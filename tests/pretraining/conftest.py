"""A processor as `pretrain.py` makes it: its tokenizer learnt from the pretraining data, and its sizes are theirs."""

from unittest import mock

import pytest

from configuration_minimax_m3 import tiny_config
from processing_minimax_m3.pretraining import WEIGHTS, resize_to_drawn_sizes, tokenizer_texts

from .pretraining_cases import available_tasks


@pytest.fixture(scope="session")
def weights() -> dict[str, float]:
    return {task: WEIGHTS[task] for task in available_tasks()}


@pytest.fixture(scope="session")
def processor(load_script, weights):
    config = tiny_config(text={"vocab_size": 1024})
    with mock.patch.object(tokenizer_texts, "ROWS", 25):  # fewer texts, which are read in less time
        texts = tokenizer_texts.tokenizer_texts(weights)
        processor = load_script("make_tiny_checkpoint").build_processor(config, texts)
    resize_to_drawn_sizes(processor)
    return processor
