"""Stock encoders of texts: which there are, where a token stands, and example inputs."""

import torch
from transformers import BertConfig, PreTrainedConfig

# Encoders of texts whose `last_hidden_state` is (batch, tokens, width) and that take `input_ids` and `attention_mask`.
TEXT_BACKBONES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")

# Those whose positions begin after the padding's id.
AFTER_PADDING = ("roberta", "xlm-roberta")


def position_offset(config: PreTrainedConfig) -> int:
    """The `position_ids` of a text's first token: 0, or after the padding's id (RoBERTa)."""
    return config.pad_token_id + 1 if config.model_type in AFTER_PADDING else 0


def longest_text(config: PreTrainedConfig) -> int:
    """Tokens of the longest text that an encoder has positions for."""
    return config.max_position_embeddings - position_offset(config)


def text_settings(config: PreTrainedConfig) -> dict:
    """Arguments with which a `TextProcessor` fits an encoder."""
    return {
        "max_length": longest_text(config),
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_token_id,
    }


def check_input_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int) -> None:
    """Raises a ValueError unless the tokens are int64 (batch, tokens) of the vocabulary, and the mask fits them."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"`input_ids` is {input_ids.dtype} of shape {tuple(input_ids.shape)}; expected int64 (batch, tokens)."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; expected that of `input_ids`, "
            f"{tuple(input_ids.shape)}."
        )
    if not torch.compiler.is_compiling() and input_ids.numel() and int(input_ids.max()) >= vocab_size:
        raise ValueError(
            f"`input_ids` holds {int(input_ids.max())}, and the encoder's vocabulary has {vocab_size} tokens: take "
            "the tokenizer that belongs to it."
        )


def tiny_bert(**settings) -> BertConfig:
    """A BERT for bytes that costs nothing: of the tiny configs of the catalogue."""
    form = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**form | {"intermediate_size": 64, "max_position_embeddings": 32} | settings)


def example_texts(config: PreTrainedConfig, *shape: int) -> dict[str, torch.Tensor]:
    """Random tokens of full length, from torch's generator: `input_ids` and `attention_mask`, int64 (*shape, 20)."""
    input_ids = torch.randint(5, config.vocab_size, (*shape, 20))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
