"""Which tokens, or patches, of two inputs make a Siamese encoder call them similar: integrated Jacobians.

The similarity of two embeddings is written as a sum over pairs of tokens, one of each input, as integrated gradients
write the output of a network as a sum over one input's features.

Lucas Moeller, Dmitry Nikolaev and Sebastian Pado, "An Attribution Method for Siamese Encoders", EMNLP 2023, arXiv
2310.05703, and "Approximate Attributions for Off-the-Shelf Siamese Transformers", EACL 2024, arXiv 2402.02883.
Reference implementation: https://github.com/lucasmllr/xsbert (`xsbert/models/XSTransformer.py`, `hooks.py`).
"""

import html
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import cached_file

from hf_masked.evaluation.features import ImageSettings, evaluation_mode, load_encoder, to_model_input
from hf_masked.modeling.parts.backbones import load_backbone
from hf_masked.modeling.parts.patches import pair, patch_grid
from hf_masked.modeling.parts.pooling import (
    TOKEN_POOLINGS,
    interpolation_argument,
    pool,
    pool_tokens,
)
from hf_masked.modeling.siamese.siamese_attribution import ReferenceShiftedConfig, reference_tokens
from hf_masked.processing.decoding import to_channels, to_uint8_tensor
from hf_masked.training.visualization import attribution_of_pictures, attribution_of_texts

SIMILARITIES = ("cosine", "dot")
RULES = ("midpoint", "right")
FORMS = ("jvp", "backward")
PICTURE_POOLINGS = ("auto", "mean", "cls")

# Where encoders of transformers keep their layers: BERT and its kind, DistilBERT, ViT and ModernBERT.
LAYERS = ("encoder.layer", "transformer.layer", "layers", "encoder.layers")

# Signs of byte-pair and sentence-piece vocabularies for "a space goes before".
SPACES = "Ġ▁"


class TokenPair(NamedTuple):
    """A pair of tokens, their places, and what they add to the similarity."""

    token_a: str
    token_b: str
    attribution: float
    index_a: int
    index_b: int


@dataclass(frozen=True)
class SiameseAttribution:
    """An explained similarity.

    Args:
        attributions: (tokens of a, tokens of b), float32, or float64 of such an encoder. Signed: what a pair adds to
            `expected_sum`.
        tokens_a, tokens_b: for people; patches are "row,column".
        score: the similarity.
        reference_terms: the similarities of "a and b's reference", of "a's reference and b" and of "both references".
            With the cosine all are divided by the norms of a and b, not by the references' own.
        completeness_error: how far the sum of all attributions is from `expected_sum`; it falls with more steps.
        special_a, special_b: bool (tokens,), class, separator and other tokens that stand for nothing in the input.
        left_out: the sum of what `drop_special` has left out.
        pictures: of a and b, float (channels, height, width) in [0, 1]; None for texts.
    """

    attributions: torch.Tensor
    tokens_a: list[str]
    tokens_b: list[str]
    score: float
    reference_terms: dict[str, float]
    completeness_error: float
    special_a: torch.Tensor
    special_b: torch.Tensor
    left_out: float = 0.0
    pictures: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def expected_sum(self) -> float:
        """What all attributions add up to: the score, less both references' terms, plus that of the references."""
        first, second, both = self.reference_terms.values()
        return self.score - first - second + both

    def drop_special(self) -> "SiameseAttribution":
        """The same without special tokens. Nothing is renormalised: the rest no longer adds up to `expected_sum`, and
        `left_out` says how much went."""
        keep_a, keep_b = ~self.special_a, ~self.special_b
        kept = self.attributions[keep_a][:, keep_b]
        return replace(
            self,
            attributions=kept,
            tokens_a=[token for token, keep in zip(self.tokens_a, keep_a, strict=True) if keep],
            tokens_b=[token for token, keep in zip(self.tokens_b, keep_b, strict=True) if keep],
            special_a=self.special_a[keep_a],
            special_b=self.special_b[keep_b],
            left_out=self.left_out + float(self.attributions.sum() - kept.sum()),
        )

    def top_pairs(self, k: int = 10) -> list[TokenPair]:
        """The k pairs of the largest magnitude, whatever their sign."""
        values = self.attributions
        order = values.flatten().abs().argsort(descending=True, stable=True)[:k].tolist()
        places = [divmod(place, values.shape[1]) for place in order]
        return [TokenPair(self.tokens_a[i], self.tokens_b[j], values[i, j].item(), i, j) for i, j in places]

    def summary(self) -> str:
        """Score, reference terms and sum in one line."""
        terms = ", ".join(f"{name} {value:.4f}" for name, value in self.reference_terms.items())
        line = f"similarity {self.score:.4f}; {terms}; "
        if self.left_out:
            return line + f"sum of what is shown {self.attributions.sum():.4f}, left out {self.left_out:.4f}"
        return line + f"sum of all pairs {self.attributions.sum():.4f}, expected {self.expected_sum:.4f}"

    def to_html(self) -> str:
        """A table of tokens by tokens: red adds to the similarity, blue takes from it."""
        largest = self.attributions.abs().max().clamp(min=torch.finfo(torch.float32).tiny).item()
        head = "".join(f"<th>{html.escape(token)}</th>" for token in self.tokens_b)
        rows = "".join(
            f"<tr><th>{html.escape(token)}</th>{''.join(_cell(value, largest) for value in row)}</tr>"
            for token, row in zip(self.tokens_a, self.attributions.tolist(), strict=True)
        )
        style = "font:13px sans-serif;border-collapse:collapse;text-align:center"
        return (
            f'<meta charset="utf-8"><table style="{style}"><caption style="text-align:left;padding:4px">'
            f"{html.escape(self.summary())}</caption><tr><th></th>{head}</tr>{rows}</table>"
        )

    _repr_html_ = to_html

    def picture(self) -> Image.Image:
        """Of texts the matrix with its tokens; of pictures both, shaded by what each patch adds, top pairs joined."""
        if self.pictures is None:
            return attribution_of_texts(self.attributions, self.tokens_a, self.tokens_b, self.summary())
        shown = self.drop_special() if self.special_a.any() else self
        grids = [_grid_of(tokens) for tokens in (shown.tokens_a, shown.tokens_b)]
        pairs = [(pair.index_a, pair.index_b, pair.attribution) for pair in shown.top_pairs(8)]
        return attribution_of_pictures(shown.attributions, self.pictures, grids, pairs, shown.summary())


class SiameseAttributor:
    """Explains similarities of an encoder, text against text or picture against picture.

    Args:
        model: an encoder of transformers, a model of this package (its backbone is explained; a
            `ReferenceShiftedEncoder` in the exact mode), or a `SentenceTransformer` (its transformer and what comes
            after).
        processor: the tokenizer; for pictures an image processor or `ImageSettings`. Not needed for ready `input_ids`
            or normalised `pixel_values`, nor by a `SentenceTransformer`.
        pooling: "mean" or "cls" (for pictures see `hf_masked.modeling.parts.pooling.pool`; "auto" too). By default the
            model's own if it says one, else the mean.
        layer: the input of which of the encoder's layers is explained: 0 is the output of the embeddings, -1 the input
            of the last layer. Later layers need fewer steps.
        num_steps: of the integral.
        rule: "midpoint", whose error falls with the square of the steps, or "right", as the reference implementation.
        similarity: "cosine" or "dot" of the embeddings; by default the model's own, or the cosine. After a module
            that normalises both are the cosine.
        reference: the input that counts as empty. Texts: "pad" (the first and last special token, padding between),
            or three ids (first, filler, last). Pictures: "zeros" (the mean colour) or "blur". Or a function from the
            model's inputs, a dict of tensors of batch 1, to the reference's.
        shift: subtract the reference's tokens before pooling, the exact mode; by default what the model was trained
            for. An encoder that was not gives other embeddings with it.
        head: applied to the pooled embedding, for example `model.projector`.
        form: "jvp", forward mode, as many passes as tokens; or "backward", as many as the embedding has dimensions.
        batch_size: rows that run through the encoder at once.

    Raises:
        ValueError: for settings outside of these, or an encoder whose layers are not found.
    """

    def __init__(
        self,
        model: nn.Module,
        processor=None,
        *,
        pooling: str | None = None,
        layer: int = -1,
        num_steps: int = 50,
        rule: str = "midpoint",
        similarity: str | None = None,
        reference: str | tuple[int, int, int] | Callable[[dict], dict] | None = None,
        shift: bool | None = None,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        form: str = "jvp",
        batch_size: int = 64,
    ):
        config = getattr(model, "config", None)
        exact = isinstance(config, ReferenceShiftedConfig)
        if _is_sentence_transformer(model):
            if pooling is not None:
                raise ValueError(f"pooling is {pooling!r}, but a SentenceTransformer brings its own: leave it out.")
            self.encoder, processor = model[0].auto_model, processor or model.tokenizer
            rest = list(model)[1:]
            # Normalisation comes with the cosine's division instead, see `explain`.
            similarity = "cosine" if any(map(_normalizes, rest)) else similarity
            pooling = nn.Sequential(*(module for module in rest if not _normalizes(module)))
        else:
            self.encoder = getattr(model, "backbone", model)
        if exact:
            pooling, similarity = pooling or config.pooling, similarity or config.similarity
            reference = tuple(config.reference_ids) if reference is None else reference
        self.similarity = _one_of("similarity", similarity or "cosine", SIMILARITIES)
        self.rule, self.form = _one_of("rule", rule, RULES), _one_of("form", form, FORMS)
        if num_steps < 1 or batch_size < 1:
            raise ValueError(f"num_steps is {num_steps} and batch_size {batch_size}; both must be at least 1.")
        self.num_steps, self.batch_size = num_steps, batch_size
        self.shift = exact if shift is None else shift
        self.head = head
        self.layer = _layer(self.encoder, layer)
        self.takes_pictures = self.encoder.main_input_name == "pixel_values"
        kind = _Pictures if self.takes_pictures else _Texts
        self.inputs = kind(self.encoder, processor, pooling, reference)

    @classmethod
    def from_pretrained(cls, path: str, **settings) -> "SiameseAttributor":
        """Of a checkpoint's encoder, with its tokenizer or its pictures' settings.

        Args:
            path: a folder or a Hub id: of transformers, of this package, or of sentence-transformers, which is not
                needed for it: its pooling is read from the checkpoint.
            settings: of `SiameseAttributor`.

        Raises:
            ValueError: for a checkpoint without an encoder, or one of sentence-transformers with other modules than a
                transformer, a pooling by mean or class token and a normalisation.
        """
        config = AutoConfig.from_pretrained(path)
        if type(config) not in MODEL_MAPPING:
            raise ValueError(f"{path} holds a {config.model_type!r}, for which transformers has no encoder.")
        if MODEL_MAPPING[type(config)].main_input_name == "pixel_values":
            return cls(*load_encoder(path), **settings)
        settings = _sentence_transformer_settings(path) | settings
        return cls(load_backbone(path), AutoTokenizer.from_pretrained(path), **settings)

    def explain(self, a, b) -> SiameseAttribution:
        """The similarity of two inputs as a sum over pairs of their tokens.

        Args:
            a, b: texts; pictures (Pillow, or uint8 arrays or tensors (channels, height, width)); `input_ids`, int64
                (tokens,), without padding; or normalised `pixel_values`, float (channels, height, width).

        Returns:
            `SiameseAttribution`, on the CPU.

        Raises:
            ValueError: for inputs of another kind or shape.
        """
        with _frozen(self.encoder), sdpa_kernel(SDPBackend.MATH):  # the fused kernels know no forward mode
            first, second = self._side(a), self._side(b)
        similarities = torch.stack([first.embedding, first.reference]) @ torch.stack(
            [second.embedding, second.reference], dim=1
        )
        normalizer = self._normalizer(first, second)
        (score, a_reference), (reference_b, references) = (similarities / normalizer).tolist()
        attributions = (first.contributions.T @ second.contributions / normalizer).cpu()
        return SiameseAttribution(
            attributions=attributions,
            tokens_a=first.tokens,
            tokens_b=second.tokens,
            score=score,
            reference_terms={
                "a and b's reference": a_reference,
                "a's reference and b": reference_b,
                "both references": references,
            },
            completeness_error=abs(attributions.sum().item() - (score - a_reference - reference_b + references)),
            special_a=first.special,
            special_b=second.special,
            pictures=(first.picture, second.picture) if first.picture is not None else None,
        )

    def feature_attributions(self, a, b) -> torch.Tensor:
        """The same for each feature of each token, always by the backward form: a large tensor.

        Returns:
            (tokens of a, hidden, tokens of b, hidden) on the CPU; its sum over both `hidden` is
            `explain(a, b).attributions`.
        """
        with _frozen(self.encoder), sdpa_kernel(SDPBackend.MATH):
            first, second = (self._side(x, per_feature=True) for x in (a, b))
        product = torch.einsum("dih,djk->ihjk", first.contributions, second.contributions)
        return (product / self._normalizer(first, second)).cpu()

    def _normalizer(self, first: "_Side", second: "_Side") -> torch.Tensor:
        if self.similarity == "dot":
            return first.embedding.new_ones(())
        # The reference's own embedding is zero in the exact mode.
        return (first.embedding.norm() * second.embedding.norm()).clamp(min=torch.finfo(torch.float32).tiny)

    def _side(self, x, per_feature: bool = False) -> "_Side":
        """One of the two inputs: its embedding, its reference's, and what its tokens contribute to each dimension."""
        inputs = self.inputs.prepare(x, self.encoder.device)
        end, last = self._run(inputs)  # each (1, tokens, hidden)
        tokens, special = self.inputs.tokens(inputs, end.shape[1])
        start, last_of_reference = self._run(self.inputs.reference_of(inputs))

        def pool(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden - last_of_reference if self.shift else hidden
            embedding = self.inputs.pool(hidden, inputs)
            embedding = self.head(embedding) if self.head else embedding
            return embedding.to(torch.promote_types(embedding.dtype, torch.float32))

        def embed(states: torch.Tensor) -> torch.Tensor:
            return pool(self._run(inputs, states)[1])  # (rows, dimensions)

        alphas = torch.arange(1, self.num_steps + 1, device=end.device, dtype=torch.float64)
        alphas = (alphas - 0.5 if self.rule == "midpoint" else alphas) / self.num_steps
        alphas = alphas.to(end.dtype)[:, None, None]
        if per_feature or self.form == "backward":
            contributions = self._backward(embed, start, end, alphas)
            contributions = contributions if per_feature else contributions.sum(dim=2)
        else:
            contributions = self._forward(embed, start, end, alphas)
        return _Side(
            tokens=tokens,
            special=special,
            embedding=pool(last)[0],
            reference=pool(last_of_reference)[0],
            contributions=contributions,
            picture=self.inputs.picture(inputs),
        )

    def _forward(self, embed, start: torch.Tensor, end: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
        """Integrated directional derivatives along each token's own way from the reference: (dimensions, tokens)."""
        way = (end - start)[0]  # (tokens, hidden)
        rows = torch.cartesian_prod(torch.arange(len(alphas)), torch.arange(len(way))).to(end.device)
        total = 0
        for steps, tokens in (chunk.unbind(dim=1) for chunk in rows.split(self.batch_size)):
            tangents = way.new_zeros(len(tokens), *way.shape)
            tangents[torch.arange(len(tokens)), tokens] = way[tokens]
            points = start + alphas[steps] * (end - start)
            _, derivatives = torch.func.jvp(embed, (points,), (tangents,))  # (rows, dimensions)
            total = total + way.new_zeros(len(way), derivatives.shape[1], dtype=derivatives.dtype).index_add(
                0, tokens, derivatives
            )
        return total.T / len(alphas)

    def _backward(self, embed, start: torch.Tensor, end: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
        """The integrated Jacobian times the way from the reference: (dimensions, tokens, hidden)."""
        total = 0
        for chunk in alphas.split(self.batch_size):
            points = (start + chunk * (end - start)).requires_grad_()
            with torch.enable_grad():
                dimensions = embed(points).sum(dim=0).unbind()
                gradients = [
                    torch.autograd.grad(value, points, retain_graph=True)[0].sum(dim=0) for value in dimensions
                ]
            total = total + torch.stack(gradients)
        return total * (end - start) / len(alphas)

    def _run(self, inputs: dict, states: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the encoder: (what enters the explained layer, the last layer's output), each (rows, tokens, hidden).

        Args:
            inputs: of the encoder, of batch 1.
            states: (rows, tokens, hidden), goes into the explained layer instead. Masks, position biases and the like
                then have batch 1 in it and in all later layers, and broadcast.
        """
        entering = []

        def hook(module, arguments, named):
            entering.append(arguments[0] if arguments else named["hidden_states"])
            if states is None:
                return None
            if arguments:
                return (states, *arguments[1:]), named
            return arguments, named | {"hidden_states": states}

        handle = self.layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            last = self.encoder(**inputs, return_dict=True).last_hidden_state
        finally:
            handle.remove()
        return entering[0], last


def explain_similarity(model: nn.Module, a, b, processor=None, **settings) -> SiameseAttribution:
    """Explains one pair; the arguments are those of `SiameseAttributor` and of its `explain`."""
    return SiameseAttributor(model, processor, **settings).explain(a, b)


@dataclass(frozen=True)
class _Side:
    """One of two inputs: `embedding` and `reference` are (dimensions,), `contributions` (dimensions, tokens)."""

    tokens: list[str]
    special: torch.Tensor
    embedding: torch.Tensor
    reference: torch.Tensor
    contributions: torch.Tensor
    picture: torch.Tensor | None


class _Texts:
    """What the attribution has to know of texts."""

    def __init__(self, encoder: PreTrainedModel, tokenizer, pooling: str | nn.Module | None, reference):
        if not isinstance(pooling, nn.Module):
            _one_of("pooling", pooling or "mean", TOKEN_POOLINGS)
        self.tokenizer, self.pooling = tokenizer, pooling or "mean"
        self.reference = self._reference_ids() if reference in (None, "pad") else reference
        if not callable(self.reference) and len(self.reference) != 3:
            raise ValueError(f'reference is {reference!r}; for texts it is "pad", three token ids, or a function.')

    def prepare(self, text: str | list[int] | torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError(f"{text!r} is a text: give the model's tokenizer as `processor`, or token ids.")
            inputs = dict(self.tokenizer(text, return_tensors="pt", truncation=True))
        else:
            ids = torch.as_tensor(text)
            if ids.ndim != 1 or ids.is_floating_point():
                raise ValueError(f"Token ids are {ids.dtype} of shape {tuple(ids.shape)}; expected int64 (tokens,).")
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def reference_of(self, inputs: dict) -> dict:
        if callable(self.reference):
            return self.reference(inputs)
        return inputs | {"input_ids": reference_tokens(inputs["attention_mask"], self.reference)}

    def pool(self, hidden: torch.Tensor, inputs: dict) -> torch.Tensor:
        mask = inputs["attention_mask"]
        if isinstance(self.pooling, str):
            return pool_tokens(hidden, mask, self.pooling)
        features = {"token_embeddings": hidden, "attention_mask": mask.expand(len(hidden), -1)}
        return self.pooling(features)["sentence_embedding"]

    def tokens(self, inputs: dict, count: int) -> tuple[list[str], torch.Tensor]:
        ids = inputs["input_ids"][0].tolist()
        if self.tokenizer is None:
            return [str(token) for token in ids], torch.zeros(count, dtype=torch.bool)
        names = [token.lstrip(SPACES) or token for token in self.tokenizer.convert_ids_to_tokens(ids)]
        return names, torch.tensor([token in self.tokenizer.all_special_ids for token in ids])

    def picture(self, inputs: dict) -> None:
        return None

    def _reference_ids(self) -> tuple[int, int, int]:
        tokenizer = self.tokenizer
        names = (("cls_token_id", "bos_token_id"), ("pad_token_id",), ("sep_token_id", "eos_token_id"))
        ids = tuple(
            next((getattr(tokenizer, name) for name in either if getattr(tokenizer, name, None) is not None), None)
            for either in names
        )
        if None in ids:
            raise ValueError(
                f"The first token, the padding and the last of a reference are {ids} by the tokenizer: give "
                "`reference` as three ids, or a tokenizer that has them."
            )
        return ids


class _Pictures:
    """What the attribution has to know of pictures."""

    def __init__(self, encoder: PreTrainedModel, processor, pooling: str | None, reference):
        self.pooling = _one_of("pooling", pooling or "auto", PICTURE_POOLINGS)
        self.encoder, self.processor = encoder, processor
        known = processor is None or isinstance(processor, ImageSettings)
        self.settings = processor if known else ImageSettings.of_processor(processor)
        self.reference = reference or "zeros"
        if not callable(self.reference):
            _one_of("reference", self.reference, ("zeros", "blur"))

    def prepare(self, picture, device: torch.device) -> dict[str, torch.Tensor]:
        if not (isinstance(picture, torch.Tensor) and picture.is_floating_point()):
            if self.settings is None:
                raise ValueError("Give an image processor as `processor`, or normalised float pictures.")
            picture = self._processed(picture)
        if picture.ndim != 3 or picture.shape[0] != self.encoder.config.num_channels:
            raise ValueError(
                f"A picture is {tuple(picture.shape)}; expected ({self.encoder.config.num_channels} channels, height, "
                "width)."
            )
        pixel_values = picture[None].to(device, self.encoder.dtype)
        return {"pixel_values": pixel_values} | interpolation_argument(self.encoder, tuple(picture.shape[-2:]))

    def reference_of(self, inputs: dict) -> dict:
        if callable(self.reference):
            return self.reference(inputs)
        pixels = inputs["pixel_values"]
        return inputs | {"pixel_values": torch.zeros_like(pixels) if self.reference == "zeros" else _blurred(pixels)}

    def pool(self, hidden: torch.Tensor, inputs: dict) -> torch.Tensor:
        outputs = _Outputs(last_hidden_state=hidden)
        return pool(outputs, self.encoder.config, tuple(inputs["pixel_values"].shape[-2:]), self.pooling)

    def tokens(self, inputs: dict, count: int) -> tuple[list[str], torch.Tensor]:
        rows, columns = patch_grid(*inputs["pixel_values"].shape[-2:], pair(self.encoder.config.patch_size))
        prefix = count - rows * columns
        if prefix < 0:
            raise ValueError(
                f"The explained layer has {count} tokens for {rows} x {columns} patches: a "
                f"{type(self.encoder).__name__} has merged patches before it. Explain layer=0, or use a ViT."
            )
        names = [f"[{number}]" for number in range(prefix)] if prefix > 1 else ["[CLS]"] * prefix
        names += [f"{row},{column}" for row in range(rows) for column in range(columns)]
        return names, torch.arange(count) < prefix

    def picture(self, inputs: dict) -> torch.Tensor:
        pixels = inputs["pixel_values"][0].float().cpu()
        if self.settings is None:
            return (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.settings.mean, self.settings.std))
        return (pixels * std + mean).clamp(0, 1)

    def _processed(self, picture) -> torch.Tensor:
        if self.processor is not self.settings:
            return self.processor(picture, return_tensors="pt")["pixel_values"][0]
        wanted = self.settings
        pixels = to_channels(picture, wanted.num_channels)
        pixels = to_uint8_tensor(pixels) if isinstance(pixels, Image.Image) else pixels
        return to_model_input(pixels[None], wanted.mean, wanted.std, wanted.size, wanted.num_channels)[0]


@dataclass(frozen=True)
class _Outputs:
    """As much of an encoder's output as `pool` reads."""

    last_hidden_state: torch.Tensor


@contextmanager
def _frozen(encoder: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradient for parameters; afterwards everything is as it was."""
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    with evaluation_mode(encoder), torch.no_grad():
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def _layer(encoder: nn.Module, index: int) -> nn.Module:
    for path in LAYERS:
        try:
            layers = attrgetter(path)(encoder)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList):
            if not -len(layers) <= index < len(layers):
                raise ValueError(f"layer is {index}; the encoder has {len(layers)}, from 0 to {len(layers) - 1}.")
            return layers[index]
    raise ValueError(
        f"A {type(encoder).__name__} has no list of layers under {', '.join(LAYERS)}: its hidden states are not "
        "tokens that can be explained. Use a Transformer such as BERT, RoBERTa, MPNet, DistilBERT or ViT."
    )


def _one_of(name: str, value, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
    return value


def _is_sentence_transformer(model: nn.Module) -> bool:
    return isinstance(model, nn.Sequential) and hasattr(model[0], "auto_model")


def _normalizes(module: nn.Module) -> bool:
    return type(module).__name__ == "Normalize"


def _sentence_transformer_settings(path: str) -> dict:
    """The pooling of a checkpoint of sentence-transformers; nothing for others."""
    modules = _read_json(path, "modules.json")
    if modules is None:
        return {}
    kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    settings = _read_json(path, f"{kinds.get('Pooling')}/config.json") or {}
    # Older checkpoints have one flag per pooling.
    flags = {name for name, value in settings.items() if name.startswith("pooling_mode_") and value}
    poolings = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    pooling = settings.get("pooling_mode") or ",".join(poolings.get(flag, flag) for flag in flags)
    if pooling not in TOKEN_POOLINGS or not kinds.keys() <= {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"{path} is a checkpoint of sentence-transformers with {', '.join(kinds)} and the pooling {pooling!r}, "
            "more than is read here: load it with SentenceTransformer(...) and give that to SiameseAttributor."
        )
    return {"pooling": pooling}


def _read_json(path: str, name: str):
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text()) if file else None


def _blurred(pixels: torch.Tensor) -> torch.Tensor:
    """Blurred until an eighth of the picture's shorter side is one spot."""
    from kornia.filters import gaussian_blur2d

    sigma = min(pixels.shape[-2:]) / 8
    size = 2 * int(2 * sigma) + 1
    return gaussian_blur2d(pixels.float(), (size, size), (sigma, sigma)).to(pixels.dtype)


def _grid_of(tokens: list[str]) -> tuple[int, int]:
    """(rows, columns) of the patches named "row,column"."""
    row, column = tokens[-1].split(",")
    return int(row) + 1, int(column) + 1


def _cell(value: float, largest: float) -> str:
    color = "214,39,40" if value > 0 else "31,119,180"
    return f'<td style="padding:3px 5px;background:rgba({color},{abs(value) / largest:.2f})">{value:.3f}</td>'
