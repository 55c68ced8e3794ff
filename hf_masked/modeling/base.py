"""What every variant's config and model share: the paper's facts, a stock backbone, what is frozen, saving."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ViTConfig

from hf_masked.modeling.parts.backbones import build_backbone, copy_weights, load_backbone, without_mask_token
from hf_masked.modeling.parts.momentum import MomentumTwin
from hf_masked.modeling.parts.teachers import FrozenTeacher
from hf_masked.modeling.parts.text import TEXT_BACKBONES, text_settings

# Settings of processors for whole pictures, without augmentation.
WHOLE_PICTURE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip_probability": 0.0, "crop_fraction": 1.0}


class ByBackbone:
    """A fact of methods that take pictures or texts: of a config, what its backbone takes; of the class, pictures."""

    def __init__(self, pictures: str, texts: str):
        self.pictures, self.texts = pictures, texts

    def __get__(self, config: "VariantConfig | None", owner: type | None = None) -> str:
        backbone = None if config is None else config.backbone_config
        return self.texts if getattr(backbone, "model_type", None) in TEXT_BACKBONES else self.pictures


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
    # What the method learns from: single pictures, sets of them (a name in `hf_masked.data.sets.SAMPLES`), or pairs
    # with disparities ("stereo", `hf_masked.data.stereo`).
    sample: ClassVar[str] = "picture"
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
        """Width of the encoder's output."""
        backbone = self.backbone_config
        return backbone.hidden_size if hasattr(backbone, "hidden_size") else backbone.hidden_sizes[-1]

    @property
    def num_channels(self) -> int:
        return self.backbone_config.num_channels

    @property
    def plain_model_type(self) -> str:
        """Type of the stock model that the encoder is exported as."""
        return self.backbone_config.model_type

    @property
    def image_size(self) -> int | list[int]:
        """Of the backbone's config; convolutional nets, which take any, need not have one."""
        return getattr(self.backbone_config, "image_size", 224)

    @classmethod
    def of_backbone(cls, backbone_config: PreTrainedConfig, **arguments) -> "VariantConfig":
        """The method's config for a pretrained backbone."""
        return cls(backbone_config=backbone_config, **arguments)

    def processor_settings(self) -> dict:
        """Arguments with which the variant's processor fits this config; recipes override the rest."""
        if self.modality == "text":
            return text_settings(self.backbone_config)
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

    # Whether the encoder sees the stock backbone's mask token in place of masked patches, or may in one of its forms.
    uses_mask_token: bool = False
    # Whether `forward` takes `classes`, the labels of a data set that has any.
    uses_classes: ClassVar[bool] = False
    # 0 at the start of training, 1 at its end; `TrainingProgressCallback` sets it.
    training_progress: float = 0.0
    # Conformance checks that cannot apply: {name of the check: reason}. The card shows them.
    declined_checks: ClassVar[dict[str, str]] = {}
    # Trainable parameters that rightly get no gradient: {name: reason}.
    without_gradient: ClassVar[dict[str, str]] = {}
    # Weight decay on norms and biases too.
    decay_everything: ClassVar[bool] = False
    # Several processes need batch statistics over all of them.
    sync_batch_norm: ClassVar[bool] = False
    # Scalar outputs that the log shows beside the loss and its parts.
    logged_outputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        if config.modality == "text":
            self.main_input_name, self.input_modalities = "input_ids", ("text",)
        self.backbone = build_backbone(config.backbone_config, mask_token=self.uses_mask_token)

    def post_init(self):
        super().post_init()
        # What FSDP shards as units. It refuses names of modules that the model at hand does not hold. A unit's weights
        # are there only while it is called, and methods read the weights of embeddings without calling them.
        held = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules & held if not name.endswith("Embeddings")}
        for twin in self.twins().values():
            twin.reset(self)
        self.freeze()

    def get_input_embeddings(self) -> None:
        # Accelerate's FSDP would make them a unit too, see `post_init`; transformers' own method raises here.
        return None

    @classmethod
    def is_custom_code(cls) -> bool:
        # Classes outside transformers count as careless with weights that are loaded already, and transformers then
        # skips `_init_weights` for modules without parameters of their own, the model itself among them. Ours use
        # `transformers.initialization`, which spares loaded weights.
        return False

    def frozen_parameters(self) -> Iterable[torch.nn.Parameter]:
        """Parameters that are never trained: fixed tables inside stock backbones, teachers. Twins always are."""
        return ()

    def freeze(self) -> None:
        """Freezes `frozen_parameters()` and twins; transformers' `from_pretrained` makes every parameter trainable."""
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)
        for twin in self.twins().values():
            twin.requires_grad_(False)

    def twins(self) -> dict[str, MomentumTwin]:
        """The momentum twins that the model holds, by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, MomentumTwin)}

    def teachers(self) -> list[FrozenTeacher]:
        """The frozen teachers, which are no modules of the model."""
        return [value for value in vars(self).values() if isinstance(value, FrozenTeacher)]

    def update_twins(self) -> None:
        """Moves the twins towards the weights; `TrainingProgressCallback` calls it after each optimizer step."""
        for twin in self.twins().values():
            twin.update(self, self.training_progress)

    def on_progress(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """What changes at points of the training; `TrainingProgressCallback` calls it before each optimizer step.

        `training_progress` is then the share of the steps that are done. Whether something has been changed already
        must be told from what is saved, so that a run that is resumed changes neither too little nor twice.

        Args:
            optimizer: of the run, which may hold averages of what is changed.
        """

    def learning_rate_cycles(self) -> int:
        """How many times the learning rate's schedule runs through, where a method trains in stages."""
        return 1

    def train(self, mode: bool = True):
        # The Trainer calls this at each step, outside of what is compiled.
        if mode:
            for twin in self.twins().values():
                twin.watch(self)
            for teacher in self.teachers():
                teacher.prepare(self.device)
        return super().train(mode)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beyond norms and biases."""
        return set()

    def learning_rate_factor(self) -> float:
        """What `base_learning_rate` is multiplied by, where a method's rate depends on its config."""
        return 1.0

    def constant_learning_rate(self) -> set[str]:
        """Names of parameters, or globs, whose learning rate the schedule leaves alone."""
        return set()

    def parameter_factors(self) -> dict[str, tuple[float, float]]:
        """Names of parameters, or globs -> what multiplies their learning rate and their weight decay.

        The first that fits a parameter holds; what none fits decays as everything else does.
        """
        return {}

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers. A twin that the checkpoint does not hold begins as the copy of what was loaded."""
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for name, twin in model.twins().items():
            if {f"{name}.{key}" for key in twin.state_dict()} <= set(report["missing_keys"]):
                twin.reset(model)
        model.freeze()
        return (model, report) if output_loading_info else model

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
            backbone = load_backbone(backbone, mask_token=cls.uses_mask_token)
        model = cls(cls.config_class.of_backbone(backbone.config, **config_arguments))
        copy_weights(backbone, model.backbone)
        for twin in model.twins().values():
            twin.reset(model)
        return model

    def plain_backbone(self) -> PreTrainedModel:
        """The encoder as a stock transformers model: what is exported. To those, a mask token in the checkpoint is an
        unexpected weight or one without a gradient."""
        return without_mask_token(self.backbone) if self.uses_mask_token else self.backbone

    def sync_backbone(self) -> None:
        """Writes what the method keeps outside the backbone into it; saving and exporting call this."""

    def save_pretrained(self, *args, **kwargs):
        # Weights that are handed over were gathered from a sharded model, which one process alone must not touch.
        if kwargs.get("state_dict") is None:
            self.sync_backbone()
        return super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """Uploads weights, config, processor, plain encoder and card; see `hf_masked.training.hub.push_model`."""
        # The one place that looks up to `training`, and only when it is called: this method is where users look.
        from hf_masked.training.hub import push_model

        return push_model(self, repo_id, **kwargs)
