"""MoCo v1 and v2: a query finds its key, made by a momentum twin from another view, among the keys of a long queue.

Kaiming He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv 1911.05722;
v2: Xinlei Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297.
Reference implementation: https://github.com/facebookresearch/moco (`moco/builder.py`, `main_moco.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import can_return_tuple

from hf_masked.modeling.hallucinated_views import HallucinatedViewsConfig, HallucinatedViewsModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.backbones import tiny_vit
from hf_masked.modeling.parts.gather import encode_shuffled, gather_rows, num_processes, rows_of_this_process
from hf_masked.modeling.parts.heads import MLPHead
from hf_masked.modeling.parts.losses import info_nce
from hf_masked.modeling.parts.momentum import MomentumTwin
from hf_masked.modeling.parts.pooling import check_views
from hf_masked.modeling.parts.queues import FeatureQueue
from hf_masked.modeling.parts.state_dicts import TIMM_RESNET_RENAMING, official_resnet_config, rename_weights
from hf_masked.modeling.projected_views import example_views, project
from hf_masked.modeling.registry import register_variant


class MoCoConfig(HallucinatedViewsConfig):
    """Config of MoCo: v2's by default; v1 is `projection_layers=1, temperature=0.07`.

    Args:
        backbone_config: a config of a convolutional net or Transformer whose output can be pooled to one vector;
            ResNet-50 by default.
        projection_dim: width of queries and keys.
        projection_hidden_dim: of v2's projector; by default the encoder's width.
        projection_layers: linear layers of the projector, without batch norm: 1 for v1, 2 for v2.
        zero_init_residual: start each residual block of a ResNet as the identity.
        queue_size: keys in the queue, a multiple of the batch over all processes.
        momentum: m of the key encoder.
        temperature: of the softmax over keys: 0.07 for v1, 0.2 for v2.
        hallucinator_config: a `HallucinatorConfig` or its dict, {} for its defaults; None for MoCo alone.
    """

    model_type = "hf_masked_moco"
    paper_title: ClassVar[str] = "Momentum Contrast for Unsupervised Visual Representation Learning"
    paper_year: ClassVar[int] = 2019
    arxiv_id: ClassVar[str] = "1911.05722"
    reference_repository: ClassVar[str] = "https://github.com/facebookresearch/moco"
    weights_licence: ClassVar[str] = "CC BY-NC 4.0"
    masks: ClassVar[str] = "nothing: two augmented crops of a picture"
    predicts: ClassVar[str] = "which of many keys is the other view's"

    queue_size: int = 65536
    momentum: float = 0.999
    temperature: float = 0.2

    def check(self) -> None:
        super().check()
        self._check_positive("queue_size")
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"momentum is {self.momentum}; it must lie in [0, 1], for example 0.999.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive, for example 0.2.")


@dataclass
class MoCoOutput(PreTrainingOutput):
    """Output of `MoCoForPreTraining`; the fields of the encoder are those of the first view.

    Args:
        logits: float32 (batch, 1 + queue_size), the cosines of each query with its key and with the queue, divided by
            the temperature.
        query: (batch, projection_dim), of unit length, from the first view.
        key: (batch, projection_dim), likewise, from the second, without gradient.
        accuracy: scalar, the share of the queries that are nearest to their own key.
    """

    logits: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    accuracy: torch.Tensor | None = None


class MoCoPreTrainedModel(HallucinatedViewsModel):
    """Encoder and projector, with their initialisation and freezing."""

    config: MoCoConfig
    decay_everything: ClassVar[bool] = True  # `main_moco.py`: SGD's weight decay on norms and biases too
    sync_batch_norm: ClassVar[bool] = False  # shuffled instead, see `MoCoForPreTraining`
    logged_outputs: ClassVar[tuple[str, ...]] = ("accuracy",)
    declined_checks: ClassVar[dict[str, str]] = {
        "accumulation": "the second half of the batch has the first half's keys among its negatives",
        "draws": "the processor draws the views, the model nothing",
    }

    def __init__(self, config: MoCoConfig):
        super().__init__(config)
        self.projector = MLPHead(config.projector_sizes, batch_norm=False)


class MoCoModel(MoCoPreTrainedModel):
    """Encoder and projector on single pictures."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(twin|queue|hallucinator)\..*"]

    def __init__(self, config: MoCoConfig):
        super().__init__(config)
        self.post_init()


class MoCoForPreTraining(MoCoPreTrainedModel):
    """Query encoder, key encoder, queue and the loss.

    The key encoder moves after each step of the optimizer; the reference moves it at the start of the next forward
    pass, so that keys are the same. What the reference has saved lacks the last move.

    Where several processes train encoders with batch norm, the key encoder sees the pictures shuffled over the
    processes (section 3.3). In one process batch norm is plain, over the batch of queries and over that of keys.
    """

    def __init__(self, config: MoCoConfig):
        super().__init__(config)
        self.twin = MomentumTwin(self, ("backbone", "projector"), momentum=config.momentum)
        self.queue = FeatureQueue(config.queue_size, config.projection_dim)
        self.add_hallucinator()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FeatureQueue):
            module.init_weights()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, return_loss: bool = True, **kwargs) -> MoCoOutput:
        """One step on pairs of views; in training the keys of all processes then enter the queue.

        Args:
            pixel_values: float (batch, 2, channels, height, width), normalised: the queries' views, the keys' views.
            return_loss: whether to compute the loss.
            kwargs: of the encoder.

        Returns:
            `MoCoOutput`.

        Raises:
            ValueError: for other channels, views or another rank; in training, for a batch over all processes of which
                the queue holds no whole number.
        """
        check_views(pixel_values, num_views=2)
        first, second = pixel_values.unbind(dim=1)
        outputs, projection = project(self, first, **kwargs)
        query = F.normalize(projection.float(), dim=1)  # (batch, projection_dim)
        if self.training:
            all_keys = self._keys_of_all_processes(second)
            key = rows_of_this_process(all_keys)
        else:
            key = self._keys(second)
        negatives, temperature = self.queue(), self.config.temperature
        contrast, logits = info_nce(query, key, negatives, temperature)
        if self.training:
            self.queue.enqueue(all_keys)

        def hallucinated_loss() -> torch.Tensor:
            hallucinated = F.normalize(self.hallucinator(query, key).float(), dim=1)
            return info_nce(hallucinated, key, negatives, temperature)[0]

        loss, parts = self.with_hallucination(contrast, hallucinated_loss) if return_loss else (None, None)
        return MoCoOutput(
            loss=loss,
            losses={"contrast": contrast.detach()} | parts if return_loss else None,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            logits=logits,
            query=query,
            key=key,
            accuracy=(logits.detach().argmax(dim=1) == 0).float().mean(),
        )

    def _keys_of_all_processes(self, views: torch.Tensor) -> torch.Tensor:
        """Unit vectors (batch * processes, projection_dim)."""
        if num_processes() > 1 and any(isinstance(module, _BatchNorm) for module in self.twin.modules()):
            return encode_shuffled(self._keys, views)
        return gather_rows(self._keys(views))

    @torch.no_grad()
    def _keys(self, views: torch.Tensor) -> torch.Tensor:
        return F.normalize(project(self.twin, views)[1].float(), dim=1)


# Official name -> ours: the encoders' `fc` is the projector, one layer of it in v1.
_RENAMING = (
    (r"^module\.", ""),
    (r"^queue_ptr$", "queue.pointer"),
    (r"^queue$", "queue.vectors"),
    (r"^encoder_([qk])\.fc\.(weight|bias)$", r"encoder_\1.projector.0.\2"),
    (r"^encoder_([qk])\.fc\.", r"encoder_\1.projector."),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: MoCoConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of `main_moco.py`, with or without DDP's "module.".
        config: unused here; other variants' conversions need it.
    """
    renamed = rename_weights(state_dict, _RENAMING)
    weights = {name: tensor for name, tensor in renamed.items() if not name.startswith("encoder_")}
    for encoder, ours in (("encoder_q.", ""), ("encoder_k.", "twin.")):
        own = {name.removeprefix(encoder): tensor for name, tensor in renamed.items() if name.startswith(encoder)}
        weights |= {f"{ours}{name}": tensor for name, tensor in rename_weights(own, TIMM_RESNET_RENAMING).items()}
    if "queue.vectors" in weights:
        weights["queue.vectors"] = weights["queue.vectors"].T.contiguous()  # the official queue is (dim, size)
        weights["queue.pointer"] = weights["queue.pointer"].squeeze(0)
    return weights


def official_config(state_dict: dict[str, torch.Tensor]) -> MoCoConfig:
    """The config of an official checkpoint, read from its names and shapes; the temperature is that of its version."""
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    version = {"projection_layers": 1, "temperature": 0.07}
    if "encoder_q.fc.2.weight" in weights:
        version = {"projection_layers": 2, "temperature": 0.2}
        version["projection_hidden_dim"] = weights["encoder_q.fc.0.weight"].shape[0]
    projection_dim, queue_size = weights["queue"].shape
    return MoCoConfig(
        backbone_config=official_resnet_config({name.removeprefix("encoder_q."): weights[name] for name in weights}),
        projection_dim=projection_dim,
        queue_size=queue_size,
        **version,
    )


def tiny_config() -> MoCoConfig:
    # Without batch norm several processes equal one, and every check applies.
    return MoCoConfig(backbone_config=tiny_vit(), projection_dim=16, queue_size=24, momentum=0.9)


register_variant(
    config=MoCoConfig,
    pretraining=MoCoForPreTraining,
    model=MoCoModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_views,
)
