"""MAE-LM: the encoder never sees a mask token; a small decoder puts them back among its outputs and predicts them.

Yu Meng et al., "Representation Deficiency in Masked Language Modeling", ICLR 2024, arXiv 2302.02060.
Reference implementation: https://github.com/yumeng5/MAE-LM (`fairseq/models/ae/model.py`,
`fairseq/modules/transformer_sentence_encoder.py`, `fairseq/data/mask_tokens_dataset.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.models.bert.modeling_bert import BertEncoder, BertPredictionHeadTransform
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.parts.text import (
    check_input_ids,
    example_texts,
    longest_text,
    position_offset,
    tiny_bert,
)
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks.tokens import fewest_and_most_masked, token_mask
from hf_masked.randomness import model_draw

# The mask tokens of the vocabularies that these encoders come with.
MASK_TOKEN_IDS = {"bert": 103, "roberta": 50264, "xlm-roberta": 250001}


class MAELMConfig(VariantConfig):
    """Config of MAE-LM.

    Args:
        backbone_config: a BERT, RoBERTa or XLM-RoBERTa config; BERT base, with fairseq's epsilon, by default.
        mask_token_id: of the tokenizer; by default that of the backbone's usual vocabulary.
        mask_probability: share of the tokens that are masked, in [0, 1) (`--mask-prob`, 0.15).
        mask_special_tokens: mask special tokens too, as the reference does. Without them the processor, which knows
            them, has to draw the mask.
        decoder_num_hidden_layers: 4 in the paper (`run_pretrain.sh`).
        decoder_hidden_size, decoder_num_attention_heads, decoder_intermediate_size: by default the encoder's.
        decoder_hidden_dropout_prob, decoder_attention_probs_dropout_prob: 0 in the reference ("zero-dropout").
    """

    model_type = "hf_masked_mae_lm"
    paper_title: ClassVar[str] = "Representation Deficiency in Masked Language Modeling"
    paper_year: ClassVar[int] = 2023
    arxiv_id: ClassVar[str] = "2302.02060"
    reference_repository: ClassVar[str] = "https://github.com/yumeng5/MAE-LM"
    modality: ClassVar[str] = "text"
    masks: ClassVar[str] = "random tokens, dropped before the encoder"
    predicts: ClassVar[str] = "the masked tokens"
    backbones: ClassVar[tuple[str, ...]] = tuple(MASK_TOKEN_IDS)
    processor: ClassVar[str] = "TextProcessor"
    sample: ClassVar[str] = "block"

    mask_token_id: int | None = None
    mask_probability: float = 0.15
    mask_special_tokens: bool = True
    decoder_num_hidden_layers: int = 4
    decoder_hidden_size: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_hidden_dropout_prob: float = 0.0
    decoder_attention_probs_dropout_prob: float = 0.0

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = BertConfig(layer_norm_eps=1e-5)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        if self.mask_token_id is None:
            self.mask_token_id = MASK_TOKEN_IDS[self.backbone_config.model_type]
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id} and the backbone's vocab_size {self.vocab_size}: set it to "
                "the tokenizer's mask_token_id."
            )
        if not 0.0 <= self.mask_probability < 1.0:
            raise ValueError(
                f"mask_probability is {self.mask_probability}; it must lie in [0, 1), because the encoder needs "
                "tokens to see. The paper's is 0.15."
            )
        if self.backbone_config.is_decoder:
            raise ValueError("The backbone's is_decoder is True, and an encoder has to see both sides: set it False.")
        if self.decoder_num_hidden_layers < 1:
            raise ValueError(f"decoder_num_hidden_layers is {self.decoder_num_hidden_layers}; it must be at least 1.")
        decoder = self.decoder_config
        if decoder.hidden_size % decoder.num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size={decoder.hidden_size} is no multiple of "
                f"decoder_num_attention_heads={decoder.num_attention_heads}."
            )

    @property
    def vocab_size(self) -> int:
        return self.backbone_config.vocab_size

    @property
    def decoder_config(self) -> BertConfig:
        """Of the decoder's layers, which are BERT's."""
        backbone = self.backbone_config
        return BertConfig(
            vocab_size=backbone.vocab_size,
            hidden_size=self.decoder_hidden_size or backbone.hidden_size,
            num_hidden_layers=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads or backbone.num_attention_heads,
            intermediate_size=self.decoder_intermediate_size or backbone.intermediate_size,
            hidden_act=backbone.hidden_act,
            hidden_dropout_prob=self.decoder_hidden_dropout_prob,
            attention_probs_dropout_prob=self.decoder_attention_probs_dropout_prob,
            max_position_embeddings=longest_text(backbone),
            initializer_range=backbone.initializer_range,
            layer_norm_eps=backbone.layer_norm_eps,
        )

    def processor_settings(self) -> dict:
        return super().processor_settings() | {
            "mask_probability": self.mask_probability,
            "mask_special_tokens": self.mask_special_tokens,
            "mask_token_id": self.mask_token_id,
        }


@dataclass
class MAELMOutput(PreTrainingOutput):
    """Output of `MAELMForPreTraining`.

    Args:
        last_hidden_state: (batch, visible, hidden), the encoder's, of the visible tokens in their order; rows with
            fewer end in padding.
        logits: (batch, masked, vocabulary), predictions of the masked tokens in their order; rows with fewer end in
            predictions of tokens that are not masked.
        masked_places: int64 (batch, masked), where those tokens stand.
        mask: bool (batch, tokens), True = masked.
        accuracy: scalar, the share of the masked tokens that are predicted rightly.
    """

    logits: torch.Tensor | None = None
    masked_places: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    accuracy: torch.Tensor | None = None


class MAELMDecoder(PreTrainedModel):
    """BERT's layers on all places, with positions of their own, and BERT's head, tied to the encoder's embeddings.

    Args:
        config: of the layers.
        encoder_size: width of the encoder's tokens and of the embeddings.
    """

    config: BertConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: BertConfig, encoder_size: int):
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Linear(encoder_size, width) if width != encoder_size else nn.Identity()
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = BertEncoder(config)
        self.head = BertPredictionHeadTransform(config)
        self.head_to_embedding = nn.Linear(width, encoder_size, bias=False) if width != encoder_size else nn.Identity()
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.head_bias)

    def forward(self, tokens: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, encoder hidden), with mask tokens in their places, and bool (batch, tokens), False for
        padding, to (batch, tokens, hidden)."""
        hidden = self.embedding(tokens) + self.position_embeddings.weight[: tokens.shape[1]]
        hidden = self.dropout(self.norm(hidden))
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=there.long())
        return self.encoder(hidden, attention_mask=mask).last_hidden_state

    def predict(self, hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to logits (..., vocabulary); `embeddings` are the encoder's, (vocabulary, encoder hidden)."""
        return F.linear(self.head_to_embedding(self.head(hidden)), embeddings, self.head_bias)


class MAELMPreTrainedModel(VariantModel):
    """How all classes of MAE-LM encode."""

    config: MAELMConfig
    _no_split_modules: ClassVar[list[str]] = ["BertLayer", "RobertaLayer", "XLMRobertaLayer"]

    @property
    def token_embeddings(self) -> torch.Tensor:
        """(vocabulary, hidden): the encoder's table, which holds the mask token and makes the predictions too."""
        return self.backbone.embeddings.word_embeddings.weight

    def make_decoder(self) -> MAELMDecoder:
        config = self.config.decoder_config
        config._attn_implementation = self.config._attn_implementation
        return MAELMDecoder(config, self.config.hidden_size)

    def check_inputs(self, input_ids, attention_mask, bool_masked_pos=None) -> torch.Tensor:
        """bool (batch, tokens), False for padding; raises a ValueError for inputs that do not fit."""
        check_input_ids(input_ids, attention_mask, self.config.vocab_size)
        longest = longest_text(self.config.backbone_config)
        if input_ids.shape[1] > longest:
            raise ValueError(f"The texts have {input_ids.shape[1]} tokens; the encoder has positions for {longest}.")
        if bool_masked_pos is not None and bool_masked_pos.shape != input_ids.shape:
            raise ValueError(
                f"`bool_masked_pos` has shape {tuple(bool_masked_pos.shape)}; expected that of `input_ids`, "
                f"{tuple(input_ids.shape)}."
            )
        if bool_masked_pos is not None and bool_masked_pos.dtype != torch.bool:
            raise ValueError(f"`bool_masked_pos` is {bool_masked_pos.dtype}; expected bool, True = masked.")
        return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 1

    def encode(self, input_ids, visible: torch.Tensor, there: torch.Tensor, token_type_ids=None, **kwargs):
        """Runs the encoder on the visible tokens alone, at their true positions.

        Args:
            input_ids: int64 (batch, tokens).
            visible: bool (batch, tokens), True for the tokens to see.
            there: bool (batch, tokens), False for padding.
            token_type_ids: int64 (batch, tokens), or None.
            kwargs: of the encoder.

        Returns:
            The encoder's output; int64 (batch, visible), the places of its tokens; bool (batch, visible), False where
            a row has fewer.
        """
        config = self.config.backbone_config
        places = first_places(visible, self._most_visible(visible))
        seen = visible.gather(1, places)
        offset = position_offset(config)
        # RoBERTa counts the tokens of the text, BERT all places: the same unless the padding stands before the text.
        positions = there.long().cumsum(dim=1) - 1 if offset else torch.arange(there.shape[1], device=there.device)
        positions = positions.expand_as(input_ids).gather(1, places) + offset
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids.gather(1, places)}
        outputs = self.backbone(
            # What fills up must be nothing that is hidden.
            input_ids=input_ids.gather(1, places).masked_fill(~seen, config.pad_token_id),
            attention_mask=seen.long(),
            position_ids=positions.masked_fill(~seen, offset),
            **types,
            **kwargs,
        )
        return outputs, places, seen

    def _most_visible(self, visible: torch.Tensor) -> int:
        """A compiled forward takes the count from the config instead of reading the mask."""
        if not torch.compiler.is_compiling():
            return int(visible.sum(dim=1).amax())
        tokens = visible.shape[1]
        # Of how many special tokens there are, which are then spared, the model knows nothing.
        return tokens - self._masked_counts(tokens)[0] if self.config.mask_special_tokens else tokens

    def _masked_counts(self, tokens: int) -> tuple[int, int]:
        return fewest_and_most_masked(tokens, self.config.mask_probability)

    def with_mask_tokens(self, encoded: torch.Tensor, places: torch.Tensor, seen: torch.Tensor, tokens: int):
        """The decoder's input, (batch, tokens, hidden): the encoder's outputs in their places, the embedding of the
        mask token elsewhere.

        Args:
            encoded: (batch, visible, hidden).
            places, seen: of `encode`.
            tokens: length of the texts.
        """
        mask_token = self.token_embeddings[self.config.mask_token_id].to(encoded.dtype)
        encoded = torch.where(seen.unsqueeze(-1), encoded, mask_token)
        sequence = mask_token.expand(len(encoded), tokens, -1)
        return sequence.scatter(1, places.unsqueeze(-1).expand_as(encoded), encoded)


class MAELMModel(MAELMPreTrainedModel):
    """The encoder: without a mask it is the plain backbone, with one it sees the visible tokens only."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]

    def __init__(self, config: MAELMConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes texts.

        Args:
            input_ids: int64 (batch, tokens).
            attention_mask: int64 (batch, tokens), 0 for padding.
            token_type_ids: int64 (batch, tokens).
            bool_masked_pos: bool (batch, tokens), True = not seen; None for the plain backbone.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            last_hidden_state: (batch, tokens, hidden); with a mask (batch, visible, hidden), in the tokens' order.

        Raises:
            ValueError: for tokens outside of the vocabulary, longer texts than the encoder's, or masks that do not
                fit.
        """
        there = self.check_inputs(input_ids, attention_mask, bool_masked_pos)
        if bool_masked_pos is None:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            outputs = self.backbone(**inputs, **kwargs)
        else:
            outputs, *_ = self.encode(input_ids, there & ~bool_masked_pos, there, token_type_ids, **kwargs)
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


class MAELMForPreTraining(MAELMPreTrainedModel):
    """Encoder, decoder and the loss on masked tokens."""

    logged_outputs: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, config: MAELMConfig):
        super().__init__(config)
        self.decoder = self.make_decoder()
        self.post_init()

    def draw_mask(self, input_ids, there, noise=None, generator=None) -> torch.Tensor:
        """bool (batch, tokens): from `noise`, from `generator`, or as `model_draw` says."""
        if not self.config.mask_special_tokens:
            raise ValueError(
                "mask_special_tokens is False, and the model does not know the special tokens: pass "
                "`bool_masked_pos`, as TextProcessor draws it in training."
            )
        draw = model_draw(len(input_ids), input_ids.device, self.training, generator, noise)
        return token_mask(draw, there, self.config.mask_probability)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> MAELMOutput:
        """One step of masked language modelling.

        Args:
            input_ids: int64 (batch, tokens), the true ones: masked tokens are left out here.
            attention_mask: int64 (batch, tokens), 0 for padding.
            bool_masked_pos: bool (batch, tokens), True = masked; drawn here by default.
            noise: float (batch, tokens + 1), numbers in [0, 1) from which to draw the mask: the tokens with the
                smallest are masked, and the last says how their number is rounded.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.
            kwargs: of the encoder.

        Returns:
            `MAELMOutput`.

        Raises:
            ValueError: for tokens outside of the vocabulary, longer texts than the encoder's, or masks that do not
                fit.
        """
        there = self.check_inputs(input_ids, attention_mask, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(input_ids, there, noise, generator)
        masked = bool_masked_pos & there
        outputs, places, seen = self.encode(input_ids, there & ~masked, there, **kwargs)
        sequence = self.with_mask_tokens(outputs.last_hidden_state, places, seen, input_ids.shape[1])
        decoded = self.decoder(sequence, there)  # (batch, tokens, decoder hidden)
        masked_places = first_places(masked, self._most_masked(masked))
        index = masked_places.unsqueeze(-1).expand(-1, -1, decoded.shape[-1])
        logits = self.decoder.predict(decoded.gather(1, index), self.token_embeddings)  # (batch, masked, vocabulary)
        asked = masked.gather(1, masked_places)
        targets = input_ids.gather(1, masked_places)
        loss = self.loss(logits, targets, asked) if return_loss else None
        hits = (logits.detach().argmax(dim=-1) == targets) & asked
        return MAELMOutput(
            loss=loss,
            losses=None if loss is None else {"masked_tokens": loss.detach()},
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            logits=logits,
            masked_places=masked_places,
            mask=masked,
            accuracy=hits.sum() / asked.sum().clamp(min=1),
        )

    def _most_masked(self, masked: torch.Tensor) -> int:
        if torch.compiler.is_compiling():
            return self._masked_counts(masked.shape[1])[1]
        return int(masked.sum(dim=1).amax())

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, the mean over the masked tokens of the batch; 0 where nothing is masked.

        Args:
            logits: (batch, masked, vocabulary).
            targets: int64 (batch, masked).
            asked: bool (batch, masked), False for what fills up a row.
        """
        per_token = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return (per_token * asked.flatten()).sum() / asked.sum().clamp(min=1)


class MAELMForMaskedLM(MAELMPreTrainedModel):
    """Fills in masks: takes ordinary `input_ids` with mask tokens, as `pipeline("fill-mask")` makes them, which it
    hides from the encoder."""

    def __init__(self, config: MAELMConfig):
        super().__init__(config)
        self.decoder = self.make_decoder()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Predicts all tokens.

        Args:
            input_ids: int64 (batch, tokens), `mask_token_id` where a token is masked.
            attention_mask: int64 (batch, tokens), 0 for padding.
            token_type_ids: int64 (batch, tokens).
            labels: int64 (batch, tokens), the tokens to predict and -100 elsewhere.
            kwargs: of the encoder.

        Returns:
            logits: (batch, tokens, vocabulary).

        Raises:
            ValueError: for tokens outside of the vocabulary, or longer texts than the encoder's.
        """
        there = self.check_inputs(input_ids, attention_mask)
        visible = there & (input_ids != self.config.mask_token_id)
        outputs, places, seen = self.encode(input_ids, visible, there, token_type_ids, **kwargs)
        sequence = self.with_mask_tokens(outputs.last_hidden_state, places, seen, input_ids.shape[1])
        logits = self.decoder.predict(self.decoder(sequence, there), self.token_embeddings)
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


def first_places(flags: torch.Tensor, count: int) -> torch.Tensor:
    """int64 (batch, count): where `flags`, bool (batch, tokens), are True, in order; then where they are not."""
    return (~flags).long().argsort(dim=1, stable=True)[:, :count]


# Names of fairseq's to BERT's as our `backbone`, and to our decoder's.
RENAMING = (
    (r"^encoder\.sentence_encoder\.embed_tokens\.", "backbone.embeddings.word_embeddings."),
    (r"^encoder\.sentence_encoder\.embed_positions\.", "backbone.embeddings.position_embeddings."),
    (r"^encoder\.sentence_encoder\.emb_layer_norm\.", "backbone.embeddings.LayerNorm."),
    (r"^encoder\.sentence_encoder\.layers\.", "backbone.encoder.layer."),
    (r"^gen_decoder\.sentence_encoder\.embed_positions\.", "decoder.position_embeddings."),
    (r"^gen_decoder\.sentence_encoder\.emb_layer_norm\.", "decoder.norm."),
    (r"^gen_decoder\.sentence_encoder\.layers\.", "decoder.encoder.layer."),
    (r"^gen_decoder\.lm_head\.dense\.", "decoder.head.dense."),
    (r"^gen_decoder\.lm_head\.layer_norm\.", "decoder.head.LayerNorm."),
    (r"^gen_decoder\.lm_head\.embed_linear\.", "decoder.head_to_embedding."),
    (r"^gen_decoder\.lm_head\.bias$", "decoder.head_bias"),
    (r"^encoder_to_decoder\.", "decoder.embedding."),
    (r"\.self_attn\.q_proj\.", ".attention.self.query."),
    (r"\.self_attn\.k_proj\.", ".attention.self.key."),
    (r"\.self_attn\.v_proj\.", ".attention.self.value."),
    (r"\.self_attn\.out_proj\.", ".attention.output.dense."),
    (r"\.self_attn_layer_norm\.", ".attention.output.LayerNorm."),
    (r"\.fc1\.", ".intermediate.dense."),
    (r"\.fc2\.", ".output.dense."),
    (r"\.final_layer_norm\.", ".output.LayerNorm."),
)
# The encoder's table once more.
TIED = ("gen_decoder.sentence_encoder.embed_tokens.weight", "gen_decoder.lm_head.weight")


def official_config(state_dict: dict[str, torch.Tensor]) -> MAELMConfig:
    """The config of a checkpoint of the reference, read from its shapes: heads are 64 wide, as in all of its sizes.

    Raises:
        ValueError: for a checkpoint with relative position biases, which stock encoders have no place for.
    """
    biased = [name for name in state_dict if name.endswith("relative_attention_bias.weight")]
    if biased:
        raise ValueError(
            f"The checkpoint has a relative position bias ({biased[0]}), for which BERT has no place: only runs of "
            "the reference with `--rel-pos 0` can be converted."
        )
    encoder, decoder = "encoder.sentence_encoder.", "gen_decoder.sentence_encoder."

    def sizes(prefix: str) -> tuple[int, int, int]:
        width = state_dict[f"{prefix}emb_layer_norm.weight"].shape[0]
        layers = {name.removeprefix(prefix).split(".")[1] for name in state_dict if name.startswith(f"{prefix}layers")}
        return width, len(layers), state_dict[f"{prefix}layers.0.fc1.weight"].shape[0]

    width, layers, intermediate = sizes(encoder)
    vocab_size = state_dict[f"{encoder}embed_tokens.weight"].shape[0]
    backbone_config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=intermediate,
        max_position_embeddings=state_dict[f"{encoder}embed_positions.weight"].shape[0],
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,  # fairseq's dictionaries: <s>, <pad>, </s>, <unk>, ..., <mask>
    )
    decoder_width, decoder_layers, decoder_intermediate = sizes(decoder)
    return MAELMConfig(
        backbone_config=backbone_config,
        mask_token_id=vocab_size - 1,
        decoder_num_hidden_layers=decoder_layers,
        decoder_hidden_size=decoder_width,
        decoder_num_attention_heads=max(1, decoder_width // 64),
        decoder_intermediate_size=decoder_intermediate,
    )


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: MAELMConfig) -> dict[str, torch.Tensor]:
    """A state dict of the reference under our names; BERT's token types, which it has not, are zero."""
    untied = {name: tensor for name, tensor in state_dict.items() if name not in TIED}
    types = (config.backbone_config.type_vocab_size, config.hidden_size)
    return rename_weights(untied, RENAMING) | {"backbone.embeddings.token_type_embeddings.weight": torch.zeros(types)}


def tiny_config() -> MAELMConfig:
    # Without dropout, and where 15 % are a whole number of tokens, two halves of a batch equal the whole.
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1}
    backbone_config = tiny_bert(max_position_embeddings=20, **plain)
    return MAELMConfig(backbone_config=backbone_config, mask_token_id=4, decoder_num_hidden_layers=1)


def example_inputs(config: MAELMConfig, batch: int) -> dict[str, torch.Tensor]:
    return example_texts(config.backbone_config, batch)


register_variant(
    config=MAELMConfig,
    pretraining=MAELMForPreTraining,
    model=MAELMModel,
    heads={AutoModelForMaskedLM: MAELMForMaskedLM},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_inputs,
)
