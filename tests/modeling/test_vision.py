"""The vision tower and the projector against stock Transformers, and what keeps images apart."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_position_ids

from modeling_minimax_m3.models.vision import MiniMaxM3VLMultiModalProjector, MiniMaxM3VLVisionModel, position_ids_of

# images, and chunks of a video, of equal and of different sizes
MIXED_GRID = torch.tensor([[1, 4, 6], [1, 4, 4], [2, 4, 4], [2, 4, 4], [1, 8, 4], [3, 2, 2]])


@pytest.fixture
def vision_config(config):
    return config.vision_config


@pytest.fixture
def make_towers(make_pair, vision_config):
    def make(attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32):
        vision_config._attn_implementation = attn_implementation
        return make_pair(MiniMaxM3VLVisionModel, vision_config, dtype=dtype)

    return make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_tower_equals_stock(make_towers, make_patches, config, attn_implementation, dtype):
    stock_tower, tower = make_towers(attn_implementation, dtype)
    inputs = {"pixel_values": make_patches(config, MIXED_GRID, dtype=dtype), "grid_thw": MIXED_GRID}
    expected = stock_tower(**inputs, output_hidden_states=True)
    output = tower(**inputs, output_hidden_states=True)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    assert len(output.hidden_states) == tower.config.num_hidden_layers + 1
    for name in ("last_hidden_state", "pooler_output", "hidden_states"):
        torch.testing.assert_close(output[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_stock(make_towers, make_patches, config, relative_error, dtype):
    pixel_values = make_patches(config, MIXED_GRID)
    exact = make_towers("sdpa", torch.float64)[0](pixel_values.double(), grid_thw=MIXED_GRID).last_hidden_state
    stock_error, error = (
        relative_error(tower(pixel_values.to(dtype), grid_thw=MIXED_GRID).last_hidden_state, exact)
        for tower in make_towers("sdpa", dtype)
    )
    assert error < 1.2 * stock_error < 0.03


@pytest.mark.parametrize("merge_size", [1, 2, 3])
def test_position_ids_are_those_of_transformers(merge_size):
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 17):
        grid = torch.randint(1, 6, (count, 3), generator=generator)
        grid[:, 1:] *= merge_size
        expected = get_vision_position_ids(grid, merge_size, include_temporal=True)
        torch.testing.assert_close(position_ids_of(grid, merge_size), expected, rtol=0, atol=0)
        torch.testing.assert_close(position_ids_of(grid.int(), merge_size), expected, rtol=0, atol=0)


def test_patch_embedding_is_the_convolution(make_towers, make_patches, config):
    proj = make_towers(dtype=torch.float64)[1].embeddings.proj
    patches = make_patches(config, MIXED_GRID, dtype=torch.float64).view(-1, 3, 2, 14, 14)
    torch.testing.assert_close(proj(patches), torch.nn.functional.conv3d(patches, proj.weight))


def test_eager_attentions_equal_stock(make_towers, make_patches, config):
    stock_tower, tower = make_towers("eager")
    inputs = {"pixel_values": make_patches(config, MIXED_GRID), "grid_thw": MIXED_GRID, "output_attentions": True}
    expected, attentions = stock_tower(**inputs).attentions, tower(**inputs).attentions
    assert len(attentions) == tower.config.num_hidden_layers
    for layer, expected_layer in zip(attentions, expected):
        assert len(layer) == len(MIXED_GRID)
        torch.testing.assert_close(list(layer), expected_layer)


def test_other_implementations_turn_eager_where_attentions_are_asked_for(make_towers, make_patches, config):
    AttentionInterface.register(
        "flash_attention_2_unused", lambda *args, **kwargs: pytest.fail("has no probabilities")
    )
    _, tower = make_towers("eager")
    inputs = {"pixel_values": make_patches(config, MIXED_GRID), "grid_thw": MIXED_GRID, "output_attentions": True}
    expected = tower(**inputs)
    for implementation in ("sdpa", "flash_attention_2_unused"):
        tower.config._attn_implementation_internal = implementation
        output = tower(**inputs)
        assert len(output.attentions) == tower.config.num_hidden_layers
        torch.testing.assert_close(output.attentions, expected.attentions, rtol=0, atol=0)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)


def test_gradients_equal_stock_with_and_without_checkpointing(make_towers, make_patches, config):
    stock_tower, tower = make_towers(dtype=torch.float64)
    pixel_values = make_patches(config, MIXED_GRID, dtype=torch.float64)

    def gradients(module) -> dict[str, torch.Tensor]:
        module.train()
        module.zero_grad()
        module(pixel_values, grid_thw=MIXED_GRID).last_hidden_state.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}

    expected = gradients(stock_tower)
    torch.testing.assert_close(gradients(tower), expected, rtol=1e-9, atol=1e-12)
    tower.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in tower.layers)
    torch.testing.assert_close(gradients(tower), expected, rtol=1e-9, atol=1e-12)


def varlen_attention(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, is_causal, scaling,
                     max_length_q, max_length_k, dropout):  # fmt: skip
    """A flash kernel's result on packed sequences, in plain PyTorch."""
    assert not is_causal
    assert attention_mask is None
    assert cu_seq_lens_q.dtype == torch.int32
    assert max_length_q == max_length_k == cu_seq_lens_q.diff().max()
    segments = zip(*(states.split(cu_seq_lens_k.diff().tolist(), dim=2) for states in (query, key, value)))
    outputs = [((q @ k.transpose(-1, -2) * scaling).softmax(-1) @ v) for q, k, v in segments]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def test_flash_kernels_get_packed_sequences(make_towers, make_patches, config):
    AttentionInterface.register("flash_attention_2_stand_in", varlen_attention)
    _, tower = make_towers("sdpa")
    pixel_values = make_patches(config, MIXED_GRID)
    expected = tower(pixel_values, grid_thw=MIXED_GRID).last_hidden_state
    tower.config._attn_implementation_internal = "flash_attention_2_stand_in"
    output = tower(pixel_values, grid_thw=MIXED_GRID).last_hidden_state
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_segments_see_only_themselves(make_towers, make_patches, config, attn_implementation):
    _, tower = make_towers(attn_implementation)
    pixel_values = make_patches(config, MIXED_GRID)
    sizes = MIXED_GRID.prod(-1).tolist()
    together = tower(pixel_values, grid_thw=MIXED_GRID).last_hidden_state[0].split(sizes)
    for row, pixels, features in zip(MIXED_GRID, pixel_values.split(sizes), together):
        alone = tower(pixels, grid_thw=row[None]).last_hidden_state[0]
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)

    changed = pixel_values.clone()
    changed[sizes[0] : sizes[0] + sizes[1]] += 1.0
    others = tower(changed, grid_thw=MIXED_GRID).last_hidden_state[0].split(sizes)
    different = [not torch.equal(new, old) for new, old in zip(others, together)]
    assert different == [False, True, False, False, False, False]


def test_successive_segments_of_equal_size_share_one_call(make_towers, make_patches, config):
    shapes = []

    def counting_attention(module, query, key, value, attention_mask, scaling, **kwargs):
        shapes.append(tuple(query.shape))
        return ((query @ key.transpose(-1, -2) * scaling).softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("counting", counting_attention)
    _, tower = make_towers("sdpa")
    grid = torch.tensor([[1, 4, 4]] * 5 + [[1, 2, 4]] + [[1, 4, 4]] * 2)
    pixel_values = make_patches(config, grid)
    expected = tower(pixel_values, grid_thw=grid).last_hidden_state
    tower.config._attn_implementation_internal = "counting"
    output = tower(pixel_values, grid_thw=grid).last_hidden_state
    torch.testing.assert_close(output, expected)
    assert [(shape[0], shape[2]) for shape in shapes] == [(5, 16), (1, 8), (2, 16)] * tower.config.num_hidden_layers


def test_no_tensor_of_patches_by_patches(make_towers, make_patches, config):
    class LargestTensor(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return output

    _, tower = make_towers("sdpa")
    grid = torch.tensor([[1, 4, 4]] * 200)
    pixel_values = make_patches(config, grid)
    with torch.no_grad(), LargestTensor() as largest:
        tower(pixel_values, grid_thw=grid)
    assert largest.elements == pixel_values.numel() < pixel_values.shape[0] ** 2


def test_text_arguments_change_nothing(make_towers, make_patches, config):
    _, tower = make_towers("eager")
    pixel_values = make_patches(config, MIXED_GRID)
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    expected = tower(pixel_values, grid_thw=MIXED_GRID).last_hidden_state
    output = tower(
        pixel_values,
        grid_thw=MIXED_GRID,
        cu_seq_lens_q=offsets,
        cu_seq_lens_k=offsets,
        max_length_q=4,
        max_length_k=4,
        attention_mask=torch.zeros(1, 7),
        is_causal=True,
    ).last_hidden_state
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_precomputed_values_are_used(make_towers, make_patches, config):
    _, tower = make_towers()
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    pixel_values = make_patches(config, grid)
    apart = tower(pixel_values, grid_thw=grid).last_hidden_state
    joined = tower(pixel_values, grid_thw=grid, cu_seqlens=torch.tensor([0, 32], dtype=torch.int32)).last_hidden_state
    moved = tower(pixel_values, grid_thw=grid, position_ids=torch.zeros(32, 3, dtype=torch.long)).last_hidden_state
    assert not torch.allclose(apart, joined, atol=1e-3)
    assert not torch.allclose(apart, moved, atol=1e-3)


@pytest.mark.parametrize("grid", [MIXED_GRID[:1], MIXED_GRID[:3]], ids=["one image", "three images"])
def test_compiles_without_graph_breaks(make_towers, make_patches, config, grid):
    config.vision_config.num_hidden_layers = 1
    _, tower = make_towers()
    torch.compiler.reset()
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for heights in (4, 8):
            grid = grid * torch.tensor([1, heights // 4, 1])
            pixel_values = make_patches(config, grid)
            expected = tower(pixel_values, grid_thw=grid).last_hidden_state
            torch.testing.assert_close(compiled(pixel_values, grid_thw=grid).last_hidden_state, expected)


WIDTH = 3 * 2 * 14 * 14


@pytest.mark.parametrize(
    ("pixel_values", "grid", "error", "message"),
    [
        (
            torch.zeros(8, WIDTH - 1),
            [[1, 2, 4]],
            ValueError,
            rf"pixel_values .*\(patches, {WIDTH}\).* got \(8, 1175\)",
        ),
        (torch.zeros(1, 8, WIDTH), [[1, 2, 4]], ValueError, r"pixel_values .* got \(1, 8, 1176\)"),
        (torch.zeros(8, WIDTH, dtype=torch.uint8), [[1, 2, 4]], TypeError, "pixel_values .* got torch.uint8"),
        (torch.zeros(8, WIDTH), [1, 2, 4], ValueError, r"image_grid_thw.*\(images, 3\).* got \(3,\)"),
        (torch.zeros(8, WIDTH), [[2, 4]], ValueError, r"image_grid_thw.*\(images, 3\).* got \(1, 2\)"),
        (torch.zeros(8, WIDTH), torch.zeros(0, 3), ValueError, r"image_grid_thw.* at least one row.* got \(0, 3\)"),
        (torch.zeros(8, WIDTH), [[1.0, 2.0, 4.0]], TypeError, "grid .* must hold integers, got torch.float32"),
        (torch.zeros(9, WIDTH), [[1, 2, 4]], ValueError, "pixel_values .* 8 patches .* got 9 rows"),
        (torch.zeros(9, WIDTH), [[1, 2, 2], [1, 3, 4]], ValueError, r"Row 1 .* spatial_merge_size=2, got \[1, 3, 4\]"),
        (torch.zeros(0, WIDTH), [[0, 2, 2]], ValueError, r"Row 0 .* positive.* got \[0, 2, 2\]"),
    ],
    ids=[
        "width",
        "axes",
        "integers",
        "flat grid",
        "short grid",
        "no images",
        "real grid",
        "count",
        "odd grid",
        "empty image",
    ],
)
def test_bad_input(make_towers, pixel_values, grid, error, message):
    _, tower = make_towers()
    with pytest.raises(error, match=message):
        tower(pixel_values, grid_thw=torch.as_tensor(grid))


def test_projector_equals_stock(make_pair, config):
    stock_projector, projector = make_pair(MiniMaxM3VLMultiModalProjector, config, dtype=torch.float64)
    outputs, gradients = [], []
    for module in (stock_projector, projector):
        features = torch.linspace(-3, 3, 24 * config.vision_config.hidden_size, dtype=torch.float64)
        features = features.view(24, -1).requires_grad_()
        output = module(features)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append(features.grad)
    assert outputs[1].shape == (24 // 4, config.text_config.hidden_size)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
