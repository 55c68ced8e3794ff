"""Errors of disparities by hand, the evaluate module, and the helper from two pictures to a map."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_masked import MAEConfig, PSMNetForStereoMatching, StereoImageProcessor
from hf_masked.cli import app
from hf_masked.data import SyntheticStereo
from hf_masked.evaluation.metrics import load_metric
from hf_masked.evaluation.stereo import (
    StereoMatch,
    StereoMatcher,
    bad_pixel_rate,
    d1_error,
    end_point_error,
    evaluate_pairs,
    stereo_errors,
)
from hf_masked.modeling.masked_image.mae import tiny_config as tiny_mae
from hf_masked.modeling.siamese.psmnet import tiny_config
from hf_masked.processing.stereo import read_disparity

# Off by 1, 2 beyond what is known, 4 (above 3 and 5 %), 4 (above 3, below 5 %), 3 exactly.
TRUTH = torch.tensor([[10.0, 0.0, 20.0, 100.0, 30.0]])
PREDICTED = torch.tensor([[11.0, 2.0, 16.0, 104.0, 33.0]])


def test_errors_by_hand():
    assert end_point_error(PREDICTED, TRUTH) == pytest.approx((1 + 4 + 4 + 3) / 4)
    assert bad_pixel_rate(PREDICTED, TRUTH) == 2 / 4
    assert bad_pixel_rate(PREDICTED, TRUTH, threshold=0.5) == 1.0
    assert d1_error(PREDICTED, TRUTH) == 1 / 4
    # Without what lies beyond the largest disparity.
    assert stereo_errors(PREDICTED, TRUTH, max_disparity=100) == pytest.approx(
        {"end_point_error": 8 / 3, "bad_pixel_rate": 1 / 3, "d1_error": 1 / 3}
    )


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="must be of one size"):
        end_point_error(PREDICTED[:, :3], TRUTH)
    with pytest.raises(ValueError, match="no valid pixel"):
        d1_error(PREDICTED, torch.zeros_like(TRUTH))


def test_it_is_a_module_of_evaluate():
    # Over all pixels of all pairs, not the mean of the pairs' means.
    maps = {"predictions": [PREDICTED.tolist(), [[5.0, 5.0]]], "references": [TRUTH.tolist(), [[5.0, 0.0]]]}
    found = load_metric("stereo").compute(**maps)
    assert found == pytest.approx({"end_point_error": 12 / 5, "bad_pixel_rate": 2 / 5, "d1_error": 1 / 5})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("psmnet")
    torch.manual_seed(0)
    PSMNetForStereoMatching(tiny_config()).save_pretrained(folder)
    StereoImageProcessor(size=(32, 32)).save_pretrained(folder)
    random = np.random.default_rng(0)
    for side in ("left", "right"):
        Image.fromarray(random.integers(256, size=(40, 70, 3), dtype=np.uint8)).save(folder / f"{side}.png")
    Image.fromarray(np.full((40, 70), 20, dtype=np.uint8)).save(folder / "truth.png")
    return folder


def test_matcher_gives_a_map_of_the_pictures_size_and_its_picture(checkpoint, tmp_path):
    matcher = StereoMatcher.from_pretrained(str(checkpoint))
    files = str(checkpoint / "left.png"), str(checkpoint / "right.png")
    found = matcher(*files)
    assert found.disparity.shape == (40, 70) and 0 <= found.disparity.min() <= found.disparity.max() < 15.001
    pictures = [Image.open(file) for file in files]
    assert torch.equal(matcher(*pictures).disparity, found.disparity)
    inputs = matcher.processor([pictures])
    with torch.no_grad():
        expected = matcher.model(inputs["pixel_values"]).predicted_disparity[0, 8:, :70]
    torch.testing.assert_close(found.disparity, expected)
    picture = found.picture()
    assert picture.mode == "RGB" and picture.width > picture.height
    found.save(tmp_path / "values.png")
    torch.testing.assert_close(read_disparity(tmp_path / "values.png"), found.disparity, rtol=0, atol=1 / 512)


def test_far_is_dark_and_near_is_bright():
    ramp = torch.linspace(0, 10, 64).expand(32, 64)
    pixels = np.asarray(StereoMatch(ramp).picture().convert("L"), dtype=float)
    row = pixels[pixels.shape[0] // 2]
    width = int(0.7 * len(row))
    assert row[10:60].mean() + 50 < row[width - 60 : width - 10].mean()


def test_other_checkpoints_are_refused(tmp_path):
    config: MAEConfig = tiny_mae()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="matches no stereo pairs"):
        StereoMatcher.from_pretrained(str(tmp_path))


def test_command_line(checkpoint, tmp_path):
    files = [str(checkpoint / f"{side}.png") for side in ("left", "right")]
    truth = ["--truth", str(checkpoint / "truth.png"), "--truth-scale", "4"]
    written = ["--output", str(tmp_path / "map.png"), "--values", str(tmp_path / "values.png")]
    result = CliRunner().invoke(app, ["disparity", str(checkpoint), *files, *truth, *written])
    assert result.exit_code == 0, result.output
    error = end_point_error(read_disparity(tmp_path / "values.png"), torch.full((40, 70), 5.0))
    line = next(line for line in result.output.splitlines() if line.startswith("end_point_error"))
    assert float(line.split()[1]) == pytest.approx(error, abs=0.01)
    assert (tmp_path / "map.png").is_file()


def test_a_source_of_pairs_is_judged_as_a_whole(checkpoint):
    matcher = StereoMatcher.from_pretrained(str(checkpoint))
    source = SyntheticStereo(3, (32, 64), 12, seed=0)
    found = evaluate_pairs(matcher, source)
    pairs = [source.sample(index) for index in range(3)]
    each = [stereo_errors(matcher(pair.left, pair.right).disparity, pair.disparity) for pair in pairs]
    assert found["pairs"] == 3
    for name in each[0]:
        assert found[name] == pytest.approx(sum(errors[name] for errors in each) / 3)
