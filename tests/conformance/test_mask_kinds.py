"""Every kind of mask goes with every method that masks patches, whoever draws it: the processor or the model."""

import pytest
import torch

import hf_masked
from hf_masked.modeling.masked_patches import MaskedPatchesConfig
from hf_masked.processing.masks import CLIP_MASKS, MASKS, PLANE_MASKS
from tests.conformance.cases import tiny_model, users_samples


@pytest.fixture
def config(variant):
    if not issubclass(variant.config, MaskedPatchesConfig):
        pytest.skip(f"{variant.name} does not mask patches of pictures.")
    # A ratio that every kind can make on every grid: three of four.
    return type(variant.tiny_config())(**variant.tiny_config().to_dict() | {"mask_ratio": 0.75})


def skip_unless_it_fits(variant, kind: str) -> None:
    if kind in (PLANE_MASKS if variant.config.modality == "video" else CLIP_MASKS):
        pytest.skip(f"Masks of the kind {kind!r} are not for {variant.config.modality}s.")


@pytest.mark.parametrize("kind", MASKS)
def test_method_learns_from_masks_of_the_processor(variant, config, kind):
    skip_unless_it_fits(variant, kind)
    settings = config.processor_settings() | {"mask_kind": kind, "mask_options": {}}
    processor = getattr(hf_masked, config.processor)(**settings)
    batch = processor(**users_samples(variant, processor, 3), training=True, seed=1)
    model = tiny_model(variant, config).train()
    output = model(**batch)
    assert torch.equal(output.mask.flatten(1), batch["bool_masked_pos"].flatten(1))
    output.loss.backward()
    gradient = sum(p.grad.abs().sum() for p in model.backbone.parameters() if p.grad is not None)
    assert torch.isfinite(output.loss) and gradient > 0


@pytest.mark.parametrize("kind", MASKS)
def test_model_draws_the_masks_that_its_processor_draws(variant, config, kind):
    skip_unless_it_fits(variant, kind)
    if config.processor_settings()["mask_kind"] == "model":
        pytest.skip(f"{variant.name} chooses its masks itself.")
    settings = {name: value for name, value in config.to_dict().items() if name != "mask_options"}
    config = type(config)(**settings | {"mask_kind": kind})
    settings = config.processor_settings()
    processor = getattr(hf_masked, config.processor)(**settings)
    model = tiny_model(variant, config)
    handed = processor(**users_samples(variant, processor, 4), training=True, seed=0)["bool_masked_pos"].flatten(0, -2)
    pixel_values = torch.zeros(len(handed), config.num_channels, *processor.size.values())
    drawn = model.draw_mask(pixel_values, processor.mask_grid, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == handed.shape and drawn.dtype == torch.bool
    assert drawn.sum(1).tolist() == handed.sum(1).tolist()
