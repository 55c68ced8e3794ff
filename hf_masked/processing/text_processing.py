"""The processor of texts: a transformers tokenizer, masks and views.

As for pictures there are two halves. `prepare_training` runs in data-loading workers: tokenize, cut, pad. The second,
`finish_training`, runs per batch on the training device: mask, or make views. `processor(texts)` does both.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_masked.processing.masks.counts import check_ratio
from hf_masked.processing.masks.tokens import token_mask
from hf_masked.processing.text_views import close_gaps, kept_by_crop, kept_by_deletion
from hf_masked.randomness import keyed_draw, sample_keys

# Purposes of the draws, see `sample_keys`.
MASK, VIEW = range(2)

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

# Length of the byte tokenizer: special tokens and the 256 bytes.
BYTES_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single UTF-8 bytes, which needs no training and knows every text.

    The special tokens `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]` are 0 to 4, as BERT's config has the padding. It is
    a plain tokenizer of transformers and loads where hf_masked is not installed.
    """
    names = list(SPECIAL_TOKENS.values())
    vocabulary = {name: number for number, name in enumerate(names + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.add_special_tokens(names)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


class TextProcessor(FeatureExtractionMixin):
    """Makes the inputs of methods that learn from texts.

    A sample is one text, a block of token ids, or several texts that belong together (a pair, a triplet). With
    `num_views` a sample gives so many views, outermost after the batch: of one text each is a random view of its own,
    of as many texts each gives one. Where no view is changed (the default) the two views of a text are equal, and the
    encoder's dropout alone tells them apart (SimCSE, arXiv 2104.08821, section 3).

    Args:
        tokenizer: of transformers, with a padding token; or a folder or Hub id; or "bytes", see `byte_tokenizer`.
        max_length: tokens of a text, special ones included; longer ones are cut. In training all are padded to it.
        mask_probability: share of the tokens that are masked in training; None for methods that mask none.
        mask_special_tokens: mask special tokens too, except padding.
        num_views: views of a sample in training; None for methods that take texts as they are.
        deletion_probability: of each token, to be left out of a view (special ones stay).
        crop_scale: smallest and largest share of the text's tokens that a view shows, one stretch.
        vocab_size, pad_token_id, mask_token_id: the model's, with which the tokenizer has to agree; None for any.

    Raises:
        ValueError: for a tokenizer that does not fit, or numbers out of their range.
    """

    model_input_names = ["input_ids", "attention_mask", "bool_masked_pos"]  # noqa: RUF012 (transformers' own)
    # Name, in the batches of data sets, of what `prepare_training` makes.
    raw_name: ClassVar[str] = "tokens"

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase = "bytes",
        max_length: int = 128,
        mask_probability: float | None = None,
        mask_special_tokens: bool = True,
        num_views: int | None = None,
        deletion_probability: float = 0.0,
        crop_scale: tuple[float, float] = (1.0, 1.0),
        vocab_size: int | None = None,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.tokenizer = _loaded(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if max_length < 1 or (num_views is not None and num_views < 1):
            raise ValueError(f"max_length is {max_length} and num_views {num_views}; they must be at least 1.")
        if mask_probability is not None:
            check_ratio(mask_probability)
        if not 0.0 <= deletion_probability < 1.0:
            raise ValueError(f"deletion_probability is {deletion_probability}; it must lie in [0, 1), as 0.1 does.")
        if not 0.0 < crop_scale[0] <= crop_scale[1] <= 1.0:
            raise ValueError(f"crop_scale is {tuple(crop_scale)}; it must be (smallest, largest) share, in (0, 1].")
        self.max_length = max_length
        self.mask_probability = mask_probability
        self.mask_special_tokens = mask_special_tokens
        self.num_views = num_views
        self.deletion_probability = deletion_probability
        self.crop_scale = list(crop_scale)
        self.vocab_size, self.pad_token_id, self.mask_token_id = vocab_size, pad_token_id, mask_token_id
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        tokenizer = self.tokenizer
        if self.vocab_size is not None and len(tokenizer) > self.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens and the model's vocab_size is {self.vocab_size}: set "
                f"--model.backbone_config.vocab_size {len(tokenizer)}, or take the tokenizer of the model."
            )
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token: set its pad_token.")
        for name in ("pad_token_id", "mask_token_id"):
            wanted, found = getattr(self, name), getattr(tokenizer, name)
            if wanted is not None and wanted != found:
                raise ValueError(
                    f"The tokenizer's {name} is {found} and the model's {wanted}: set the model's to the tokenizer's."
                )

    def to_dict(self) -> dict:
        """The settings; the tokenizer has files of its own."""
        return {name: value for name, value in super().to_dict().items() if name != "tokenizer"}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes `preprocessor_config.json` and the tokenizer's files."""
        self.tokenizer.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """The processor that was saved in a folder or a repository on the Hub, with its tokenizer."""
        if "tokenizer" not in kwargs:
            kwargs["tokenizer"] = _loaded(pretrained_model_name_or_path)
        settings, rest = cls.get_feature_extractor_dict(pretrained_model_name_or_path, **kwargs)
        names = ("feature_extractor_type", "processor_class")
        return cls(**{name: value for name, value in (settings | rest).items() if name not in names})

    def save_plain(self, folder) -> None:
        """What stock tools need beside an exported encoder: the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def prepare(self, samples: list, padding: str = "max_length") -> dict[str, torch.Tensor]:
        """First half: token ids.

        Args:
            samples: texts; lists of texts, as many in each; or int64 (tokens,) each, special tokens included.
            padding: "max_length", or "longest" of the batch.

        Returns:
            input_ids, attention_mask: int64 (batch, tokens), of several texts (batch, texts, tokens).

        Raises:
            ValueError: for samples of unequal numbers of texts, or of other numbers than `num_views`.
        """
        if isinstance(samples[0], torch.Tensor):
            encoded = {"input_ids": [ids[: self.max_length].tolist() for ids in samples]}
            tokens = self.tokenizer.pad(encoded, padding=padding, max_length=self.max_length, return_tensors="pt")
            return {name: tokens[name] for name in ("input_ids", "attention_mask")}
        if isinstance(samples[0], str):
            return self._tokenized(list(samples), padding)
        found = {len(sample) for sample in samples}
        if found != {self.num_views}:
            raise ValueError(
                f"Samples have {', '.join(map(str, sorted(found)))} texts and num_views is {self.num_views}: each "
                "text of a sample gives one view."
            )
        tokens = self._tokenized([text for sample in samples for text in sample], padding)
        return {name: value.unflatten(0, (len(samples), -1)) for name, value in tokens.items()}

    def _tokenized(self, texts: list[str], padding: str) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(
            texts, padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def prepare_training(
        self, samples: list, indices: torch.Tensor, seed: int, epochs: int | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The first half for training, in which nothing is drawn: see `prepare`."""
        return self.prepare(samples)

    def finish(
        self,
        tokens: dict[str, torch.Tensor],
        mask_keys: torch.Tensor | None = None,
        view_keys: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Second half, on the device of `tokens`.

        Args:
            tokens: of `prepare`.
            mask_keys: int64 (batch,), to draw masks from; None for none.
            view_keys: int64 (batch, views), to make views with; None for none.

        Returns:
            input_ids, attention_mask: int64 (batch, tokens), with views (batch, views, tokens).
            bool_masked_pos: bool (batch, tokens), True = masked; `input_ids` are not changed. Only with `mask_keys`.
        """
        tokens = dict(tokens)
        if view_keys is not None:
            tokens = self._views(tokens, view_keys.to(tokens["input_ids"].device))
        if mask_keys is not None:
            maskable = tokens["attention_mask"] == 1
            if not self.mask_special_tokens:
                maskable &= ~self.special_tokens_mask(tokens["input_ids"])
            draw = keyed_draw(mask_keys.to(maskable.device))
            tokens["bool_masked_pos"] = token_mask(draw, maskable, self.mask_probability)
        return tokens

    def special_tokens_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """bool, True for special tokens, the unknown one excepted: it stands for a piece of the text."""
        ids = sorted(set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id})
        return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))

    def _views(self, tokens: dict[str, torch.Tensor], keys: torch.Tensor) -> dict[str, torch.Tensor]:
        if tokens["input_ids"].ndim == 2:
            tokens = {name: value[:, None].expand(-1, self.num_views, -1) for name, value in tokens.items()}
        if self.deletion_probability == 0 and self.crop_scale == [1.0, 1.0]:
            return {name: value.contiguous() for name, value in tokens.items()}
        shape = tokens["input_ids"].shape  # (batch, views, tokens)
        input_ids, there = (tokens[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
        special = self.special_tokens_mask(input_ids)
        movable = (there == 1) & ~special
        draw = keyed_draw(keys.flatten())
        kept = kept_by_crop(draw, movable, self.crop_scale)
        kept = kept_by_deletion(draw, kept, self.deletion_probability)
        keep = kept | ((there == 1) & special)
        input_ids, there = close_gaps(input_ids, keep, self.tokenizer.pad_token_id)
        return {"input_ids": input_ids.view(shape), "attention_mask": there.view(shape)}

    def finish_training(
        self, tokens: dict[str, torch.Tensor], indices: torch.Tensor, seed: int, epochs: int | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`finish` with everything drawn for the samples `indices`, int64 (batch,), in an epoch of a seeded run."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        mask_keys = view_keys = None
        if self.mask_probability is not None:
            mask_keys = sample_keys(seed, epochs, indices, purpose=MASK)
        if self.num_views is not None:
            epochs = epochs.unsqueeze(-1) if isinstance(epochs, torch.Tensor) and epochs.ndim else epochs
            views = torch.arange(self.num_views, device=indices.device)
            view_keys = sample_keys(seed, epochs, indices[:, None], views, VIEW)
        return self.finish(tokens, mask_keys, view_keys)

    def __call__(
        self, texts: str | Sequence, training: bool = False, seed: int | None = None, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Both halves.

        Args:
            texts: one text, a list of texts, or a list of samples of several texts.
            training: draw masks, or make views, instead of giving the tokens alone.
            seed: makes everything that is drawn a function of this number and the text's place in the list; by
                default torch's generator picks it.
            return_tensors: "pt", or "np".

        Returns:
            What `finish` returns; without training the texts are padded to the longest.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not training:
            return BatchFeature(self.finish(self.prepare(texts, "longest")), tensor_type=return_tensors)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        tokens = self.prepare(texts)
        return BatchFeature(self.finish_training(tokens, range(len(texts)), seed, 0), tensor_type=return_tensors)


def _loaded(name_or_path: str) -> PreTrainedTokenizerBase:
    if name_or_path == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except OSError as error:
        raise ValueError(
            f"There is no tokenizer {name_or_path!r}, neither a folder nor a Hub id that can be reached: "
            f"{str(error).splitlines()[0]}"
        ) from error


__all__ = ["BYTES_VOCAB_SIZE", "TextProcessor", "byte_tokenizer"]
