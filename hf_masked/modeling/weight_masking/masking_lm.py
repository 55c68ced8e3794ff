"""Masking of pretrained language models: one bit per frozen weight, learnt through a threshold.

Each weight has a real score; the forward pass keeps weights whose score is above a threshold, and gradients go
straight through to the scores. A task costs one bit per masked weight over a base that all tasks share.

Mengjie Zhao, Tao Lin, Fei Mi, Martin Jaggi and Hinrich Schuetze, "Masking as an Efficient Alternative to Finetuning
for Pretrained Language Models", EMNLP 2020, arXiv 2004.12406. Reference implementation:
https://github.com/ptlmasking/maskbert (`code/masking/maskers.py`, `code/masking/sparsity_control.py`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_masked.modeling.registry import register_tuner
from hf_masked.modeling.weight_masking.peft_bridge import (
    TunerConfig,
    WeightMaskLayer,
    WeightMaskTuner,
    check_choice,
    check_range,
    mask_layers_of,
    register_with_peft,
)

BINARIZERS = ("threshold", "sign", "bernoulli")
INITS = ("uniform_scores", "magnitude", "uniform", "double_uniform")
GRANULARITIES = ("weight", "head", "matrix")

_BERT_LAYERS = [
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "pooler.dense",
]
# What the paper masks, by the names of each model (section 4.2; the classifier is the user's choice).
TARGETS = {
    "bert": _BERT_LAYERS,
    "roberta": _BERT_LAYERS,
    "xlm-roberta": _BERT_LAYERS,
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "ffn.lin1", "ffn.lin2", "pre_classifier"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


@dataclass
class MaskingLMConfig(TunerConfig):
    """Config of masking.

    Args:
        target_modules: names or a pattern of the linear layers to mask; by default those of the paper, where the model
            is of a known type. The paper leaves the lowest two blocks of BERT whole (section 5.1): a pattern such as
            `r".*layer\\.([2-9]|1[01])\\..*(query|key|value|dense)|.*pooler\\.dense|classifier"` says so.
        exclude_modules: names or a pattern of layers that stay whole.
        layers_to_transform: numbers of the blocks to mask, with `target_modules` as names; it leaves out what stands
            in no block, so also the pooler.
        layers_pattern: what the blocks' list is called, where it is not found by itself.
        modules_to_save: modules that are trained as usual and saved beside the masks, as the classifier.
        binarizer: "threshold", straight through (equation 3 and what follows); "sign", of scores in [-1, 1]; or
            "bernoulli", drawn in training with probability sigmoid(score).
        threshold: of the scores.
        init: "uniform_scores", from an interval with `init_sparsity` of it below the threshold; or scores of one value
            for kept and one for dropped weights, which are the smallest ("magnitude") or any ("uniform"); or two
            intervals, 0.5 to 0.9 and 1.1 to 1.5 times the threshold ("double_uniform"). "sign" and "bernoulli" have
            their own and take "uniform_scores" only.
        init_sparsity: share that is dropped at the start; 3 to 10 % suits large pretrained encoders (section 5.1).
        init_scale: the interval begins at minus this.
        granularity: one bit for each "weight", for each "head" (rows of query, key or value) or for the "matrix".
        target_sparsity: what the share of dropped weights is drawn to, from 10 to 80 % of the training on in a cubic
            ramp; `MaskCallback` tells the progress.
        sparsity_weight: of the squared distance to it in the loss.
    """

    tuner_name: ClassVar[str] = "masking_lm"
    paper_title: ClassVar[str] = "Masking as an Efficient Alternative to Finetuning for Pretrained Language Models"
    paper_year: ClassVar[int] = 2020
    arxiv_id: ClassVar[str] = "2004.12406"
    reference_repository: ClassVar[str] = "https://github.com/ptlmasking/maskbert"
    masks: ClassVar[str] = "weights of linear layers, by a threshold"
    predicts: ClassVar[str] = "the task, from a frozen model"
    backbones: ClassVar[tuple[str, ...]] = ("any with linear layers",)

    binarizer: str = "threshold"
    threshold: float = 0.01
    init: str = "uniform_scores"
    init_sparsity: float = 0.05
    init_scale: float = 0.02
    granularity: str = "weight"
    target_sparsity: float | None = None
    sparsity_weight: float = 0.0

    def check(self) -> None:
        check_choice(self, "binarizer", BINARIZERS)
        check_choice(self, "init", INITS)
        check_choice(self, "granularity", GRANULARITIES)
        check_range(self, "init_sparsity", 0, 1, "()")
        check_range(self, "init_scale", 0, math.inf, "()")
        check_range(self, "threshold", 0, math.inf, "()")
        check_range(self, "sparsity_weight", 0, math.inf, "[)")
        if self.init != "uniform_scores" and (self.binarizer != "threshold" or self.granularity != "weight"):
            raise ValueError(
                f"init={self.init!r} places scores of single weights around a threshold; it does not go with "
                f"binarizer={self.binarizer!r} and granularity={self.granularity!r}. Use init='uniform_scores'."
            )
        if self.target_sparsity is not None:
            check_range(self, "target_sparsity", 0, 1, "[)")
        if (self.target_sparsity is None) != (self.sparsity_weight == 0):
            raise ValueError(
                f"target_sparsity={self.target_sparsity} and sparsity_weight={self.sparsity_weight}: give both, or "
                "leave both out."
            )

    @property
    def interval(self) -> tuple[float, float]:
        """Where uniform scores lie: a share of `init_sparsity` of [low, high] is below the threshold."""
        if self.binarizer == "sign":
            return -self.init_scale, self.init_scale
        if self.binarizer == "bernoulli":
            logit = math.log((1 - self.init_sparsity) / self.init_sparsity)
            return logit, logit
        return -self.init_scale, (self.init_scale + self.threshold) / self.init_sparsity - self.init_scale


class _Threshold(torch.autograd.Function):
    """1 where a score is above the threshold, else 0; the gradient goes straight through."""

    @staticmethod
    def forward(scores, threshold):
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Sign(torch.autograd.Function):
    """1 where a score is above 0, else 0; the gradient goes straight through inside (-1, 1)."""

    @staticmethod
    def forward(scores):
        return (scores > 0).to(scores.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (scores,) = ctx.saved_tensors
        return gradient * (scores.abs() < 1)


class _Bernoulli(torch.autograd.Function):
    """A draw with probability sigmoid(score); the gradient goes straight through."""

    @staticmethod
    def forward(scores):
        return torch.bernoulli(scores.sigmoid())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def binarize(scores: torch.Tensor, config: MaskingLMConfig) -> torch.Tensor:
    """Scores to a mask of zeros and ones, of the same shape and dtype, with the binarizer's gradient."""
    if config.binarizer == "threshold":
        return _Threshold.apply(scores, config.threshold)
    return _Sign.apply(scores) if config.binarizer == "sign" else _Bernoulli.apply(scores)


class MaskingLMLayer(WeightMaskLayer):
    """A linear layer under learnt thresholds."""

    prefix = "masking_lm_"
    num_heads: int | None = None

    def add_adapter(self, adapter_name, config, tuner):
        if config.granularity == "head":
            heads = getattr(tuner.model.config, "num_attention_heads", None)
            rows = self.matrix.shape[0]
            if not heads or rows % heads:
                raise ValueError(
                    f"granularity='head' needs layers whose {rows} outputs are those of all heads "
                    f"(num_attention_heads={heads}); name queries, keys and values in target_modules."
                )
            self.num_heads = heads
        super().add_adapter(adapter_name, config, tuner)

    def unit_shape(self, config):
        if config.granularity == "head":
            return self.num_heads, 1, 1
        return tuple(self.matrix.shape) if config.granularity == "weight" else (1, 1)

    def spread(self, units):
        # (heads, 1, 1) -> (out, 1); other shapes broadcast by themselves.
        if units.dim() != 3:
            return units
        return units.expand(-1, self.matrix.shape[0] // len(units), 1).reshape(-1, 1)

    def initial_scores(self, config):
        if config.init == "uniform_scores":
            low, high = config.interval
            return torch.empty(self.unit_shape(config), device=self.base_layer.weight.device).uniform_(low, high)
        weight = self.matrix
        ranks = weight.abs().float() if config.init == "magnitude" else torch.rand(weight.shape, device=weight.device)
        dropped = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        dropped[ranks.flatten().argsort()[: math.floor(config.init_sparsity * weight.numel())]] = True
        dropped = dropped.view(weight.shape)
        if config.init == "double_uniform":
            low, high = (torch.empty(weight.shape, device=weight.device).uniform_(*ends) for ends in _TWO_INTERVALS)
            return config.threshold * torch.where(dropped, low, high)
        return self.scores_of_units(~dropped, config)

    def scores_of_units(self, units, config):
        kept = {"threshold": 2 * config.threshold, "sign": config.init_scale, "bernoulli": 1.0}[config.binarizer]
        dropped = 0.0 if config.binarizer == "threshold" else -kept
        return torch.where(units, kept, dropped)

    def training_mask(self, adapter_name):
        config, scores = self.settings[adapter_name], self.scores[adapter_name]
        if config.binarizer == "sign":
            with torch.no_grad():
                scores.clamp_(-1, 1)
        return binarize(scores, config)

    def hard_units(self, scores, config):
        return scores > (config.threshold if config.binarizer == "threshold" else 0)


# In units of the threshold (`controlled_init` of the reference): dropped, kept.
_TWO_INTERVALS = ((0.5, 0.9), (1.1, 1.5))

# Shares of the training at which the ramp to the target begins and ends (`MaskerScheduler` of the reference).
_RAMP = (0.1, 0.8)


def sparsity_target(config: MaskingLMConfig, progress: float) -> float:
    """The share of dropped weights that is aimed at: a cubic ramp from `init_sparsity` to `target_sparsity`."""
    done = min(max((progress - _RAMP[0]) / (_RAMP[1] - _RAMP[0]), 0.0), 1.0)
    return config.target_sparsity + (config.init_sparsity - config.target_sparsity) * (1 - done) ** 3


class MaskingLMTuner(WeightMaskTuner):
    """PEFT's tuner of masking."""

    prefix = "masking_lm_"
    tuner_layer_cls = MaskingLMLayer
    target_module_mapping = TARGETS

    @property
    def active_config(self) -> MaskingLMConfig:
        return self.peft_config[self.active_adapters[0]]

    def needs_progress(self):
        return self.active_config.sparsity_weight > 0

    def penalty(self) -> torch.Tensor | None:
        """Squared distance of the share of dropped weights to its target."""
        if not self.active_config.sparsity_weight:
            return None
        name = self.active_adapters[0]
        layers = [layer for layer in mask_layers_of(self.model) if name in layer.scores]
        kept = sum(layer.training_mask(name).mean() * layer.matrix.numel() for layer in layers)
        current = 1 - kept / sum(layer.matrix.numel() for layer in layers)
        aim = sparsity_target(self.active_config, self.training_progress or 0.0)
        return self.active_config.sparsity_weight * (aim - current) ** 2


def tiny_config() -> MaskingLMConfig:
    return MaskingLMConfig(target_modules=["query", "key", "value", "dense"], init_sparsity=0.5)


register_with_peft(MaskingLMConfig, MaskingLMTuner)
register_tuner(config=MaskingLMConfig, tuner=MaskingLMTuner, layer=MaskingLMLayer, tiny_config=tiny_config)

__all__ = ["MaskingLMConfig", "MaskingLMTuner"]
