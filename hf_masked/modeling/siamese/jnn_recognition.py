"""Joint neural network for one-shot recognition: two streams that are merged at several depths, not only at the end.

After each of the first stages the maps of query and target are concatenated and merged by a joint convolution; the
merged map goes on as the query's. One logit says whether the two pictures show different classes.

Camilo J. Vargas, Qianni Zhang and Ebroul Izquierdo, "Joint Neural Networks for One-shot Object Recognition and
Detection", 2024, arXiv 2408.00701.
Reference implementation: https://github.com/cjvargasc/JNN_recog (`models/jAlexnet.py`, `loaders/datasetBatch.py`,
`training/train.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import WHOLE_PICTURE, VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.joint import ConvBlock, JointConv
from hf_masked.modeling.parts.patches import check_pixel_values
from hf_masked.modeling.parts.pooling import check_views
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.projected_views import example_views
from hf_masked.modeling.registry import register_variant

# Of the five stages (`jAlexnet.py`): kernels of those after the first, which stages end with pooling, kernels of the
# joint convolutions; the reference has joint convolutions after the first three alone.
KERNELS = (5, 3, 3, 3)
POOLED = (1, 2, 5)
JOINT_KERNELS = (3, 5, 3, 3, 3)


class JNNEncoderConfig(PreTrainedConfig):
    """Config of the one stream of the recognition network: AlexNet's five convolutions.

    Args:
        num_channels: of the pictures.
        hidden_sizes: channels of the five convolutions.
        kernel_size: of the first convolution, which has a padding of 2.
        stride: of the first convolution; with pooling the encoder's is eight times that.
        image_size: in pixels, or (height, width); pictures of other sizes work too.
    """

    model_type = "hf_masked_jnn_encoder"

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (64, 192, 384, 256, 256)
    kernel_size: int = 11
    stride: int = 4
    image_size: int | list[int] | tuple[int, int] = 224

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if len(self.hidden_sizes) != len(JOINT_KERNELS):
            raise ValueError(
                f"hidden_sizes is {self.hidden_sizes}; the encoder has {len(JOINT_KERNELS)} convolutions."
            )


class JNNStage(GradientCheckpointingLayer):
    """A convolution with ReLU, and pooling where the stage has it."""

    def __init__(self, before: int, after: int, kernel_size: int, pooled: bool, **kwargs):
        super().__init__()
        self.block = ConvBlock(before, after, kernel_size, **kwargs)
        self.pooled = pooled

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, before, rows, columns) to (batch, after, about half the rows, columns) where it pools."""
        hidden = self.block(hidden)
        return F.max_pool2d(hidden, kernel_size=3, stride=2) if self.pooled else hidden


@torch.no_grad()
def init_as_reference(module: nn.Module) -> None:
    """Xavier-uniform weights, biases as torch has them (`jAlexnet.py`)."""
    init_as_torch(module)
    if isinstance(module, nn.Linear | nn.Conv2d):
        init.xavier_uniform_(module.weight)


class JNNEncoderModel(PreTrainedModel):
    """One stream by itself, on single pictures."""

    config: JNNEncoderConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: JNNEncoderConfig):
        super().__init__(config)
        before, after = [config.num_channels, *config.hidden_sizes[:-1]], config.hidden_sizes
        self.stages = nn.ModuleList(
            JNNStage(*channels, kernel, number in POOLED)
            for number, (*channels, kernel) in enumerate(zip(before[1:], after[1:], KERNELS, strict=True), start=2)
        )
        first = JNNStage(before[0], after[0], config.kernel_size, 1 in POOLED, stride=config.stride, padding=2)
        self.stages.insert(0, first)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_as_reference(module)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width) in [0, 1].
            kwargs: unused, for callers that know other encoders.

        Returns:
            `last_hidden_state` (batch, width, rows, columns) and its mean, `pooler_output` (batch, width, 1, 1).

        Raises:
            ValueError: for other channels, another rank, or pictures of which no map would be left.
        """
        check_pictures(pixel_values, self.config)
        hidden = pixel_values
        for stage in self.stages:
            hidden = stage(hidden)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=hidden.mean(dim=(2, 3), keepdim=True)
        )


def check_pictures(pixel_values: torch.Tensor, config: JNNEncoderConfig) -> None:
    """Raises a ValueError for other channels, another rank, or pictures that are too small for the encoder."""
    check_pixel_values(pixel_values, config.num_channels)
    # Three poolings, 3 x 3 with stride 2, need 15 rows and columns of the first convolution.
    smallest = 14 * config.stride + config.kernel_size - 4
    if min(pixel_values.shape[-2:]) < smallest:
        raise ValueError(
            f"The pictures have {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels; with "
            f"stride={config.stride} and kernel_size={config.kernel_size} the encoder needs {smallest} x {smallest}: "
            "set the processor's size higher, or the encoder's stride lower."
        )


class JNNRecognitionConfig(VariantConfig):
    """Config of the joint neural network for recognition.

    Args:
        backbone_config: of one stream, a `JNNEncoderConfig`; AlexNet's convolutions by default.
        joint_stages: after which stages, counted from 1, the streams are merged, in ascending order. () is the Siamese
            baseline: streams apart until the end, where the absolute differences of their features are classified
            (Koch et al., 2015).
        pooled_size: rows and columns of the map that is classified.
        classifier_hidden_size: width of the classifier's two hidden layers.
        dropout: before these.
    """

    model_type = "hf_masked_jnn_recognition"
    paper_title: ClassVar[str] = "Joint Neural Networks for One-shot Object Recognition and Detection"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2408.00701"
    reference_repository: ClassVar[str] = "https://github.com/cjvargasc/JNN_recog"
    masks: ClassVar[str] = "nothing: two pictures, of one class or of two"
    predicts: ClassVar[str] = "whether two pictures show different classes"
    backbones: ClassVar[tuple[str, ...]] = (JNNEncoderConfig.model_type,)
    processor: ClassVar[str] = "MultiViewImageProcessor"
    sample: ClassVar[str] = "class_pair"
    num_views: ClassVar[int] = 2

    joint_stages: list[int] | tuple[int, ...] = (1, 2, 3)
    pooled_size: int = 6
    classifier_hidden_size: int = 4096
    dropout: float = 0.5

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = JNNEncoderConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        stages, known = list(self.joint_stages), range(1, len(JOINT_KERNELS) + 1)
        if stages != sorted(set(stages) & set(known)):
            raise ValueError(
                f"joint_stages is {self.joint_stages}; expected different numbers of stages, 1 to {known[-1]}, in "
                "ascending order, for example (1, 2, 3)."
            )
        for name in ("pooled_size", "classifier_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1).")

    @property
    def hidden_size(self) -> int:
        return self.backbone_config.hidden_sizes[-1]

    def processor_settings(self) -> dict:
        # The whole picture in [0, 1], without augmentation (`train.py`).
        plain = {"photometric": None, "image_mean": 0.0, "image_std": 1.0}
        return super().processor_settings() | {"num_views": self.num_views} | WHOLE_PICTURE | plain


@dataclass
class JNNRecognitionOutput(PreTrainingOutput):
    """Output of `JNNForPairClassification`; `last_hidden_state` is the merged map.

    Args:
        logits: (batch,); `logits.sigmoid()` is how surely the two pictures show different classes.
        pair_accuracy: scalar, the share of pairs on the right side of 0; None without classes.
    """

    logits: torch.Tensor | None = None
    pair_accuracy: torch.Tensor | None = None


class JNNRecognitionPreTrainedModel(VariantModel):
    """The shared stages and the joint convolutions between them."""

    config: JNNRecognitionConfig
    logged_outputs: ClassVar[tuple[str, ...]] = ("pair_accuracy",)
    uses_classes: ClassVar[bool] = True
    declined_checks: ClassVar[dict[str, str]] = {
        "draws": "the data set draws the pairs; the model draws nothing but dropout, which the tiny config has not",
        "attentions": "the encoder is convolutional",
        "export": "the encoder is the paper's own; its export needs hf_masked",
    }

    def __init__(self, config: JNNRecognitionConfig):
        super().__init__(config)
        channels = config.backbone_config.hidden_sizes
        self.joints = nn.ModuleDict(
            {str(stage): JointConv(channels[stage - 1], JOINT_KERNELS[stage - 1]) for stage in config.joint_stages}
        )

    def _init_weights(self, module: nn.Module) -> None:
        init_as_reference(module)

    def merge(self, query: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Two batches of pictures, (batch, channels, height, width), to one map of what is classified, (batch, width,
        rows, columns). The order matters: the merged map takes the query's place."""
        check_pictures(query, self.config.backbone_config)
        first, second = query.to(self.dtype), target.to(self.dtype)
        joint_stages = self.config.joint_stages
        last = joint_stages[-1] if joint_stages else len(self.backbone.stages)
        for number, stage in enumerate(self.backbone.stages, start=1):
            first = stage(first)
            if number <= last:
                second = stage(second)
            if number in joint_stages:
                first = self.joints[str(number)](first, second)
        return first if joint_stages else (first - second).abs()


class JNNRecognitionModel(JNNRecognitionPreTrainedModel):
    """The merged map of pairs."""

    def __init__(self, config: JNNRecognitionConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Merges pairs.

        Args:
            pixel_values: float (batch, 2, channels, height, width) in [0, 1]: query and target.
            kwargs: unused.

        Returns:
            `last_hidden_state` (batch, width, rows, columns) and its mean, `pooler_output` (batch, width).

        Raises:
            ValueError: for other channels, sets or another rank, or pictures that are too small.
        """
        check_views(pixel_values, self.config.num_views)
        hidden = self.merge(*pixel_values.unbind(dim=1))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.mean(dim=(2, 3)))


class JNNForPairClassification(JNNRecognitionPreTrainedModel):
    """The merged map and the classifier on it: do two pictures show different classes?"""

    def __init__(self, config: JNNRecognitionConfig):
        super().__init__(config)
        width = config.classifier_hidden_size
        self.classifier = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_size * config.pooled_size**2, width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 1),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        classes: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> JNNRecognitionOutput:
        """One step on pairs.

        Args:
            pixel_values: float (batch, 2, channels, height, width) in [0, 1]: query and target.
            classes: int64 (batch, 2), of the pictures; the loss needs them, and only whether they are equal.
            return_loss: whether to compute the loss.
            kwargs: unused.

        Returns:
            `JNNRecognitionOutput`; the loss is binary cross-entropy, 1 = different classes.

        Raises:
            ValueError: for other channels, sets or another rank, pictures that are too small, or missing classes.
        """
        check_views(pixel_values, self.config.num_views)
        hidden = self.merge(*pixel_values.unbind(dim=1))  # (batch, width, rows, columns)
        logits = self.classify(hidden)
        loss = accuracy = None
        if return_loss:
            different = self._different(classes, len(pixel_values))
            loss = F.binary_cross_entropy_with_logits(logits, different)
            accuracy = ((logits > 0) == different.bool()).float().mean()
        return JNNRecognitionOutput(
            loss=loss,
            losses=None if loss is None else {"cross_entropy": loss.detach()},
            last_hidden_state=hidden,
            logits=logits,
            pair_accuracy=accuracy,
        )

    def classify(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (batch,), of merged maps."""
        pooled = F.adaptive_avg_pool2d(hidden, self.config.pooled_size)
        return self.classifier(pooled.flatten(1)).squeeze(1).float()

    def _different(self, classes: torch.Tensor | None, batch: int) -> torch.Tensor:
        """float32 (batch,): 1 where the two pictures have different classes."""
        if classes is None or classes.shape != (batch, 2):
            found = None if classes is None else tuple(classes.shape)
            raise ValueError(
                f"`classes` is {found}; the loss needs those of query and target, of shape {(batch, 2)}. "
                "return_loss=False does without."
            )
        return (classes[:, 0] != classes[:, 1]).float()

    def predict_same(self, query: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
        """How surely each query shows the class of each picture of its support set; the largest is the answer to a
        one-shot question.

        Args:
            query: float (episodes, channels, height, width) in [0, 1].
            support: float (episodes, ways, channels, height, width), one picture of each class.

        Returns:
            float32 (episodes, ways): the negative of the pairs' logits, which do not saturate as probabilities do;
            their sigmoid is the probability of the same class.

        Raises:
            ValueError: where the two do not belong together.
        """
        if support.ndim != 5 or query.shape != support[:, 0].shape:
            raise ValueError(
                f"`query` has shape {tuple(query.shape)} and `support` {tuple(support.shape)}; expected (episodes, "
                "channels, height, width) and (episodes, ways, channels, height, width)."
            )
        queries = query.unsqueeze(1).expand_as(support).flatten(0, 1)
        logits = self.classify(self.merge(queries, support.flatten(0, 1)))
        return -logits.unflatten(0, support.shape[:2])

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What there is to see: name of the panel -> (batch, channels, height, width). The last one is a gray column
        as high as the model is sure that the class is the same."""
        query, target = pixel_values.unbind(dim=1)
        same = self.predict_same(query, target.unsqueeze(1)).sigmoid()  # (batch, 1)
        height = pixel_values.shape[-2]
        rows = torch.arange(height, 0, -1, device=pixel_values.device) / height  # from the top
        column = 0.6 * (rows <= same).to(pixel_values.dtype)  # (batch, height)
        return {"query": query, "target": target, "same class?": column[:, None, :, None].expand_as(query)}


_RENAMING = (
    *((rf"^seq{stage}\.0\.", f"backbone.stages.{stage - 1}.block.convolution.") for stage in range(1, 6)),
    (r"^joint(\d)\.0\.", r"joints.\1.convolution."),
)


def convert_official_weights(
    state_dict: dict[str, torch.Tensor], config: JNNRecognitionConfig
) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of the reference's `jNetwork`.
        config: unused here; other variants' conversions need it.
    """
    return rename_weights(state_dict, _RENAMING)


def official_config(state_dict: dict[str, torch.Tensor]) -> JNNRecognitionConfig:
    """The config of an official checkpoint: the reference has one network."""
    return JNNRecognitionConfig()


def example_inputs(config: JNNRecognitionConfig, batch: int) -> dict[str, torch.Tensor]:
    classes = torch.stack([torch.arange(batch), torch.arange(batch) // 2 * 2], dim=1)  # in turn the same and not
    return example_views(config, batch) | {"classes": classes}


def tiny_config() -> JNNRecognitionConfig:
    encoder = JNNEncoderConfig(hidden_sizes=(8, 8, 16, 16, 16), kernel_size=5, stride=1, image_size=32)
    return JNNRecognitionConfig(backbone_config=encoder, pooled_size=2, classifier_hidden_size=32, dropout=0.0)


AutoConfig.register(JNNEncoderConfig.model_type, JNNEncoderConfig)
AutoModel.register(JNNEncoderConfig, JNNEncoderModel)

register_variant(
    config=JNNRecognitionConfig,
    pretraining=JNNForPairClassification,
    model=JNNRecognitionModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_inputs,
)
