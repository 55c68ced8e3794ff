"""What every variant's config and model share: the paper's facts, a stock backbone, what is frozen, saving."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ViTConfig

from hf_masked.modeling.parts.backbones import build_backbone, load_backbone


class VariantConfig(PreTrainedConfig):
    """Base of all configs. The class attributes are the facts that catalogue, cards, docs and command line read.

    Args:
        backbone_config: the stock transformers config of the encoder, or its dict; a ViT-B/16 by default.
    """

    paper_title: ClassVar[str]
    paper_year: ClassVar[int]
    arxiv_id: ClassVar[str]
    reference_repository: ClassVar[str | None] = None
    weights_licence: ClassVar[str | None] = None
    modality: ClassVar[str] = "image"
    masks: ClassVar[str]
    predicts: ClassVar[str]
    backbones: ClassVar[tuple[str, ...]]
    processor: ClassVar[str] = "MaskedImageProcessor"
    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = ViTConfig(layer_norm_eps=1e-6)
        elif isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raises a ValueError for values that do not fit together."""
        if self.backbone_config.model_type not in self.backbones:
            raise ValueError(
                f"{type(self).__name__} takes a backbone of type {', '.join(self.backbones)}, not "
                f"{self.backbone_config.model_type!r}."
            )

    @property
    def hidden_size(self) -> int:
        return self.backbone_config.hidden_size

    @property
    def num_channels(self) -> int:
        return self.backbone_config.num_channels

    @property
    def image_size(self) -> int | list[int]:
        return self.backbone_config.image_size

    @classmethod
    def of_backbone(cls, backbone_config: PreTrainedConfig, **arguments) -> "VariantConfig":
        """The method's config for a pretrained backbone."""
        return cls(backbone_config=backbone_config, **arguments)

    def processor_settings(self) -> dict:
        """Arguments with which the variant's processor fits this config; recipes override the rest."""
        return {"size": self.image_size, "num_channels": self.num_channels}


class VariantModel(PreTrainedModel):
    """Base of all models: holds a stock transformers model as `self.backbone`."""

    config: VariantConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # The losses are means; the Trainer must average them over accumulated batches, not divide by `num_items_in_batch`.
    accepts_loss_kwargs = False

    # 0 at the start of training, 1 at its end; `TrainingProgressCallback` sets it.
    training_progress: float = 0.0
    # Conformance checks that cannot apply: {name of the check: reason}. The card shows them.
    declined_checks: ClassVar[dict[str, str]] = {}
    # Trainable parameters that rightly get no gradient: {name: reason}.
    without_gradient: ClassVar[dict[str, str]] = {}

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)

    def post_init(self):
        super().post_init()
        self.freeze()

    @classmethod
    def is_custom_code(cls) -> bool:
        # Classes outside transformers count as careless with weights that are loaded already, and transformers then
        # skips `_init_weights` for modules without parameters of their own, the model itself among them. Ours use
        # `transformers.initialization`, which spares loaded weights.
        return False

    def frozen_parameters(self) -> Iterable[torch.nn.Parameter]:
        """Parameters that are never trained: fixed tables inside stock backbones, teachers, twins."""
        return ()

    def freeze(self) -> None:
        """Freezes `frozen_parameters()`; `from_pretrained` of transformers makes every parameter trainable."""
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beyond norms and biases, which never have it."""
        return set()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze()
        return loaded

    @classmethod
    def from_backbone(cls, backbone: str | PreTrainedModel, **config_arguments):
        """A model of this method that starts from a pretrained encoder.

        Args:
            backbone: a folder, a Hub id, or a stock transformers model.
            config_arguments: of the method's config.

        Raises:
            ValueError: for a backbone of a type that the method does not take, or of another form than its config.
        """
        if not isinstance(backbone, PreTrainedModel):
            backbone = load_backbone(backbone)
        model = cls(cls.config_class.of_backbone(backbone.config, **config_arguments))
        weights = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith("pooler.")}
        model.backbone.load_state_dict(weights)
        return model

    def sync_backbone(self) -> None:
        """Writes what the method keeps outside the backbone into it; saving and exporting call this."""

    def save_pretrained(self, *args, **kwargs):
        self.sync_backbone()
        return super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """Uploads weights, config, processor, plain encoder and card; see `hf_masked.training.hub.push_model`."""
        # The one place that looks up to `training`, and only when it is called: this method is where users look.
        from hf_masked.training.hub import push_model

        return push_model(self, repo_id, **kwargs)
