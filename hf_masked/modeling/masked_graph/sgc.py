"""SGC: average the features of each node's neighbourhood a few times, then fit one linear classifier. Nothing is
masked and nothing is pretrained: it is the baseline that a masked graph method with a linear probe must beat.

Felix Wu et al., "Simplifying Graph Convolutional Networks", ICML 2019, arXiv 1902.07153.
Reference implementation: https://github.com/Tiiiger/SGC (`models.py`, `normalization.py`, `utils.py`, `citation.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import SAFE_WEIGHTS_NAME, can_return_tuple

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.graph import SELF_LOOPS, check_graph, normalized_edges, propagate, random_ring
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.registry import register_variant


class SGCFilterConfig(PreTrainedConfig):
    """Config of the filter S^K, S being the adjacency with self-loops, normalised on both sides.

    Args:
        num_features: of a node.
        num_hops: K.
        self_loops: see `parts.graph.normalized_edges`: "add" (the reference: what has a self-loop already gets
            another), "keep" (torch-geometric's `SGConv`), or "none" (section 3: without them the spectrum is wider).
    """

    model_type = "hf_masked_sgc_filter"

    num_features: int = 1433
    num_hops: int = 2
    self_loops: str = "add"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_hops < 0:
            raise ValueError(f"num_hops is {self.num_hops}; it must be at least 0, for example 2.")
        if self.self_loops not in SELF_LOOPS:
            raise ValueError(f"self_loops is {self.self_loops!r}; it must be one of {', '.join(SELF_LOOPS)}.")

    @property
    def hidden_size(self) -> int:
        """Width of the output."""
        return self.num_features


class MaybeWithoutParameters:
    """Put before `PreTrainedModel`, for the filter has no parameters: transformers reads dtype and device from the
    first one, writes no file for a model without any, and loads none without a file."""

    @property
    def dtype(self) -> torch.dtype:
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        if not list(self.parameters()):
            save_file({}, Path(save_directory) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


class SGCFilter(MaybeWithoutParameters, PreTrainedModel):
    """S^K x: a filter without parameters."""

    config: SGCFilterConfig
    main_input_name = "x"
    input_modalities = ("graph",)

    def __init__(self, config: SGCFilterConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, x: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """Filters the features of a graph (equation 8).

        Args:
            x: float (nodes, num_features).
            edge_index: int64 (2, edges), senders and receivers, each edge of the graph once in each direction.
            edge_weight: float (edges,); by default 1.

        Returns:
            last_hidden_state: (nodes, num_features).

        Raises:
            ValueError: for other shapes.
        """
        check_graph(x, edge_index, self.config.num_features)
        edges = normalized_edges(edge_index, len(x), edge_weight, self.config.self_loops)
        return BaseModelOutput(last_hidden_state=propagate(x, *edges, self.config.num_hops))


class SGCConfig(VariantConfig):
    """Config of SGC.

    Args:
        backbone_config: of the filter, `SGCFilterConfig`.
        use_bias: of the classifier.
    """

    model_type = "hf_masked_sgc"
    paper_title: ClassVar[str] = "Simplifying Graph Convolutional Networks"
    paper_year: ClassVar[int] = 2019
    arxiv_id: ClassVar[str] = "1902.07153"
    reference_repository: ClassVar[str] = "https://github.com/Tiiiger/SGC"
    modality: ClassVar[str] = "graph"
    masks: ClassVar[str] = "nothing: the family's baseline"
    predicts: ClassVar[str] = "the classes of nodes (supervised)"
    backbones: ClassVar[tuple[str, ...]] = (SGCFilterConfig.model_type,)
    processor: ClassVar[str] = "GraphProcessor"
    sample: ClassVar[str] = "node"

    use_bias: bool = True

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = SGCFilterConfig()
        super().__post_init__(**kwargs)

    @property
    def num_features(self) -> int:
        return self.backbone_config.num_features

    def processor_settings(self) -> dict:
        # Rows are divided by their sums as in the paper's experiments on citations.
        return {"num_features": self.num_features, "feature_scaling": "rows"}


@dataclass
class SGCOutput(PreTrainingOutput):
    """Output of `SGCForNodeClassification`; `last_hidden_state` are the filtered features.

    Args:
        logits: (nodes, num_labels).
        accuracy: scalar, with labels.
    """

    logits: torch.Tensor | None = None
    accuracy: torch.Tensor | None = None


class SGCPreTrainedModel(MaybeWithoutParameters, VariantModel):
    """The filter."""

    config: SGCConfig
    main_input_name = "x"
    input_modalities = ("graph",)
    supports_gradient_checkpointing = False
    decay_everything: ClassVar[bool] = True
    declined_checks: ClassVar[dict[str, str]] = {
        "draws": "nothing is drawn in the model",
        "attentions": "there are none",
        "gradient_checkpointing": "one linear layer has nothing to recompute",
        "export": "the filter is the paper's own, so what is exported needs hf_masked",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_as_torch(module)


class SGCModel(SGCPreTrainedModel):
    """The filtered features, S^K x. It has no parameters."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"classifier\..*"]

    def __init__(self, config: SGCConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Filters the features of a graph, see `SGCFilter.forward`."""
        return self.backbone(x, edge_index, **kwargs)


class SGCForNodeClassification(SGCPreTrainedModel):
    """Logistic regression on the filtered features."""

    main_input_name = "propagated_x"
    logged_outputs: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, config: SGCConfig):
        super().__init__(config)
        self.classifier = nn.Linear(config.num_features, config.num_labels, bias=config.use_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        propagated_x: torch.Tensor | None = None,
        x: torch.Tensor | None = None,
        edge_index: torch.Tensor | None = None,
        edge_weight: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> SGCOutput:
        """Classifies nodes, of a graph or of features that have been filtered before.

        Args:
            propagated_x: float (nodes, num_features), S^K x of any nodes: the filter learns nothing, so training
                applies it once.
            x, edge_index, edge_weight: a graph, see `SGCFilter.forward`; in place of `propagated_x`.
            labels: int64 (nodes,), -100 for nodes that the loss leaves out.
            return_loss: whether to compute the loss, where there are labels.

        Raises:
            ValueError: for both or neither of the two, or other shapes.
        """
        if (propagated_x is None) == (x is None) or (x is not None and edge_index is None):
            raise ValueError("Give either `propagated_x` or a graph, `x` and `edge_index`.")
        if propagated_x is None:
            propagated_x = self.backbone(x, edge_index, edge_weight).last_hidden_state
        elif propagated_x.shape[-1] != self.config.num_features:
            raise ValueError(
                f"`propagated_x` has shape {tuple(propagated_x.shape)}; expected (nodes, {self.config.num_features})."
            )
        logits = self.classifier(propagated_x.to(self.classifier.weight.dtype))  # (nodes, num_labels)
        loss, accuracy = None, None
        if labels is not None and return_loss:
            loss = F.cross_entropy(logits.float(), labels)
            labelled = labels >= 0
            right = (logits.detach().argmax(dim=1) == labels) & labelled
            accuracy = right.sum() / labelled.sum().clamp(min=1)
        return SGCOutput(
            loss=loss,
            losses=None if loss is None else {"classification": loss.detach()},
            last_hidden_state=propagated_x,
            logits=logits,
            accuracy=accuracy,
        )


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: SGCConfig) -> dict[str, torch.Tensor]:
    """The reference's layout (`SGC` of `models.py`) to that of `SGCForNodeClassification`."""
    return rename_weights(state_dict, ((r"^W\.", "classifier."),))


def official_config(state_dict: dict[str, torch.Tensor]) -> SGCConfig:
    """The config of the reference's weights, whose number of hops they do not tell: 2, as published."""
    labels, features = state_dict["W.weight"].shape
    return SGCConfig(
        backbone_config=SGCFilterConfig(num_features=features), num_labels=labels, use_bias="W.bias" in state_dict
    )


def tiny_config() -> SGCConfig:
    return SGCConfig(backbone_config=SGCFilterConfig(num_features=12))


def example_inputs(config: SGCConfig, batch: int) -> dict[str, torch.Tensor]:
    """A ring of nodes with random features and classes, 8 per sample."""
    nodes = 8 * batch
    return {
        "x": torch.randn(nodes, config.num_features),
        "edge_index": random_ring(nodes),
        "labels": torch.randint(config.num_labels, (nodes,)),
    }


AutoConfig.register(SGCFilterConfig.model_type, SGCFilterConfig)
AutoModel.register(SGCFilterConfig, SGCFilter)

register_variant(
    config=SGCConfig,
    pretraining=SGCForNodeClassification,
    model=SGCModel,
    tiny_config=tiny_config,
    example_inputs=example_inputs,
    convert=convert_official_weights,
    official_config=official_config,
)
