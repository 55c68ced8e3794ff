"""TriBYOL: BYOL with a third view and a second target network, for small batches.

Guang Li, Ren Togo, Takahiro Ogawa and Miki Haseyama, "TriBYOL: Triplet BYOL for Self-Supervised Representation
Learning", ICASSP 2022, arXiv 2206.03012. There is no official code; what the paper leaves open is marked.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init

from hf_masked.modeling.projected_views import example_views
from hf_masked.modeling.registry import register_variant
from hf_masked.modeling.siamese.byol import BYOLConfig, BYOLForPreTraining, BYOLModel
from hf_masked.modeling.siamese.byol import tiny_config as byol_tiny_config

TARGET_UPDATES = ("alternate", "both")


class TriBYOLConfig(BYOLConfig):
    """Config of TriBYOL.

    Args:
        projection_dim, projection_hidden_dim, predictor_hidden_dim, base_tau, tau_schedule: as BYOL's; the defaults
            are those of public re-implementations.
        target_update: "alternate" moves the first target network after the first, third, ... step and the second after
            the second, fourth, ...; "both" moves both after each step, which leaves them equal for ever but for batch
            norm's running statistics, as they begin equal.
        kwargs: of `BYOLConfig`.
    """

    model_type = "hf_masked_tribyol"
    paper_title: ClassVar[str] = "TriBYOL: Triplet BYOL for Self-Supervised Representation Learning"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2206.03012"
    reference_repository: ClassVar[str | None] = None
    masks: ClassVar[str] = "nothing: three augmented crops of a picture"
    predicts: ClassVar[str] = "two momentum twins' projections of the other views"
    num_views: ClassVar[int] = 3

    projection_dim: int = 128
    projection_hidden_dim: int | None = 512
    predictor_hidden_dim: int = 512
    tau_schedule: str = "constant"
    target_update: str = "alternate"

    def check(self) -> None:
        super().check()
        if self.target_update not in TARGET_UPDATES:
            raise ValueError(
                f"target_update is {self.target_update!r}; it must be one of {', '.join(TARGET_UPDATES)}."
            )


class TriBYOLModel(BYOLModel):
    """Encoder and projector on single pictures: the online network's."""

    config: TriBYOLConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(predictor|target_1|target_2)\..*", "num_updates"]


class TriBYOLForPreTraining(BYOLForPreTraining):
    """Online network, two target networks, and the loss between the first of three views and each of the others.

    The buffer `num_updates`, int64, counts the updates of the target networks: it is saved, so that a run that is
    resumed knows whose turn it is.
    """

    config: TriBYOLConfig
    pairs: ClassVar[dict[str, tuple[int, int]]] = {"target_1": (0, 1), "target_2": (0, 2)}

    def __init__(self, config: TriBYOLConfig):
        super().__init__(config)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._known_updates: int | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self, "num_updates"):
            init.zeros_(self.num_updates)

    def update_twins(self) -> None:
        if self.config.target_update == "both":
            super().update_twins()
            return
        # Read from the device once, and counted on both sides from there.
        if self._known_updates is None:
            self._known_updates = self.num_updates.item()
        twins = list(self.twins().values())
        turn = self._known_updates % len(twins)
        for number, twin in enumerate(twins):
            if number == turn:
                twin.update(self, self.training_progress)
            else:
                twin.wait()
        self._known_updates += 1
        self.num_updates += 1


def tiny_config() -> TriBYOLConfig:
    settings = byol_tiny_config()
    return TriBYOLConfig(
        backbone_config=settings.backbone_config,
        projection_dim=settings.projection_dim,
        projection_hidden_dim=settings.projection_hidden_dim,
        predictor_hidden_dim=settings.predictor_hidden_dim,
    )


register_variant(
    config=TriBYOLConfig,
    pretraining=TriBYOLForPreTraining,
    model=TriBYOLModel,
    tiny_config=tiny_config,
    example_inputs=example_views,
)
