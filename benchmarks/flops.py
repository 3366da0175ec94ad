"""Operations per token of dense, learned and structured attention: `python -m benchmarks.flops`.

`modeling_minimax_m3.flops` counts for the released geometry, whose first three layers are always dense. The other
layers are dense, learned-sparse or structured. The baseline is the previous model, MiniMax-M2, with the geometry of
its public configuration.
"""

from configuration_minimax_m3 import MiniMaxM3VLTextConfig, released_config
from configuration_minimax_m3.layer_types import FULL_ATTENTION, LEARNED_SPARSE, STRUCTURED
from modeling_minimax_m3.flops import forward_flops

LENGTHS = {"8k": 2**13, "128k": 2**17, "1M": 2**20}
NUM_DENSE = 3
MATRICES = ("attention projections", "indexer projections", "mlp", "output head")


def configs() -> dict[str, MiniMaxM3VLTextConfig]:
    found = {}
    for name, kind in (("dense", FULL_ATTENTION), ("learned", LEARNED_SPARSE), ("structured", STRUCTURED)):
        found[name] = released_config().text_config
        found[name].layer_types[NUM_DENSE:] = [kind.name] * (len(found[name].layer_types) - NUM_DENSE)
    # M2 routes a token to 8 of 256 experts and has no shared expert. That costs as much as 7 routed experts and a
    # shared expert of the same width.
    found["M2"] = MiniMaxM3VLTextConfig(
        vocab_size=200064, hidden_size=3072, intermediate_size=1536, shared_intermediate_size=1536,
        num_hidden_layers=62, num_attention_heads=48, num_key_value_heads=8, index_n_heads=8, num_local_experts=256,
        num_experts_per_tok=7,
    )  # fmt: skip
    return found


def per_token(config: MiniMaxM3VLTextConfig, tokens: int, last: bool) -> dict[str, float]:
    """GFLOP of the last token of a context, or of its average token."""
    flops = forward_flops(config, tokens)
    if last:
        before = forward_flops(config, tokens - 1)
        flops = {part: 1.0 * count - before[part] for part, count in flops.items()}
    else:
        flops = {part: count / tokens for part, count in flops.items()}
    return {part: count / 1e9 for part, count in flops.items()}


def main() -> None:
    for last in (True, False):
        print(f"\nGFLOP of the {'last' if last else 'average'} token of a context, and M2's GFLOP over the model's\n")
        print(
            "| model | context | weights | index scores | attention | all "
            "| M2 / model: all | M2 / model: attention | M2 / model: attention without the dense layers |"
        )
        print("| --- " * 9 + "|")
        for label, tokens in LENGTHS.items():
            counts = {name: per_token(config, tokens, last) for name, config in configs().items()}
            between = {name: count["attention"] + count["index scores"] for name, count in counts.items()}
            dense_layer = counts["dense"]["attention"] / len(configs()["dense"].layer_types)
            for name, count in counts.items():
                cells = [sum(count[part] for part in MATRICES), count["index scores"], count["attention"]]
                cells += [sum(cells), sum(counts["M2"].values()) / sum(cells), between["M2"] / between[name]]
                row = [f"{cell:.1f}" for cell in cells]
                is_sparse = name in ("learned", "structured")
                row.append(f"{between['M2'] / (between[name] - NUM_DENSE * dense_layer):.1f}" if is_sparse else "")
                print(f"| {name} | {label} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
