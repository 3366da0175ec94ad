"""State dicts under the names that checkpoints have on disk, as `Trainer` passes them to `load_state_dict`."""

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig


def with_module_names(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` with the names, and the fused tensors, that the modules of `model` have.

    Args:
        model (`PreTrainedModel`): The model that is to load the result.
        state_dict (`Mapping`): Tensors under names on disk, names of modules, or both.

    Returns:
        The converted tensors, and those whose names no rule knows, as they came.

    Raises:
        ValueError: A fused tensor lacks some of its parts, as the experts of a layer do in one file of several.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if not conversions:
        return dict(state_dict)
    own = model.state_dict()
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config))
    for name, tensor in shell.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(own[name].dtype if name in own else model.dtype)
    foreign = {name: tensor for name, tensor in state_dict.items() if name not in own}
    info, _ = convert_and_load_state_dict_in_model(
        shell, foreign, LoadStateDictConfig(weight_mapping=conversions, dtype=model.dtype)
    )
    if info.mismatched_keys or info.conversion_errors:
        names = sorted({key for key, *_ in info.mismatched_keys} | set(info.conversion_errors))
        raise ValueError(
            f"`state_dict` does not hold all parts of {names[0]}. A checkpoint of several files is loaded by "
            "`from_pretrained`; one that `Trainer` is to resume from has to be a single file."
        )
    kept = {name: tensor for name, tensor in state_dict.items() if name in own or name in info.unexpected_keys}
    return kept | {name: tensor for name, tensor in shell.state_dict().items() if not tensor.is_meta}
