"""GenMD4: MD4 where each value of the vocabulary learns its own masking schedule.

Jiaxin Shi et al., "Simplified and Generalized Masked Diffusion for Discrete Data", NeurIPS 2024, arXiv 2406.04329,
section 6 and appendix. Reference implementation: https://github.com/google-deepmind/md4
(`md4/models/diffusion/genmd4.py`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_generation.md4 import (
    MD4Config,
    MD4ForPreTraining,
    MD4Model,
    MD4Output,
    convert_official_weights,
    example_inputs,
    tiny_network,
)
from hf_masked.modeling.parts.patches import check_mask
from hf_masked.modeling.registry import register_variant


class LearnedSchedule(nn.Module):
    """Of each value v its own alpha(t) = 1 - (1 - eps) t^w, with a learned power w = softplus(raw power) > 0."""

    def __init__(self, vocab_size: int, power_init: float, eps: float):
        super().__init__()
        self.raw_init = math.log(math.expm1(power_init))
        self.eps = eps
        self.raw_powers = nn.Parameter(torch.full((vocab_size,), self.raw_init))

    def forward(self) -> torch.Tensor:
        """The powers, float32 (vocab_size,)."""
        return F.softplus(self.raw_powers.float())

    def alpha(self, times: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
        """The probability of being visible; times and powers are broadcast."""
        return 1 - (1 - self.eps) * times**powers


@dataclass
class GenMD4Output(MD4Output):
    """Output of GenMD4.

    Args:
        loss: with the term that is there for its gradient alone, so no bound; `bits_per_token` is the bound.
        logits, mask: of the first of both maskings.
        power_min, power_max: float32 scalars, of the schedules' powers.
    """

    power_min: torch.Tensor | None = None
    power_max: torch.Tensor | None = None


class GenMD4Config(MD4Config):
    """Config of GenMD4.

    Args:
        backbone_config: as MD4's.
        power_init: of all schedules at the start; 1 is the linear one.
        first_time: the earliest time of the loss, t1; earlier ones are the reconstruction's.
        noise_schedule, continuous_time: "poly" and True, which are the only ones that are learned.
    """

    model_type = "hf_masked_genmd4"
    masks: ClassVar[str] = "single tokens, at a random rate that each value of the vocabulary learns"
    num_masks: ClassVar[int] = 2

    noise_schedule: str = "poly1"
    power_init: float = 1.0
    first_time: float = 1e-3

    def check(self) -> None:
        super().check()
        if not self.noise_schedule.startswith("poly") or not self.continuous_time:
            raise ValueError(
                f"noise_schedule={self.noise_schedule!r}, continuous_time={self.continuous_time}: GenMD4 learns the "
                "powers of polynomial schedules in continuous time; leave both as they are, or use MD4."
            )
        if self.power_init <= 0 or not 0 < self.first_time < 1:
            raise ValueError(
                f"power_init={self.power_init} and first_time={self.first_time}; the first must be above 0 and the "
                "second in (0, 1)."
            )


class GenMD4Model(MD4Model):
    """The network as an encoder, without the schedules."""

    config: GenMD4Config


class GenMD4ForPreTraining(MD4ForPreTraining):
    """The network, the learned schedules, the bound and the sampler."""

    config: GenMD4Config
    logged_outputs: ClassVar[tuple[str, ...]] = ("bits_per_token", "power_min", "power_max")
    averaged: ClassVar[tuple[str, ...]] = ("backbone", "schedule")

    def make_schedule(self) -> None:
        self.schedule = LearnedSchedule(self.vocab_size, self.config.power_init, self.config.schedule_eps)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LearnedSchedule):
            init.constant_(module.raw_powers, module.raw_init)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        time_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> GenMD4Output:
        """One step: mask twice at the same random times, predict both, and let their difference teach the schedules.

        Args:
            noise: float (batch, 2, units) in [0, 1), from which to draw both masks.
            bool_masked_pos: bool (batch, units), True = masked, for both maskings.
            pixel_values, input_ids, classes, times, time_noise, generator, return_loss: as of MD4.

        Raises:
            ValueError: for inputs or masks that do not fit.
        """
        ids = self.token_ids(pixel_values, input_ids)
        times, noise = self.draw(ids, times, noise, time_noise, generator)
        powers = self.weights_in_use.schedule()  # (vocab_size,)
        alpha = self.schedule.alpha(times[:, None], powers[ids.flatten(1)])  # (batch, units)
        masks = [drawn >= alpha for drawn in noise.unbind(1)]
        if bool_masked_pos is not None:
            check_mask(bool_masked_pos, len(ids), ids.shape[1:])
            masks = [bool_masked_pos, bool_masked_pos]
        features, logits = self.predict(ids, masks[0], times, classes)
        figures = {"power_min": powers.min().detach(), "power_max": powers.max().detach()}
        if return_loss:
            second = self.predict(ids, masks[1], times, classes)[1]
            figures |= self.objectives(ids, (logits, second), masks, times, powers)
        return GenMD4Output(last_hidden_state=features, logits=logits, mask=masks[0], times=times, **figures)

    def objectives(self, ids, logits, masks, times, powers) -> dict:
        """The loss, its parts and the bound, as `GenMD4Output` has them."""
        rate = 1 / (math.log(2) * masks[0].shape[1])
        pair = zip(logits, masks, strict=True)
        first, second = (self.weighted_loss(ids, predicted, mask, times, powers) for predicted, mask in pair)
        diffusion = (first + second).mean() / 2 * rate
        reconstruction = self.lost_at_first_time(ids, powers).mean() * rate
        # REINFORCE with the other masking as the baseline (leave one out): how the masks depend on the powers.
        likelihoods = [self.log_probability(ids, mask, times, powers) for mask in masks]
        surrogate = ((first - second).detach() * (likelihoods[0] - likelihoods[1])).mean() / 2 * rate
        bound = diffusion + reconstruction
        return {
            "loss": bound + surrogate,
            "losses": {"diffusion": diffusion.detach(), "reconstruction": reconstruction.detach()},
            "bits_per_token": bound.detach(),
        }

    def weighted_loss(self, ids, logits, bool_masked_pos, times, powers) -> torch.Tensor:
        """Nats of each sample, float32 (batch,) (equation 10): of a masked token of value x, predicted with the
        probabilities p, the sum over all values v of -w_v / t ((log p_x + 1) [v = x] - p_v)."""
        log_p = logits.float().log_softmax(dim=-1)  # (batch, units, vocab_size)
        x = ids.flatten(1)
        true = powers[x] * (log_p.gather(2, x.unsqueeze(-1)).squeeze(-1) + 1)
        integrand = true - log_p.exp() @ powers  # (batch, units)
        return -(integrand * bool_masked_pos).sum(dim=1) / times

    def lost_at_first_time(self, ids, powers) -> torch.Tensor:
        """Nats of each sample, float32 (batch,), for what is still masked at t1, guessed by the schedules alone."""
        logs = powers * math.log(self.config.first_time)  # (vocab_size,)
        of_true = logs[ids.flatten(1)]
        return (-(1 - self.schedule.eps) * of_true.exp() * (of_true - logs.logsumexp(dim=0))).sum(dim=1)

    def log_probability(self, ids, bool_masked_pos, times, powers) -> torch.Tensor:
        """Of a masking, given the tokens: float32 (batch,)."""
        of_true = powers[ids.flatten(1)]
        masked = math.log1p(-self.schedule.eps) + of_true * times.log()[:, None]
        visible = self.schedule.alpha(times[:, None], of_true).log()
        return torch.where(bool_masked_pos, masked, visible).sum(dim=1)

    def rescale_times(self, times: torch.Tensor) -> torch.Tensor:
        first = self.config.first_time
        return (1 - first) * times + first

    def bound_at(self, ids, times, classes, generator) -> torch.Tensor:
        powers = self.weights_in_use.schedule()
        output = self(input_ids=ids, classes=classes, times=times, generator=generator, return_loss=False)
        nats = self.weighted_loss(ids, output.logits, output.mask, times, powers)
        return nats + self.lost_at_first_time(ids, powers)

    def unmasking(self, probabilities, time, earlier) -> torch.Tensor:
        # As MD4's, with a schedule for each value; the reference has no sampler of GenMD4.
        powers = self.weights_in_use.schedule()
        alpha = self.schedule.alpha(time, powers)
        return probabilities * (self.schedule.alpha(earlier, powers) - alpha) / (1 - alpha)


def tiny_config() -> GenMD4Config:
    return GenMD4Config(backbone_config=tiny_network(), timesteps=8)


register_variant(
    config=GenMD4Config,
    pretraining=GenMD4ForPreTraining,
    model=GenMD4Model,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    example_inputs=example_inputs,
)
