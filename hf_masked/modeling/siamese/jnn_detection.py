"""Joint neural network for one-shot detection: a YOLOv2-like detector whose class is given by one query picture.

After each of the first stages the maps of target and query are merged by a joint convolution; the merged map goes on
as the target's, and the detector's head reads it.

Camilo J. Vargas, Qianni Zhang and Ebroul Izquierdo, "Joint Neural Networks for One-shot Object Recognition and
Detection", 2024, arXiv 2408.00701.
Reference implementation: https://github.com/cjvargasc/JNN_detection (`model/darkJNN.py`, `model/darknet19.py`,
`loss/loss.py`, `model/decoder.py`, `utils/bbox.py`).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.boxes import (
    box_iou,
    decode_boxes,
    encode_boxes,
    grid_anchors,
    non_maximum_suppression,
    space_to_depth,
)
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.joint import ConvBlock, JointConv
from hf_masked.modeling.parts.patches import check_pixel_values, pair
from hf_masked.modeling.registry import register_variant

# Of Darknet-19's six stages (`darknet19.py`): convolutions, and which of them begin with pooling. Between the second
# and the third there is one more, which a query of half the size goes without.
BLOCKS = (1, 1, 3, 3, 5, 5)
POOLED = (1, 3, 4, 5)
STRIDE = 32
PASSED = 4  # the stage whose output skips the last ones

# As shares of a cell's width and height (`config.py`; YOLOv2's for VOC).
ANCHORS = ((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071))

# Values of a prediction: the box's four and its confidence.
BOX, VALUES = 4, 5


class JNNDarknetConfig(PreTrainedConfig):
    """Config of Darknet-19, one stream of the detector.

    Args:
        num_channels: of the pictures.
        hidden_sizes: channels of the six stages.
        image_size: of the target in pixels, or (height, width), multiples of 32.
    """

    model_type = "hf_masked_jnn_darknet"

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    image_size: int | list[int] | tuple[int, int] = 416

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if len(self.hidden_sizes) != len(BLOCKS):
            raise ValueError(f"hidden_sizes is {self.hidden_sizes}; Darknet-19 has {len(BLOCKS)} stages.")


def darknet_block(before: int, after: int, kernel_size: int) -> ConvBlock:
    return ConvBlock(before, after, kernel_size, batch_norm=True, negative_slope=0.1)


class DarknetStage(nn.Sequential):
    """Convolutions of 3 x 3 and, at half the width, 1 x 1 in turn.

    Args:
        before, after: channels.
        number: of the stage, from 0.
    """

    def __init__(self, before: int, after: int, number: int):
        super().__init__()
        self.pooled = number in POOLED
        for place in range(BLOCKS[number]):
            width = after // 2 if place % 2 else after
            self.append(darknet_block(before, width, 1 if place % 2 else 3))
            before = width

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, before, rows, columns) to (batch, after, ...), half the rows and columns where it pools."""
        return super().forward(F.max_pool2d(hidden, 2) if self.pooled else hidden)


class JNNDarknetModel(PreTrainedModel):
    """One stream by itself, on single pictures."""

    config: JNNDarknetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: JNNDarknetConfig):
        super().__init__(config)
        channels = [config.num_channels, *config.hidden_sizes]
        self.stages = nn.ModuleList(DarknetStage(*channels[n : n + 2], n) for n in range(len(BLOCKS)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_as_torch(module)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width) in [0, 1], sides multiples of 32.
            kwargs: unused, for callers that know other encoders.

        Returns:
            `last_hidden_state` (batch, width, rows, columns) and its mean, `pooler_output` (batch, width, 1, 1).

        Raises:
            ValueError: for other channels, another rank or other sides.
        """
        check_pixel_values(pixel_values, self.config.num_channels, (STRIDE, STRIDE))
        hidden = pixel_values
        for number, stage in enumerate(self.stages):
            hidden = stage(hidden)
            if number == 1:
                hidden = F.max_pool2d(hidden, 2)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=hidden.mean(dim=(2, 3), keepdim=True)
        )


class JNNDetectionConfig(VariantConfig):
    """Config of the joint neural network for detection.

    Args:
        backbone_config: of one stream, a `JNNDarknetConfig`; Darknet-19 by default. Its `image_size` is the target's;
            the query's is half of it.
        joint_stages: after which stages, counted from 0, the streams are merged, in ascending order; 1 to 5.
        anchors: widths and heights in cells of 32 pixels.
        passed_size: channels in which the output of the last stage but one is handed to the head.
        ignore_threshold: predictions that overlap a box by more than this are no background.
        object_scale, noobject_scale: what errors of the confidence are multiplied by, before they are squared, where
            there is an object and where there is none.
        coord_scale: weight of the boxes' loss.
    """

    model_type = "hf_masked_jnn_detection"
    paper_title: ClassVar[str] = "Joint Neural Networks for One-shot Object Recognition and Detection"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2408.00701"
    reference_repository: ClassVar[str] = "https://github.com/cjvargasc/JNN_detection"
    modality: ClassVar[str] = "pictures with boxes"
    masks: ClassVar[str] = "nothing: a picture and a query of what is to be found in it"
    predicts: ClassVar[str] = "boxes around what is of the query's class"
    backbones: ClassVar[tuple[str, ...]] = (JNNDarknetConfig.model_type,)
    processor: ClassVar[str] = "OneShotDetectionProcessor"

    joint_stages: list[int] | tuple[int, ...] = (1, 2, 3)
    anchors: list | tuple = ANCHORS
    passed_size: int = 64
    ignore_threshold: float = 0.6
    object_scale: float = 5.0
    noobject_scale: float = 1.0
    coord_scale: float = 1.0

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = JNNDarknetConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        stages = list(self.joint_stages)
        if not stages or stages != sorted(set(stages) & set(range(1, len(BLOCKS)))):
            raise ValueError(
                f"joint_stages is {self.joint_stages}; expected different numbers of stages, 1 to {len(BLOCKS) - 1}, "
                "in ascending order, one at least: without any the query would not be seen."
            )
        if not self.anchors or any(len(anchor) != 2 or min(anchor) <= 0 for anchor in self.anchors):
            raise ValueError(f"anchors is {self.anchors}; expected pairs of a width and a height above 0, in cells.")
        if not 0.0 <= self.ignore_threshold <= 1.0:
            raise ValueError(f"ignore_threshold is {self.ignore_threshold}; it must lie in [0, 1].")

    @property
    def hidden_size(self) -> int:
        return self.backbone_config.hidden_sizes[-1]

    def processor_settings(self) -> dict:
        height, width = pair(self.image_size)
        return {"size": (height, width), "query_size": (height // 2, width // 2), "num_channels": self.num_channels}


@dataclass
class JNNDetectionOutput(PreTrainingOutput):
    """Output of `JNNForOneShotObjectDetection`; `last_hidden_state` is the merged map.

    Args:
        logits: (batch, predictions, 1); their sigmoid is a prediction's confidence, trained to be its overlap with the
            true box.
        pred_boxes: (batch, predictions, 4), (left, top, right, bottom) as shares of the target's width and height.
        deltas: (batch, predictions, 4), the boxes as the loss sees them, see `decode_boxes`.
    """

    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    deltas: torch.Tensor | None = None


class Targets(NamedTuple):
    """What is compared with the predictions, (batch, predictions) each but for `deltas`.

    Args:
        deltas: (batch, predictions, 4), where there is an object.
        assigned: 1 where a true box is this prediction's.
        overlap: of the assigned predictions with the nearest true box.
        scale: of errors of the confidence.
    """

    deltas: torch.Tensor
    assigned: torch.Tensor
    overlap: torch.Tensor
    scale: torch.Tensor


class JNNDetectionPreTrainedModel(VariantModel):
    """The shared stages and the joint convolutions between them."""

    config: JNNDetectionConfig
    supports_gradient_checkpointing = False
    sync_batch_norm: ClassVar[bool] = True

    def __init__(self, config: JNNDetectionConfig):
        super().__init__(config)
        channels = config.backbone_config.hidden_sizes
        self.joints = nn.ModuleDict(
            {
                str(stage): JointConv(channels[stage], batch_norm=True, negative_slope=0.1)
                for stage in config.joint_stages
            }
        )

    def _init_weights(self, module: nn.Module) -> None:
        init_as_torch(module)

    def merge(self, target: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Target (batch, channels, height, width) and query of half the height and width to the merged maps after the
        last stage but one, (batch, width, height / 16, width / 16), and after the last."""
        channels = self.config.num_channels
        check_pixel_values(target, channels, (STRIDE, STRIDE))
        check_pixel_values(query, channels)
        half = (len(target), channels, target.shape[2] // 2, target.shape[3] // 2)
        if query.shape != half:
            raise ValueError(
                f"`query_pixel_values` has shape {tuple(query.shape)} and `pixel_values` {tuple(target.shape)}; "
                f"expected a query of half the height and width each, {half}, as {self.config.processor} makes them."
            )
        target, query = target.to(self.dtype), query.to(self.dtype)
        passed = None
        for number, stage in enumerate(self.backbone.stages):
            target = stage(target)
            if number <= self.config.joint_stages[-1]:
                query = stage(query)
            if number == 1:
                target = F.max_pool2d(target, 2)  # where target and query meet
            if number in self.config.joint_stages:
                target = self.joints[str(number)](target, query)
            if number == PASSED:
                passed = target
        return passed, target


class JNNDetectionModel(JNNDetectionPreTrainedModel):
    """The merged map of targets and queries."""

    # The head, which the detector adds.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["^neck", "^shortcut", "^head", "^predictor"]

    def __init__(self, config: JNNDetectionConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, query_pixel_values: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Merges.

        Args:
            pixel_values, query_pixel_values, kwargs: see `JNNForOneShotObjectDetection.forward`.

        Returns:
            `last_hidden_state` (batch, width, rows, columns) and its mean, `pooler_output` (batch, width).
        """
        _, hidden = self.merge(pixel_values, query_pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.mean(dim=(2, 3)))


class JNNForOneShotObjectDetection(JNNDetectionPreTrainedModel):
    """The merged map and the detector's head on it: where is what the query shows?"""

    def __init__(self, config: JNNDetectionConfig):
        super().__init__(config)
        *_, before, width = config.backbone_config.hidden_sizes
        self.neck = nn.Sequential(darknet_block(width, width, 3), darknet_block(width, width, 3))
        self.shortcut = darknet_block(before, config.passed_size, 1)
        self.head = darknet_block(4 * config.passed_size + width, width, 3)
        self.predictor = nn.Conv2d(width, VALUES * len(config.anchors), kernel_size=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        query_pixel_values: torch.Tensor,
        boxes: torch.Tensor | None = None,
        num_boxes: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> JNNDetectionOutput:
        """Looks for the queries in the targets.

        Args:
            pixel_values: float (batch, channels, height, width) in [0, 1], the targets; sides multiples of 32.
            query_pixel_values: float (batch, channels, height / 2, width / 2) in [0, 1].
            boxes: float (batch, most, 4), the true boxes of the query's class, (left, top, right, bottom) as shares of
                the target's width and height, filled up with anything.
            num_boxes: int64 (batch,), how many of them count; by default all.
            return_loss: whether to compute the loss; without `boxes` there is none.
            kwargs: unused.

        Returns:
            `JNNDetectionOutput`; predictions are cell by cell in raster order, anchor by anchor in each.

        Raises:
            ValueError: for other channels, sizes or ranks, and for boxes of another shape.
        """
        passed, hidden = self.merge(pixel_values, query_pixel_values)
        shortcut = space_to_depth(self.shortcut(passed))
        values = self.predictor(self.head(torch.cat([shortcut, self.neck(hidden)], dim=1)))
        rows, columns = values.shape[-2:]
        values = values.permute(0, 2, 3, 1).reshape(len(values), -1, VALUES).float()  # (batch, predictions, 5)
        deltas = torch.cat([values[..., :2].sigmoid(), values[..., 2:BOX].exp()], dim=-1)
        logits = values[..., BOX:]
        anchors = grid_anchors(torch.tensor(self.config.anchors, device=values.device), rows, columns)
        found = decode_boxes(deltas, anchors)  # in cells
        losses = None
        if return_loss and boxes is not None:
            num_boxes = self._check_boxes(boxes, num_boxes, len(pixel_values))
            cells = boxes.float() * boxes.new_tensor([columns, rows, columns, rows])
            targets = self.assign(found.detach(), cells, num_boxes, anchors, columns)
            losses = self.losses(deltas, logits.squeeze(-1).sigmoid(), targets)
        return JNNDetectionOutput(
            loss=None if losses is None else sum(losses.values()),
            losses=None if losses is None else {name: loss.detach() for name, loss in losses.items()},
            last_hidden_state=hidden,
            logits=logits,
            pred_boxes=found / found.new_tensor([columns, rows, columns, rows]),
            deltas=deltas,
        )

    def _check_boxes(self, boxes: torch.Tensor, num_boxes: torch.Tensor | None, batch: int) -> torch.Tensor:
        if boxes.ndim != 3 or boxes.shape[0] != batch or boxes.shape[2] != BOX:
            raise ValueError(f"`boxes` has shape {tuple(boxes.shape)}; expected ({batch}, boxes, 4).")
        if num_boxes is None:
            return torch.full((batch,), boxes.shape[1], device=boxes.device)
        if num_boxes.numel() != batch:
            raise ValueError(f"`num_boxes` has shape {tuple(num_boxes.shape)}; expected ({batch},).")
        return num_boxes.view(batch)

    def assign(
        self, found: torch.Tensor, boxes: torch.Tensor, num_boxes: torch.Tensor, anchors: torch.Tensor, columns: int
    ) -> Targets:
        """Which prediction answers for which true box (`build_target`).

        A box goes to the cell that its centre lies in, there to the anchor that overlaps it most; of two boxes with
        the same prediction the later one counts.

        Args:
            found: (batch, predictions, 4), the predicted boxes, without gradients.
            boxes: (batch, most, 4), the true ones; these and all others in cells.
            num_boxes: (batch,), how many of them count.
            anchors: (predictions, 4), see `grid_anchors`.
            columns: of the grid.
        """
        config, batch = self.config, len(boxes)
        valid = torch.arange(boxes.shape[1], device=boxes.device) < num_boxes[:, None]  # (batch, most)
        overlaps = box_iou(found[:, :, None], boxes[:, None])  # (batch, predictions, most)
        nearest = overlaps.masked_fill(~valid[:, None], 0.0).amax(dim=2)  # (batch, predictions)
        deltas, assigned, overlap = torch.zeros_like(found), torch.zeros_like(nearest), torch.zeros_like(nearest)
        scale = torch.where(nearest > config.ignore_threshold, 0.0, config.noobject_scale)
        per_cell, rows = len(config.anchors), len(anchors) // len(config.anchors) // columns
        # Anchors lie around the middle of their cell.
        placed = decode_boxes(anchors.new_tensor([0.5, 0.5, 1.0, 1.0]), anchors).view(-1, per_cell, BOX)
        samples = torch.arange(batch, device=boxes.device)
        for number in range(boxes.shape[1]):
            box = boxes[:, number]  # (batch, 4)
            centre = (box[:, :2] + box[:, 2:]).div(2).floor().long()
            cell = centre[:, 1].clamp(0, rows - 1) * columns + centre[:, 0].clamp(0, columns - 1)
            prediction = cell * per_cell + box_iou(placed[cell], box[:, None]).argmax(dim=1)  # (batch,)
            here = samples[valid[:, number]], prediction[valid[:, number]]
            deltas[here] = encode_boxes(box, anchors[prediction])[valid[:, number]]
            assigned[here] = 1.0
            overlap[here] = nearest[here]
            scale[here] = config.object_scale
        return Targets(deltas, assigned, overlap, scale)

    def losses(self, deltas: torch.Tensor, confidence: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Half the squared errors per sample (`yolo_loss`). The scales are inside of the square."""
        box = (deltas - targets.deltas) * targets.assigned[..., None]
        overlap = (confidence - targets.overlap) * targets.scale
        per_sample = 1 / (2 * len(deltas))
        return {
            "box": self.config.coord_scale * per_sample * box.square().sum(),
            "overlap": per_sample * overlap.square().sum(),
        }

    @torch.no_grad()
    def post_process_one_shot_detection(
        self,
        outputs: JNNDetectionOutput,
        threshold: float = 0.5,
        nms_threshold: float = 0.45,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """What was found (`decoder.py`).

        Args:
            outputs: of this model.
            threshold: least confidence.
            nms_threshold: of two boxes that overlap by this or more the surer one stays.
            target_sizes: (height, width) in pixels of each picture, for boxes in pixels; by default shares of the
                sides.

        Returns:
            For each sample "scores", float (found,), falling, and "boxes", float (found, 4), within the picture.

        Raises:
            ValueError: for sizes of another number of pictures.
        """
        if target_sizes is not None and len(target_sizes) != len(outputs.pred_boxes):
            raise ValueError(
                f"target_sizes has {len(target_sizes)} sizes for {len(outputs.pred_boxes)} pictures: give one each."
            )
        results = []
        for number, (boxes, logits) in enumerate(zip(outputs.pred_boxes, outputs.logits, strict=True)):
            scores = logits.squeeze(-1).sigmoid()
            sure = scores > threshold
            boxes, scores = boxes[sure].clamp(0, 1), scores[sure]
            kept = non_maximum_suppression(boxes, scores, nms_threshold)
            height, width = (1, 1) if target_sizes is None else target_sizes[number]
            sides = boxes.new_tensor([width, height, width, height])
            results.append({"scores": scores[kept], "boxes": boxes[kept] * sides})
        return results

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, query_pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What there is to see: name of the panel -> (batch, channels, height, width). The last one is the target,
        dark where no box was found."""
        size = pixel_values.shape[-2:]
        outputs = self(pixel_values, query_pixel_values)
        found = self.post_process_one_shot_detection(outputs, target_sizes=[size] * len(pixel_values))
        shown = 0.25 * pixel_values
        for picture, target, result in zip(shown, pixel_values, found, strict=True):
            for left, top, right, bottom in result["boxes"].round().long().tolist():
                picture[:, top:bottom, left:right] = target[:, top:bottom, left:right]
        query = F.interpolate(query_pixel_values, size, mode="bilinear")
        return {"query": query, "target": pixel_values, "found": shown}


_LAYERS = ("convolution", "norm")


def convert_official_weights(
    state_dict: dict[str, torch.Tensor], config: JNNDetectionConfig
) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of the reference's `DarkJNN`.
        config: unused here; other variants' conversions need it.
    """
    return {_renamed(name): tensor for name, tensor in state_dict.items()}


def _renamed(name: str) -> str:
    module, *places, leaf = name.split(".")
    if module.startswith("conv") and module[4:] in "012345":
        # Convolution, norm and activation in turn, after the pooling where there is one.
        stage = int(module[4:])
        block, layer = divmod(int(places[1]) - (stage in POOLED), 3)
        return f"backbone.stages.{stage}.{block}.{_LAYERS[layer]}.{leaf}"
    if module.startswith("joint"):
        return f"joints.{module[5:]}.{_LAYERS[int(places[0])]}.{leaf}"
    if module == "conv6":
        return f"neck.{places[0]}.{_LAYERS[int(places[1])]}.{leaf}"
    if module == "downsampler":
        return f"shortcut.{_LAYERS[int(places[0])]}.{leaf}"
    if module == "conv7":
        return f"predictor.{leaf}" if places == ["1"] else f"head.{_LAYERS[int(places[1])]}.{leaf}"
    return name


def official_config(state_dict: dict[str, torch.Tensor]) -> JNNDetectionConfig:
    """The config of an official checkpoint: the reference has one network."""
    return JNNDetectionConfig()


def tiny_config() -> JNNDetectionConfig:
    darknet = JNNDarknetConfig(hidden_sizes=(4, 8, 8, 16, 16, 32), image_size=64)
    return JNNDetectionConfig(backbone_config=darknet, anchors=[[0.5, 0.5], [1.0, 1.5]], passed_size=4)


def example_inputs(config: JNNDetectionConfig, batch: int) -> dict[str, torch.Tensor]:
    """Random pictures with one or two boxes each."""
    height, width = pair(config.image_size)
    corners = 0.05 + 0.4 * torch.rand(batch, 2, 2)
    return {
        "pixel_values": torch.rand(batch, config.num_channels, height, width),
        "query_pixel_values": torch.rand(batch, config.num_channels, height // 2, width // 2),
        "boxes": torch.cat([corners, corners + 0.1 + 0.4 * torch.rand(batch, 2, 2)], dim=-1),
        "num_boxes": 1 + torch.arange(batch) % 2,
    }


AutoConfig.register(JNNDarknetConfig.model_type, JNNDarknetConfig)
AutoModel.register(JNNDarknetConfig, JNNDarknetModel)

# A procedure: boxes and queries of another size do not go through `PreTrainer`'s path of pictures.
register_variant(
    config=JNNDetectionConfig,
    pretraining=JNNForOneShotObjectDetection,
    model=JNNDetectionModel,
    heads={AutoModelForObjectDetection: JNNForOneShotObjectDetection},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_inputs,
    kind="procedure",
)
