"""Which indexers train: their parameters require gradients where `config.indexer_loss_coef` is above 0."""

from transformers import PreTrainedModel

from ..layers.indexer import MiniMaxM3VLIndexer


def freeze_untrained_indexers(model: PreTrainedModel) -> None:
    """Freeze the indexers of a model that has just been loaded, unless its config trains them.

    Loading replaces the parameters that were frozen at construction, so they are frozen again.
    """
    indexers = _indexers(model)
    if indexers and model.config.get_text_config().indexer_loss_coef == 0:  # a vision config has no such field
        for indexer in indexers:
            indexer.requires_grad_(False)


def set_indexer_training(model: PreTrainedModel, coef: float, warmup: bool) -> None:
    """See `MiniMaxM3VLPreTrainedModel.set_indexer_training`."""
    config = model.config.get_text_config()
    before = config.indexer_loss_coef, config.indexer_warmup
    try:
        config.indexer_loss_coef, config.indexer_warmup = coef, warmup
        config.validate()
    except Exception:
        config.indexer_loss_coef, config.indexer_warmup = before
        raise
    for indexer in _indexers(model):
        for parameter in indexer.parameters():
            if parameter.is_floating_point() and parameter.element_size() > 1:  # quantized ones cannot be trained
                parameter.requires_grad_(coef > 0)


def _indexers(model: PreTrainedModel) -> list[MiniMaxM3VLIndexer]:
    return [module for module in model.modules() if isinstance(module, MiniMaxM3VLIndexer)]
