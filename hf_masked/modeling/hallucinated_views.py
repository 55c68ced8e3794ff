"""What methods to which a Hallucinator can be added share: its config, its start and its loss beside their own."""

from collections.abc import Callable
from typing import ClassVar

import torch
from transformers import AutoConfig, PreTrainedConfig

from hf_masked.modeling.parts.hallucinator import Hallucinator, HallucinatorConfig
from hf_masked.modeling.projected_views import ProjectedViewsConfig, ProjectedViewsModel


class HallucinatedViewsConfig(ProjectedViewsConfig):
    """Base of the configs of methods that take a Hallucinator.

    Args:
        hallucinator_config: a `HallucinatorConfig` or its dict, {} for its defaults; None for the method alone.
    """

    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig, "hallucinator_config": HallucinatorConfig}

    hallucinator_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.hallucinator_config, dict):
            self.hallucinator_config = HallucinatorConfig(**self.hallucinator_config)
        super().__post_init__(**kwargs)


class HallucinatedViewsModel(ProjectedViewsModel):
    """Base of the models; one that pretrains calls `add_hallucinator()` before `post_init()`."""

    config: HallucinatedViewsConfig

    def add_hallucinator(self) -> None:
        config = self.config.hallucinator_config
        self.hallucinator = None if config is None else Hallucinator(config, self.config.projection_dim)

    def on_progress(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().on_progress(optimizer)
        if self.hallucinator is not None:
            self.hallucinator.set_progress(self.training_progress)

    def with_hallucination(
        self, loss: torch.Tensor, hallucinated_loss: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The method's loss, in training with the hallucinated one, and the latter by name, if there is one.

        In evaluation the loss is the method's alone, so that it can be compared.
        """
        if self.hallucinator is None or not self.training:
            return loss, {}
        hallucinated = hallucinated_loss()
        return loss + self.hallucinator.weight * hallucinated, {"hallucination": hallucinated.detach()}
