"""Bytes that passes hold beside the weights: cache, activations, the kernels' workspaces, and the loss.

Each count follows the code that runs: what autograd keeps, and the tensors that live at the largest moment of a layer.
The counts are those of the CUDA kernels in half precision.

K is the number of experts of a token, F the width of an expert.
"""

from dataclasses import dataclass

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from ..layers.layer_types import attention_type
from ..layers.token_parts import TOKENS_OF_A_LAYER, TOKENS_OF_A_PART, TOKENS_OF_A_QUANTIZED_PART

_MIB, _GIB = 2**20, 2**30
# Workspaces of the kernels, which msa/csrc/smxx/README.md describes.
_PARTIAL_BYTES, _MOST_PARTIAL_BYTES = 3 * _GIB // 2, 2 * _GIB
_TOKENS_OF_MOST_PARTIALS = 190_000
_PARTIAL_GRADIENT_BYTES = 4 * _GIB
_SELECTION_BYTES = 256 * _MIB
_INDEXER_LOSS_BYTES, _INDEXER_LOSS_BYTES_OF_PAIR = 1_250_000_000, 520
_SAVED_PROBS_BYTES = _GIB
_KV_MAJOR_TOKENS, _KV_MAJOR_HEADS = 2048, 16


@dataclass(frozen=True)
class LayerBytes:
    """What one layer holds in a training step.

    Args:
        input (float): The layer's input, which checkpointing keeps.
        saved (float): What autograd keeps of the layer beside its input.
        backward (float): What the backward of the layer holds at its largest moment, `saved` included.
        workspace (float): How much of `backward` is a workspace of kernels.
    """

    input: float
    saved: float
    backward: float
    workspace: float


def cache_capacity(context: int, prompt: int, first_pass: int, is_static: bool) -> int:
    """Tokens for which each layer of a cache has memory, once it holds `context` tokens.

    A dynamic cache takes what the first pass brings, and doubles whenever it is full.

    Args:
        context (int): Tokens of a row, the generated ones included.
        prompt (int): Tokens of a row that are read at first.
        first_pass (int): Tokens of a row that the first pass reads.
        is_static (bool): Whether the cache reserves `context` tokens at once.
    """
    if is_static:
        return context
    capacity = min(prompt, first_pass)
    while capacity < context:
        capacity *= 2
    return capacity


def cache_bytes(config: MiniMaxM3VLTextConfig, layer: int, tokens: int, element_bytes: int, processes: int = 1) -> int:
    """Bytes of the keys, values and index keys of `tokens` tokens in one layer.

    Of the processes of tensor parallelism, each holds its own heads and all index keys, or all heads where these cannot
    be shared out evenly.
    """
    heads = config.num_key_value_heads
    heads = heads if heads % processes else heads // processes
    channels = 2 * heads * config.head_dim
    if _has_indexer(config, layer):
        channels += config.index_head_dim
    return tokens * channels * element_bytes


def prefill_bytes(
    config: MiniMaxM3VLTextConfig,
    layer: int,
    rows: int,
    new: int,
    keys: int,
    *,
    element_bytes: int,
    layers_in_parts: bool,
    mlps_in_parts: bool,
    experts_one_by_one: bool = False,
    quantized_experts: bool = False,
) -> tuple[float, float]:
    """Bytes of a pass without gradients at the largest moment of a layer.

    Args:
        config (MiniMaxM3VLTextConfig): The language model.
        layer (int): Index of the layer.
        rows (int): Rows of the batch.
        new (int): Tokens of each row that the pass reads.
        keys (int): Tokens of each row after the pass.
        element_bytes (int): Bytes of an element of the hidden states.
        layers_in_parts (bool): Whether layers take long inputs in parts, as over a dynamic cache on one device.
        mlps_in_parts (bool): Whether MLPs and experts do, as on one device.
        experts_one_by_one (bool): Whether tokens meet one expert at a time, as where experts are on the host.
        quantized_experts (bool): Whether experts are in fewer bits, and take larger parts.

    Returns:
        Bytes of the activations, and of the kernels' workspace.
    """
    hidden = config.hidden_size
    tokens = rows * new
    most = rows * max(TOKENS_OF_A_LAYER // rows, TOKENS_OF_A_LAYER // 8)
    part = min(tokens, most) if layers_in_parts else tokens
    queries, key_values, index = _widths(config, layer)
    workspace = max(_forward_workspace(config, layer, part, keys), _selection_workspace(config, layer, part, keys))
    attention = part * (hidden + 2 * queries + 2 * key_values + index) * element_bytes
    has_large_parts = quantized_experts and config.mlp_layer_types[layer] == "sparse"
    most_pairs = TOKENS_OF_A_QUANTIZED_PART if has_large_parts else TOKENS_OF_A_PART
    pairs = min(part, most_pairs) if mlps_in_parts else part
    mlp = part * 2 * hidden + pairs * _mlp_channels(config, layer, experts_one_by_one)
    held = tokens * (hidden + config.rotary_width) * element_bytes
    if attention + workspace > mlp * element_bytes:
        return held + attention, workspace
    return held + mlp * element_bytes, 0


def last_logits_bytes(config: MiniMaxM3VLTextConfig, rows: int, element_bytes: int) -> int:
    """Bytes of the logits of the last token of each row, and of the float32 copies that `generate` samples from."""
    return rows * config.vocab_size * (element_bytes + 8)


def training_bytes(
    config: MiniMaxM3VLTextConfig,
    layer: int,
    tokens: int,
    keys: int,
    *,
    element_bytes: int = 2,
    residual_bytes: int = 2,
    attention_inputs: int,
    mlp_inputs: int,
    adapted_experts: bool = False,
    trains_indexer: bool,
    indexer_only: bool = False,
) -> LayerBytes:
    """What one layer holds in a training step.

    Args:
        config (MiniMaxM3VLTextConfig): The language model.
        layer (int): Index of the layer.
        tokens (int): Tokens of all rows.
        keys (int): Tokens of a row.
        element_bytes (int): Bytes of an element in attention and MLP.
        residual_bytes (int): Bytes of an element of the hidden states between layers.
        attention_inputs, mlp_inputs (int): Channels of the inputs that weights there keep for their gradients, or
            adapters on them.
        adapted_experts (bool): Whether the routed experts have adapters, whose products are added to the experts' own.
        trains_indexer (bool): Whether the indexers' loss runs.
        indexer_only (bool): Whether nothing but the indexers is trained.
    """
    hidden = config.hidden_size
    queries, key_values, index = _widths(config, layer)
    trains_indexer = trains_indexer and _has_indexer(config, layer)
    kl_workspace = _indexer_loss_workspace(config, tokens) if trains_indexer else 0
    layer_input = tokens * hidden * residual_bytes
    if indexer_only:
        # The loss keeps what it reads. The rest of the layer runs as without gradients.
        saved = tokens * (hidden + 2 * index + queries + key_values) * element_bytes if trains_indexer else 0
        workspace = max(kl_workspace, _forward_workspace(config, layer, tokens, keys))
        rest = tokens * (2 * hidden + max(2 * queries, _mlp_channels(config, layer))) * element_bytes
        return LayerBytes(layer_input, saved, saved + rest + workspace, workspace)

    # Queries and keys before and after norm and rotation, values, output, and the output's log-sums.
    attention = 3 * queries + 3 * key_values + index + attention_inputs
    saved_attention = tokens * (attention * element_bytes + 4 * config.num_attention_heads)
    if _has_indexer(config, layer):
        saved_attention += tokens * 4 * config.num_key_value_heads * config.index_topk_blocks
    if trains_indexer:
        saved_attention += tokens * (hidden + index) * element_bytes
    # The sum of residual and attention, its norm, the gates and ups, the rows that the experts return.
    if config.mlp_layer_types[layer] == "sparse":
        choices = config.num_experts_per_tok
        widths = choices * config.intermediate_size + config.shared_intermediate_size
        mlp = 2 * widths + choices * hidden + 2 * config.num_local_experts
        # Where a product and that of the adapters become a third tensor, `mlp` counts the last one alone.
        passing_rows = (2 if adapted_experts else 1) * choices * hidden
    else:
        mlp = 2 * config.dense_intermediate_size
        passing_rows = config.dense_intermediate_size
    saved_mlp = tokens * (hidden * residual_bytes + (hidden + mlp + mlp_inputs) * element_bytes)
    gradients = tokens * 2 * hidden * residual_bytes
    in_mlp = saved_attention + saved_mlp + gradients + tokens * passing_rows * element_bytes
    workspace = max(_backward_workspace(config, layer, tokens, keys), kl_workspace)
    in_attention = saved_attention + gradients + tokens * (2 * queries + 2 * key_values) * element_bytes + workspace
    if in_mlp > in_attention:
        workspace = 0
    return LayerBytes(layer_input, saved_attention + saved_mlp, max(in_mlp, in_attention), workspace)


def loss_bytes(config: MiniMaxM3VLTextConfig, tokens: int, chunk: int, element_bytes: int = 2) -> float:
    """Bytes of the language loss without logits: final hidden states, their copy and gradient, and a chunk's logits.

    Two chunks' logits overlap: those of the chunk before are freed after the next ones exist.
    """
    states = 4 * tokens * config.hidden_size * element_bytes
    logits = config.vocab_size * (4 + element_bytes)
    return states + logits * (2 * chunk if tokens > chunk else tokens)


def _has_indexer(config: MiniMaxM3VLTextConfig, layer: int) -> bool:
    return attention_type(config.layer_types[layer]).layer_type.has_indexer


def _widths(config: MiniMaxM3VLTextConfig, layer: int) -> tuple[int, int, int]:
    """Channels of the queries, of the keys, and of the indexer's queries and keys."""
    index = (config.index_n_heads + 1) * config.index_head_dim if _has_indexer(config, layer) else 0
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim, index


def _mlp_channels(config: MiniMaxM3VLTextConfig, layer: int, one_by_one: bool = False) -> float:
    """Channels for each token at the largest moment of an MLP without gradients."""
    if config.mlp_layer_types[layer] == "sparse":
        choices, hidden = config.num_experts_per_tok, config.hidden_size
        if one_by_one:  # the outputs of all experts, and what one computes with, if all have equally many tokens
            return choices * (hidden + (2 * hidden + 3 * config.intermediate_size) / config.num_local_experts)
        return choices * (hidden + 2 * config.intermediate_size)
    return 3 * config.dense_intermediate_size + config.hidden_size


def _partial_bytes_of_token(config: MiniMaxM3VLTextConfig, layer: int) -> int:
    """Bytes of the partial outputs of a query token: one output for each listed block, in 16 bits."""
    selector = attention_type(config.layer_types[layer]).selector
    if selector is None:
        return 0
    return 2 * config.num_attention_heads * config.head_dim * selector.blocks_per_query(config)


def _forward_workspace(config: MiniMaxM3VLTextConfig, layer: int, tokens: int, keys: int) -> int:
    q_heads_per_kv = config.num_attention_heads // config.num_key_value_heads
    if tokens < _KV_MAJOR_TOKENS or q_heads_per_kv != _KV_MAJOR_HEADS:
        return 0
    most = _MOST_PARTIAL_BYTES if keys > _TOKENS_OF_MOST_PARTIALS else _PARTIAL_BYTES
    return min(most, tokens * _partial_bytes_of_token(config, layer))


def _selection_workspace(config: MiniMaxM3VLTextConfig, layer: int, tokens: int, keys: int) -> int:
    if not _has_indexer(config, layer):
        return 0
    blocks = -(-keys // config.index_block_size)
    return min(_SELECTION_BYTES, 4 * tokens * config.index_n_heads * blocks)


def _indexer_loss_workspace(config: MiniMaxM3VLTextConfig, tokens: int) -> int:
    pairs = tokens * config.index_n_heads * config.index_topk_blocks
    saved_probs = min(_SAVED_PROBS_BYTES, 2 * pairs * config.index_block_size)
    return saved_probs + min(_INDEXER_LOSS_BYTES, _INDEXER_LOSS_BYTES_OF_PAIR * pairs)


def _backward_workspace(config: MiniMaxM3VLTextConfig, layer: int, tokens: int, keys: int) -> int:
    partials = _partial_bytes_of_token(config, layer)
    if partials == 0:  # dense attention sums the queries' gradients in float32
        return 4 * tokens * config.num_attention_heads * config.head_dim
    rows_of_sums = 4 * tokens * config.num_attention_heads
    accumulators = 8 * tokens * config.num_key_value_heads * config.head_dim
    return min(_PARTIAL_GRADIENT_BYTES, tokens * partials) + rows_of_sums + accumulators
