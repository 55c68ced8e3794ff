"""The joint neural network for detection against its reference, and every check of its spec (section 11)."""

import colorsys
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    Trainer,
    TrainingArguments,
)

from hf_masked import (
    JNNDetectionConfig,
    JNNDetectionModel,
    JNNForOneShotObjectDetection,
    OneShotDetectionProcessor,
    get_variant,
)
from hf_masked.data.one_shot_detection import OneShotDetectionData, augment
from hf_masked.modeling.parts.boxes import (
    box_iou,
    decode_boxes,
    encode_boxes,
    grid_anchors,
    non_maximum_suppression,
    space_to_depth,
)
from hf_masked.modeling.siamese.jnn_detection import (
    ANCHORS,
    JNNDarknetConfig,
    JNNDetectionOutput,
    convert_official_weights,
    example_inputs,
    tiny_config,
)
from hf_masked.training.cli import main
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "jnn_detection.json").read_text())["pretraining"]


def small_model(seed: int = 0, **settings) -> JNNForOneShotObjectDetection:
    torch.manual_seed(seed)
    config = tiny_config().to_dict() | settings
    return JNNForOneShotObjectDetection(JNNDetectionConfig(**config)).eval()


def inputs(batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return example_inputs(tiny_config(), batch)


# --- the reference ---


def reference_model() -> tuple[JNNForOneShotObjectDetection, dict[str, str]]:
    """In train mode and double precision, with the reference's channels divided by 16; our names to its."""
    factor, size = PARITY["config"]["K"], PARITY["config"]["image_size"]
    darknet = JNNDarknetConfig(
        hidden_sizes=[size // factor for size in (32, 64, 128, 256, 512, 1024)], image_size=size
    )
    config = JNNDetectionConfig(
        backbone_config=darknet, passed_size=64 // factor, ignore_threshold=PARITY["config"]["thresh"]
    )
    weights = filled(PARITY["parameters"])
    renamed = convert_official_weights(weights, config)
    model = JNNForOneShotObjectDetection(config)
    report = model.load_state_dict(renamed, strict=False)
    assert not report.unexpected_keys and all("running_" in n or "num_batches" in n for n in report.missing_keys)
    return model.double().train(), dict(zip(renamed, weights, strict=True))


def reference_inputs() -> dict[str, torch.Tensor]:
    size = PARITY["config"]["image_size"]
    return {
        "pixel_values": (filled_pixels((2, 3, size, size), "jnn.target").double() + 2) / 4,
        "query_pixel_values": (filled_pixels((2, 3, size // 2, size // 2), "jnn.query").double() + 2) / 4,
    }


def close(found: torch.Tensor, expected, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


def test_the_reference_s_losses_gradients_and_statistics():
    model, names = reference_model()
    boxes, num_boxes = torch.tensor(PARITY["boxes"]), torch.tensor(PARITY["num_boxes"])[:, None]
    output = model(**reference_inputs(), boxes=boxes, num_boxes=num_boxes)
    output.loss.backward()
    close(output.losses["box"], PARITY["box"])
    close(output.losses["overlap"], PARITY["overlap"])
    close(output.deltas, PARITY["delta"])
    close(output.logits.squeeze(-1).sigmoid(), PARITY["conf"])
    for name, parameter in model.named_parameters():
        close(parameter.grad.norm(), PARITY["gradient_norms"][names[name]], rtol=1e-4)
    buffers = {name: value for name, value in model.named_buffers() if "running_" in name}
    for name, value in convert_official_weights(PARITY["statistics"], model.config).items():
        close(buffers.pop(name).norm(), value)
    assert not buffers


def test_the_reference_s_targets():
    model, _ = reference_model()
    with torch.no_grad():
        found = model(**reference_inputs()).pred_boxes
    boxes = torch.tensor(PARITY["boxes"])
    side = PARITY["config"]["image_size"] // 32
    anchors = grid_anchors(torch.tensor(ANCHORS), side, side)
    targets = model.assign(found * side, boxes * side, torch.tensor(PARITY["num_boxes"]), anchors, side)
    close(targets.overlap, PARITY["targets"]["overlap"])
    assert torch.equal(targets.scale, torch.tensor(PARITY["targets"]["scale"]))
    places = targets.assigned.nonzero().tolist()
    assert places == [[int(sample), int(place)] for sample, place, *_ in PARITY["targets"]["deltas"]]
    for sample, place, *deltas in PARITY["targets"]["deltas"]:
        close(targets.deltas[int(sample), int(place)], deltas)


def test_the_reference_s_detections():
    model, _ = reference_model()
    with torch.no_grad():
        outputs = model(**reference_inputs())
    found = model.post_process_one_shot_detection(outputs, target_sizes=[(100, 200)] * 2)
    for result, expected in zip(found, PARITY["detections"], strict=True):
        last = torch.tensor([199.0, 99.0, 199.0, 99.0])  # where the reference's pictures end
        close(torch.minimum(result["boxes"], last), [row[:4] for row in expected], rtol=1e-4, atol=1e-4)
        close(result["scores"], [row[4] for row in expected])


# --- section 11: sizes ---


def test_the_paper_s_network_has_its_size():
    with torch.device("meta"):
        model = JNNForOneShotObjectDetection(JNNDetectionConfig())
        output = model(torch.empty(1, 3, 416, 416), torch.empty(1, 3, 208, 208))
    assert sum(parameter.numel() for parameter in model.parameters()) == 52_102_073
    assert output.deltas.shape == output.pred_boxes.shape == (1, 845, 4) and output.logits.shape == (1, 845, 1)


# --- section 11: two streams ---


def test_gradients_reach_the_first_stage_through_both_pictures():
    model, batch = small_model(), inputs()
    for name in ("pixel_values", "query_pixel_values"):
        batch[name].requires_grad_()
    model(**batch).loss.backward()
    assert batch["pixel_values"].grad.abs().max() > 0 and batch["query_pixel_values"].grad.abs().max() > 0
    weight = model.backbone.stages[0][0].convolution.weight
    whole = weight.grad.clone()
    for name in ("pixel_values", "query_pixel_values"):
        model.zero_grad()
        black = inputs() | {name: torch.zeros_like(batch[name])}
        model(**black).loss.backward()
        assert weight.grad.abs().max() > 0 and not torch.allclose(weight.grad, whole)


def test_the_query_is_seen_unless_the_joints_copy_the_target():
    model, batch = small_model().train(), inputs()
    other = batch | {"query_pixel_values": inputs(seed=1)["query_pixel_values"]}
    assert not torch.allclose(model(**other).logits, model(**batch).logits)
    for joint in model.joints.values():
        joint.copy_first()
    assert torch.equal(model(**other).logits, model(**batch).logits)


def test_one_stream_is_the_same_network(tmp_path):
    model, batch = small_model(), inputs()
    for joint in model.joints.values():
        joint.copy_first()
        joint.norm = torch.nn.Identity()
        joint.negative_slope = 1.0
    _, merged = model.merge(batch["pixel_values"], batch["query_pixel_values"])
    torch.testing.assert_close(merged, model.backbone(batch["pixel_values"]).last_hidden_state)


# --- section 11: targets ---


def grid(model, rows: int = 3, columns: int = 4) -> torch.Tensor:
    return grid_anchors(torch.tensor(model.config.anchors), rows, columns)


def test_one_box_is_one_prediction_s():
    model = small_model()
    anchors = grid(model)
    box = torch.tensor([[[2.1, 0.2, 3.1, 1.6]]])  # centre in row 0, column 2; the shape of the second anchor
    far = torch.tensor([-9.0, -9.0, -8.0, -8.0]).expand(1, len(anchors), 4)
    targets = model.assign(far, box, torch.tensor([1]), anchors, columns=4)
    assert targets.assigned.nonzero().tolist() == [[0, 2 * 2 + 1]]
    torch.testing.assert_close(targets.deltas[0, 5], torch.tensor([0.6, 0.9, 1.0, 1.4 / 1.5]))
    assert targets.scale[0, 5] == 5 and targets.scale.sum() == 5 + len(anchors) - 1 and targets.overlap.sum() == 0


def test_perfect_predictions_have_no_loss_of_boxes():
    model = small_model()
    anchors = grid(model)
    boxes = torch.tensor([[[2.1, 0.2, 3.1, 1.6], [0.4, 1.1, 0.9, 1.6]], [[0.0, 2.0, 1.0, 2.5], [7.0, 7.0, 7.0, 7.0]]])
    deltas = torch.zeros(2, len(anchors), 4)
    for sample, number, place in ((0, 0, 5), (0, 1, 8), (1, 0, 17)):
        deltas[sample, place] = encode_boxes(boxes[sample, number], anchors[place])
    found = decode_boxes(deltas, anchors)
    targets = model.assign(found, boxes, torch.tensor([2, 1]), anchors, columns=4)
    assert targets.assigned.nonzero().tolist() == [[0, 5], [0, 8], [1, 17]]
    torch.testing.assert_close(targets.overlap, targets.assigned)
    losses = model.losses(deltas, targets.assigned, targets)
    assert losses["box"] < 1e-10 and losses["overlap"] < 1e-10
    # One wrong value of the three boxes: half its square over two samples.
    deltas[0, 5, 0] += 0.4
    torch.testing.assert_close(model.losses(deltas, targets.assigned, targets)["box"], torch.tensor(0.16 / 4))
    # The scale is squared: 25 for an object that is not seen, 1 for background that is taken for one.
    seen = targets.assigned.clone()
    seen[0, 5] = 0
    torch.testing.assert_close(model.losses(deltas, seen, targets)["overlap"], torch.tensor(25 / 4))
    seen = targets.assigned.clone()
    seen[0, 0] = 1
    torch.testing.assert_close(model.losses(deltas, seen, targets)["overlap"], torch.tensor(1 / 4))


def test_a_good_prediction_elsewhere_is_ignored():
    model = small_model()
    anchors = grid(model)
    box = torch.tensor([2.1, 0.2, 3.1, 1.6])
    found = torch.tensor([-9.0, -9.0, -8.0, -8.0]).repeat(1, len(anchors), 1)
    found[0, 20] = box + torch.tensor([0.0, 0.0, 0.0, 0.3])  # overlap 1.4 / 1.7 > 0.6
    found[0, 21] = box + torch.tensor([0.0, 0.0, 0.0, 1.4])  # overlap 0.5
    targets = model.assign(found, box.view(1, 1, 4), torch.tensor([1]), anchors, columns=4)
    assert targets.scale[0, 20] == 0 and targets.scale[0, 21] == 1 and targets.assigned[0, 20] == 0


def test_padding_counts_for_nothing_and_boxes_stay_as_they_are():
    model, batch = small_model(), inputs()
    one = batch | {"num_boxes": torch.ones(3, dtype=torch.int64)}
    expected = model(**batch | {"boxes": batch["boxes"][:, :1], "num_boxes": None}).loss
    torch.testing.assert_close(model(**one).loss, expected)
    zeros = batch["boxes"].clone()
    zeros[:, 1] = 0
    torch.testing.assert_close(model(**one | {"boxes": zeros}).loss, expected)
    given = batch["boxes"].clone()
    model(**batch)
    assert torch.equal(batch["boxes"], given)


def test_targets_have_no_gradient():
    """The overlap that a confidence is compared with depends on the box, which gets nothing of its loss."""
    model = small_model(coord_scale=0.0)
    model(**inputs()).loss.backward()
    gradient = model.predictor.weight.grad.view(2, 5, -1)
    assert (gradient[:, :4] == 0).all() and (gradient[:, 4] != 0).any()


# --- section 11: boxes ---


def test_decoding_undoes_encoding():
    generator = torch.Generator().manual_seed(0)
    anchors = grid_anchors(torch.tensor(ANCHORS), 13, 13)
    corners = 10 * torch.rand(len(anchors), 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.1 + 3 * torch.rand(len(anchors), 2, generator=generator)], dim=1)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, rtol=0, atol=1e-5)


def test_suppression_is_the_naive_one():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.5 * torch.rand(60, 2, generator=generator)], dim=1)
    scores = torch.rand(60, generator=generator)
    left = sorted(range(60), key=lambda number: -scores[number])
    expected = []
    while left:
        best = left.pop(0)
        expected.append(best)
        left = [number for number in left if naive_iou(boxes[best].tolist(), boxes[number].tolist()) < 0.3]
    assert non_maximum_suppression(boxes, scores, 0.3).tolist() == expected and 5 < len(expected) < 50
    assert non_maximum_suppression(boxes[:0], scores[:0], 0.3).shape == (0,)


def naive_iou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in range(2))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_space_to_depth_is_a_permutation():
    hidden = torch.arange(64 * 26 * 26, dtype=torch.float32).view(1, 64, 26, 26)
    packed = space_to_depth(hidden)
    assert packed.shape == (1, 256, 13, 13) and torch.equal(packed.flatten().sort().values, hidden.flatten())
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = 64 * (2 * row + column)
        assert torch.equal(packed[:, place : place + 64], hidden[:, :, row::2, column::2])


def test_post_processing_keeps_the_sure_boxes_within_the_picture():
    boxes = torch.tensor([[[-0.1, 0.2, 0.5, 0.6], [0.0, 0.2, 0.5, 0.65], [0.6, 0.6, 1.2, 0.9], [0.1, 0.1, 0.2, 0.2]]])
    outputs = JNNDetectionOutput(pred_boxes=boxes, logits=torch.tensor([2.0, 3.0, 1.0, -1.0])[None, :, None])
    model = small_model()
    (found,) = model.post_process_one_shot_detection(outputs, target_sizes=[(100, 200)])
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 20, 100, 65], [120, 60, 200, 90]]))
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 1.0]).sigmoid())
    assert len(model.post_process_one_shot_detection(outputs, threshold=0.2)[0]["boxes"]) == 3
    assert len(model.post_process_one_shot_detection(outputs, threshold=0.99)[0]["boxes"]) == 0
    with pytest.raises(ValueError, match="2 sizes for 1 pictures"):
        model.post_process_one_shot_detection(outputs, target_sizes=[(1, 1)] * 2)


# --- what the conformance suite asks of models ---


def test_round_trips_and_auto_classes(tmp_path):
    model, batch = small_model(), inputs()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    expected = model(**batch)
    for auto_class in (AutoModelForPreTraining, AutoModelForObjectDetection):
        loaded = auto_class.from_pretrained(tmp_path).eval()
        assert type(loaded) is JNNForOneShotObjectDetection and torch.equal(loaded(**batch).loss, expected.loss)
    features = AutoModel.from_pretrained(tmp_path).eval()
    assert type(features) is JNNDetectionModel
    merged = features(batch["pixel_values"], batch["query_pixel_values"]).last_hidden_state
    torch.testing.assert_close(merged, expected.last_hidden_state)
    model.backbone.save_pretrained(tmp_path / "darknet")
    started = JNNForOneShotObjectDetection.from_backbone(str(tmp_path / "darknet"))
    assert torch.equal(
        started.backbone.stages[5][4].convolution.weight, model.backbone.stages[5][4].convolution.weight
    )


def test_every_parameter_gets_a_gradient_in_half_precision_too():
    for dtype in (None, torch.bfloat16):
        model = small_model().train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            loss = model(**inputs()).loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert small_model().to(torch.bfloat16)(**inputs()).loss.isfinite()


def test_predictions_compile_to_one_graph():
    model, batch = small_model(), inputs()
    counter = CompileCounter()
    pictures = (batch["pixel_values"], batch["query_pixel_values"])
    compiled = torch.compile(model, backend=counter, fullgraph=True)(*pictures)
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled.logits, model(*pictures).logits)


@pytest.mark.parametrize("channels", [1, 4])
def test_rectangles_channels_and_pictures(channels):
    darknet = tiny_config().backbone_config.to_dict() | {"num_channels": channels}
    model = small_model(backbone_config=darknet)
    target, query = torch.rand(1, channels, 64, 96), torch.rand(1, channels, 32, 48)
    loss = model(target, query, boxes=torch.tensor([[[0.1, 0.1, 0.9, 0.5]]])).loss
    loss.backward()
    model.predictor.bias.data += 100  # finds something
    panels = model.pictures(target, query)
    assert {panel.shape for panel in panels.values()} == {target.shape}
    assert (panels["found"] == target).any() and (model(target, query, return_loss=False).loss is None)


def test_the_plain_trainer_trains_and_evaluates(tmp_path):
    samples = [{name: value[number] for name, value in inputs(8).items()} for number in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=4, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=small_model(), args=args, train_dataset=samples, eval_dataset=samples)
    assert trainer.train().training_loss > 0 and trainer.evaluate()["eval_loss"] > 0


def test_train_py_says_what_trains_it(capsys):
    with pytest.raises(SystemExit):
        main(
            ["--method", "jnn_detection", "--dataset_name", "digits", "--output_dir", "/nowhere", "--use_cpu", "true"]
        )
    assert "model_cards/jnn_detection.md" in capsys.readouterr().err


def test_what_cannot_be_is_named():
    model, batch = small_model(), inputs()
    with pytest.raises(ValueError, match=r"\(3, 3, 64, 64\).*half.*\(3, 3, 32, 32\)"):
        model(**batch | {"query_pixel_values": batch["pixel_values"]})
    with pytest.raises(ValueError, match="6 channels"):
        model(**batch | {"pixel_values": batch["pixel_values"].repeat(1, 2, 1, 1)})
    with pytest.raises(ValueError, match=r"`boxes` has shape \(3, 4\)"):
        model(**batch | {"boxes": batch["boxes"][:, 0]})
    with pytest.raises(ValueError, match="`num_boxes`"):
        model(**batch | {"num_boxes": torch.ones(2)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"joint_stages": ()}, "query would not be seen"),
        ({"joint_stages": (0, 1)}, "1 to 5"),
        ({"anchors": [[1.0, 0.0]]}, "anchors is"),
        ({"ignore_threshold": 2.0}, "ignore_threshold is 2.0"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        JNNDetectionConfig(**settings)


# --- data ---

CANVAS, ITEM, HUES = 64, 20, 24
UNSEEN = range(0, HUES, 4)
SEEN = [hue for hue in range(HUES) if hue not in UNSEEN]


def canvases(count: int, hues, seed: int = 0):
    """Canvases with four patches each, of different hues, their classes: pictures, boxes (4, 4) and classes (4,)."""
    numbers = random.Random(seed)
    shades = np.random.default_rng(seed)
    pictures, boxes, classes = [], [], []
    for _ in range(count):
        canvas, placed = np.zeros((CANVAS, CANVAS, 3)), []
        chosen = numbers.sample(list(hues), 4)
        for hue, (row, column) in zip(chosen, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
            top, left = (CANVAS // 2 * part + numbers.randrange(CANVAS // 2 - ITEM) for part in (row, column))
            shade = shades.uniform(0.6, 1.0, (ITEM, ITEM, 1))
            canvas[top : top + ITEM, left : left + ITEM] = 255 * shade * colorsys.hsv_to_rgb(hue / HUES, 1, 1)
            placed.append([left / CANVAS, top / CANVAS, (left + ITEM) / CANVAS, (top + ITEM) / CANVAS])
        pictures.append(Image.fromarray(canvas.astype(np.uint8)))
        boxes.append(torch.tensor(placed))
        classes.append(torch.tensor(chosen))
    return pictures, boxes, classes


def detection_data(count: int, hues, seed: int = 0, **settings) -> OneShotDetectionData:
    processor = OneShotDetectionProcessor((CANVAS, CANVAS), (CANVAS // 2, CANVAS // 2))
    return OneShotDetectionData(*canvases(count, hues, seed), processor, **settings)


def test_a_sample_is_a_query_and_what_there_is_of_its_class():
    data = detection_data(40, range(HUES), seen_classes=SEEN, training=False)
    labels = set()
    for index in range(40):
        sample = data[index]
        labels.add(int(sample["classes"]))
        assert sample["pixel_values"].shape == (3, 64, 64) and sample["query_pixel_values"].shape == (3, 32, 32)
        (box,) = sample["boxes"][: sample["num_boxes"]]
        # The target is one of the pictures, and the box one of its class.
        shown = (255 * sample["pixel_values"]).round().byte().permute(1, 2, 0).numpy()
        (number,) = (n for n, picture in enumerate(data.pictures) if np.array_equal(np.asarray(picture), shown))
        place = data.classes[number].tolist().index(int(sample["classes"]))
        torch.testing.assert_close(box, data.boxes[number][place].clamp(0.001, 0.999))
        color = sample["query_pixel_values"].mean(dim=(1, 2))
        hue = HUES * colorsys.rgb_to_hsv(*color.tolist())[0]
        assert min(abs(hue - int(sample["classes"])), HUES - abs(hue - int(sample["classes"]))) < 0.2
    assert labels <= set(SEEN) and len(labels) > 6
    again = detection_data(40, range(HUES), seen_classes=SEEN, training=False)
    assert all(torch.equal(value, again[7][name]) for name, value in data[7].items())
    again.set_epoch(1)
    assert any(not torch.equal(data[index]["boxes"], again[index]["boxes"]) for index in range(5))


def test_augmented_boxes_stay_on_what_they_hold():
    """A bright square in the dark: what the box says is what lies in it, wherever the crop goes."""
    generator = torch.Generator().manual_seed(0)
    picture = Image.new("RGB", (200, 100))
    picture.paste((200, 60, 60), (80, 30, 120, 70))
    boxes, found = torch.tensor([[0.4, 0.3, 0.6, 0.7]]), []
    for _ in range(40):
        changed, moved = augment(picture, boxes, lambda n: torch.rand(n, generator=generator).tolist())
        pixels = np.asarray(changed).max(axis=2) > 60
        height, width = pixels.shape
        rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
        seen = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
        np.testing.assert_allclose(moved[0].numpy(), seen, atol=1e-6)
        found.append((width, height, tuple(seen)))
    assert len({size[:2] for size in found}) > 30


def test_data_that_do_not_belong_together_are_refused():
    pictures, boxes, classes = canvases(3, range(HUES))
    processor = OneShotDetectionProcessor()
    with pytest.raises(ValueError, match="3 pictures, boxes for 2"):
        OneShotDetectionData(pictures, boxes[:2], classes, processor)
    with pytest.raises(ValueError, match="No class is in two pictures"):
        OneShotDetectionData(pictures, boxes, classes, processor, seen_classes=[77])
    with pytest.raises(ValueError, match="3 targets and 1 queries"):
        processor(pictures, pictures[0])


# --- section 11: end to end ---


def average_precision(model, samples: list[dict], query_of: list[int]) -> float:
    """Area under precision over recall at an overlap of 0.5, with the queries of other samples."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    found, total = [], int(batch["num_boxes"].sum())
    with torch.no_grad():
        outputs = model.eval()(batch["pixel_values"], batch["query_pixel_values"][query_of])
    for number, result in enumerate(model.post_process_one_shot_detection(outputs, threshold=0.02)):
        left = batch["boxes"][number, : batch["num_boxes"][number]]
        for score, box in zip(result["scores"].tolist(), result["boxes"], strict=True):
            overlaps = box_iou(box, left)
            hit = len(left) > 0 and bool(overlaps.max() > 0.5)
            if hit:
                left = left[torch.arange(len(left)) != overlaps.argmax()]
            found.append((score, hit))
    hits = torch.tensor([hit for _, hit in sorted(found, reverse=True)], dtype=torch.float64)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / total)


@pytest.mark.slow
def test_it_finds_unseen_hues_by_the_right_query(tmp_path):
    """The toy is simple on purpose: what is to be found is the patch of the query's hue among three others."""
    train = detection_data(1600, SEEN, training=False)
    unseen = detection_data(80, UNSEEN, seed=1, training=False)
    torch.manual_seed(0)
    darknet = JNNDarknetConfig(hidden_sizes=(8, 16, 16, 32, 32, 64), image_size=CANVAS)
    config = JNNDetectionConfig(backbone_config=darknet, anchors=[[0.6, 0.6]], passed_size=16)
    model = JNNForOneShotObjectDetection(config)
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=400, per_device_train_batch_size=32, learning_rate=3e-3,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=train).train()
    samples = [unseen[index] for index in range(len(unseen))]
    classes = [int(sample["classes"]) for sample in samples]
    other = [next(j for j in range(len(samples)) if classes[j] != label) for label in classes]
    right = average_precision(model, samples, list(range(len(samples))))
    wrong = average_precision(model, samples, other)
    assert right > 0.3 and right > 2 * wrong, (right, wrong)


def test_it_is_in_the_catalogue_as_a_procedure():
    variant = get_variant("jnn_detection")
    assert (variant.kind, variant.family) == ("procedure", "siamese")
