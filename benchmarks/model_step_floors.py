"""Floors of a whole model's work, from its configuration and the rates of the card, and an estimate for 60 layers.

A part takes at least the time of its matrix products at the rate of a large one, and at least the time to read its
bytes once at the rate of a large sum. The floor of a pass is the sum over its parts of the longer of the two.
"""

from typing import NamedTuple

from configuration_minimax_m3 import MiniMaxM3VLTextConfig
from configuration_minimax_m3.presets import released_config
from modeling_minimax_m3.flops import attended_keys
from modeling_minimax_m3.layers.layer_types import attention_type

BYTES = 2  # of a bf16 number


class Cost(NamedTuple):
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Rates(NamedTuple):
    """What the card reaches: TFLOP/s of a large bf16 matmul, and bytes per second of a large sum."""

    matmul_tflops: float
    read_bytes_per_second: float

    def ms(self, cost: Cost) -> float:
        return max(cost.flops / self.matmul_tflops / 1e9, 1e3 * cost.bytes / self.read_bytes_per_second)


def layers_config(dense: int, sparse: int, experts: int | None = None) -> MiniMaxM3VLTextConfig:
    """The released geometry with fewer layers, the dense ones first, and with fewer experts where given."""
    released = released_config().text_config.to_dict()
    released |= {"num_hidden_layers": dense + sparse}
    for name in ("layer_types", "mlp_layer_types"):
        released[name] = released[name][:dense] + released[name][-sparse:]
    if experts is not None:
        released |= {"num_local_experts": experts}
    return MiniMaxM3VLTextConfig(**released)


def experts_hit(config: MiniMaxM3VLTextConfig, tokens: int) -> float:
    """Expected number of distinct experts that a router with equal chances gives to `tokens` tokens."""
    missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** tokens
    return config.num_local_experts * (1 - missed)


def weights(config: MiniMaxM3VLTextConfig) -> dict[str, int]:
    """Numbers in the matrices that a token passes, by part, over all layers."""
    hidden = config.hidden_size
    found = dict.fromkeys(("projections", "dense MLP", "router", "routed experts", "shared expert", "head"), 0)
    for layer_type, mlp_type in zip(config.layer_types, config.mlp_layer_types, strict=True):
        heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
        found["projections"] += hidden * config.head_dim * heads
        if attention_type(layer_type).layer_type.has_indexer:
            found["projections"] += hidden * config.index_head_dim * (config.index_n_heads + 1)
        if mlp_type == "sparse":
            found["router"] += hidden * config.num_local_experts
            found["routed experts"] += config.num_experts_per_tok * 3 * hidden * config.intermediate_size
            found["shared expert"] += 3 * hidden * config.shared_intermediate_size
        else:
            found["dense MLP"] += 3 * hidden * config.dense_intermediate_size
    found["head"] = hidden * config.vocab_size
    return found


def pass_costs(
    config: MiniMaxM3VLTextConfig, new: int, past: int, batch: int = 1, hit: float | None = None
) -> dict[str, Cost]:
    """Operations and bytes of a pass without gradients, by part. The last token of each row gets logits.

    Args:
        config (MiniMaxM3VLTextConfig): The model.
        new (int): Tokens of a row that the pass reads.
        past (int): Tokens of a row that the cache holds before.
        batch (int): Rows.
        hit (float): Distinct experts of a layer that the pass reads. Default: `experts_hit`.
    """
    tokens = batch * new
    hit = experts_hit(config, tokens) if hit is None else hit
    costs = {part: Cost(2 * tokens * count, BYTES * count) for part, count in weights(config).items()}
    costs["routed experts"] = Cost(
        costs["routed experts"].flops, costs["routed experts"].bytes * hit / config.num_experts_per_tok
    )
    costs["head"] = Cost(2 * batch * config.hidden_size * config.vocab_size, costs["head"].bytes)
    costs |= {part: Cost(0, 0) for part in ("dense attention", "block attention", "index and selection")}
    kv_bytes = 2 * BYTES * config.num_key_value_heads * config.head_dim
    all_pairs = new * past + new * (new + 1) // 2
    for layer_type in config.layer_types:
        kind = attention_type(layer_type)
        pairs = attended_keys(config, layer_type, past + new) - attended_keys(config, layer_type, past)
        read = past + new
        part = "dense attention"
        if kind.selector is not None:
            # A pass over several tokens may select more blocks in all. How many depends on the data.
            read = min(read, kind.selector.blocks_per_query(config) * config.index_block_size)
            part = "block attention"
        flops = 4 * batch * config.num_attention_heads * config.head_dim * pairs
        costs[part] += Cost(flops, batch * read * kv_bytes)
        if kind.layer_type.has_indexer:
            flops = 2 * batch * config.index_n_heads * config.index_head_dim * all_pairs
            costs["index and selection"] += Cost(flops, batch * (past + new) * BYTES * config.index_head_dim)
    return costs


def pass_ms(config: MiniMaxM3VLTextConfig, rates: Rates, new: int, past: int, batch: int = 1, **options) -> float:
    return sum(rates.ms(cost) for cost in pass_costs(config, new, past, batch, **options).values())


def chunks_ms(config: MiniMaxM3VLTextConfig, rates: Rates, tokens: int, chunk: int) -> float:
    """Floor of a prefill in chunks."""
    return sum(pass_ms(config, rates, min(chunk, tokens - start), start) for start in range(0, tokens, chunk))


def experts_ms(config: MiniMaxM3VLTextConfig, rates: Rates, tokens: int, hit: float) -> float:
    """Floor of the routed experts of one layer."""
    size = 3 * config.hidden_size * config.intermediate_size
    return rates.ms(Cost(2 * tokens * config.num_experts_per_tok * size, BYTES * hit * size))


def router_and_shared_ms(config: MiniMaxM3VLTextConfig, rates: Rates, tokens: int) -> float:
    """Floor of the router and the shared expert of one layer."""
    sizes = (config.num_local_experts, 3 * config.shared_intermediate_size)
    numbers = config.hidden_size * sum(sizes)
    return rates.ms(Cost(2 * tokens * numbers, BYTES * numbers))


# Forward passes that a training step with gradient checkpointing computes: the forward, its recomputation, and a
# backward of twice (matrices) or 2.5 times (attention, which computes its probabilities again) the operations. The head
# is not recomputed, and a selection has no gradient.
PASSES = {"dense attention": 4.5, "block attention": 4.5, "index and selection": 2.0, "head": 3.0}


def training_costs(config: MiniMaxM3VLTextConfig, tokens: int) -> dict[str, Cost]:
    """Operations of forward and backward with gradient checkpointing, by part. Every token has a target."""
    costs = pass_costs(config, tokens, 0)
    costs["head"] = Cost(2 * tokens * config.hidden_size * config.vocab_size, costs["head"].bytes)
    return {part: Cost(PASSES.get(part, 4.0) * cost.flops, cost.bytes) for part, cost in costs.items()}


def training_ms(config: MiniMaxM3VLTextConfig, rates: Rates, tokens: int) -> float:
    return sum(rates.ms(cost) for cost in training_costs(config, tokens).values())


def model_flops_utilization(config: MiniMaxM3VLTextConfig, rates: Rates, tokens: int, ms: float) -> float:
    """Share of the matmul rate by 6 operations for each number that a token passes, attention not counted."""
    return 6 * sum(weights(config).values()) * tokens / ms / 1e9 / rates.matmul_tflops


def cache_gib(config: MiniMaxM3VLTextConfig, tokens: int) -> float:
    """GiB of the cache of one row and of its hidden states, which a prefill cannot do without."""
    size = BYTES * tokens * config.hidden_size
    for layer_type in config.layer_types:
        size += 2 * BYTES * tokens * config.num_key_value_heads * config.head_dim
        if attention_type(layer_type).layer_type.has_indexer:
            size += BYTES * tokens * config.index_head_dim
    return size / 2**30


def sparse_layer_ms(ms: dict[int, float]) -> float:
    """Time of one sparse layer, from the times of 4 and 7 layers, which differ by three of them."""
    return (ms[7] - ms[4]) / 3


def released_ms(ms: dict[int, float], head: float) -> float:
    """An extrapolation to the released number of layers, on a card with enough memory.

    Args:
        ms (dict[int, float]): Times of 4 and 7 layers, of which one is dense.
        head (float): Time of what is not a layer: the output head.
    """
    config = released_config().text_config
    num_dense = sum(attention_type(name).selector is None for name in config.layer_types)
    sparse = sparse_layer_ms(ms)
    dense = ms[4] - 3 * sparse - head
    return num_dense * dense + (len(config.layer_types) - num_dense) * sparse + head
