"""VQ-KD against its reference, and the checks of BEiT v2's spec (section 11) that concern the tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPVisionConfig, ViTConfig, ViTModel

from hf_masked import VQKDConfig, VQKDForPreTraining, VQKDModel
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_latent.vqkd import convert_official_weights, official_config, tiny_config
from hf_masked.modeling.parts.codebooks import cosine_kmeans
from hf_masked.modeling.parts.patches import patchify
from hf_masked.modeling.registry import get_variant
from hf_masked.training.optimization import parameter_groups
from tests.conformance.test_training import trainer_of, weights
from tests.modeling.masked_image.short_runs import fashion
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "vqkd.json").read_text())

VIT = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8}


def tiny_model(seed: int = 0, **settings) -> VQKDForPreTraining:
    torch.manual_seed(seed)
    return VQKDForPreTraining(VQKDConfig(**tiny_config().to_dict() | settings))


# The reference, through the stored values


def official_weights(run: str) -> dict[str, torch.Tensor]:
    stored = PARITY["pretraining"][run]
    official = filled(stored["parameters"])
    official["quantize.embedding.weight"] = F.normalize(official["quantize.embedding.weight"], dim=1)
    codes = torch.zeros(stored["config"]["n_embed"])
    begun = torch.tensor([not stored["config"]["kmeans"]]).float()
    return official | {"quantize.cluster_size": codes, "quantize.embedding.initted": begun}


def reference_config(run: str) -> VQKDConfig:
    reference = PARITY["pretraining"][run]["config"]
    form = {"image_size": reference["img_size"], "patch_size": reference["patch_size"]}
    backbone_config = ViTConfig(
        hidden_size=reference["embed_dim"],
        num_hidden_layers=reference["depth"],
        num_attention_heads=reference["num_heads"],
        intermediate_size=reference["embed_dim"] * reference["mlp_ratio"],
        layer_norm_eps=1e-6,
        **form,
    )
    return VQKDConfig(
        backbone_config=backbone_config,
        codebook_size=reference["n_embed"],
        code_dim=reference["code_dim"],
        kmeans_init=reference["kmeans"],
        decoder_hidden_size=reference["decoder_embed_dim"],
        decoder_num_hidden_layers=reference["decoder_depth"],
        decoder_num_attention_heads=reference["num_heads"],
        decoder_intermediate_size=reference["decoder_embed_dim"] * reference["mlp_ratio"],
        teacher_config=ViTConfig(**VIT | form, hidden_size=reference["out_dim"]),
    )


def run_as_reference(run: str):
    stored, config = PARITY["pretraining"][run], reference_config(run)
    reference = stored["config"]
    model = VQKDForPreTraining(config).train()
    model.load_state_dict(convert_official_weights(official_weights(run), config))
    size, units = reference["img_size"], (reference["img_size"] // reference["patch_size"]) ** 2
    target = filled_pixels((reference["batch"], units, reference["out_dim"]), f"{run}.target")
    model.teacher.features = lambda pixel_values, grid: target
    # The reference was given values in [0, 1); ours come normalised to [-1, 1).
    pixels = filled_pixels((reference["batch"], 3, size, size), f"{run}.pixels") / 2
    return stored, model, model(pixels)


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_losses_tokens_and_features_are_the_references(run):
    stored, model, output = run_as_reference(run)
    if "codebook_before" in stored:
        close(model.codebook.vectors, stored["codebook_before"])
    assert output.token_ids.tolist() == stored["token_ids"]
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    for part in ("distillation", "commitment"):
        assert output.losses[part].item() == pytest.approx(stored[part], rel=1e-5), part
    close(output.reconstruction, stored["reconstruction"])


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_codebook_moves_as_the_references(run):
    stored, model, _ = run_as_reference(run)
    model.update_twins()
    close(model.codebook.vectors, stored["codebook"])
    close(model.codebook.usage, stored["usage"])


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_are_the_references(run):
    stored, model, output = run_as_reference(run)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = set()
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        is_bias = name.endswith(("q_bias", "v_bias"))
        names = [name[:-6] + "q_bias", name[:-6] + "v_bias"] if is_bias else [name]
        probe = {name: torch.zeros(stored["parameters"][name]) for name in names}
        ours = list(convert_official_weights(probe, model.config))
        joined = torch.cat([gradients[converted].flatten() for converted in ours])
        ours_norm = (joined.chunk(3)["qkv".index(name[-6])] if is_bias else joined).norm().item()
        assert ours_norm == pytest.approx(norm, rel=1e-4), name
        compared |= set(ours)
    assert compared == gradients.keys()


def released(target: int) -> dict[str, torch.Tensor]:
    """A released tokenizer without values, as far as its form tells the config."""
    stored = PARITY["pretraining"]["three_layers"]["parameters"]
    sizes = {32: 768, 64: 3072, 24: 768, 48: 3072, 12: target}
    shapes = {name: [sizes.get(side, side) for side in shape] for name, shape in stored.items()}
    shapes["encoder.patch_embed.proj.weight"] = [768, 3, 16, 16]
    shapes["encoder.pos_embed"] = [1, 197, 768]
    shapes["quantize.embedding.weight"] = [8192, 32]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(("target", "form", "projection"), [(512, "clip_vision_model", True), (768, "vit", False)])
def test_config_of_released_models_is_read_from_the_shapes(target, form, projection):
    config = official_config(released(target))
    assert (config.teacher_config.model_type, config.teacher_projection) == (form, projection)
    assert (config.target_size, config.codebook_size, config.code_dim) == (target, 8192, 32)
    assert (config.decoder_num_hidden_layers, config.decoder_num_attention_heads) == (3, 12)
    assert (config.backbone_config.num_attention_heads, config.backbone_config.image_size) == (12, 224)
    with pytest.raises(ValueError, match="100 wide; known are 512"):
        official_config(released(100))


def test_official_file_converts_strictly(tmp_path):
    # What released files hold besides.
    others = ("teacher_model.visual.proj", "scaling_layer.shift", "quantize.embedding.cluster_size")
    official = official_weights("three_layers") | {name: torch.zeros(2, 2) for name in others}
    torch.save({"model": official, "epoch": 99}, tmp_path / "vqkd.pth")
    config = reference_config("three_layers")
    model = convert(get_variant("vqkd"), tmp_path / "vqkd.pth", config)
    assert isinstance(model, VQKDForPreTraining) and model.codebook.begun
    assert torch.equal(model.codebook.vectors, official["quantize.embedding.weight"])
    torch.save({"model": official | {"encoder.norm.weight": torch.zeros(32)}}, tmp_path / "vqkd.pth")
    with pytest.raises(ValueError, match=r"left over: .*norm\.weight"):
        convert(get_variant("vqkd"), tmp_path / "vqkd.pth", config)


# The spec's section 11


def step(model, pixel_values, learning_rate: float = 1e-3):
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.05), lr=learning_rate)
    output = model.train()(pixel_values)
    output.loss.backward()
    optimizer.step()
    model.update_twins()
    return output


def test_codebook_is_of_unit_vectors_and_moves_without_gradient_or_optimizer():
    """Check 2; the codes that move, and eval mode, are in tests/modeling/parts/test_codebooks.py."""
    model = tiny_model(kmeans_init=False)
    before = model.codebook.vectors.clone()
    output = step(model, torch.randn(2, 3, 32, 32))
    used = torch.zeros(16, dtype=torch.bool).index_fill(0, output.token_ids.unique(), True)
    moved = (model.codebook.vectors != before).any(dim=1)
    assert torch.equal(moved, used) and used.any() and not used.all()
    torch.testing.assert_close(model.codebook.vectors.norm(dim=1), torch.ones(16))
    assert not any("codebook" in name for name, _ in model.named_parameters())


def test_tokenizer_in_eval_mode_changes_nothing_and_in_training_mode_neither():
    """Check 2: labelling leaves the tokenizer as it is, bit for bit."""
    tokenizer = VQKDModel(tiny_config())
    before = {name: value.clone() for name, value in tokenizer.named_buffers()}
    pixel_values = torch.randn(3, 3, 32, 32)
    ids = [tokenizer.train(mode)(pixel_values).token_ids for mode in (True, False, False)]
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[1], ids[2]) and ids[0].shape == (3, 16)
    for name, value in tokenizer.named_buffers():
        assert torch.equal(value, before[name]), name


def test_gradient_passes_straight_through_the_codebook():
    """Check 3: the decoder's gradient at the encoder's vectors is that at the codes."""
    model = tiny_model()
    seen = {}

    def keep(module, inputs):
        inputs[0].retain_grad()
        seen["codes"] = inputs[0]

    model.decoder.register_forward_pre_hook(keep)
    make = model.unit_vectors

    def vectors(tokens):
        seen["vectors"] = make(tokens)
        seen["vectors"].retain_grad()
        return seen["vectors"]

    model.unit_vectors = vectors
    output = model(torch.randn(2, 3, 32, 32))
    codes = model.codebook.vectors[output.token_ids]
    torch.testing.assert_close(seen["codes"], codes)
    output.reconstruction.square().sum().backward()
    assert torch.equal(seen["vectors"].grad, seen["codes"].grad) and seen["codes"].grad.abs().max() > 0


def test_teacher_is_frozen_and_stays_out_of_optimizer_and_checkpoint(tmp_path):
    """Check 4."""
    model = tiny_model()
    pixel_values = torch.randn(2, 3, 32, 32)
    loss = step(model, pixel_values).loss
    teacher = list(model.teacher.encoder(model.device).parameters())
    assert teacher and all(not p.requires_grad and p.grad is None for p in teacher)
    ours = {id(p) for group in parameter_groups(model, weight_decay=0.05) for p in group["params"]}
    assert not ours & {id(p) for p in teacher}
    model.save_pretrained(tmp_path)
    loaded, report = VQKDForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and not any("teacher" in name for name in model.state_dict())
    assert torch.equal(loaded.eval()(pixel_values).loss, model.eval()(pixel_values).loss) and loss > 0


def test_loss_is_the_papers_equation_written_as_loops():
    model = tiny_model(commitment_weight=0.5).train()
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    target = model.teacher.features(pixel_values, (4, 4))
    vectors = model.unit_vectors(output.last_hidden_state)
    codes = model.codebook.vectors[output.token_ids]
    features = zip(output.reconstruction.flatten(0, 1), target.flatten(0, 1), strict=True)
    cosines = [a @ b / (a.norm() * b.norm()) for a, b in features]
    distances = [(a - b).square().sum() / 8 for a, b in zip(vectors.flatten(0, 1), codes.flatten(0, 1), strict=True)]
    expected = 1 - torch.stack(cosines).mean() + 0.5 * torch.stack(distances).mean()
    torch.testing.assert_close(output.loss, expected)


def test_accumulation_gives_one_large_batchs_codebook(tmp_path):
    """Check 8 for accumulated batches; for two processes it is the conformance suite's, with k-means."""
    config = VQKDConfig(**tiny_config().to_dict() | {"kmeans_init": False})
    variant = replace(get_variant("vqkd"), tiny_config=lambda: config)
    short = {"max_steps": 2, "save_strategy": "no"}
    small = trainer_of(variant, tmp_path / "small", gradient_accumulation_steps=2, **short)
    large = trainer_of(variant, tmp_path / "large", per_device_train_batch_size=8, **short)
    for trainer in (small, large):
        trainer.train()
    expected = weights(large)
    for name, value in weights(small).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-4, msg=name)
    assert expected["codebook.usage"].sum() > 0


def test_clips_features_are_normed_and_projected():
    """As the class token is: CLIP's own image features are its projected first token."""
    form = CLIPVisionConfig(**VIT, hidden_size=16, projection_dim=12)
    with pytest.raises(ValueError, match="vit, which has no projection"):
        tiny_model(teacher_projection=True)
    model = tiny_model(teacher_config=form, teacher_projection=True)
    pixel_values = torch.randn(2, 3, 32, 32)
    features = model.teacher.features(pixel_values, (4, 4))
    clip = model.teacher.encoder(model.device)
    tokens = clip.vision_model(pixel_values).last_hidden_state[:, 1:]
    torch.testing.assert_close(features, clip.visual_projection(model.teacher._norm(tokens)))
    assert model(pixel_values).reconstruction.shape == features.shape == (2, 16, 12)


def test_projection_comes_with_the_checkpoint_of_clip(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = VIT | {"hidden_size": 16, "projection_dim": 12}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    clip.save_pretrained(tmp_path)
    model = tiny_model(teacher=str(tmp_path), teacher_config=None, teacher_projection=True)
    assert model.config.target_size == 12
    teacher = model.teacher.encoder(model.device)
    assert torch.equal(teacher.visual_projection.weight, clip.visual_projection.weight)


def test_one_tokenizer_for_several_picture_sizes():
    tokenizer = VQKDModel(tiny_config()).eval()
    assert tokenizer(torch.randn(1, 3, 48, 64)).token_ids.shape == (1, 48)


def test_configs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="no teacher"):
        VQKDConfig()
    with pytest.raises(ValueError, match=r"codebook_decay is 1\.0"):
        tiny_model(codebook_decay=1.0)
    with pytest.raises(ValueError, match="codebook_size=1"):
        tiny_model(codebook_size=1)
    with pytest.raises(ValueError, match="no multiple of decoder_num_attention_heads=3"):
        tiny_model(decoder_num_attention_heads=3)


def test_learns_more_than_a_constant_from_a_random_teacher():
    """The experiment, in seconds: the loss of the best constant prediction is 1 - |mean unit target|."""
    torch.manual_seed(0)
    model = tiny_model(codebook_decay=0.9).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch():
        across = torch.arange(32) / 32
        phase, count = torch.rand(32, 1, 1), torch.randint(0, 4, (32, 2, 1, 1))
        wave = (2 * torch.pi * (count[:, 0] * across[None, None] + count[:, 1] * across[None, :, None] + phase)).sin()
        return wave[:, None].expand(-1, 3, -1, -1)

    for _ in range(120):
        model(batch()).loss.backward()
        optimizer.step()
        model.update_twins()
        optimizer.zero_grad()
    pictures = batch()
    with torch.no_grad():
        output = model.eval()(pictures)
        target = F.normalize(model.teacher.features(pictures, (4, 4)), dim=-1).flatten(0, 1)
    assert output.losses["distillation"] < 0.8 * (1 - target.mean(dim=0).norm())
    assert len(output.token_ids.unique()) > 8


def mutual_information(token_ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Between the token of a patch and the class of its picture, in nats, as the counts have it."""
    joint = torch.zeros(int(token_ids.max()) + 1, int(labels.max()) + 1)
    joint.index_put_((token_ids.flatten(), labels.repeat_interleave(token_ids.shape[1])), torch.ones(()), True)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent).log(), 0.0).sum().item()


@pytest.mark.slow
def test_tokens_of_a_taught_teacher_say_more_of_the_class_than_tokens_of_pixels(tmp_path):
    """The experiment: Fashion-MNIST at 32 px, a small ViT that was taught labels a little, 64 codes."""
    (pictures, labels), (unseen, unseen_labels) = fashion(4000, 1000)
    form = ViTConfig(**VIT | {"hidden_size": 48, "num_channels": 1, "num_attention_heads": 4}, layer_norm_eps=1e-6)
    torch.manual_seed(0)
    teacher, classifier = ViTModel(form, add_pooling_layer=False), torch.nn.Linear(48, 10)
    optimizer = torch.optim.AdamW([*teacher.parameters(), *classifier.parameters()], lr=1e-3)
    for _ in range(400):
        chosen = torch.randint(len(pictures), (64,))
        features = teacher(pictures[chosen]).last_hidden_state[:, 1:].mean(dim=1)
        F.cross_entropy(classifier(features), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.save_pretrained(tmp_path)
    settings = {"teacher": str(tmp_path), "teacher_config": None, "backbone_config": form, "codebook_size": 64}
    model = tiny_model(**settings, decoder_hidden_size=48, image_mean=0.286, image_std=0.353)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(600):
        model.train()(pictures[torch.randint(len(pictures), (64,))]).loss.backward()
        optimizer.step()
        model.update_twins()
        optimizer.zero_grad()
    with torch.no_grad():
        output = model.eval()(unseen)
        target = F.normalize(model.teacher.features(unseen, (4, 4)), dim=-1).flatten(0, 1)
    assert output.losses["distillation"] < 0.7 * (1 - target.mean(dim=0).norm())
    assert len(output.token_ids.unique()) > 32
    patches = [F.normalize(patchify(part, (8, 8)) + 1, dim=-1) for part in (pictures, unseen)]
    means = cosine_kmeans(patches[0].flatten(0, 1)[:20_000], 64)
    of_pixels = (patches[1] @ means.T).argmax(dim=-1)
    assert mutual_information(output.token_ids, unseen_labels) > mutual_information(of_pixels, unseen_labels)
    # A picture is what tokens it has: their counts classify it.
    counts = [
        torch.stack([F.one_hot(ids, 64).sum(0) for ids in model(part, return_loss=False).token_ids]).float()
        for part in (pictures, unseen)
    ]
    assert weighted_knn(counts[0], labels, counts[1], unseen_labels) > 0.5


def test_auto_model_is_the_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer = AutoModel.from_pretrained(tmp_path)
    assert isinstance(tokenizer, VQKDModel) and not hasattr(tokenizer, "decoder")
    assert tokenizer(torch.randn(1, 3, 32, 32)).token_ids.dtype == torch.int64
