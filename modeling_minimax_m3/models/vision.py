"""Vision tower: pixel patches to patch features, and the projector that turns groups of them into text tokens.

A call packs every image and video into one row of patches. An image is a segment, and so is a temporal chunk of a
video that has its own row of the grid: its patches attend to each other and to nothing else.

In shapes, `length` is the number of patches of a segment, H_q the number of heads, D the channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLVisionConfig

from ..layers.sdpa_gradients import finite_gradients
from .pretrained import MiniMaxM3VLPreTrainedModel


class PatchProjection(nn.Conv3d):
    """A convolution whose input is exactly one kernel wide, computed as a matrix product.

    The checkpoint stores a convolution's weight. The product is several times faster than the general algorithm.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(patches, channels, *kernel_size) to (patches, hidden, 1, 1, 1)."""
        features = nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return features[..., None, None, None]


class MiniMaxM3VLVisionEmbeddings(nn.Module):
    """Linear embedding of flattened patches."""

    def __init__(self, config: MiniMaxM3VLVisionConfig):
        super().__init__()
        self.patch_shape = (config.num_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        kernel_size = self.patch_shape[1:]
        self.proj = PatchProjection(
            config.num_channels, config.hidden_size, kernel_size=kernel_size, stride=kernel_size, bias=False
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(patches, channels * temporal_patch * patch * patch) to (patches, hidden), in the dtype of the weight."""
        patches = pixel_values.to(self.proj.weight.dtype).view(-1, *self.patch_shape)
        return self.proj(patches).flatten(1)


class MiniMaxM3VLVisionRotaryEmbedding(nn.Module):
    """Rotary embedding over time, height and width, with the same frequencies for each axis."""

    def __init__(self, config: MiniMaxM3VLVisionConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self.compute_axial_rope_parameters(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        # Weight initialisation in Transformers finds the rotary modules by this second buffer.
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_axial_rope_parameters(
        config: MiniMaxM3VLVisionConfig, device: torch.device | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies of one axis, float32, and the factor on cos and sin, which is 1."""
        head_dim = config.hidden_size // config.num_attention_heads
        axis_dim = 2 * (head_dim // 3 // 2)  # an even third of the channels; the rest of the head does not rotate
        exponents = torch.arange(0, axis_dim, 2, dtype=torch.float, device=device) / axis_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (patches, rotary channels) of (patches, 3) positions, in the dtype of `hidden_states`."""
        inv_freq = self.inv_freq.to(device=position_ids.device, dtype=torch.float)
        angles = (position_ids[..., None].float() * inv_freq).flatten(1).repeat(1, 2)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states), sin.to(hidden_states)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first channels of (patches, H_q, D) by `cos` and `sin` (patches, rotary channels)."""
    rotary_dim = cos.shape[-1]
    rotated, rest = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.cat((rotated, rest), dim=-1)


@dataclass(frozen=True)
class Segments:
    """Which patches attend to each other, computed once for all layers.

    Attributes:
        cu_seqlens (`torch.Tensor`): int32 (segments + 1,), offsets into the patches.
        max_seqlen (`int`, *optional*): Length of the longest segment. Known only where a flash kernel needs it.
        runs (`tuple`, *optional*): Pairs (count, length) of successive segments of equal length, in patches. None
            where a flash kernel reads `cu_seqlens` instead.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int | None
    runs: tuple[tuple[int, int], ...] | None


def position_ids_of(grid_thw: torch.Tensor, merge_size: int) -> torch.Tensor:
    """Time, row and column of each patch, as Transformers' `get_vision_position_ids` gives them.

    That function runs ten operations for each image, this one the same number for all of them.

    Args:
        grid_thw (`torch.Tensor`): (segments, 3) integers: patches along time, height and width.
        merge_size (`int`): Side of a merge group, whose patches lie next to each other.

    Returns:
        (patches, 3) int64.
    """
    times, heights, widths = grid_thw.long().unbind(1)
    sizes = times * heights * widths
    places = torch.arange(int(sizes.sum()), device=grid_thw.device)
    segment = torch.repeat_interleave(sizes, output_size=len(places))
    in_segment = places - (sizes.cumsum(0) - sizes)[segment]
    areas, columns = (heights * widths)[segment], (widths // merge_size)[segment]
    in_frame = in_segment % areas
    group, in_group = in_frame // merge_size**2, in_frame % merge_size**2
    rows = group // columns * merge_size + in_group // merge_size
    return torch.stack((in_segment // areas, rows, group % columns * merge_size + in_group % merge_size), dim=1)


def split_into_runs(cu_seqlens: torch.Tensor, num_patches: int) -> tuple[tuple[int, int], ...]:
    """Group successive segments of equal length, so that each group is one batched attention call."""
    if cu_seqlens.shape[0] == 2:
        return ((1, num_patches),)
    lengths = cu_seqlens.diff().tolist()
    if is_torchdynamo_compiling():
        # While tracing, lengths are unknown and cannot be compared, but attention has to know that none is trivial.
        for length in lengths:
            torch._check(length > 1)
        return tuple((1, length) for length in lengths)
    return tuple((len(list(run)), length) for length, run in groupby(lengths))


# Patches of the longest segment up to which all segments attend in one call. A call of SDPA for each size costs the host
# about half a millisecond (benchmarks/results/vision_calls.txt). By arithmetic, not by measurement, that outweighs a slower
# kernel only for short segments. So longer ones stay with SDPA.
_LONGEST_PACKED = 4096


def _dtype_of_sdpa(states: torch.Tensor) -> torch.dtype:
    """The dtype to which autocast would bring inputs of SDPA."""
    device_type = states.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else states.dtype


def _runs_packed(query: torch.Tensor, segments: Segments) -> bool:
    """Whether PyTorch's flash kernel takes all segments of (patches, H_q, D) at once."""
    return (
        not is_torchdynamo_compiling()  # first, because lengths are unknown while tracing
        and len(segments.runs or ()) > 1
        and max(length for _, length in segments.runs or ()) <= _LONGEST_PACKED
        and query.is_cuda
        and torch.version.hip is None
        and _dtype_of_sdpa(query) in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask.

    Takes (B, H_q, length, D) and returns (B, length, H_q, D) and the probabilities (B, H_q, length, length).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


class MiniMaxM3VLVisionAttention(nn.Module):
    """Full attention inside each segment, by the implementation that `attn_implementation` names."""

    def __init__(self, config: MiniMaxM3VLVisionConfig):
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
        implementation: str,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Attend inside each segment.

        Args:
            hidden_states (`torch.Tensor`): (patches, hidden).
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): Cosines and sines, each
                (patches, rotary channels).
            segments (`Segments`): Where each segment begins.
            implementation (`str`): As `attn_implementation` in Transformers.

        Returns:
            (patches, hidden), and one (1, H_q, length, length) tensor of probabilities for each segment where the
            implementation returns them.
        """
        heads = (-1, self.num_heads, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(heads), *position_embeddings)
        key = rotate(self.k_proj(hidden_states).view(heads), *position_embeddings)
        value = self.v_proj(hidden_states).view(heads)
        attend = self._attend_runs
        if segments.runs is None:
            attend = self._attend_varlen
        elif implementation == "sdpa" and _runs_packed(query, segments):
            attend = self._attend_packed
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, probabilities = attend(attention_function, query, key, value, segments)
        return self.out_proj(output.reshape(hidden_states.shape)), probabilities

    def _attend_varlen(
        self,
        attention_function: Callable,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
    ) -> tuple[torch.Tensor, None]:
        output, _ = attention_function(
            self,
            *(states.transpose(0, 1).unsqueeze(0) for states in (query, key, value)),
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            is_causal=False,
            cu_seq_lens_q=segments.cu_seqlens,
            cu_seq_lens_k=segments.cu_seqlens,
            max_length_q=segments.max_seqlen,
            max_length_k=segments.max_seqlen,
        )
        return output, None

    def _attend_packed(
        self,
        attention_function: Callable,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
    ) -> tuple[torch.Tensor, None]:
        """As `_attend_runs` with SDPA, by PyTorch's kernel for sequences of several lengths.

        A step of training sees tens of images of as many sizes. SDPA would be called for each, and cuDNN, which it
        may choose, prepares each new size for half a millisecond on the host.
        """
        query, key, value = (states.to(_dtype_of_sdpa(states)) for states in (query, key, value))
        dropout = self.attention_dropout if self.training else 0.0
        longest = max(length for _, length in segments.runs or ())
        offsets = segments.cu_seqlens
        output = torch.ops.aten._flash_attention_forward(
            query, key, value, offsets, offsets, longest, longest, dropout, False, False, scale=self.scaling
        )[0]
        return output, None

    def _attend_runs(
        self,
        attention_function: Callable,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        sizes = [count * length for count, length in segments.runs]
        outputs, probabilities = [], []
        for (count, length), *run in zip(segments.runs, *(states.split(sizes) for states in (query, key, value))):
            states = [part.view(count, length, self.num_heads, self.head_dim).transpose(1, 2) for part in run]
            with finite_gradients(length, length, *states):
                output, weights = attention_function(
                    self,
                    *states,
                    attention_mask=None,
                    scaling=self.scaling,
                    dropout=self.attention_dropout if self.training else 0.0,
                    is_causal=False,
                )
            outputs.append(output.flatten(0, 1))
            probabilities.extend(() if weights is None else weights.split(1))
        return torch.cat(outputs), tuple(probabilities) or None


class MiniMaxM3VLVisionMLP(nn.Module):
    def __init__(self, config: MiniMaxM3VLVisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class MiniMaxM3VLVisionEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP over (1, patches, hidden): the packed patches, with a batch axis of one."""

    def __init__(self, config: MiniMaxM3VLVisionConfig):
        super().__init__()
        self.self_attn = MiniMaxM3VLVisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MiniMaxM3VLVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
        implementation: str,
    ) -> torch.Tensor:
        normed = self.layer_norm1(hidden_states).squeeze(0)
        attended, _ = self.self_attn(normed, position_embeddings, segments, implementation)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class MiniMaxM3VLVisionModel(MiniMaxM3VLPreTrainedModel):
    """CLIP-like encoder over packed patches."""

    config: MiniMaxM3VLVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    _input_embed_layer = "proj"
    _no_split_modules = ["MiniMaxM3VLVisionEncoderLayer"]
    _can_record_outputs = {
        "hidden_states": MiniMaxM3VLVisionEncoderLayer,
        "attentions": MiniMaxM3VLVisionAttention,
    }

    def __init__(self, config: MiniMaxM3VLVisionConfig):
        super().__init__(config)
        self.embeddings = MiniMaxM3VLVisionEmbeddings(config)
        # The checkpoint's own spelling.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([MiniMaxM3VLVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.rotary_emb = MiniMaxM3VLVisionRotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encode patches.

        Args:
            pixel_values (`torch.Tensor`): (patches, channels * temporal_patch * patch * patch) floating-point patches
                of all images in order. Those of one merge group lie next to each other, as the processors lay them
                out.
            grid_thw (`torch.Tensor`): (segments, 3) integers: patches along time, height and width.
            **kwargs: Precomputed values, which depend on `grid_thw` alone: `cu_seqlens` (segments + 1,), `max_seqlen`,
                and `position_ids` (patches, 3). They help under `torch.compile`. `output_attentions=True` runs the
                eager implementation, the only one that has probabilities. All other arguments are ignored.

        Returns:
            `last_hidden_state` (1, patches, hidden) and `pooler_output` (1, hidden), its first patch.

        Raises:
            ValueError: `pixel_values` or `grid_thw` has another shape, or they differ in the number of patches.
            TypeError: `pixel_values` is not floating-point, or `grid_thw` holds no integers.
        """
        self.check_inputs(pixel_values, grid_thw)
        cu_seqlens, max_seqlen = self.attention_seqlens(grid_thw, kwargs)
        position_ids = self.patch_position_ids(grid_thw, kwargs)
        needs_probabilities = kwargs.get("output_attentions", self.config.output_attentions)
        implementation = "eager" if needs_probabilities else self.config._attn_implementation
        runs = None
        if needs_probabilities or not is_flash_attention_requested(self.config):
            runs = split_into_runs(cu_seqlens, pixel_values.shape[0])
        segments = Segments(cu_seqlens.to(pixel_values.device), max_seqlen, runs)

        # Autocast may return a lower precision than the tower's own.
        embeddings = self.embeddings(pixel_values).to(self.pre_layrnorm.weight.dtype)
        position_embeddings = self.rotary_emb(embeddings, position_ids)
        hidden_states = self.pre_layrnorm(embeddings).unsqueeze(0)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                segments=segments,
                implementation=implementation,
            )
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])

    def attention_seqlens(
        self, grid_thw: torch.Tensor, precomputed: dict[str, Any]
    ) -> tuple[torch.Tensor, int | None]:
        """`cu_seqlens` and `max_seqlen` of a grid, or those that are taken out of `precomputed`."""
        return get_vision_attention_seqlens(grid_thw, self.config, merge_temporal=True, kwargs=precomputed)

    def patch_position_ids(self, grid_thw: torch.Tensor, precomputed: dict[str, Any]) -> torch.Tensor:
        """Positions (patches, 3) of a grid, or those that are taken out of `precomputed`."""
        if precomputed.get("position_ids") is None and not is_torchdynamo_compiling():
            precomputed.pop("position_ids", None)
            return position_ids_of(grid_thw, self.config.spatial_merge_size)
        return get_vision_position_ids(
            grid_thw, self.config.spatial_merge_size, include_temporal=True, kwargs=precomputed
        )

    def blank_image(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (all zero) and grid of the smallest possible image, one merge group of patches."""
        config = self.config
        merge = config.spatial_merge_size
        width = config.num_channels * config.temporal_patch_size * config.patch_size**2
        # The grid stays on the host, where it is read.
        return torch.zeros(merge**2, width, device=device), torch.tensor([[1, merge, merge]])

    def check_inputs(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> None:
        """Raise the errors of `forward`."""
        config = self.config
        width = config.num_channels * config.temporal_patch_size * config.patch_size**2
        if pixel_values.ndim != 2 or pixel_values.shape[1] != width:
            raise ValueError(
                f"pixel_values must have shape (patches, {width}), where {width} = {config.num_channels} channels * "
                f"{config.temporal_patch_size} frames * {config.patch_size} * {config.patch_size} pixels, got "
                f"{tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be floating-point, normalised pixels, got {pixel_values.dtype}.")
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] == 0:
            raise ValueError(
                "The grid (image_grid_thw, video_grid_thw) must have shape (images, 3) with at least one row of "
                f"time, height and width in patches, got {tuple(grid_thw.shape)}."
            )
        if grid_thw.is_floating_point() or grid_thw.is_complex():
            raise TypeError(f"The grid (image_grid_thw, video_grid_thw) must hold integers, got {grid_thw.dtype}.")
        if is_torchdynamo_compiling():
            return
        merge = config.spatial_merge_size
        for index, (time, height, width) in enumerate(grid_thw.tolist()):
            if time < 1 or height < 1 or width < 1 or height % merge or width % merge:
                raise ValueError(
                    f"Row {index} of the grid (image_grid_thw, video_grid_thw) must be positive, with a height and "
                    f"width that are multiples of spatial_merge_size={merge}, got {[time, height, width]}."
                )
        expected = int(grid_thw.prod(-1).sum())
        if pixel_values.shape[0] != expected:
            raise ValueError(
                f"pixel_values must have one row for each of the {expected} patches of the grid (image_grid_thw, "
                f"video_grid_thw) {grid_thw.tolist()}, got {pixel_values.shape[0]} rows."
            )


class MiniMaxM3VLMultiModalProjector(nn.Module):
    """Maps patch features to text embeddings by an MLP on each patch, then one on each merge group of patches."""

    def __init__(self, config: MiniMaxM3VLConfig):
        super().__init__()
        text_size, inner_size = config.text_config.hidden_size, config.projector_hidden_size
        self.spatial_merge_size = config.vision_config.spatial_merge_size
        self.act = ACT2FN["gelu"]
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, inner_size)
        self.linear_2 = nn.Linear(inner_size, text_size)
        self.merge_linear_1 = nn.Linear(config.merged_hidden_size, inner_size)
        self.merge_linear_2 = nn.Linear(inner_size, text_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(patches, hidden) to (patches / spatial_merge_size**2, hidden size of the text)."""
        patches = self.linear_2(self.act(self.linear_1(image_features)))
        groups = patches.view(patches.shape[0] // self.spatial_merge_size**2, -1)
        return self.merge_linear_2(self.act(self.merge_linear_1(groups)))
