"""Exact Siamese attribution: an encoder whose similarities are sums over pairs of tokens, for nothing is left over.

From the tokens of a text those of a reference without content are subtracted before pooling, so that the reference's
embedding is zero. The explanation itself, for this encoder and for any other, is
`hf_masked.evaluation.attribution.SiameseAttributor`.

Lucas Moeller, Dmitry Nikolaev and Sebastian Pado, "An Attribution Method for Siamese Encoders", EMNLP 2023, arXiv
2310.05703. Reference implementation: https://github.com/lucasmllr/xsbert (`ShiftingReferenceTransformer.py`,
`dot_loss.py`, `train.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.pooling import TOKEN_POOLINGS, pool_tokens
from hf_masked.modeling.registry import register_variant

SIMILARITIES = {"cosine": F.cosine_similarity, "dot": lambda a, b: (a * b).sum(dim=-1)}

# [CLS], [PAD], [SEP] of BERT's own vocabularies, which the default backbone has.
BERT_REFERENCE_IDS = (101, 0, 102)


class ReferenceShiftedConfig(VariantConfig):
    """Config of the exact Siamese attribution.

    Args:
        backbone_config: a config of an encoder of texts; BERT-base by default.
        reference_ids: ids of the tokens that the reference begins with, is filled with and ends with; by default those
            that the backbone's config names (RoBERTa's and MPNet's do, BERT's and DistilBERT's do not).
        pooling: "mean" of the tokens or the first one, "cls".
        similarity: of two embeddings, "cosine" or "dot" (section 3, "models").
    """

    model_type = "hf_masked_siamese_attribution"
    paper_title: ClassVar[str] = "An Attribution Method for Siamese Encoders"
    paper_year: ClassVar[int] = 2023
    arxiv_id: ClassVar[str] = "2310.05703"
    reference_repository: ClassVar[str] = "https://github.com/lucasmllr/xsbert"
    modality: ClassVar[str] = "text"
    masks: ClassVar[str] = "nothing: two texts"
    predicts: ClassVar[str] = "the score of two texts, such that it is a sum over pairs of tokens"
    backbones: ClassVar[tuple[str, ...]] = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert")
    processor: ClassVar[str] = "AutoTokenizer"

    reference_ids: tuple[int, int, int] | list[int] | None = None
    pooling: str = "mean"
    similarity: str = "cosine"

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = BertConfig()
            self.reference_ids = self.reference_ids or BERT_REFERENCE_IDS
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        if self.pooling not in TOKEN_POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; it must be one of {', '.join(TOKEN_POOLINGS)}.")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity is {self.similarity!r}; it must be one of {', '.join(SIMILARITIES)}.")
        backbone = self.backbone_config
        if self.reference_ids is None:
            self.reference_ids = [backbone.bos_token_id, backbone.pad_token_id, backbone.eos_token_id]
        self.reference_ids = list(self.reference_ids)
        if len(self.reference_ids) != 3 or any(
            not isinstance(token, int) or not 0 <= token < backbone.vocab_size for token in self.reference_ids
        ):
            raise ValueError(
                f"reference_ids is {self.reference_ids}; expected three ids below vocab_size={backbone.vocab_size}: "
                "of the first token, the filler and the last. Give those of the tokenizer: reference_ids=("
                "tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id)."
            )


def reference_tokens(attention_mask: torch.Tensor, reference_ids: tuple[int, int, int] | list[int]) -> torch.Tensor:
    """The reference of each text: as long as the text, without content (paper, section 2.2, "reference").

    Args:
        attention_mask: (batch, tokens), 1 for the tokens of the text, 0 for padding on either side. The reference has
            the same mask: its fillers are attended to.
        reference_ids: ids of its first token, its filler and its last token.

    Returns:
        int64 (batch, tokens).
    """
    first, filler, last = reference_ids
    place = attention_mask.long().cumsum(dim=1) * attention_mask  # 1 for the first token of the text
    end = attention_mask.long().sum(dim=1, keepdim=True)
    tokens = torch.full_like(place, filler)
    tokens = torch.where(place == end, last, tokens)
    tokens = torch.where(place == 1, first, tokens)
    return torch.where(attention_mask.bool(), tokens, filler)


@dataclass
class ReferenceShiftedOutput(PreTrainingOutput):
    """Output of `ReferenceShiftedForSimilarity`; `last_hidden_state` is that of the first texts.

    Args:
        logits: (batch,) similarities.
        embeddings: (batch, 2, width).
    """

    logits: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


class ReferenceShiftedPreTrainedModel(VariantModel):
    """The stock encoder of texts, and its embeddings relative to the reference."""

    config: ReferenceShiftedConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)

    # Texts have no picture processor, which the base class's would push beside the model.
    push_to_hub = PreTrainedModel.push_to_hub

    def __init__(self, config: ReferenceShiftedConfig):
        super().__init__(config)
        self.post_init()

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes texts, see `ReferenceShiftedEncoder.forward`."""
        if input_ids.ndim != 2:
            raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; expected (batch, tokens).")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        references = reference_tokens(attention_mask, self.config.reference_ids)
        if token_type_ids is not None:  # BERT's alone
            kwargs["token_type_ids"] = token_type_ids.repeat(2, 1)
        outputs = self.backbone(
            input_ids=torch.cat([input_ids, references]), attention_mask=attention_mask.repeat(2, 1), **kwargs
        )
        hidden, reference = outputs.last_hidden_state.chunk(2)  # (batch, tokens, hidden)
        shifted = hidden - reference
        return BaseModelOutputWithPooling(
            last_hidden_state=shifted,
            pooler_output=pool_tokens(shifted, attention_mask, self.config.pooling),
            hidden_states=_first_half(outputs.get("hidden_states")),
            attentions=_first_half(outputs.get("attentions")),
        )


def _first_half(tensors: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...] | None:
    """Of the texts, without their references."""
    return tensors and tuple(tensor.chunk(2)[0] for tensor in tensors)


class ReferenceShiftedEncoder(ReferenceShiftedPreTrainedModel):
    """Embeds texts relative to their reference, whose own embedding is zero."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embeds texts.

        Args:
            input_ids: int64 (batch, tokens).
            attention_mask: (batch, tokens), 1 for the tokens of the text; by default all.
            token_type_ids: (batch, tokens), of BERT's tokenizer.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            `last_hidden_state`, (batch, tokens, hidden): the text's tokens less the reference's, and `pooler_output`,
            (batch, hidden): the embedding. `hidden_states` and `attentions` are the encoder's.

        Raises:
            ValueError: for another rank.
        """
        return self.embed(input_ids, attention_mask, token_type_ids, **kwargs)


class ReferenceShiftedForSimilarity(ReferenceShiftedPreTrainedModel):
    """The encoder, and the squared error of the similarity of two texts (section 3, "models")."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> ReferenceShiftedOutput:
        """Compares pairs of texts.

        Args:
            input_ids: int64 (batch, 2, tokens).
            attention_mask: (batch, 2, tokens), 1 for the tokens of the texts; by default all.
            token_type_ids: (batch, 2, tokens), of BERT's tokenizer.
            labels: float (batch,), the similarities to learn; the paper's are STS scores / 5.
            return_loss: whether to compute the loss.
            kwargs: of the encoder.

        Returns:
            `ReferenceShiftedOutput`; `loss` is None without labels.

        Raises:
            ValueError: for anything but two texts each.
        """
        if input_ids.ndim != 3 or input_ids.shape[1] != 2:
            raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; expected (batch, 2, tokens): pairs.")
        first, second = (
            self.embed(
                *(None if part is None else part[:, text] for part in (input_ids, attention_mask, token_type_ids)),
                **kwargs,
            )
            for text in range(2)
        )
        embeddings = torch.stack([first.pooler_output, second.pooler_output], dim=1).float()  # (batch, 2, width)
        similarity = SIMILARITIES[self.config.similarity](embeddings[:, 0], embeddings[:, 1])  # (batch,)
        loss = F.mse_loss(similarity, labels.float()) if return_loss and labels is not None else None
        return ReferenceShiftedOutput(
            loss=loss,
            losses=None if loss is None else {"similarity": loss.detach()},
            last_hidden_state=first.last_hidden_state,
            hidden_states=first.hidden_states,
            attentions=first.attentions,
            logits=similarity,
            embeddings=embeddings,
        )


def tiny_config() -> ReferenceShiftedConfig:
    backbone_config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ReferenceShiftedConfig(backbone_config=backbone_config, reference_ids=(1, 0, 2))


def example_inputs(config: ReferenceShiftedConfig, batch: int) -> dict[str, torch.Tensor]:
    """Pairs of random texts of 8 and fewer tokens with their scores."""
    first, filler, last = config.reference_ids
    lengths = torch.randint(3, 9, (batch, 2, 1))
    lengths[0] = 8
    places = torch.arange(8)
    input_ids = torch.randint(3, config.backbone_config.vocab_size, (batch, 2, 8))
    input_ids = torch.where(places == 0, first, torch.where(places == lengths - 1, last, input_ids))
    attention_mask = (places < lengths).long()
    return {
        "input_ids": torch.where(attention_mask.bool(), input_ids, filler),
        "attention_mask": attention_mask,
        "labels": torch.rand(batch),
    }


register_variant(
    config=ReferenceShiftedConfig,
    pretraining=ReferenceShiftedForSimilarity,
    model=ReferenceShiftedEncoder,
    tiny_config=tiny_config,
    example_inputs=example_inputs,
    kind="procedure",
)
