"""A processor as `pretrain.py` makes it: its tokenizer learnt from the pretraining data, and its sizes are theirs."""

import pytest

from configuration_minimax_m3 import tiny_config
from processing_minimax_m3.pretraining import WEIGHTS, resize_to_drawn_sizes
from processing_minimax_m3.pretraining.tokenizer_texts import tokenizer_texts

from .pretraining_cases import available_tasks


@pytest.fixture(scope="session")
def weights() -> dict[str, float]:
    return {task: WEIGHTS[task] for task in available_tasks()}


@pytest.fixture(scope="session")
def processor(load_script, weights):
    config = tiny_config(text={"vocab_size": 1024})
    processor = load_script("make_tiny_checkpoint").build_processor(config, tokenizer_texts(weights))
    resize_to_drawn_sizes(processor)
    return processor
