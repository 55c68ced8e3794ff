import itertools
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    get_cosine_schedule_with_warmup,
    get_scheduler,
)

from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.optimization import (
    LARS,
    cycle_length,
    layer_scales,
    multistep_schedule,
    parameter_groups,
    repeated_schedule,
    scaled_learning_rate,
    spare_constant_rates,
)

VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}

# Expected layer of some parameters, counted by hand; the last number is that of head and final norm. For ViTs it is
# what `get_layer_id_for_vit` in facebookresearch/mae, util/lr_decay.py, gives the same parameters.
LAYERS = {
    "vit": (
        ViTConfig(**VIT),
        {"cls_token": 0, "position_embeddings": 0, "projection.weight": 0, "layers.0.": 1, "layers.1.": 2},
        {"vit.layernorm.weight", "classifier.weight"},
        3,
    ),
    "deit": (
        DeiTConfig(**VIT, architectures=[]),
        {"distillation_token": 0, "layers.0.": 1, "layers.1.": 2},
        {"deit.layernorm.bias", "classifier.bias"},
        3,
    ),
    "dinov2": (
        Dinov2Config(**VIT, mlp_ratio=2),
        {"mask_token": 0, "encoder.layer.0.": 1, "encoder.layer.1.": 2, "layer.1.layer_scale1": 2},
        {"dinov2.layernorm.weight", "classifier.weight"},
        3,
    ),
    "beit": (
        BeitConfig(**VIT),
        {"cls_token": 0, "layers.0.": 1, "layers.1.lambda_1": 2},
        {"beit.pooler.layernorm.weight", "classifier.weight"},
        3,
    ),
    "swin": (
        SwinConfig(embed_dim=4, depths=[1, 2], num_heads=[1, 2], window_size=2, image_size=16, patch_size=2),
        {
            "embeddings.norm.weight": 0,
            "layers.0.blocks.0.": 1,
            "layers.0.downsample.": 1,
            "layers.1.blocks.0.": 2,
            "layers.1.blocks.1.": 3,
        },
        {"swin.layernorm.weight", "classifier.weight"},
        4,
    ),
    "resnet": (
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic"),
        {"embedder.embedder.": 0, "stages.0.layers.0.": 1, "stages.1.layers.0.": 2, "stages.1.layers.1.": 3},
        {"classifier.1.weight"},
        4,
    ),
    "convnext": (
        ConvNextConfig(hidden_sizes=[4, 8], depths=[2, 1], num_stages=2),
        {
            "embeddings.layernorm.weight": 0,
            "stages.0.layers.0.": 1,
            "stages.0.layers.1.": 2,
            "stages.1.downsampling_layer.": 3,
            "stages.1.layers.0.": 3,
        },
        {"convnext.layernorm.weight", "classifier.weight"},
        4,
    ),
}


def classifier(config):
    return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_scales_against_hand_computed_layers(name):
    config, expected, head, last = LAYERS[name]
    names = [parameter for parameter, _ in classifier(config).named_parameters()]
    scales = layer_scales(names, 0.5)
    for part, layer in expected.items():
        found = {scales[parameter] for parameter in names if part in parameter}
        assert found == {0.5 ** (last - layer)}, part
    assert {scales[parameter] for parameter in head} == {1.0}


def test_layer_decay_scales_are_those_of_the_reference():
    # layer_scales of util/lr_decay.py for 2 blocks and 0.65: 0.65^3, 0.65^2, 0.65, 1.
    groups = parameter_groups(classifier(ViTConfig(**VIT)), 0.05, learning_rate=1e-3, layer_decay=0.65)
    rates = sorted({group["lr"] for group in groups})
    assert rates == pytest.approx([0.274625e-3, 0.4225e-3, 0.65e-3, 1e-3])


def test_weight_decay_spares_norms_and_biases_but_not_tokens():
    model = classifier(ViTConfig(**VIT))
    groups = parameter_groups(model, 0.05)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(groups) == 2 and all("lr" not in group for group in groups)
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.05 if parameter.ndim > 1 else 0.0), name
    assert decays[id(model.vit.embeddings.cls_token)] == 0.05


@pytest.mark.parametrize("names", [{"cls_token"}, {"embeddings.cls_token"}, {"*.cls_token"}])
def test_named_parameters_do_not_decay(names):
    model = classifier(ViTConfig(**VIT))
    decays = {
        id(p): g["weight_decay"] for g in parameter_groups(model, 0.05, no_weight_decay=names) for p in g["params"]
    }
    assert decays[id(model.vit.embeddings.cls_token)] == 0.0
    assert decays[id(model.vit.embeddings.position_embeddings)] == 0.05


def test_declared_and_frozen_parameters():
    model = classifier(ViTConfig(**VIT))
    model.no_weight_decay = lambda: {"position_embeddings"}
    model.vit.embeddings.cls_token.requires_grad_(False)
    groups = parameter_groups(model, 0.05)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model.vit.embeddings.position_embeddings)] == 0.0
    assert id(model.vit.embeddings.cls_token) not in decays


def test_a_model_may_decay_everything_but_what_it_names():
    model = classifier(ViTConfig(**VIT))
    model.decay_everything = True
    model.no_weight_decay = lambda: {"cls_token"}
    decays = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.05) for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if name.endswith("cls_token") else 0.05), name


def constant_bias_schedule(scheduler_type: str, steps: int = 10, warmup: int = 2):
    """Optimizer and schedule of a linear layer whose bias keeps its rate."""
    model = torch.nn.Linear(2, 2)
    model.constant_learning_rate = lambda: {"bias"}
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, learning_rate=0.4))
    scheduler = get_scheduler(scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    return optimizer, spare_constant_rates(scheduler)


def test_constant_rates_stay_while_others_follow_the_schedule():
    optimizer, scheduler = constant_bias_schedule("cosine")
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    weight, bias = zip(*rates, strict=True)
    assert set(bias) == {0.4}
    assert weight[0] == 0.0 and weight[2] == pytest.approx(0.4) and weight[6] == pytest.approx(0.2)


def test_constant_rates_survive_a_resume():
    optimizer, scheduler = constant_bias_schedule("cosine")
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    resumed_optimizer, resumed = constant_bias_schedule("cosine")
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for stepped in (scheduler, resumed):
        stepped.optimizer.step()
        stepped.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert [group["lr"] for group in resumed_optimizer.param_groups] == resumed.get_last_lr()


def test_a_schedule_that_cannot_spare_a_group_is_named():
    with pytest.raises(ValueError, match="ReduceLROnPlateau cannot leave"):
        constant_bias_schedule("reduce_lr_on_plateau", steps=None, warmup=None)


def test_layer_decay_needs_a_rate_and_blocks():
    with pytest.raises(ValueError, match="need learning_rate"):
        parameter_groups(classifier(ViTConfig(**VIT)), 0.05, layer_decay=0.5)
    with pytest.raises(ValueError, match="layer_decay=None"):
        parameter_groups(torch.nn.Linear(2, 2), 0.05, learning_rate=1.0, layer_decay=0.5)


def test_scaled_learning_rate():
    assert scaled_learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_lars_by_hand():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([weight, bias], lr=2.0, momentum=0.5, trust_coefficient=0.1)
    for _ in range(2):
        weight.grad, bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([0.25])
        optimizer.step()
    # Step 1: trust 0.1 * 5 / 2, update (0, 0.5), weight (3, 3). Step 2: trust 0.1 * sqrt(18) / 2.
    second = 0.5 * 0.5 + 0.1 * 18**0.5
    assert weight.detach()[0].tolist() == pytest.approx([3.0, 3.0 - 2.0 * second])
    assert bias.item() == pytest.approx(1.0 - 2.0 * 0.25 - 2.0 * (0.125 + 0.25))


def rates(schedule, optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_multistep_schedule_warms_up_and_falls_at_each_milestone():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = multistep_schedule(optimizer, warmup_steps=4, milestones=[6, 8])
    assert rates(schedule, optimizer, 10) == pytest.approx([0, 0.5, 1.0, 1.5, 2, 2, 0.2, 0.2, 0.02, 0.02])


def test_trainer_follows_the_milestones_of_simmims_recipe(tmp_path):
    """Warm-up for 10 of 800 epochs, a tenth of the learning rate from epoch 700 on."""
    from hf_masked import SimMIMForPreTraining
    from hf_masked.modeling.masked_image.simmim import tiny_config
    from hf_masked.training.trainer import PreTrainer

    args = PreTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=1.0, warmup_steps=0.0125, lr_milestones=[0.875]
    )
    trainer = PreTrainer(model=SimMIMForPreTraining(tiny_config()), args=args)
    trainer.create_optimizer()
    found = rates(trainer.create_scheduler(800), trainer.optimizer, 800)
    assert found[:11] == pytest.approx([step / 10 for step in range(11)])
    assert set(found[10:700]) == {1.0} and found[700:] == pytest.approx([0.1] * 100)


@pytest.mark.parametrize(("steps", "cycles"), [(20, 2), (21, 3), (22, 3), (7, 1)])
def test_repeated_schedule_runs_through_in_each_part_of_the_training(steps, cycles):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    length = cycle_length(cycles, steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, length)
    found = rates(repeated_schedule(schedule, cycles, steps), optimizer, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    once = rates(get_cosine_schedule_with_warmup(optimizer, 2, length), optimizer, length)
    starts = [math.ceil(k * steps / cycles) for k in range(cycles)]
    assert max(once) == 2.0 and once[0] == 0.0
    for start, end in itertools.pairwise([*starts, steps]):
        assert found[start:end] == pytest.approx(once[: end - start])
    # After the last step it is down at zero.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_schedules_that_are_no_function_of_the_step_cannot_be_repeated():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert repeated_schedule(plateau, 1, 10) is plateau
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.*2 times"):
        repeated_schedule(plateau, 2, 10)


def test_recipe_may_ask_for_cycles_and_the_method_for_its_own(tmp_path):
    from hf_masked import DBOTForPreTraining, MAEForPreTraining
    from hf_masked.modeling.masked_image.mae import tiny_config as mae_config
    from hf_masked.modeling.masked_latent.dbot import tiny_config as dbot_config
    from hf_masked.training.trainer import PreTrainer

    def found(model, **settings):
        args = PreTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, learning_rate=1.0, lr_scheduler_type="cosine", **settings
        )
        trainer = PreTrainer(model=model, args=args)
        trainer.create_optimizer()
        return rates(trainer.create_scheduler(40), trainer.optimizer, 40)

    once = found(MAEForPreTraining(mae_config()), warmup_steps=0.1)
    assert once[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and sorted(once[4:], reverse=True) == once[4:]
    # A share of warm-up is one of each part.
    twice = found(MAEForPreTraining(mae_config()), warmup_steps=0.2, lr_cycles=2)
    assert twice[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and twice[20:] == pytest.approx(twice[:20])
    assert found(DBOTForPreTraining(dbot_config()), warmup_steps=0.2) == pytest.approx(twice)
    assert found(DBOTForPreTraining(dbot_config()), warmup_steps=0.1, lr_cycles=1) == pytest.approx(once)
    with pytest.raises(ValueError, match="lr_cycles is 0"):
        found(None, lr_cycles=0)


def test_milestones_outside_the_training_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lr_milestones are \[700\.0\]"):
        PreTrainingArguments(output_dir=str(tmp_path), use_cpu=True, lr_milestones=[700.0])


def test_a_models_factors_multiply_rates_and_decays():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model.parameter_factors = lambda: {"1.weight": (1.0, 0.5), "2.*": (0.2, 1.0)}
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=1e-3)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {
        model[0].weight: (1e-3, 0.1),
        model[0].bias: (1e-3, 0.0),
        model[1].weight: (1e-3, 0.05),
        model[1].bias: (1e-3, 0.0),
        model[2].weight: (2e-4, 0.1),
        model[2].bias: (2e-4, 0.1),
    }
    assert found == {id(parameter): pytest.approx(values) for parameter, values in expected.items()}
    with pytest.raises(ValueError, match="parameter_factors` need learning_rate"):
        parameter_groups(model, weight_decay=0.1)
