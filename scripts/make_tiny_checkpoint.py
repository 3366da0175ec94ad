"""Write a tiny MiniMax-M3 checkpoint with the real architecture and random weights.

    python scripts/make_tiny_checkpoint.py OUTPUT_DIRECTORY

The folder has the same content as a released checkpoint: `config.json`, safetensors with the released parameter names,
a byte-level BPE tokenizer with M3's special tokens, the processor's configuration, the chat template and the
generation defaults. `AutoProcessor` and `AutoModelForImageTextToText` load it after `import modeling_minimax_m3`. The
weights are random (the same for the same seed), so the model's answers mean nothing.
"""

import argparse
import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from configuration_minimax_m3 import MiniMaxM3VLConfig, tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from processing_minimax_m3 import (
    MiniMaxM3VLImageProcessor,
    MiniMaxM3VLProcessor,
    MiniMaxM3VLVideoProcessor,
    load_chat_template,
)
from processing_minimax_m3.special_tokens import (
    BEGIN_OF_DOCUMENT_TOKEN,
    END_OF_TURN_TOKEN,
    SPECIAL_TOKENS,
    TEXT_MARKUP_TOKENS,
    UNKNOWN_TOKEN,
)
from replace_when_done import replace_when_done

# The released tokenizer splits text by this pattern before it merges bytes: words with their leading space, runs of up
# to three digits, punctuation, line breaks.
WORD_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def training_text() -> list[str]:
    """The Python language reference that ships with CPython: about 460,000 characters of real prose and code."""
    return [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]


def train_tokenizer(config: MiniMaxM3VLConfig, texts: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE whose special tokens have the ids of `config`.

    Special tokens come last in the vocabulary, in the released order. The other tokens are learnt from `texts`, by
    default from `training_text`.

    Raises:
        ValueError: The vocabulary has no room for the bytes and the special tokens, or `config` places a special
            token elsewhere.
    """
    num_learnt = config.image_token_id - SPECIAL_TOKENS.index(MiniMaxM3VLProcessor.IMAGE_TOKEN)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_learnt, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(training_text() if texts is None else texts, trainer)
    if tokenizer.get_vocab_size() != num_learnt:
        raise ValueError(
            f"`config` leaves {num_learnt} ids below the special tokens, but the tokenizer has "
            f"{tokenizer.get_vocab_size()}: at least the 256 bytes, at most what the training text yields."
        )
    # Markup stays visible when special tokens are skipped, because readers of the answer look for it.
    tokenizer.add_tokens(
        [AddedToken(token, special=token not in TEXT_MARKUP_TOKENS, normalized=False) for token in SPECIAL_TOKENS]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN_OF_DOCUMENT_TOKEN,
        eos_token=END_OF_TURN_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        pad_token=SPECIAL_TOKENS[0],
        padding_side="left",
        model_max_length=config.text_config.max_position_embeddings,
    )
    _check_token_ids(config, wrapped)
    return wrapped


def _check_token_ids(config: MiniMaxM3VLConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = {
        "image_token_id": (config.image_token_id, MiniMaxM3VLProcessor.IMAGE_TOKEN),
        "video_token_id": (config.video_token_id, MiniMaxM3VLProcessor.VIDEO_TOKEN),
        "bos_token_id": (config.text_config.bos_token_id, tokenizer.bos_token),
        "eos_token_id": (config.text_config.eos_token_id, tokenizer.eos_token),
        "pad_token_id": (config.text_config.pad_token_id, tokenizer.pad_token),
    }
    for name, (token_id, token) in expected.items():
        actual = tokenizer.convert_tokens_to_ids(token)
        if actual != token_id:
            raise ValueError(
                f"`{name}` of the config must be {actual}, the tokenizer's id of {token!r}, got {token_id}."
            )
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(f"`vocab_size` must be at least {len(tokenizer)}, got {config.text_config.vocab_size}.")


def build_processor(config: MiniMaxM3VLConfig, texts: Iterable[str] | None = None) -> MiniMaxM3VLProcessor:
    """Builds the joint processor for `config`, with its tokenizer and the patch sizes of its vision tower.

    `texts` are those that the tokenizer learns from, by default `training_text`.
    """
    vision = config.vision_config
    patches = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    return MiniMaxM3VLProcessor(
        image_processor=MiniMaxM3VLImageProcessor(**patches),
        tokenizer=train_tokenizer(config, texts),
        video_processor=MiniMaxM3VLVideoProcessor(**patches),
        chat_template=load_chat_template(),
    )


def make_tiny_checkpoint(
    directory: str | Path,
    *,
    config: MiniMaxM3VLConfig | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a checkpoint with random weights to `directory`, which is made if it does not exist.

    An earlier checkpoint of this function in `directory` is replaced.

    Args:
        directory (str or Path): Folder of the checkpoint.
        config (MiniMaxM3VLConfig, optional): Configuration of the model. The default is `tiny_config()`.
        seed (int): Seed of the weights. The caller's random state stays as it is.
        dtype (torch.dtype): Type of the saved weights.

    Returns:
        `directory` as a path.

    Raises:
        FileExistsError: `directory` holds other files than a checkpoint of this function.
    """
    directory = Path(directory)
    config = tiny_config() if config is None else config
    processor = build_processor(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MiniMaxM3SparseForConditionalGeneration(config).to(dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    with replace_when_done(directory) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny MiniMax-M3 checkpoint with random weights.")
    parser.add_argument("directory", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    arguments = parser.parse_args()
    directory = make_tiny_checkpoint(arguments.directory, seed=arguments.seed)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"wrote {directory}, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
