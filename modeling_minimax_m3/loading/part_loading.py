"""Loading of one part, the language model or the vision tower, from a whole model's checkpoint.

Transformers converts a whole model's names for the whole model only. A part would find none of its weights there and
be initialised at random, with no more than a report among the log lines.
"""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig

# For the model type of a part: the name of its module in the whole model.
_MODULES = {MiniMaxM3VLTextConfig.model_type: "language_model", MiniMaxM3VLVisionConfig.model_type: "vision_tower"}
_OTHER_PARTS = {
    MiniMaxM3VLTextConfig.model_type: ("vision_tower.", "multi_modal_projector."),
    MiniMaxM3VLVisionConfig.model_type: ("language_model.", "multi_modal_projector.", "lm_head."),
}


def part_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """The rules that turn names of a whole model's checkpoint into those of `model`. Empty where that is no part."""
    if model.config.model_type not in _MODULES:
        return []
    whole = get_checkpoint_conversion_mapping(MiniMaxM3VLConfig.model_type)
    module = _MODULES[model.config.model_type]
    # With the head's prefix and without it: a whole model without a head is saved without it.
    return [*whole, PrefixChange(prefix_to_remove=module, model_prefix="model"), PrefixChange(prefix_to_remove=module)]


def finish_part_loading(
    model: PreTrainedModel,
    conversions: list[WeightTransform],
    load_config: LoadStateDictConfig,
    info: LoadStateDictInfo,
) -> None:
    """Remove the traces of other parts from a part that has been loaded.

    Args:
        model (`PreTrainedModel`): The loaded part.
        conversions (`list[WeightTransform]`): The result of `part_conversions` for it, which the loading used.
        load_config (`LoadStateDictConfig`): How it was loaded.
        info (`LoadStateDictInfo`): The report of the loading. It loses the unexpected names of other parts.

    Raises:
        ValueError: The weights are quantized, so their scales would be missing.
    """
    if not any(conversion.was_used() for conversion in conversions):
        return
    others = _OTHER_PARTS[model.config.model_type]
    info.unexpected_keys -= {key for key in info.unexpected_keys if key.removeprefix("model.").startswith(others)}
    # A part is saved under the names of its modules.
    model._weight_conversions = [used for used in model._weight_conversions if used not in conversions]

    known = {name.removeprefix("model.") for name in model.state_dict()}
    known |= {name.rpartition(".")[0] for name in known}
    beside_weights = sorted(
        key for key in info.unexpected_keys if key.removeprefix("model.").rpartition(".")[0] in known
    )
    quantizer = load_config.hf_quantizer
    if beside_weights or (quantizer is not None and quantizer.pre_quantized):
        raise ValueError(
            f"The checkpoint is a whole model's with quantized weights, which {type(model).__name__} cannot take a part "
            f"of, got {', '.join(beside_weights[:3]) or 'a `quantization_config`'}. Load the whole model and use its part."
        )


def refuse_parts_without_weights(model: PreTrainedModel, info: LoadStateDictInfo, base_class: type) -> None:
    """Raise `ValueError` where the checkpoint, of another kind of model, has no weight of a whole part.

    Args:
        model (`PreTrainedModel`): The loaded model, a part or a whole.
        info (`LoadStateDictInfo`): The report of the loading.
        base_class (`type`): Class of the parts, and of the model.
    """
    names = list(model.state_dict())
    for prefix, part in model.named_modules():
        if not isinstance(part, base_class):
            continue
        of_part = [name for name in names if not prefix or name.startswith(f"{prefix}.")]
        if of_part and set(info.missing_keys).issuperset(of_part):
            raise ValueError(
                f"The checkpoint has no weight of the {type(part).__name__}{f' at `{prefix}`' if prefix else ''}, so it is "
                f"no checkpoint of a {type(model).__name__}. To start from random weights, make the model from its "
                f"config, and give `load_state_dict(..., strict=False)` of its parts what there is."
            )
