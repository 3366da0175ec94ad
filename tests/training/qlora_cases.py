"""What adapters over quantized weights are tested with: which layers get them, and what they learn."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
TARGETS = {
    "attention": ATTENTION,
    "experts": EXPERTS,
    "one weight of the experts": {"target_parameters": ["mlp.experts.down_proj"]},
    "both": ATTENTION | EXPERTS,
    "dora": ATTENTION | {"use_dora": True},
}


def with_adapters(model, rank: int = 4, **targets):
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, task_type="CAUSAL_LM", **targets))
    fill_adapters(model)
    return model.train()


def fill_adapters(model) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05


def tokens() -> torch.Tensor:
    return torch.randint(2, 400, (2, 70), generator=torch.Generator().manual_seed(2))


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)
    return loss.detach(), gradients


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits


def assert_close_training(model, reference, tolerance: float) -> None:
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(model), loss_and_gradients(reference)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0 or ".indexer." in name  # the language loss sends nothing there
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name


def assert_adapters_learn_and_are_saved(load: Callable, tmp_path: Path) -> None:
    """The loss falls, and a model that is loaded again with the saved adapters gives the same logits.

    Args:
        load (Callable): Returns the base, each time the same.
        tmp_path (Path): Where the adapters go.
    """
    model = with_adapters(load(), **TARGETS["both"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss, _ = loss_and_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits_of(again), expected)
