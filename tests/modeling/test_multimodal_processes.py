"""The calls of vision tower and projector that other processes rely on, in one process; tests/training runs two."""

import pytest
import torch
from transformers import DynamicCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration

IMAGES = [[1, 4, 6], [1, 4, 4]]
VIDEOS = [[1, 4, 4], [2, 4, 4]]
BOTH = {"images": IMAGES, "videos": VIDEOS}


@pytest.fixture
def model(make_pair, config):
    config._attn_implementation = "sdpa"
    return make_pair(MiniMaxM3SparseForConditionalGeneration, config)[1]


@pytest.fixture
def have_company(monkeypatch):
    """A function that pretends, once called, that there are two processes."""

    def begin():
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    return begin


@pytest.fixture
def trained(model, have_company):
    have_company()
    return model.train()


@pytest.fixture
def calls(model):
    """The parts that were called, in order."""
    names = []
    for name in ("vision_tower", "multi_modal_projector"):
        model.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: names.append(name))
    return names


def vision_gradients(model):
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    return [parameter.grad for part in parts for parameter in part.parameters()]


@pytest.mark.parametrize("media", [{}, {"images": IMAGES}, {"videos": VIDEOS}, BOTH])
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_one_call_and_a_gradient_of_everything(trained, calls, make_inputs, config, media, given):
    inputs = make_inputs(config, **media)
    labels = inputs["input_ids"]
    if given == "embeddings":
        inputs["inputs_embeds"] = trained.get_input_embeddings()(inputs.pop("input_ids"))
    trained(**inputs, labels=labels).loss.backward()
    assert calls == ["vision_tower", "multi_modal_projector"]
    gradients = vision_gradients(trained)
    assert all(gradient is not None for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == bool(media)


@pytest.mark.parametrize("media", [{}, BOTH], ids=["nothing", "both"])
def test_the_rest_is_as_in_one_process(model, calls, make_inputs, config, media, have_company):
    inputs = make_inputs(config, **media)

    def losses_and_gradients():
        model.train().zero_grad()
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return output.loss, output.image_hidden_states, output.video_hidden_states, gradients

    *alone, expected = losses_and_gradients()
    num_calls = calls.count("vision_tower")
    assert num_calls == len(media)
    have_company()
    *among, gradients = losses_and_gradients()
    assert calls.count("vision_tower") == num_calls + 1
    # The tower's batches have other sizes, so sums may round differently.
    torch.testing.assert_close(among, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close({name: gradients[name] for name in expected}, expected, rtol=1e-4, atol=1e-6)
    assert not any(gradients[name].any() for name in gradients.keys() - expected.keys())


def test_a_feature_that_overflows_does_no_harm(trained, make_inputs, config):
    with torch.no_grad():
        trained.model.multi_modal_projector.merge_linear_2.bias.fill_(float("inf"))
    inputs = make_inputs(config)
    loss = trained(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.isfinite()
    assert trained.get_input_embeddings().weight.grad.isfinite().all()
    assert not trained.model.multi_modal_projector.merge_linear_2.bias.grad.any()


def test_values_worked_out_ahead_are_used(model, calls, make_inputs, config, have_company):
    """Precomputed values that differ from the grid's show that they are used: no positions, and too many segments."""
    inputs = make_inputs(config, **BOTH)
    given = {
        "image_position_ids": torch.zeros(len(inputs["pixel_values"]), 3, dtype=torch.long),
        "video_cu_seqlens": torch.tensor([0, 16, 32, 48], dtype=torch.int32),
    }
    model.train()
    plain = model(**inputs).logits
    expected = model(**inputs, **given).logits
    assert (expected - plain).abs().max() > 1e-2
    calls.clear()
    have_company()
    torch.testing.assert_close(model(**inputs, **given).logits, expected, rtol=1e-5, atol=1e-5)
    assert calls == ["vision_tower", "multi_modal_projector"]


@pytest.mark.parametrize(
    "case", ["evaluation", "no gradients", "frozen", "features", "no features", "cache", "generation"]
)
def test_no_call_where_nobody_waits(trained, calls, make_inputs, config, case):
    inputs, options = make_inputs(config), {}
    if case == "evaluation":
        trained.eval()
    if case == "frozen":
        trained.model.vision_tower.requires_grad_(False)
        trained.model.multi_modal_projector.requires_grad_(False)
    if case == "features":
        features = trained.get_image_features(torch.zeros(4, 1176), torch.tensor([[1, 2, 2]]))
        inputs["input_ids"][0, 3] = config.image_token_id
        options = {"mm_encoder_outputs": {"image": features}}
        calls.clear()
    if case == "no features":
        options = {"mm_encoder_outputs": {}}
    if case == "cache":
        options = {"cache": DynamicCache(config=config.text_config)}
    with torch.set_grad_enabled(case != "no gradients"):
        if case == "generation":  # without gradients, somebody waits only where weights are cut
            next(trained.model.vision_tower.parameters()).ds_id = 0
            trained.generate(**inputs, max_new_tokens=3, use_cache=False)
        else:
            trained(**inputs, **options)
    assert "vision_tower" not in calls


@pytest.mark.parametrize("part", ["vision_tower.layers.1", "multi_modal_projector"])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_weights_that_are_cut_are_called_for(trained, calls, make_inputs, config, part, mode):
    """ZeRO-3 marks the weights that it shards. It shards frozen ones too, and an evaluation gathers them as well."""
    trained.model.requires_grad_(False)
    next(trained.model.get_submodule(part).parameters()).ds_id = 0
    trained.train(mode == "training")
    with torch.no_grad():
        trained(**make_inputs(config))
    assert calls == ["vision_tower", "multi_modal_projector"]


def test_mistakes_are_named_for_each_kind(trained, make_inputs, config):
    inputs = make_inputs(config, **BOTH)
    with pytest.raises(ValueError, match="pixel_values_videos needs video_grid_thw"):
        trained(**{name: value for name, value in inputs.items() if name != "video_grid_thw"})
    pixels = torch.cat((inputs["pixel_values"], inputs["pixel_values_videos"]))
    split = len(inputs["pixel_values"]) + 4
    inputs |= {"pixel_values": pixels[:split], "pixel_values_videos": pixels[split:]}
    with pytest.raises(ValueError, match="40 patches of the grid .* got 44 rows"):
        trained(**inputs)


@pytest.mark.slow
def test_compiles_without_graph_breaks(make_pair, make_inputs):
    from torch.testing._internal.distributed.fake_pg import FakeStore  # the compiler asks for more than the size

    config = tiny_config(text={"num_hidden_layers": 2}, vision={"num_hidden_layers": 1})
    model = make_pair(MiniMaxM3SparseForConditionalGeneration, config)[1].train()
    inputs = make_inputs(config)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        expected = model.model(**inputs, use_cache=False).last_hidden_state
        torch.compiler.reset()
        compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
        states = compiled(**inputs, use_cache=False).last_hidden_state
        states.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert all(gradient is not None for gradient in vision_gradients(model))
