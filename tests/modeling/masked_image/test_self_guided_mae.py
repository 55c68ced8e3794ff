"""Self-guided MAE: every check of its spec (section 11); there is no reference implementation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hf_masked import (
    MAEForPreTraining,
    MaskedImageProcessor,
    SelfGuidedMAEConfig,
    SelfGuidedMAEForImageClassification,
    SelfGuidedMAEForPreTraining,
)
from hf_masked.data import ResidentImageDataset
from hf_masked.data.sources import ArraySource
from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.self_guided_mae import (
    choose_hints,
    exploitation_rate,
    in_eval_mode,
    normalized_cut,
    relevance_mask,
    relevance_to,
    tiny_config,
)
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.trainer import PreTrainer

ROOT = Path(__file__).parents[3]
GRID = (14, 14)


def tiny_model(progress: float = 1.0, **settings) -> SelfGuidedMAEForPreTraining:
    torch.manual_seed(0)
    model = SelfGuidedMAEForPreTraining(SelfGuidedMAEConfig(**tiny_config().to_dict() | settings)).train()
    model.training_progress = progress
    return model


def two_clusters(sizes: list[int], units: int = 196, dim: int = 16, noise: float = 0.05):
    """Features of two directions at right angles, and bool (batch, units): the first `sizes` units are of one."""
    first = torch.arange(units) < torch.tensor(sizes)[:, None]
    axes = torch.eye(dim)[:2]
    return torch.where(first[..., None], axes[0], axes[1]) + noise * torch.randn(len(sizes), units, dim), first


def same_split(partition: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Per sample, whichever side bears the name."""
    return (partition == truth).all(dim=1) | (partition == ~truth).all(dim=1)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_cut_recovers_two_clusters(threshold):
    torch.manual_seed(0)
    features, truth = two_clusters([20, 60, 98, 150])
    partition, vector = normalized_cut(features, threshold)
    assert same_split(partition, truth).all()
    # The first cluster lies above the mean.
    assert torch.equal(partition, vector > vector.mean(dim=1, keepdim=True))


def test_cut_solves_the_generalised_eigenproblem():
    """Against scipy-free arithmetic in float64: (D - W) y = lambda D y with the second-smallest lambda."""
    torch.manual_seed(0)
    features = torch.randn(1, 12, 6)
    _, vector = normalized_cut(features)
    unit = torch.nn.functional.normalize(features[0].double(), dim=1)
    affinity = (unit @ unit.T).clamp(min=0) + 1e-5
    degrees = affinity.sum(dim=1)
    eigenvalues = torch.linalg.eigvals((torch.diag(degrees) - affinity) / degrees[:, None]).real.sort().values
    left, right = (torch.diag(degrees) - affinity) @ vector[0].double(), degrees * vector[0].double()
    torch.testing.assert_close(left, eigenvalues[1] * right, rtol=1e-3, atol=1e-5)


def test_cut_knows_neither_scale_nor_order_nor_sign(monkeypatch):
    torch.manual_seed(0)
    features, _ = two_clusters([50, 80], noise=0.2)
    partition, vector = normalized_cut(features)
    scaled, _ = normalized_cut(features * (1 + torch.rand(2, 196, 1)))
    assert torch.equal(scaled, partition)
    order = torch.randperm(196)
    shuffled, shuffled_vector = normalized_cut(features[:, order])
    assert torch.equal(shuffled, partition[:, order])
    torch.testing.assert_close(shuffled_vector, vector[:, order], rtol=0, atol=1e-4)
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    turned, turned_vector = normalized_cut(features)
    assert torch.equal(turned, partition) and torch.equal(turned_vector, vector)


def test_batched_and_single_cuts_agree():
    torch.manual_seed(0)
    features, _ = two_clusters([30, 70, 110], noise=0.3)
    together = normalized_cut(features)[1]
    alone = torch.cat([normalized_cut(sample[None])[1] for sample in features])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("features", [torch.ones(2, 196, 8), torch.zeros(2, 196, 8), torch.ones(2, 196, 8) * 1e20])
def test_features_without_clusters_give_random_masks(features, threshold):
    target, vector = normalized_cut(features, threshold)
    assert not target.any() and vector.isfinite().all()
    relevance, noise = relevance_to(features, target), torch.rand(2, 196)
    hints = choose_hints(target, relevance, noise, GRID, 0.75, hint_ratio=0.1)
    mask = relevance_mask(relevance, hints, noise, GRID, 0.75)
    assert not hints.any() and (mask.sum(dim=1) == 147).all()
    # The random mask of the same noise: its smallest numbers stay visible.
    assert torch.equal(mask, noise.argsort(dim=1).argsort(dim=1) >= 49)


@pytest.mark.parametrize("strategy", ["random", "similarity"])
def test_counts_hold_for_any_size_of_the_target(strategy):
    torch.manual_seed(0)
    sizes = [1, 5, 49, 100, 147, 190]
    features, target = two_clusters(sizes)
    relevance, noise = relevance_to(features, target), torch.rand(len(sizes), 196)
    for hint_ratio in (0.0, 0.05, 0.1):
        hints = choose_hints(target, relevance, noise, GRID, 0.75, hint_ratio, strategy)
        mask = relevance_mask(relevance, hints, noise, GRID, 0.75)
        assert (mask.sum(dim=1) == 147).all()
        assert not (hints & mask).any() and not (hints & ~target).any()
        assert hints.sum(dim=1).tolist() == [round(hint_ratio * size) for size in sizes]
        # What is not of the target is masked only where the target is used up.
        small = torch.tensor(sizes) <= 147
        assert torch.equal((target & ~hints)[small] & mask[small], (target & ~hints)[small])
    whole = relevance_mask(relevance, torch.zeros_like(target), noise, GRID, 0.75)
    assert (whole | ~target)[:5].all(), "without hints a target that fits is masked whole"


def test_similar_hints_are_the_most_relevant():
    target = torch.tensor([[True] * 6 + [False] * 10])
    relevance = torch.arange(16, 0, -1.0)[None]
    hints = choose_hints(target, relevance, torch.rand(1, 16), (4, 4), 0.75, 0.34, "similarity")
    assert hints[0].nonzero().flatten().tolist() == [0, 1]


def test_random_hints_differ_from_draw_to_draw():
    features, target = two_clusters([100] * 2000, units=16 * 16, noise=0.0)
    relevance = relevance_to(features, target)
    hints = choose_hints(target, relevance, torch.rand(2000, 256), (16, 16), 0.75, 0.1).float().mean(dim=0)
    torch.testing.assert_close(hints[:100], torch.full((100,), 0.1), rtol=0, atol=0.04)


def test_it_is_mae_before_the_start():
    torch.manual_seed(0)
    model, plain = tiny_model(progress=0.1).eval(), MAEForPreTraining(mae.tiny_config()).eval()
    plain.load_state_dict(model.state_dict())
    pixel_values, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    ours, theirs = model(pixel_values, noise=noise), plain(pixel_values, noise=noise)
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.loss, theirs.loss)
    model.training_progress = 0.125
    assert not torch.equal(model(pixel_values, noise=noise).mask, ours.mask)
    masks = tiny_model(progress=0.1).draw_mask(torch.zeros(20_000, 3, 32, 32), (4, 4)).float().mean(dim=0)
    torch.testing.assert_close(masks, torch.full((16,), 0.75), rtol=0, atol=0.02)


def test_hints_become_fewer_after_the_start(monkeypatch):
    from hf_masked.modeling.masked_image import self_guided_mae

    seen = []
    chosen = self_guided_mae.choose_hints

    def spy(target, relevance, noise, grid, ratio, hint_ratio, strategy):
        seen.append(hint_ratio)
        return chosen(target, relevance, noise, grid, ratio, hint_ratio, strategy)

    monkeypatch.setattr(self_guided_mae, "choose_hints", spy)
    for progress in (0.125, 0.5625, 1.0):
        tiny_model(progress)(torch.randn(2, 3, 32, 32))
    assert seen == pytest.approx([0.10, 0.075, 0.05])


def test_masks_come_from_the_whole_picture_and_leave_no_trace():
    model = tiny_model(backbone_config=tiny_config().backbone_config.to_dict() | {"hidden_dropout_prob": 0.3})
    pixel_values, noise = torch.randn(4, 3, 32, 32, requires_grad=True), torch.rand(4, 16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first = model.draw_mask(pixel_values, (4, 4), noise)
    # Dropout is off, and on again afterwards.
    assert torch.equal(model.draw_mask(pixel_values, (4, 4), noise), first)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    target, relevance = model.main_cluster(pixel_values)
    assert not relevance.requires_grad and target.dtype == torch.bool
    with torch.no_grad():
        changed = pixel_values.masked_fill(first.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3), 2.0)
    assert not torch.equal(model.main_cluster(changed)[1], relevance), "masked patches are seen"
    # The choice of the mask has no part in the gradient.
    model.eval()
    chosen = model(pixel_values, noise=noise)
    assert torch.equal(chosen.mask, first) and not model.training
    model(pixel_values, bool_masked_pos=first).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chosen.loss.backward()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name


def test_eval_mode_ends_when_something_fails():
    module = torch.nn.Dropout().train()
    with pytest.raises(RuntimeError), in_eval_mode(module):
        assert not module.training
        raise RuntimeError
    assert module.training


def test_clustered_features_are_those_of_the_layer_asked_for():
    pixel_values = torch.randn(2, 3, 32, 32)
    relevances = [tiny_model(guide_layer=layer).eval().main_cluster(pixel_values)[1] for layer in (0, 1, -1)]
    assert not torch.equal(relevances[0], relevances[1]) and torch.equal(relevances[1], relevances[2])
    model = tiny_model().eval()
    # Before the final norm.
    with torch.no_grad():
        model.backbone.layernorm.weight.normal_()
    assert torch.equal(model.main_cluster(pixel_values)[1], relevances[2])


def test_exploitation_rate_of_a_hand_made_attention():
    """One prefix token and four units, of which the first and the third are masked."""
    masked = torch.tensor([[True, False, True, False]])
    first, second = torch.zeros(2, 1, 2, 5, 5)
    # The rows of masked positions; those of others are not looked at.
    first[0, :, 1] = torch.tensor([0.2, 0.1, 0.3, 0.1, 0.3])
    first[0, :, 3] = torch.tensor([0.0, 0.4, 0.2, 0.2, 0.2])
    first[0, :, [0, 2, 4], 1] = 1.0
    second[0, 0, 1, 1] = second[0, 0, 3, 3] = 1.0  # one head looks at mask tokens only,
    second[0, 1, 1, 2] = second[0, 1, 3, 0] = 1.0  # the other half at the prefix, half at visible patches
    of_masked, of_visible = exploitation_rate([first, second], ~masked, masked)
    # Five tokens, so that the uniform attention of one of them is a fifth.
    torch.testing.assert_close(of_masked, 5 * torch.tensor([(0.1 + 0.1 + 0.4 + 0.2) / 4, 2 / 8]))
    torch.testing.assert_close(of_visible, 5 * torch.tensor([(0.3 + 0.3 + 0.2 + 0.2) / 4, 1 / 8]))


@pytest.mark.parametrize("number", [1, 12, 15])
def test_uniform_attention_exploits_both_kinds_alike_whatever_their_number(number):
    masked = (torch.arange(16) < number).expand(3, -1)
    rates = exploitation_rate([torch.full((3, 2, 17, 17), 1 / 17)] * 2, ~masked, masked)
    torch.testing.assert_close(torch.stack(rates), torch.ones(2, 2))


def look_at(model: SelfGuidedMAEForPreTraining, masked: bool) -> SelfGuidedMAEForPreTraining:
    """Makes the first block of the decoder attend to mask tokens alone, or to visible patches alone."""
    with torch.no_grad():
        attention, width = model.decoder.layers[0].attention, model.config.decoder_hidden_size
        # Visible tokens become constant: the norm leaves of them what is opposed to the mask token.
        direction = torch.nn.functional.normalize(torch.tensor([1.0, -1.0]).repeat(width // 2), dim=0)
        model.decoder.position_embeddings.zero_()
        model.decoder.mask_token.copy_(direction)
        model.decoder.embedding.weight.zero_()
        model.decoder.embedding.bias.copy_(-direction)
        attention.qkv.weight.zero_()
        attention.qkv.weight[width : 2 * width] = direction if masked else -direction
        attention.qkv.bias[:width] = 30.0
    return model


def test_exploitation_rates_follow_what_the_decoder_looks_at():
    pixel_values, mask = torch.randn(2, 3, 32, 32), (torch.arange(16) > 3).expand(2, -1)
    of_masked, of_visible = look_at(tiny_model(decoder_num_hidden_layers=2), masked=True).exploitation_rates(
        pixel_values, mask
    )
    # The attention of 17 tokens goes to 12.
    assert of_masked.shape == (2,) and of_masked[0].item() == pytest.approx(17 / 12, abs=1e-4)
    assert of_visible[0].item() == pytest.approx(0.0, abs=1e-4)
    of_masked, of_visible = look_at(tiny_model(), masked=False).exploitation_rates(pixel_values, mask)
    # To the 4 visible patches and the class token.
    assert of_visible[0].item() == pytest.approx(17 / 5, abs=1e-4)
    assert of_masked[0].item() == pytest.approx(0.0, abs=1e-4)


DETECTING = {"guide_start": None, "guide_earliest": 0.0, "guide_patience": 1}


def start_of(model: SelfGuidedMAEForPreTraining, steps: int = 10, act=lambda step: None) -> int | None:
    """The first of so many steps with a guided mask; the weights stand still."""
    random = MAEForPreTraining(mae.tiny_config()).train()
    for step in range(steps):
        model.training_progress = step / steps
        model.on_progress()
        act(step)
        pixel_values, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
        if not torch.equal(model(pixel_values, noise=noise).mask, random(pixel_values, noise=noise).mask):
            return step
        model.update_twins()
    return None


def test_a_decoder_that_looks_at_mask_tokens_starts_it_at_once():
    assert start_of(look_at(tiny_model(**DETECTING), masked=True)) == 1
    # As soon as it may: the step at 0.5 is the first that counts.
    assert start_of(look_at(tiny_model(**DETECTING | {"guide_earliest": 0.5}), masked=True)) == 6


def test_a_decoder_that_looks_at_visible_patches_never_starts_it():
    model = look_at(tiny_model(**DETECTING), masked=False)
    assert start_of(model) is None and model.guided_from == 1.0
    model.training_progress = 1.0
    pixel_values, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    random = MAEForPreTraining(mae.tiny_config())(pixel_values, noise=noise).mask
    assert torch.equal(model(pixel_values, noise=noise).mask, random)
    # There is something to see all the same.
    assert "main cluster" in model.pictures(pixel_values)


def test_mask_tokens_must_be_ahead_for_several_steps_in_a_row():
    model = tiny_model(**DETECTING | {"guide_patience": 3})
    # Ahead in steps 0 and 1, behind in step 2, ahead in 3, 4 and 5.
    assert start_of(model, act=lambda step: look_at(model, masked=step != 2)) == 6


def test_hints_run_from_the_detected_start():
    model = look_at(tiny_model(**DETECTING), masked=True)
    assert start_of(model, steps=4000, act=lambda step: look_at(model, masked=step > 100)) == 104
    # Detected in step 101, at 0.02525; the next thousandth of training is the 26th.
    assert model.guided_from == 0.026
    seen = []
    model.guided_mask = lambda pixel_values, grid, draw, hint_ratio: seen.append(hint_ratio)
    for progress in (0.026, (1 + 0.026) / 2, 1.0):
        model.training_progress = progress
        model.draw_mask(torch.randn(2, 3, 32, 32), (4, 4))
    assert seen == pytest.approx([0.10, 0.075, 0.05])


def test_a_new_run_detects_anew():
    model = look_at(tiny_model(**DETECTING), masked=True)
    assert start_of(model) == 1
    assert start_of(look_at(model, masked=False)) is None


def test_measuring_leaves_weights_randomness_outputs_and_gradients_alone():
    measured, plain = tiny_model(0.0, **DETECTING), tiny_model(0.0)
    for model in (measured, plain):
        model.on_progress()
    weights = {name: value.clone() for name, value in measured.named_parameters()}
    pixel_values = torch.randn(3, 3, 32, 32)
    outputs, states = [], []
    for model in (measured, plain):
        torch.manual_seed(1)
        outputs.append(model(pixel_values))
        outputs[-1].loss.backward()
        model.update_twins()
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(outputs[0].mask, outputs[1].mask)
    assert torch.equal(outputs[0].loss, outputs[1].loss) and torch.equal(outputs[0].logits, outputs[1].logits)
    for name, parameter in plain.named_parameters():
        assert torch.equal(measured.get_parameter(name), weights[name]), name
        if parameter.grad is not None:
            assert torch.equal(measured.get_parameter(name).grad, parameter.grad), name
    assert not measured.exploitation.requires_grad
    # What was measured is what `exploitation_rates` says of the same pictures and mask.
    rates = measured.exploitation_rates(pixel_values, outputs[0].mask)
    torch.testing.assert_close(measured.exploitation, torch.stack([rate.mean() for rate in rates]))


def test_nothing_is_measured_with_a_fixed_start_in_eval_or_after_the_start(monkeypatch):
    from hf_masked.modeling.masked_image import self_guided_mae

    def refuse(*args):
        raise AssertionError("measured")

    monkeypatch.setattr(self_guided_mae, "exploitation_rate", refuse)
    pixel_values = torch.randn(2, 3, 32, 32)
    fixed, detecting = tiny_model(0.0), tiny_model(0.0, **DETECTING)
    for model in (fixed, detecting.eval()):
        model.on_progress()
        model(pixel_values)
        model.train()
    assert set(fixed.state_dict()) == set(MAEForPreTraining(mae.tiny_config()).state_dict())
    with pytest.raises(AssertionError, match="measured"):
        detecting(pixel_values)
    detecting.training_progress = 0.5
    detecting.guide_thousandth.fill_(400)
    detecting.on_progress()
    assert detecting(pixel_values).loss.isfinite()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_batches_are_measured_as_one_large_batch(checkpointing):
    pixel_values, noise = torch.randn(6, 3, 32, 32), torch.rand(6, 16)
    found = []
    for sizes in ([6], [2, 4]):
        model = tiny_model(0.0, **DETECTING)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.on_progress()
        for part in zip(pixel_values.split(sizes), noise.split(sizes), strict=True):
            model(part[0], noise=part[1]).loss.backward()
        model.update_twins()
        found.append(model.exploitation)
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0], torch.ones(2))


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hf_masked.training.launch import disconnect
from tests.modeling.masked_image.test_self_guided_mae import DETECTING, tiny_model

dist.init_process_group("gloo")
rank = dist.get_rank()
model = tiny_model(0.0, **DETECTING)
model.on_progress()
parallel = DistributedDataParallel(model)
inputs = torch.load(sys.argv[1])
for half in (0, 1):
    start = 4 * half + 2 * rank
    parallel(**{name: value[start : start + 2] for name, value in inputs.items()}).loss.backward()
model.update_twins()
torch.save((model.exploitation, model.guide_thousandth), f"{sys.argv[1]}.{rank}")
del parallel
disconnect()
"""


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_two_processes_decide_as_one(tmp_path):
    torch.manual_seed(0)
    inputs = {"pixel_values": torch.randn(8, 3, 32, 32), "noise": torch.rand(8, 16)}
    torch.save(inputs, tmp_path / "inputs")
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "run.py"), str(tmp_path / "inputs")], check=True, env=environment)
    model = tiny_model(0.0, **DETECTING)
    model.on_progress()
    model(**inputs)
    model.update_twins()
    found = [torch.load(tmp_path / f"inputs.{rank}") for rank in (0, 1)]
    assert torch.equal(found[0][0], found[1][0])
    for exploitation, guide_thousandth in found:
        torch.testing.assert_close(exploitation, model.exploitation)
        assert torch.equal(guide_thousandth, model.guide_thousandth)


def detecting_trainer(output: Path, steps: int, **settings) -> PreTrainer:
    """Of a model whose decoder looks at mask tokens, with so much patience that it starts at step 6 of 12."""
    model = look_at(tiny_model(0.0, **DETECTING | {"guide_patience": 6}), masked=True)
    processor = MaskedImageProcessor(**model.config.processor_settings())
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    args = PreTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=1e-5,
        save_strategy="steps",
        save_steps=steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    dataset = ResidentImageDataset(ArraySource("random pictures", pictures.numpy()), processor)
    return PreTrainer(model=model, args=args, processing_class=processor, train_dataset=dataset)


@pytest.mark.parametrize("steps", [3, 6, 9])
def test_a_resumed_run_starts_when_the_uninterrupted_does_and_not_twice(tmp_path, steps):
    """Interrupted before the detection, between it and the start, and afterwards."""
    whole = detecting_trainer(tmp_path / "whole", steps)
    whole.train()
    # Six steps, 0 to 5, are ahead; that of number 5 is 416 thousandths and a part into training.
    assert whole.model.guide_thousandth.item() == 417 and whole.model.guided_from == 0.417
    torch.manual_seed(123)
    resumed = detecting_trainer(tmp_path / "resumed", steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    assert resumed.model.guided_from == 0.417
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_log_shows_the_rates(tmp_path):
    trainer = detecting_trainer(tmp_path, 12)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    masked = [line["exploitation_of_masked"] for line in lines]
    # The step before is what a line knows of; the last measured step is that before the start.
    assert masked[0] == 1.0 and masked[1] == pytest.approx(17 / 12, abs=0.01)
    assert lines[1]["exploitation_of_visible"] == pytest.approx(0.0, abs=0.01)
    assert len(set(masked[6:])) == 1


def test_detection_compiles_to_one_graph_while_it_waits_and_one_afterwards():
    model, counter = tiny_model(0.0, **DETECTING), CompileCounter()
    look_at(model, masked=False)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        model.training_progress = step / 12
        model.on_progress()
        compiled(torch.randn(2, 3, 32, 32), noise=torch.rand(2, 16)).loss.backward()
        model.update_twins()
        assert model.exploitation[1] > 2
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_too_large_a_cluster_is_the_background():
    pixel_values = torch.randn(8, 3, 32, 32)
    anything = tiny_model(max_target_share=1.0).segment(pixel_values)
    small = tiny_model(max_target_share=0.3).segment(pixel_values)
    share = anything.float().mean(dim=(1, 2))
    assert (share > 0.3).any()
    for before, after, part in zip(anything, small, share, strict=True):
        assert torch.equal(after, ~before if part > 0.3 else before)


def test_hidden_states_are_those_of_the_visible_patches():
    output = tiny_model().eval()(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 5, 32)] * 3


def test_half_precision_gives_the_masks_of_float32():
    model = tiny_model().eval()
    pixel_values, noise = noisy_objects(16)[0], torch.rand(16, 16)
    expected = model(pixel_values, noise=noise).mask
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(pixel_values, noise=noise).mask
    assert (found == expected).float().mean() > 0.9


def test_progress_does_not_recompile_at_each_step():
    model, counter = tiny_model(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(12):
        model.training_progress = step / 12
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "noise": torch.rand(2, 16)}
        mask = model(**inputs).mask
        assert torch.equal(compiled(**inputs).mask, mask)
    # Before the start, after it, and for numbers that change.
    assert counter.frame_count <= 4 and model.backbone.training
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_kind": "block"}, ["block", "processor"]),
        ({"guide_start": 1.0}, ["guide_start", "1.0", "None"]),
        ({"guide_start": None, "guide_earliest": 1.0}, ["guide_earliest", "1.0"]),
        ({"guide_start": None, "guide_patience": 0}, ["guide_patience", "0"]),
        ({"guide_layer": 12}, ["12", "blocks"]),
        ({"affinity": "cosine"}, ["cosine", "relu"]),
        ({"hint_strategy": "all"}, ["all", "random"]),
        ({"hint_ratio_end": 2.0}, ["hint_ratio_end", "2.0"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        SelfGuidedMAEConfig(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_rectangles_pictures_and_the_classifier(tmp_path):
    backbone_config = tiny_config().backbone_config.to_dict() | {"image_size": (16, 40), "num_channels": 4}
    model = tiny_model(backbone_config=backbone_config).eval()
    pixel_values = torch.randn(2, 4, 24, 32)
    assert model(pixel_values).loss.isfinite() and model.segment(pixel_values).shape == (2, 3, 4)
    panels = model.pictures(pixel_values)
    assert {panel.shape for panel in panels.values()} == {pixel_values.shape} and "main cluster" in panels
    model.save_pretrained(tmp_path)
    classifier = SelfGuidedMAEForImageClassification.from_pretrained(tmp_path, num_labels=3)
    classifier(pixel_values, labels=torch.tensor([0, 2])).loss.backward()


def noisy_objects(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a faintly brighter or darker square of 4 x 4 patches, and bool (count, 64): where it is."""
    where = torch.zeros(count, 8, 8, dtype=torch.bool)
    for picture, (row, column) in zip(where, torch.randint(0, 5, (count, 2)).tolist(), strict=True):
        picture[row : row + 4, column : column + 4] = True
    brightness = 0.25 * torch.randint(0, 2, (count, 1, 1, 1)).mul(2).sub(1)
    inside = where.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    return torch.where(inside, brightness, -brightness) + 0.7 * torch.randn(count, 3, 32, 32), where.flatten(1)


def test_main_cluster_becomes_the_object_and_its_patches_are_masked():
    backbone_config = tiny_config().backbone_config.to_dict() | {"patch_size": 4}
    model = tiny_model(backbone_config=backbone_config, norm_pix_loss=False, guide_start=0.5)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    pictures, where = noisy_objects(128)

    def overlap() -> float:
        """Mean intersection over union of main cluster and object."""
        target, _ = model.main_cluster(pictures)
        return ((target & where).sum(dim=1) / (target | where).sum(dim=1)).mean().item()

    before = overlap()
    for step in range(150):
        model.training_progress = step / 150
        loss = model(noisy_objects(32)[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert overlap() > max(0.6, before + 0.2)
    masked = model.eval()(pictures).mask[where].float().mean()
    assert masked > 0.85, "three quarters by chance"
