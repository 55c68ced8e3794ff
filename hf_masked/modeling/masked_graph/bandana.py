"""Bandana: no edge of the graph is hidden, each gets a random bandwidth for its messages, and after every layer a
decoder must tell how wide the edges are and what is no edge.

Ziwen Zhao et al., "Masked Graph Autoencoder with Non-discrete Bandwidths", The Web Conference 2024, arXiv 2402.03814.
Reference implementation: https://github.com/Newiz430/Bandana (`src/mask.py`, `src/model.py`, `src/base_model.py`,
`train_link.py`, `train_node.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple

from hf_masked.extras import torch_geometric
from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.graph import check_graph, normalized_edges, random_ring
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks.bandwidth import bandwidth_mask
from hf_masked.processing.masks.non_edges import draw_non_edges
from hf_masked.randomness import model_draw

ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU, "identity": nn.Identity}  # transformers has no ELU

FEATURES = ("cat", "last")

# The decoder's two logits.
EDGE, NO_EDGE = 0, 1


class BandanaEncoderConfig(PreTrainedConfig):
    """Config of Bandana's encoder, graph convolutions with batch norm; the default is that of links in Cora.

    Args:
        num_features: of a node.
        hidden_size: of every layer.
        num_hidden_layers: number of layers.
        hidden_act: after every layer, the last one too: "elu", "relu" or "identity".
        use_batch_norm: batch norm before it.
        hidden_dropout: of what goes into each layer, the features too.
    """

    model_type = "hf_masked_bandana_encoder"

    num_features: int = 1433
    hidden_size: int = 128
    num_hidden_layers: int = 2
    hidden_act: str = "elu"
    use_batch_norm: bool = True
    hidden_dropout: float = 0.8

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; it must be one of {', '.join(ACTIVATIONS)}.")
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; it must be at least 1.")


class BandanaLayer(nn.Module):
    """Dropout, graph convolution, batch norm, activation."""

    def __init__(self, config: BandanaEncoderConfig, in_features: int):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.convolution = torch_geometric("nn").GCNConv(in_features, config.hidden_size, normalize=False)
        self.normalization = nn.BatchNorm1d(config.hidden_size) if config.use_batch_norm else nn.Identity()
        self.activation = ACTIVATIONS[config.hidden_act]()

    def forward(self, hidden: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor) -> torch.Tensor:
        """(nodes, in_features) -> (nodes, hidden); the edges are normalised and hold the self-loops."""
        weight = self.convolution.lin.weight
        hidden = self.dropout(hidden.to(weight.dtype))
        hidden = self.convolution(hidden, edge_index, edge_weight.to(weight.dtype))
        return self.activation(self.normalization(hidden))


class BandanaEncoder(PreTrainedModel):
    """The encoder of graphs."""

    config: BandanaEncoderConfig
    main_input_name = "x"
    input_modalities = ("graph",)
    _no_split_modules: ClassVar[list[str]] = ["BandanaLayer"]

    def __init__(self, config: BandanaEncoderConfig):
        super().__init__(config)
        sizes = [config.num_features, *[config.hidden_size] * (config.num_hidden_layers - 1)]
        self.layers = nn.ModuleList(BandanaLayer(config, size) for size in sizes)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # see `VariantModel`

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)

    @can_return_tuple
    def forward(
        self,
        x: torch.Tensor,
        edge_index: torch.Tensor,
        bandwidths: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes the nodes of a graph; several graphs are one whose parts are not connected.

        Args:
            x: float (nodes, num_features).
            edge_index: int64 (2, edges), senders and receivers, each edge of the graph in both directions, without
                self-loops.
            bandwidths: float32 (layers, edges), 1 in sum over the edges of each receiver. Together with a self-loop of
                weight 1 they are the weights of the convolution, so that the degree of a node that has a neighbour is
                2. Without them all edges weigh 1: the ordinary graph convolution.
            output_hidden_states: also return what comes out of each layer.

        Returns:
            last_hidden_state: (nodes, hidden).

        Raises:
            ValueError: for other shapes.
        """
        check_graph(x, edge_index, self.config.num_features)
        if bandwidths is None:
            edges = [normalized_edges(edge_index, len(x))] * len(self.layers)
        else:
            self._check_bandwidths(bandwidths, edge_index)
            edges = [normalized_edges(edge_index, len(x), widths) for widths in bandwidths]
        states = [x]
        for layer, weighted in zip(self.layers, edges, strict=True):
            states.append(layer(states[-1], *weighted))
        return BaseModelOutput(
            last_hidden_state=states[-1], hidden_states=tuple(states[1:]) if output_hidden_states else None
        )

    def _check_bandwidths(self, bandwidths: torch.Tensor, edge_index: torch.Tensor) -> None:
        expected = (len(self.layers), edge_index.shape[1])
        if bandwidths.shape != expected:
            raise ValueError(
                f"`bandwidths` has shape {tuple(bandwidths.shape)}; expected {expected}, one for each layer and edge."
            )


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """The reference's: Xavier-uniform convolutions with zero biases, torch's own for norms and the decoder."""
    if isinstance(module, BandanaLayer):
        init.xavier_uniform_(module.convolution.lin.weight)
        init.zeros_(module.convolution.bias)
    else:
        init_as_torch(module)


class BandanaConfig(VariantConfig):
    """Config of Bandana.

    Args:
        backbone_config: of the encoder, `BandanaEncoderConfig`.
        temperature: of the softmax that makes the bandwidths, one number or one for each layer. Towards 0 each node
            listens to one neighbour, towards infinity to all alike.
        decoder_hidden_size, decoder_num_layers, decoder_dropout: of the edge decoder.
        negative_ratio: pairs without an edge per directed edge.
        excluded_layers: numbers, from 0, of the layers whose output the loss leaves out.
        reference_edge_order: give each edge, in the loss, the bandwidth that another one has in message passing, as
            the reference does where the edges are not sorted.
        node_features: what `BandanaForNodeClassification` reads: "cat", the output of all layers, or the "last".
        normalize_node_features: divide it by its length.
        freeze_encoder: train the classifier alone.
    """

    model_type = "hf_masked_bandana"
    paper_title: ClassVar[str] = "Masked Graph Autoencoder with Non-discrete Bandwidths"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2402.03814"
    reference_repository: ClassVar[str] = "https://github.com/Newiz430/Bandana"
    modality: ClassVar[str] = "graph"
    masks: ClassVar[str] = "random bandwidths of edges, anew in every layer"
    predicts: ClassVar[str] = "the bandwidths of edges, and which pairs of nodes are none"
    backbones: ClassVar[tuple[str, ...]] = (BandanaEncoderConfig.model_type,)
    processor: ClassVar[str] = "GraphProcessor"
    sample: ClassVar[str] = "graph"

    temperature: float | list[float] | tuple[float, ...] = 0.9
    decoder_hidden_size: int = 64
    decoder_num_layers: int = 2
    decoder_dropout: float = 0.2
    negative_ratio: float = 1.0
    excluded_layers: list[int] | tuple[int, ...] = ()
    reference_edge_order: bool = False
    node_features: str = "cat"
    normalize_node_features: bool = True
    freeze_encoder: bool = True

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = BandanaEncoderConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        layers = self.backbone_config.num_hidden_layers
        if not isinstance(self.temperature, int | float) and len(self.temperature) != layers:
            raise ValueError(
                f"temperature has {len(self.temperature)} numbers and the encoder {layers} layers: give one for each, "
                "or one for all."
            )
        if min(self.temperatures) <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0, for example 0.9.")
        if self.negative_ratio <= 0:
            raise ValueError(f"negative_ratio is {self.negative_ratio}; it must be above 0, for example 1.")
        if not set(self.excluded_layers) < set(range(layers)):
            raise ValueError(
                f"excluded_layers is {list(self.excluded_layers)}; the encoder's layers are 0 to {layers - 1}, and "
                "one at least must stay."
            )
        if self.decoder_num_layers < 1:
            raise ValueError(f"decoder_num_layers is {self.decoder_num_layers}; it must be at least 1.")
        if self.node_features not in FEATURES:
            raise ValueError(f"node_features is {self.node_features!r}; it must be one of {', '.join(FEATURES)}.")

    @property
    def num_features(self) -> int:
        return self.backbone_config.num_features

    @property
    def temperatures(self) -> list[float]:
        """One for each layer."""
        if isinstance(self.temperature, int | float):
            return [float(self.temperature)] * self.backbone_config.num_hidden_layers
        return [float(number) for number in self.temperature]

    def processor_settings(self) -> dict:
        return {
            "num_features": self.num_features,
            "temperatures": self.temperatures,
            "negative_ratio": self.negative_ratio,
        }


@dataclass
class BandanaOutput(PreTrainingOutput):
    """Output of `BandanaForPreTraining`; `hidden_states` are those of all layers, `losses` two for each layer.

    Args:
        bandwidths: float32 (layers, edges).
        neg_edge_index: int64 (2, pairs), without an edge; -1 where none was found.
    """

    bandwidths: torch.Tensor | None = None
    neg_edge_index: torch.Tensor | None = None


@dataclass
class NodeClassifierOutput(ModelOutput):
    """Output of `BandanaForNodeClassification`.

    Args:
        loss: float32 scalar, with labels.
        logits: (nodes, num_labels).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class BandanaEdgeDecoder(nn.Module):
    """The product of two nodes' states, through a few linear layers."""

    def __init__(self, config: BandanaConfig):
        super().__init__()
        hidden = [config.decoder_hidden_size] * (config.decoder_num_layers - 1)
        sizes = [config.hidden_size, *hidden]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, [*hidden, 2], strict=True))
        self.dropout = nn.Dropout(config.decoder_dropout)

    def forward(self, states: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """(nodes, hidden) and int64 (2, pairs) -> logits (pairs, 2) of "edge" and "no edge"."""
        hidden = states[pairs[0]] * states[pairs[1]]
        for layer in self.layers[:-1]:
            hidden = layer(self.dropout(hidden)).relu()
        return self.layers[-1](hidden)


class BandanaPreTrainedModel(VariantModel):
    """The encoder, and what links and nodes are judged by."""

    config: BandanaConfig
    main_input_name = "x"
    input_modalities = ("graph",)
    supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = list(BandanaEncoder._no_split_modules)
    decay_everything: ClassVar[bool] = True
    sync_batch_norm: ClassVar[bool] = True
    declined_checks: ClassVar[dict[str, str]] = {
        "ddp": "one graph is one sample, which two processes cannot share; of several graphs each process would take "
        "its own batch statistics and means over edges",
        "accumulation": "batch norm and the means over edges are those of all graphs of a step together",
        "attentions": "the encoder has graph convolutions",
        "gradient_checkpointing": "recomputing would update the statistics of batch norm twice",
        "export": "the encoder is the paper's own, so what is exported needs hf_masked and torch-geometric",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)

    def node_features(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """What nodes are classified by, (nodes, layers * hidden) or with `node_features="last"` (nodes, hidden): the
        output of the layers, without bandwidths."""
        states = self.backbone(x, edge_index, output_hidden_states=True).hidden_states
        features = torch.cat(states, dim=1) if self.config.node_features == "cat" else states[-1]
        return F.normalize(features, dim=1) if self.config.normalize_node_features else features

    def link_scores(self, x: torch.Tensor, edge_index: torch.Tensor, edge_label_index: torch.Tensor) -> torch.Tensor:
        """How likely pairs of nodes are linked: the sigmoid of the product of their last states, without the decoder
        (`train_link.py`).

        Args:
            x, edge_index: the graph that is known, see `BandanaEncoder.forward`.
            edge_label_index: int64 (2, pairs).

        Returns:
            float32 (pairs,), in (0, 1).
        """
        states = self.backbone(x, edge_index).last_hidden_state.float()
        return (states[edge_label_index[0]] * states[edge_label_index[1]]).sum(dim=1).sigmoid()


class BandanaModel(BandanaPreTrainedModel):
    """The encoder, without bandwidths: an ordinary graph convolutional network."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*", r"classifier\..*"]

    def __init__(self, config: BandanaConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Encodes the nodes of a graph, see `BandanaEncoder.forward`."""
        return self.backbone(x, edge_index, **kwargs)


class BandanaForPreTraining(BandanaPreTrainedModel):
    """Encoder, edge decoder and the loss after every layer."""

    def __init__(self, config: BandanaConfig):
        super().__init__(config)
        self.decoder = BandanaEdgeDecoder(config)
        self.post_init()

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"classifier\..*"]

    @can_return_tuple
    def forward(
        self,
        x: torch.Tensor,
        edge_index: torch.Tensor,
        bandwidths: torch.Tensor | None = None,
        neg_edge_index: torch.Tensor | None = None,
        loss_edges: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> BandanaOutput:
        """One step of masked autoencoding.

        Args:
            x: float (nodes, num_features).
            edge_index: int64 (2, edges), senders and receivers, each edge in both directions, without self-loops.
            bandwidths: float32 (layers, edges), see `BandanaEncoder.forward`; drawn here by default.
            neg_edge_index: int64 (2, pairs), pairs without an edge, -1 for none; drawn here by default.
            loss_edges: int64 (n,), places in `edge_index` of the edges that the loss takes; by default all.
            noise: float (1, numbers) in [0, 1), from which to draw: one number per layer and edge for the bandwidths,
                then 8 per pair without an edge.
            generator: to draw from.
            return_loss: whether to compute the loss.

        Raises:
            ValueError: for other shapes, or a graph without edges.
        """
        check_graph(x, edge_index, self.config.num_features)
        if not edge_index.shape[1]:
            raise ValueError("The graph has no edges (`edge_index` is empty), and edges are what is learned.")
        draw = model_draw(1, x.device, self.training, generator, noise)
        if bandwidths is None:
            bandwidths = torch.stack(
                [bandwidth_mask(draw, edge_index[1], len(x), number) for number in self.config.temperatures]
            )
        if neg_edge_index is None:
            edges = edge_index.shape[1] if loss_edges is None else len(loss_edges)
            count = max(1, int(self.config.negative_ratio * edges))
            neg_edge_index = draw_non_edges(draw, edge_index, len(x), count)
        states = self.backbone(x, edge_index, bandwidths, output_hidden_states=True).hidden_states
        losses = self._losses(states, edge_index, bandwidths, neg_edge_index, loss_edges) if return_loss else None
        return BandanaOutput(
            loss=losses and torch.stack(list(losses.values())).sum() / self._num_loss_layers,
            losses=losses and {name: part.detach() for name, part in losses.items()},
            last_hidden_state=states[-1],
            hidden_states=states,
            bandwidths=bandwidths,
            neg_edge_index=neg_edge_index,
        )

    @property
    def _num_loss_layers(self) -> int:
        return self.config.backbone_config.num_hidden_layers - len(set(self.config.excluded_layers))

    def _losses(self, states, edge_index, bandwidths, neg_edge_index, loss_edges) -> dict[str, torch.Tensor]:
        """The two terms of each layer (equation 6): float32 scalars."""
        weights = self._loss_weights(edge_index, bandwidths, len(states[0]))
        if loss_edges is not None:
            edge_index, weights = edge_index[:, loss_edges], weights[:, loss_edges]
        losses = {}
        for layer, hidden in enumerate(states):
            if layer in self.config.excluded_layers:
                continue
            is_edge = self._log_probabilities(hidden, edge_index)[:, EDGE]
            losses[f"positive_{layer}"] = -(weights[layer] * is_edge).mean()
            losses[f"negative_{layer}"] = self._negative_loss(hidden, neg_edge_index)
        return losses

    def _loss_weights(self, edge_index, bandwidths, num_nodes: int) -> torch.Tensor:
        """float32 (layers, edges): the bandwidths, which no gradient reaches."""
        weights = bandwidths.detach().float()
        if self.config.reference_edge_order:  # those of the sorted edges, for the unsorted ones
            weights = weights[:, (edge_index[1] * num_nodes + edge_index[0]).argsort()]
        return weights

    def _negative_loss(self, hidden: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        valid = pairs[0] >= 0
        is_none = self._log_probabilities(hidden, pairs.clamp(min=0))[:, NO_EDGE]
        return -(is_none * valid).sum() / valid.sum().clamp(min=1)

    def _log_probabilities(self, hidden: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return self.decoder(hidden, pairs).float().log_softmax(dim=1)


class BandanaForNodeClassification(BandanaPreTrainedModel):
    """A linear layer on the encoder's output, which is frozen by default (`train_node.py`)."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]

    def __init__(self, config: BandanaConfig):
        super().__init__(config)
        layers = config.backbone_config.num_hidden_layers if config.node_features == "cat" else 1
        self.classifier = nn.Linear(layers * config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.xavier_uniform_(self.classifier.weight)
            init.zeros_(self.classifier.bias)

    def frozen_parameters(self):
        return self.backbone.parameters() if self.config.freeze_encoder else ()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_encoder:  # without dropout, and with the statistics of pretraining
            self.backbone.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        x: torch.Tensor,
        edge_index: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> NodeClassifierOutput:
        """Classifies the nodes of a graph.

        Args:
            x, edge_index: see `BandanaEncoder.forward`.
            labels: int64 (nodes,), -100 for nodes that the loss leaves out.

        Returns:
            logits: (nodes, num_labels).
        """
        logits = self.classifier(self.node_features(x, edge_index).to(self.classifier.weight.dtype))
        loss = F.cross_entropy(logits.float(), labels) if return_loss and labels is not None else None
        return NodeClassifierOutput(loss=loss, logits=logits)


# Of the reference's names to ours.
_RENAMING = (
    (r"^encoder\.convs\.(\d+)\.", r"backbone.layers.\1.convolution."),
    (r"^encoder\.bns\.(\d+)\.", r"backbone.layers.\1.normalization."),
    (r"^decoder\.mlps\.(\d+)\.", r"decoder.layers.\1."),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: BandanaConfig) -> dict[str, torch.Tensor]:
    """The reference's layout (`Bandana` of `src/model.py`) to that of `BandanaForPreTraining`."""
    return rename_weights(state_dict, _RENAMING)


def official_config(state_dict: dict[str, torch.Tensor]) -> BandanaConfig:
    """The config of the reference's checkpoint, as far as its shapes tell: not dropout and temperature."""
    weights = [name for name in state_dict if name.startswith("encoder.convs.") and name.endswith(".lin.weight")]
    layers = [name for name in state_dict if name.startswith("decoder.mlps.") and name.endswith(".weight")]
    hidden, features = state_dict["encoder.convs.0.lin.weight"].shape
    backbone_config = BandanaEncoderConfig(
        num_features=features,
        hidden_size=hidden,
        num_hidden_layers=len(weights),
        use_batch_norm="encoder.bns.0.weight" in state_dict,
    )
    decoder = {"decoder_hidden_size": len(state_dict["decoder.mlps.0.weight"])} if len(layers) > 1 else {}
    return BandanaConfig(backbone_config=backbone_config, decoder_num_layers=len(layers), **decoder)


def tiny_config() -> BandanaConfig:
    backbone_config = BandanaEncoderConfig(num_features=12, hidden_size=16, hidden_dropout=0.0)
    return BandanaConfig(backbone_config=backbone_config, decoder_hidden_size=8, decoder_dropout=0.0)


def example_inputs(config: BandanaConfig, batch: int) -> dict[str, torch.Tensor]:
    """A ring of nodes with random features, 8 per sample."""
    nodes = 8 * batch
    return {"x": torch.randn(nodes, config.num_features), "edge_index": random_ring(nodes)}


AutoConfig.register(BandanaEncoderConfig.model_type, BandanaEncoderConfig)
AutoModel.register(BandanaEncoderConfig, BandanaEncoder)

register_variant(
    config=BandanaConfig,
    pretraining=BandanaForPreTraining,
    model=BandanaModel,
    tiny_config=tiny_config,
    example_inputs=example_inputs,
    convert=convert_official_weights,
    official_config=official_config,
)
