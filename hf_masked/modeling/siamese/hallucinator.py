"""MoCo v2 with the Hallucinator, which makes one more positive for each query in feature space.

Jing Wu et al., "Hallucination Improves the Performance of Unsupervised Visual Representation Learning", ICCV 2023,
arXiv 2307.12168. No reference implementation is public: see `hf_masked.modeling.parts.hallucinator`. SimCLR and
SimSiam take it too, as their `hallucinator_config`.
"""

from typing import ClassVar

from hf_masked.modeling.parts.backbones import tiny_vit
from hf_masked.modeling.parts.hallucinator import HallucinatorConfig
from hf_masked.modeling.projected_views import example_views
from hf_masked.modeling.registry import register_variant
from hf_masked.modeling.siamese.moco import MoCoConfig, MoCoForPreTraining, MoCoModel


class HallucinatedMoCoConfig(MoCoConfig):
    """Config of MoCo with the Hallucinator: MoCo's, with the Hallucinator on.

    Args:
        hallucinator_config: a `HallucinatorConfig` or its dict; its defaults by default.
    """

    model_type = "hf_masked_hallucinator"
    paper_title: ClassVar[str] = (
        "Hallucination Improves the Performance of Unsupervised Visual Representation Learning"
    )
    paper_year: ClassVar[int] = 2023
    arxiv_id: ClassVar[str] = "2307.12168"
    reference_repository: ClassVar[str | None] = None
    weights_licence: ClassVar[str | None] = None
    predicts: ClassVar[str] = (
        "which of many keys is the other view's, from the query and from one made in feature space"
    )

    def __post_init__(self, **kwargs):
        if self.hallucinator_config is None:
            self.hallucinator_config = HallucinatorConfig()
        super().__post_init__(**kwargs)


class HallucinatedMoCoModel(MoCoModel):
    """MoCo's encoder and projector under this config."""

    config: HallucinatedMoCoConfig


class HallucinatedMoCoForPreTraining(MoCoForPreTraining):
    """MoCo's query encoder, key encoder, queue and loss, with the Hallucinator and its loss."""

    config: HallucinatedMoCoConfig
    declined_checks: ClassVar[dict[str, str]] = {
        "accumulation": MoCoForPreTraining.declined_checks["accumulation"],
        "ddp": "each process draws its own extrapolations, and the Hallucinator's batch norm sees one process's batch",
        "single_samples": "the Hallucinator's batch norm over the samples needs at least two in training",
    }


def tiny_config() -> HallucinatedMoCoConfig:
    return HallucinatedMoCoConfig(backbone_config=tiny_vit(), projection_dim=16, queue_size=24, momentum=0.9)


register_variant(
    config=HallucinatedMoCoConfig,
    pretraining=HallucinatedMoCoForPreTraining,
    model=HallucinatedMoCoModel,
    tiny_config=tiny_config,
    example_inputs=example_views,
)
