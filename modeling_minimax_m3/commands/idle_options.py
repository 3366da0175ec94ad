"""Makes options of `train` that would do nothing an error."""

# Every circumstance in which options do nothing: options of the command, and options of TrainingArguments that the
# command does not use. Transformers itself checks how options of TrainingArguments affect each other.
IDLE = {
    "adapter": (
        "with --adapter, which has its own",
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_experts", "lora_save"),
    ),
    "no_lora": (
        "without --lora",
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_experts", "lora_save"),
    ),
    "lora": (
        "with --lora or --adapter, which train adapters of the language model and what --lora_save names",
        ("train_vision",),
    ),
    "label_smoothing": (
        "with --label_smoothing_factor, which takes the place of the model's loss",
        ("indexer_loss_coef", "router_aux_loss_coef"),
    ),
    "no_evaluation": (
        "without --eval_dataset, --eval_split or --eval_fraction",
        (
            *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval", "per_device_eval_batch_size"),
            *(
                "samples",
                "sample_tokens",
                "eval_accumulation_steps",
                "load_best_model_at_end",
                "metric_for_best_model",
                "greater_is_better",
            ),
        ),
    ),
    "any_run": (
        "here: the command predicts nothing and measures the loss alone",
        ("do_predict", "include_for_metrics", "batch_eval_metrics"),
    ),
    "streaming": ("with --streaming", ("num_proc", "data_seed", "train_sampling_strategy")),
    "held_out": ("with --eval_fraction, which holds out training rows", ("eval_dataset", "eval_split")),
    "packing": ("with --packing, whose packs have one length", ("padding_free", "train_sampling_strategy")),
    "no_named_data": ("where the data are files or were saved by `save_to_disk`", ("dataset_config",)),
    "no_chats": ("where the data have no chats", ("messages_column", "thinking_mode")),
    "no_texts": ("where the data have no texts", ("text_column",)),
    "media": ("where the data have images or videos", ("padding_free", "remove_unused_columns", "packing")),
    "no_media": ("where the data have neither images nor videos", ("train_vision", "media_folder", "check_media")),
    "no_vision": ("with a checkpoint that reads text only", ("train_vision",)),
    "no_experts": (
        "with a checkpoint that has no routed experts",
        ("lora_experts", "router_aux_loss_coef", "ep_size"),
    ),
    "no_indexers": ("with a checkpoint that has no learned-sparse layers", ("indexer_loss_coef",)),
    "no_adapted_indexers": (
        "where no adapter is on the indexers: add q_proj and k_proj to --lora_targets, or leave it out",
        ("indexer_loss_coef",),
    ),
    "own_attention": (
        "where neither a dense layer nor a vision tower computes attention",
        ("attn_implementation",),
    ),
}


def refuse_idle(given: set[str], **circumstances: bool | str) -> None:
    """Raises ValueError for an option that would do nothing.

    Args:
        given (set[str]): Names of the options that the user gave.
        **circumstances (bool or str): Which circumstances, by their keys in IDLE, apply. A text applies, and adds
            details to the message.

    Raises:
        ValueError: An option would do nothing. The message names the option and the circumstance.
    """
    for name, detail in circumstances.items():
        when, options = IDLE[name]
        if detail and (idle := [f"--{option}" for option in options if option in given]):
            more = f": {detail}" if isinstance(detail, str) else ""
            raise ValueError(f"{', '.join(idle)} would do nothing {when}{more}")
