"""QLoRA: adapters on a base model whose linear layers are kept in 4 bits by bitsandbytes, on a GPU."""

from importlib.util import find_spec

import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]

# Rows of a multiple of 64, which is the block that a scale of 4 bits stands for; heads and blocks of the compiled kernels.
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "dense_intermediate_size": 128,
    "shared_intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "index_head_dim": 64,
    "index_n_heads": 2,
    "index_block_size": 64,
    "index_topk_blocks": 3,
    "indexer_loss_coef": 0.1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    MiniMaxM3VLForCausalLM(tiny_config(text=TEXT).text_config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no autocast"])
def test_training_steps_and_generation(checkpoint, autocast, kernels):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "router", "gate"],
    )
    model = MiniMaxM3VLForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    model.config.msa_backend = "cuda"
    in_4_bits = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert any(name.endswith("self_attn.q_proj") for name in in_4_bits)
    assert any(".indexer." in name for name in in_4_bits)

    # What is not in 4 bits becomes float32, and so do the hidden states and what the projections make of them.
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    target = ["q_proj", "k_proj", "v_proj", "o_proj"]  # of the indexers, too
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=target)).train()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(2, 400, (2, 500), generator=torch.Generator().manual_seed(1)).cuda()
    losses = []
    for _ in range(6):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            outputs = model(input_ids=tokens, labels=tokens)
        outputs.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        assert any("indexer" in name and grad.abs().sum() > 0 for name, grad in grads.items())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], parameter) for name, parameter in frozen.items())

    model.eval()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        generated = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert generated.sequences.shape == (2, 504)
    assert {layer.keys.dtype for layer in generated.cache.layers} == {torch.bfloat16}
