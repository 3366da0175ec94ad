"""What a request keeps on each device for as long as it runs: weights, what is trained, and the optimizer's states."""

from dataclasses import dataclass

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from .request import Config, MemoryRequest
from .weights import PRECISIONS, Weight, adapters, copies, is_adapter, list_weights, optimizer_bytes, stored_bytes


class Model:
    """A configuration with the list of its parameters."""

    def __init__(self, config: Config):
        text = config if isinstance(config, MiniMaxM3VLTextConfig) else config.text_config
        self.text: MiniMaxM3VLTextConfig = text
        self.weights = list_weights(config)
        self.layers = range(self.text.num_hidden_layers)


@dataclass(frozen=True)
class Trained:
    """What a request trains.

    Args:
        weights (list[Weight]): The weights.
        are_new (bool): Whether they stand beside the model's own: adapters, and copies of what is trained whole.
        whole_bytes (int): Bytes of an element of a trained weight, and of its gradient. Those of adapters have 4.
    """

    weights: list[Weight]
    are_new: bool
    whole_bytes: int

    def bytes_of(self, weight: Weight) -> int:
        """Bytes of the weight, or of its gradient."""
        return weight.elements * self.element_bytes(weight)

    def element_bytes(self, weight: Weight) -> int:
        """Bytes of an element of the weight. PEFT makes adapters float32."""
        return 4 if is_adapter(weight) else self.whole_bytes


def trained_of(model: Model, request: MemoryRequest) -> Trained:
    """What a request trains.

    Raises:
        ValueError: The model has no such module, or no indexer to train.
    """
    # The sharding engines of Accelerate train float32 weights, and compute in bfloat16.
    shards = request.strategy in ("fsdp2", "zero3")
    element_bytes = 4 if shards else max(2, int(PRECISIONS[request.precision].element_bytes))
    if request.training == "none":
        return Trained([], False, element_bytes)
    if request.training in ("lora", "qlora"):
        added = adapters(model.weights, request.lora_targets, request.lora_rank, request.lora_experts)
        return Trained(added + copies(model.weights, request.lora_save), True, element_bytes)
    if request.training == "indexers":
        weights = [weight for weight in model.weights if weight.part == "indexer"]
        if not weights:
            raise ValueError("`training` must not be 'indexers', because the model has no indexer")
    else:
        weights = [
            weight
            for weight in model.weights
            if weight.requires_grad and (request.train_vision or weight.part != "vision")
        ]
    return Trained(weights, False, element_bytes)


def share_of(weight: Weight, request: MemoryRequest) -> float:
    """The part of a weight that one device holds, where all devices hold equally much."""
    strategy, trains = request.strategy, request.training != "none"
    if strategy in ("fsdp2", "zero3") or (strategy == "expert_parallel" and trains):
        is_cut = True  # beside expert parallelism in training, FSDP2 shards all but the experts
    elif strategy in ("tensor_parallel", "expert_parallel"):
        is_cut = (
            weight.part in ("routed experts", "embeddings", "head")
            or (weight.part == "attention" and weight.is_linear)
            or (weight.part in ("dense MLPs", "shared experts") and _is_cut_mlp(weight, request.devices))
        )
    else:
        is_cut = False
    return 1 / request.devices if is_cut else 1


def _is_cut_mlp(weight: Weight, devices: int) -> bool:
    """Whether tensor parallelism cuts this weight of an MLP. Adapters of MLPs are not cut."""
    names = {"gate_up_proj": weight.shape[0] // 2, "down_proj": weight.shape[-1]}
    width = names.get(weight.module.rpartition(".")[2]) if weight.name.endswith(".weight") else None
    return width is not None and width % (2 * devices) == 0


def loaded_bytes(weight: Weight, request: MemoryRequest) -> float:
    """Bytes of the whole weight as it is loaded, scales included."""
    return stored_bytes(
        weight, request.precision, request.unquantized_parts, unquantized_bytes=4 if request.prepared_for_kbit else 2
    )


def states_bytes(weight: Weight, request: MemoryRequest, trained: Trained) -> float:
    """Bytes of the optimizer's states for a weight on one device, paged ones included."""
    return optimizer_bytes(weight.shape, request.optimizer, trained.element_bytes(weight)) * share_of(weight, request)
