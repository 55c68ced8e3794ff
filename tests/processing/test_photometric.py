"""Photometric changes: Pillow's results for the same factors, within the set strengths, each sample for itself."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from hf_masked.processing.photometric import Photometric
from hf_masked.randomness import given_draw, keyed_draw, sample_keys

# Places of the numbers that `Photometric` draws.
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SIGMA, SOLARIZE = range(9)
ORDER = slice(9, 13)
ALL = {
    "jitter_probability": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale_probability": 0.2,
    "blur_probability": 0.5,
    "solarize_probability": 0.2,
}


def picture(height: int = 24, width: int = 20) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def apply(settings: dict, pixels: torch.Tensor, **numbers: float) -> torch.Tensor:
    """Each number is 0, which every probability above 0 chooses, unless given by its place's name."""
    drawn = torch.zeros(len(pixels), 13)
    for name, number in numbers.items():
        drawn[:, globals()[name]] = number
    return Photometric(**settings)(pixels, given_draw(drawn))


def levels(pixels: torch.Tensor, image: Image.Image) -> float:
    """Largest difference in grey levels."""
    return (pixels - pixels_of(image)).abs().max().item() * 255


@pytest.mark.parametrize("number", [0.0, 0.2, 0.5, 0.7, 0.999])
@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_jitter_is_pillows_enhancement(name, enhancer, number):
    ours = apply({"jitter_probability": 1.0, name: 0.8}, pixels_of(picture()), **{name.upper(): number})
    assert levels(ours, enhancer(picture()).enhance(0.2 + 1.6 * number)) < 2


def test_each_picture_is_jittered_in_its_own_order():
    orders = list(itertools.permutations(range(4)))
    pixels = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)).expand(len(orders), -1, -1, -1)
    strengths = {"BRIGHTNESS": 0.9, "CONTRAST": 0.8, "SATURATION": 0.1, "HUE": 0.9}
    names = [name.lower() for name in strengths]
    drawn = torch.zeros(len(orders), 13)
    drawn[:, 1:5] = torch.tensor(list(strengths.values()))
    drawn[:, ORDER] = torch.tensor(orders).argsort(dim=1) / 4  # the number at an operation is its turn
    ours = Photometric(**ALL | {"jitter_probability": 1.0} | dict.fromkeys(list(ALL)[5:], 0.0))(
        pixels, given_draw(drawn)
    )
    for order, found in zip(orders, ours, strict=True):
        expected = pixels[:1]
        for operation in order:
            name = names[operation]
            expected = apply({"jitter_probability": 1.0, name: ALL[name]}, expected, **strengths)
        torch.testing.assert_close(found[None], expected, rtol=0, atol=1e-6)
    assert len(torch.unique(ours, dim=0)) > 12, "most orders differ in their result"


def test_orders_of_the_jitters_are_equally_frequent():
    drawn = keyed_draw(sample_keys(0, 0, range(4800)))(13)
    _, counts = drawn[:, ORDER].argsort(dim=1).unique(dim=0, return_counts=True)
    assert len(counts) == 24 and (counts - 200).abs().max() < 5 * 200**0.5


@pytest.mark.parametrize(("strength", "lowest"), [(0.4, 0.6), (1.5, 0.0)])
def test_factors_span_one_minus_to_one_plus_the_strength(strength, lowest):
    gray = torch.full((1, 3, 4, 4), 0.3)
    settings = {"jitter_probability": 1.0, "brightness": strength}
    assert apply(settings, gray, BRIGHTNESS=0.0).mean().item() == pytest.approx(0.3 * lowest)
    assert apply(settings, gray, BRIGHTNESS=1 - 2**-24).mean().item() == pytest.approx(0.3 * (1 + strength))


@pytest.mark.parametrize("number", [0.0, 0.3, 0.5, 0.9])
def test_hue_turns_the_colour_circle(number):
    ours = apply({"jitter_probability": 1.0, "hue": 0.4}, pixels_of(picture(4, 4)), HUE=number)
    for row in range(4):
        for column in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixels_of(picture(4, 4))[0, :, row, column].tolist())
            expected = colorsys.hsv_to_rgb((hue + (2 * number - 1) * 0.4) % 1, saturation, value)
            assert ours[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-4)


def test_gray_is_pillows_luminance():
    ours = apply({"grayscale_probability": 1.0}, pixels_of(picture()))
    assert torch.equal(ours[:, 0], ours[:, 1]) and torch.equal(ours[:, 0], ours[:, 2])
    assert levels(ours, picture().convert("L").convert("RGB")) < 1


def test_solarize_inverts_the_bright_half():
    ours = apply({"solarize_probability": 1.0}, torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0]).view(1, 1, 1, 5))
    assert ours.flatten().tolist() == pytest.approx([0.0, 0.3, 0.5, 0.2, 0.0])


def test_blur_is_a_gaussian_of_the_drawn_width():
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1.0
    for number, sigma in ((0.0, 0.5), (0.5, 1.5), (1 - 2**-24, 2.5)):
        row = apply({"blur_probability": 1.0, "blur_sigma": (0.5, 2.5)}, point, SIGMA=number)[0, 0].sum(dim=0)
        gaussian = (-((torch.arange(41) - 20.0) ** 2) / (2 * sigma**2)).exp()
        torch.testing.assert_close(row, gaussian / gaussian.sum(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 4)])
def test_blur_fits_into_small_pictures(size):
    pixels = torch.rand(2, 3, *size)
    assert apply({"blur_probability": 1.0}, pixels, SIGMA=0.9).shape == pixels.shape


@pytest.mark.parametrize("settings", [{}, {"jitter_probability": 1.0}, ALL | dict.fromkeys(list(ALL)[5:], 0.0)])
def test_nothing_changes_without_strength_or_choice(settings):
    pixels = pixels_of(picture())
    # JITTER at 0.9 is above the probability of `ALL`, below 1.
    assert torch.equal(apply(settings, pixels, JITTER=0.9, BRIGHTNESS=0.9, HUE=0.9), pixels)


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_values_stay_in_range_for_any_channels(channels):
    pixels = torch.rand(64, channels, 8, 8)
    changed = Photometric(**ALL)(pixels, keyed_draw(sample_keys(0, 0, range(64))))
    assert changed.shape == pixels.shape and changed.min() >= 0 and changed.max() <= 1
    assert not torch.equal(changed, pixels)


def test_samples_do_not_depend_on_their_batch():
    pixels, keys = torch.rand(16, 3, 8, 8), sample_keys(0, 0, range(16))
    together = Photometric(**ALL)(pixels, keyed_draw(keys))
    alone = [Photometric(**ALL)(pixels[i : i + 1], keyed_draw(keys[i : i + 1])) for i in range(16)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["jitter", "grayscale", "blur", "solarize"])
def test_share_of_changed_pictures_is_the_probability(name):
    pixels = torch.rand(1, 3, 4, 4).expand(2000, -1, -1, -1)
    settings = {f"{name}_probability": 0.3, "brightness": 0.4, "blur_sigma": (1.0, 2.0)}
    changed = Photometric(**settings)(pixels, keyed_draw(sample_keys(0, 0, range(2000))))
    share = (changed != pixels).flatten(1).any(dim=1).float().mean().item()
    assert share == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 2000) ** 0.5)


def test_settings_do_not_shift_later_numbers():
    positions = []
    for settings in ({}, ALL):
        draw = keyed_draw(sample_keys(0, 0, range(2)))
        Photometric(**settings)(torch.rand(2, 3, 8, 8), draw)
        positions.append(draw(1))
    assert torch.equal(*positions)


def test_dict_makes_the_same_settings():
    settings = Photometric(**ALL, blur_sigma=[0.2, 1.0])
    assert Photometric(**settings.to_dict()) == settings


@pytest.mark.parametrize(
    "settings",
    [
        {"jitter_probability": 1.1},
        {"solarize_probability": -0.1},
        {"brightness": -0.4},
        {"hue": 0.6},
        {"blur_sigma": (0.0, 1.0)},
        {"blur_sigma": (2.0, 1.0)},
    ],
)
def test_impossible_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"photometric.{next(iter(settings))} is"):
        Photometric(**settings)
