"""MD4: mask tokens at a random rate and predict them; with the right weight that is a bound on the likelihood.

Jiaxin Shi et al., "Simplified and Generalized Masked Diffusion for Discrete Data", NeurIPS 2024, arXiv 2406.04329.
Reference implementation: https://github.com/google-deepmind/md4 (`md4/models/diffusion/md4.py`).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_masked.modeling.base import WHOLE_PICTURE, VariantConfig, VariantModel
from hf_masked.modeling.masked_generation.md4_networks import (
    MD4TransformerConfig,
    MD4UNetConfig,
    pixels_of_tokens,
    tokens_of_pixels,
)
from hf_masked.modeling.outputs import GenerationOutput, MaskedPreTrainingOutput
from hf_masked.modeling.parts.momentum import MomentumTwin
from hf_masked.modeling.parts.patches import check_mask, check_pixel_values, pair
from hf_masked.modeling.registry import register_variant
from hf_masked.randomness import model_draw

SAMPLING_GRIDS = ("uniform", "cosine")

# Steps of the sampler for pictures of a run.
PICTURE_STEPS = 32


@dataclass
class MD4Output(MaskedPreTrainingOutput):
    """Output of MD4 and GenMD4.

    Args:
        logits: (batch, units, vocab_size), units in the order of `pixel_values` (channel, row, column) or of the text.
        mask: bool (batch, units), True = masked.
        times: float32 (batch,), how far each sample was masked.
        bits_per_token: float32 scalar, the bound on the negative log-likelihood, without gradient: bits per dimension
            of pictures; ln 2 times it, nats per character of texts.
    """

    times: torch.Tensor | None = None
    bits_per_token: torch.Tensor | None = None


@dataclass
class EvidenceBound(ModelOutput):
    """The bound on the negative log-likelihood of samples.

    Args:
        bits_per_token: float32 (batch,): bits per dimension.
        nats_per_token: float32 (batch,).
        perplexity: float32 scalar, of the mean over the batch.
    """

    bits_per_token: torch.Tensor | None = None
    nats_per_token: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None


class MaskingSchedule:
    """The probability alpha(t) that a token is still visible at time t, from nearly 1 at 0 to nearly 0 at 1.

    Args:
        kind: "linear", "cosine", or "poly" with an exponent, for example "poly3" (paper, table 4).
        eps: what alpha keeps away from 1 and 0.

    Raises:
        ValueError: for another kind.
    """

    def __init__(self, kind: str, eps: float):
        found = re.fullmatch(r"linear|cosine|poly(\d+(\.\d+)?)", kind)
        if not found:
            raise ValueError(f"noise_schedule is {kind!r}; it must be 'linear', 'cosine' or 'poly3' and its like.")
        self.kind = kind
        self.eps = eps
        self.exponent = float(found[1]) if found[1] else 1.0

    def alpha(self, times: torch.Tensor) -> torch.Tensor:
        """float, the shape of `times`."""
        masked = torch.cos(math.pi / 2 * (1 - times)) if self.kind == "cosine" else times**self.exponent
        return (1 - 2 * self.eps) * (1 - masked) + self.eps

    def slope(self, times: torch.Tensor) -> torch.Tensor:
        """The derivative of alpha, negative."""
        if self.kind == "cosine":
            slope = -math.pi / 2 * torch.sin(math.pi / 2 * (1 - times))
        else:
            slope = -self.exponent * times ** (self.exponent - 1)
        return (1 - 2 * self.eps) * slope

    def weight(self, times: torch.Tensor) -> torch.Tensor:
        """What a masked token's log-likelihood is multiplied by, negative: alpha' / (1 - alpha) (equation 5)."""
        return self.slope(times) / (1 - self.alpha(times))

    def step_weight(self, times: torch.Tensor, steps: int) -> torch.Tensor:
        """The same of `steps` discrete steps, of which the last before `times` counts (equation 4)."""
        earlier = self.alpha(times - 1 / steps)
        alpha = self.alpha(times)
        return -steps * (earlier - alpha) / (1 - alpha)


class MD4Config(VariantConfig):
    """Config of MD4.

    Args:
        backbone_config: an `MD4UNetConfig` for pictures, CIFAR-10's by default, or an `MD4TransformerConfig` for
            texts.
        noise_schedule: "linear", "cosine", or "poly" with an exponent.
        schedule_eps: how far alpha stays away from 1 and 0.
        continuous_time: the loss in the limit of infinitely many steps; else of `timesteps`.
        timesteps: of the discrete loss, and of the sampler where it is not told.
        antithetic: the times of a batch are spread evenly, from a random start.
        sampling_grid: times of the sampler's steps, "uniform" or "cosine", which goes slowly at the start. The
            reference pairs the linear schedule with the cosine grid, and the cosine schedule with the uniform one.
        average_momentum: of the moving average of the weights, with which the model evaluates and generates; None for
            no average.
    """

    model_type = "hf_masked_md4"
    paper_title: ClassVar[str] = "Simplified and Generalized Masked Diffusion for Discrete Data"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2406.04329"
    reference_repository: ClassVar[str] = "https://github.com/google-deepmind/md4"
    masks: ClassVar[str] = "single tokens (pixels' values, characters), at a random rate"
    predicts: ClassVar[str] = "the masked tokens, weighted to a bound on the likelihood; generates"
    backbones: ClassVar[tuple[str, ...]] = (MD4UNetConfig.model_type, MD4TransformerConfig.model_type)
    processor: ClassVar[str] = "PixelTokenProcessor"
    # Maskings of one sample in a step.
    num_masks: ClassVar[int] = 1

    noise_schedule: str = "linear"
    schedule_eps: float = 1e-4
    continuous_time: bool = True
    timesteps: int = 256
    antithetic: bool = True
    sampling_grid: str = "cosine"
    average_momentum: float | None = 0.9999

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = MD4UNetConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        MaskingSchedule(self.noise_schedule, self.schedule_eps)
        if not 0 <= self.schedule_eps < 0.5:
            raise ValueError(f"schedule_eps is {self.schedule_eps}; it must lie in [0, 0.5), for example 1e-4.")
        if self.timesteps < 1:
            raise ValueError(f"timesteps is {self.timesteps}; it must be at least 1, for example 256.")
        if self.sampling_grid not in SAMPLING_GRIDS:
            raise ValueError(
                f"sampling_grid is {self.sampling_grid!r}; it must be one of {', '.join(SAMPLING_GRIDS)}."
            )
        if self.average_momentum is not None and not 0 <= self.average_momentum <= 1:
            raise ValueError(f"average_momentum is {self.average_momentum}; it must lie in [0, 1], or be None.")

    @property
    def takes_text(self) -> bool:
        return isinstance(self.backbone_config, MD4TransformerConfig)

    def processor_settings(self) -> dict:
        settings = WHOLE_PICTURE | {"num_masks": self.num_masks, "image_mean": 0.0, "image_std": 1.0}
        return super().processor_settings() | settings


class MD4PreTrainedModel(VariantModel):
    """What the models of MD4 and GenMD4 share: tokens of pictures and texts."""

    config: MD4Config
    _no_split_modules: ClassVar[list[str]] = ["ModulatedLayer", "ResidualBlock"]
    # Recorded inside the network, with its own classes.
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": OutputRecorder(target_class=None),
        "attentions": OutputRecorder(target_class=None, index=1),
    }

    def __init__(self, config: MD4Config):
        super().__init__(config)
        if config.takes_text:
            self.main_input_name = "input_ids"

    def _init_weights(self, module) -> None:
        self.backbone._init_weights(module)

    def token_ids(self, pixel_values: torch.Tensor | None, input_ids: torch.Tensor | None) -> torch.Tensor:
        """The tokens that were given, int64 (batch, channels, height, width) or (batch, tokens).

        Raises:
            ValueError: for neither or both inputs, other channels or sizes, values outside [0, 1], unknown tokens.
        """
        form = self.config.backbone_config
        if (pixel_values is None) == (input_ids is None):
            raise ValueError("Give `pixel_values` or `input_ids`: one of the two.")
        if self.config.takes_text and input_ids is None:
            raise ValueError("The model was made for texts: give `input_ids`, int64 (batch, tokens).")
        eager = not torch.compiler.is_compiling()
        if pixel_values is not None:
            check_pixel_values(pixel_values, form.num_channels, pair(form.stride))
            if eager and not 0 <= pixel_values.min() <= pixel_values.max() <= 1:
                raise ValueError(
                    f"`pixel_values` span {pixel_values.min():.3g} to {pixel_values.max():.3g}; here they are "
                    "tokens and must lie in [0, 1]: leave the processor's image_mean at 0 and image_std at 1."
                )
            return tokens_of_pixels(pixel_values, form.vocab_size)
        if not self.config.takes_text:
            check_pixel_values(input_ids, form.num_channels, pair(form.stride))
        if eager and not 0 <= input_ids.min() <= input_ids.max() < form.vocab_size:
            raise ValueError(
                f"`input_ids` span {input_ids.min()} to {input_ids.max()}; tokens lie in [0, {form.vocab_size})."
            )
        return input_ids


class MD4Model(MD4PreTrainedModel):
    """The network as an encoder: of what is visible, at a time that says how much that is."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"twin\..*", r"schedule\..*"]

    def __init__(self, config: MD4Config):
        super().__init__(config)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes pictures or texts.

        Args:
            pixel_values: float (batch, channels, height, width) in [0, 1].
            input_ids: instead, int64 tokens, of the same shape or (batch, tokens).
            bool_masked_pos: bool (batch, units), True = masked, in the order of the input; None for nothing.
            times: float (batch,) in [0, 1]; by default the masked share.
            classes: int64 (batch,), of class-conditional models.

        Returns:
            last_hidden_state: (batch, hidden, height, width), of texts (batch, tokens, hidden).

        Raises:
            ValueError: for inputs or masks that do not fit.
        """
        ids = self.token_ids(pixel_values, input_ids)
        if bool_masked_pos is not None:
            check_mask(bool_masked_pos, len(ids), ids.shape[1:])
            ids = ids.masked_fill(bool_masked_pos.view_as(ids), self.config.backbone_config.vocab_size)
            times = bool_masked_pos.float().mean(dim=1) if times is None else times
        features = self.backbone(input_ids=ids, times=times, classes=classes).last_hidden_state
        return BaseModelOutput(last_hidden_state=features)


class MD4ForPreTraining(MD4PreTrainedModel):
    """The network, the bound on the likelihood, and the sampler."""

    logged_outputs: ClassVar[tuple[str, ...]] = ("bits_per_token",)
    declined_checks: ClassVar[dict[str, str]] = {
        "ddp": "the times are spread evenly over the batch of each process, so two halves are not the whole",
        "accumulation": "the times are spread evenly over each batch, so two halves are not the whole",
        "attentions": "the network for pictures is convolutional",
        "export": "the network is the paper's own, so what is exported needs hf_masked",
    }
    averaged: ClassVar[tuple[str, ...]] = ("backbone",)

    def __init__(self, config: MD4Config):
        super().__init__(config)
        # The labels of a data set reach models of classes alone.
        self.uses_classes = config.backbone_config.num_classes > 0
        self.make_schedule()
        if config.average_momentum is not None:
            self.twin = MomentumTwin(self, self.averaged, momentum=config.average_momentum)
        self.post_init()

    def make_schedule(self) -> None:
        self.schedule = MaskingSchedule(self.config.noise_schedule, self.config.schedule_eps)

    @property
    def weights_in_use(self):
        """What holds the network: the moving average in eval mode, where there is one, else the model."""
        return self if self.training or self.config.average_momentum is None else self.twin

    @property
    def vocab_size(self) -> int:
        return self.config.backbone_config.vocab_size

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
    ) -> MD4Output:
        """One step: mask at random times and predict.

        Args:
            pixel_values: float (batch, channels, height, width) in [0, 1], rounded to `vocab_size` values.
            input_ids: instead, int64 tokens, of the same shape or (batch, tokens).
            classes: int64 (batch,), or (batch, 1), of class-conditional models.
            times: float (batch,) in [0, 1]; drawn here by default.
            bool_masked_pos: bool (batch, units), True = masked; drawn here by default, as the times say.
            noise: float (batch, 1, units) in [0, 1), from which to draw the mask.
            time_noise: float (batch,) in [0, 1), from which to draw the times; with `antithetic` the first counts.
            generator: to draw from.
            return_loss: whether to compute the loss.

        Returns:
            `MD4Output`; loss and its parts are in bits per token, a mean over the batch.

        Raises:
            ValueError: for inputs or masks that do not fit.
        """
        ids = self.token_ids(pixel_values, input_ids)
        times, noise = self.draw(ids, times, noise, time_noise, generator)
        if bool_masked_pos is None:
            bool_masked_pos = noise[:, 0] >= self.schedule.alpha(times)[:, None]
        check_mask(bool_masked_pos, len(ids), ids.shape[1:])
        features, logits = self.predict(ids, bool_masked_pos, times, classes)
        losses, loss = None, None
        if return_loss:
            rate = 1 / (math.log(2) * bool_masked_pos.shape[1])
            diffusion = self.diffusion_loss(ids, logits, bool_masked_pos, times).mean() * rate
            losses = {
                "diffusion": diffusion.detach(),
                "reconstruction": torch.full_like(diffusion.detach(), self.reconstruction_loss()),
            }
            loss = diffusion + losses["reconstruction"]
        return MD4Output(
            loss=loss,
            losses=losses,
            last_hidden_state=features,
            logits=logits,
            mask=bool_masked_pos,
            times=times,
            bits_per_token=None if loss is None else loss.detach(),
        )

    def draw(self, ids, times, noise, time_noise, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Times, float32 (batch,), and noise, float32 (batch, masks, units): what is not given is drawn."""
        batch, units = len(ids), ids[0].numel()
        masks = self.config.num_masks
        draw = model_draw(batch, ids.device, self.training, generator)
        drawn_time = draw(1)[:, 0]
        if noise is None:
            noise = draw(masks * units).unflatten(1, (masks, units))
        elif noise.shape != (batch, masks, units):
            raise ValueError(f"`noise` has shape {tuple(noise.shape)}; expected ({batch}, {masks}, {units}).")
        if times is None:
            times = drawn_time if time_noise is None else time_noise
            if self.config.antithetic:
                # One random start for the whole batch: the even spread keeps the loss's variance low.
                times = (times[0] + torch.arange(batch, device=ids.device) / batch) % 1
            times = self.rescale_times(times.float())
        return times, noise

    def rescale_times(self, times: torch.Tensor) -> torch.Tensor:
        """Uniform times in [0, 1) to those that the loss is taken at."""
        if self.config.continuous_time:
            return times
        return ((times * self.config.timesteps).floor() + 1) / self.config.timesteps

    def predict(self, ids, bool_masked_pos, times, classes) -> tuple[torch.Tensor, torch.Tensor]:
        """Features, and logits (batch, units, vocab_size), of tokens some of which are masked."""
        network = self.weights_in_use.backbone
        masked = ids.masked_fill(bool_masked_pos.view_as(ids), self.vocab_size)
        classes = classes.flatten() if classes is not None else None
        features, condition = network.features(masked, times, classes)
        return features, network.predict(features, condition)

    def diffusion_loss(self, ids, logits, bool_masked_pos, times) -> torch.Tensor:
        """Nats of each sample, float32 (batch,): a sum over masked tokens times one weight (equation 5).

        A mean over the masked tokens instead would raise the weight of samples with few of them.
        """
        log_likelihood = -F.cross_entropy(logits.float().transpose(1, 2), ids.flatten(1), reduction="none")
        masked = (log_likelihood * bool_masked_pos).sum(dim=1)
        if self.config.continuous_time:
            return self.schedule.weight(times) * masked
        return self.schedule.step_weight(times, self.config.timesteps) * masked

    def reconstruction_loss(self) -> float:
        """Bits per token that are lost at time 0, where alpha is 1 - eps and a masked token is anyone's guess."""
        return self.config.schedule_eps * math.log2(self.vocab_size)

    @torch.no_grad()
    def evidence_bound(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        num_times: int = 16,
        seed: int = 0,
    ) -> EvidenceBound:
        """Estimates the bound on the negative log-likelihood of each sample, in eval mode.

        Args:
            pixel_values, input_ids, classes: as of `forward`.
            num_times: evenly spread times at which each sample is masked; more make the estimate less noisy.
            seed: of start and masks.
        """
        ids = self.token_ids(pixel_values, input_ids)
        generator = torch.Generator(ids.device).manual_seed(seed)
        total = torch.zeros(len(ids), device=ids.device)
        was_training = self.training
        self.eval()
        start = torch.rand(len(ids), device=ids.device, generator=generator)
        for step in range(num_times):
            times = self.rescale_times((start + step / num_times) % 1)
            total += self.bound_at(ids, times, classes, generator)
        self.train(was_training)
        nats = total / num_times / ids[0].numel()
        return EvidenceBound(bits_per_token=nats / math.log(2), nats_per_token=nats, perplexity=nats.mean().exp())

    def bound_at(self, ids, times, classes, generator) -> torch.Tensor:
        """The bound's estimate from one masking at `times`: nats of each sample, float32 (batch,)."""
        output = self(input_ids=ids, classes=classes, times=times, generator=generator, return_loss=False)
        nats = self.diffusion_loss(ids, output.logits, output.mask, times)
        return nats + self.reconstruction_loss() * math.log(2) * output.mask.shape[1]

    @torch.no_grad()
    def generate(
        self,
        num_samples: int | None = None,
        *,
        classes: Sequence[int] | torch.Tensor | None = None,
        steps: int | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        sampling_grid: str | None = None,
        progress: bool = True,
    ) -> GenerationOutput:
        """Draws samples, by unmasking tokens over time (the ancestral sampler), with the averaged weights.

        Args:
            num_samples: how many; by default as many as there are classes or samples to complete, else 1.
            classes: int64 (num_samples,), of class-conditional models.
            steps: of the sampler; `timesteps` by default. More steps make better samples, up to a step per token.
            seed: makes the samples repeatable; by default torch's generator goes on.
            temperature: what the logits are divided by; below 1 makes samples more probable and less varied.
            top_p: draw among the most probable values of this total probability only (the reference's value is 0.98).
            pixel_values, input_ids: samples to complete, where `bool_masked_pos` is True; the rest is kept.
            bool_masked_pos: bool (num_samples, units), True = to be drawn.
            sampling_grid: "uniform" or "cosine"; the config's by default.
            progress: show a bar.

        Returns:
            `GenerationOutput`: token_ids int64, of pictures (num_samples, channels, height, width) with pixel_values
            in [0, 1], of texts (num_samples, tokens).

        Raises:
            ValueError: for arguments that do not fit.
        """
        steps = self.config.timesteps if steps is None else steps
        if steps < 1 or temperature <= 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"steps={steps}, temperature={temperature}, top_p={top_p}: steps must be at least 1, temperature "
                "above 0, and top_p in (0, 1]."
            )
        ids, classes = self._start(num_samples, classes, pixel_values, input_ids, bool_masked_pos)
        device = ids.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        grid = self.sampling_times(steps, sampling_grid or self.config.sampling_grid).to(device)
        was_training = self.training
        self.eval()
        for step in tqdm(range(steps), desc="sampling", disable=not progress):
            probabilities = self._probabilities(ids, grid[step], classes, temperature, top_p)
            drawn = self._draw_earlier(probabilities, grid[step], grid[step + 1], generator).view_as(ids)
            ids = torch.where(ids == self.vocab_size, drawn, ids)
        # What is masked at time 0, an alpha of not quite 1 leaves some, becomes the most probable value.
        probabilities = self._probabilities(ids, grid[-1], classes, temperature, top_p)
        ids = torch.where(ids == self.vocab_size, probabilities.argmax(dim=-1).view_as(ids), ids)
        self.train(was_training)
        pixels = None if self.config.takes_text else pixels_of_tokens(ids, self.vocab_size)
        return GenerationOutput(token_ids=ids, pixel_values=pixels)

    def _start(self, num_samples, classes, pixel_values, input_ids, bool_masked_pos):
        """What the sampler begins with: tokens and masks, and the classes."""
        device = self.device
        if classes is not None:
            classes = torch.as_tensor(classes, device=device).flatten()
        if (bool_masked_pos is None) != (pixel_values is None and input_ids is None):
            raise ValueError("To complete samples give them and `bool_masked_pos`, True where they are to be drawn.")
        if bool_masked_pos is not None:
            ids = self.token_ids(pixel_values, input_ids).to(device)
            check_mask(bool_masked_pos, len(ids), ids.shape[1:])
            ids = ids.masked_fill(bool_masked_pos.to(device).view_as(ids), self.vocab_size)
        else:
            count = num_samples or (1 if classes is None else len(classes))
            ids = torch.full((count, *self.config.backbone_config.data_shape), self.vocab_size, device=device)
        if len(ids) != (num_samples or len(ids)) or (classes is not None and len(classes) != len(ids)):
            raise ValueError(
                f"num_samples={num_samples}, {len(ids)} samples to complete and "
                f"{None if classes is None else len(classes)} classes do not go together."
            )
        return ids, classes

    def sampling_times(self, steps: int, grid: str) -> torch.Tensor:
        """float32 (steps + 1,): from 1 to 0.

        Raises:
            ValueError: for an unknown grid.
        """
        if grid not in SAMPLING_GRIDS:
            raise ValueError(f"sampling_grid is {grid!r}; it must be one of {', '.join(SAMPLING_GRIDS)}.")
        times = torch.linspace(1, 0, steps + 1)
        return torch.cos(math.pi / 2 * (1 - times)).clamp(min=0) if grid == "cosine" else times

    def _probabilities(self, ids, time, classes, temperature: float, top_p: float) -> torch.Tensor:
        """Of each value of each token, float32 (batch, units, vocab_size)."""
        mask = ids == self.vocab_size
        # Through `forward`, without which the weights of a sharded model are not there.
        logits = self(
            input_ids=ids.masked_fill(mask, 0),
            bool_masked_pos=mask.flatten(1),
            times=time.expand(len(ids)),
            classes=classes,
            return_loss=False,
        ).logits
        probabilities = (logits.float() / temperature).softmax(dim=-1)
        if top_p == 1:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # of all that are more probable
        kept = torch.zeros_like(probabilities).scatter(-1, order, ordered * (before < top_p))
        return kept / kept.sum(dim=-1, keepdim=True)

    def unmasking(self, probabilities, time, earlier) -> torch.Tensor:
        """Probabilities that a token masked at `time` has each value at `earlier`: float32 (batch, units, vocab_size);
        what they lack to 1 is that it stays masked (equation 3)."""
        alpha = self.schedule.alpha(time)
        return probabilities * (self.schedule.alpha(earlier) - alpha) / (1 - alpha)

    def _draw_earlier(self, probabilities, time, earlier, generator) -> torch.Tensor:
        """Tokens at an earlier time, int64 (batch, units): one draw decides value and unmasking, which keeps more of
        float32's precision than two (paper, appendix G)."""
        unmasking = self.unmasking(probabilities, time, earlier)
        staying = (1 - unmasking.sum(dim=-1, keepdim=True)).clamp(min=0)
        outcomes = torch.cat([unmasking, staying], dim=-1)
        return torch.multinomial(outcomes.flatten(0, 1), 1, generator=generator).view(outcomes.shape[:2])

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width) in [0, 1].

        The rows below the middle are masked (gray) and drawn again; the last panel is drawn from nothing.
        """
        height = pixel_values.shape[2]
        shape = pixel_values.shape
        below = torch.arange(height, device=pixel_values.device)[:, None] >= height // 2
        mask = below.expand(shape[1:]).flatten().expand(len(pixel_values), -1)
        classes = None
        if self.uses_classes:
            classes = torch.arange(len(pixel_values), device=self.device) % self.config.backbone_config.num_classes
        settings = {"steps": PICTURE_STEPS, "seed": 0, "classes": classes, "progress": False}
        whole = torch.ones_like(mask)
        return {
            "picture": pixels_of_tokens(tokens_of_pixels(pixel_values, self.vocab_size), self.vocab_size),
            "masked": pixel_values.float().masked_fill(mask.view(shape), 0.5),
            "completed": self.generate(pixel_values=pixel_values, bool_masked_pos=mask, **settings).pixel_values,
            "generated": self.generate(pixel_values=pixel_values, bool_masked_pos=whole, **settings).pixel_values,
        }


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: MD4Config) -> dict[str, torch.Tensor]:
    """The reference's flax parameters to our names; names that are not known stay, for strict loading to report.

    Args:
        state_dict: flattened, names joined by "/" ("classifier/Embed_0/embedding"), as
            `flax.traverse_util.flatten_dict(params, sep="/")` gives them.
        config: of the model.
    """
    renaming = (
        _transformer_renaming(config.backbone_config) if config.takes_text else _unet_renaming(config.backbone_config)
    )
    common = (
        (r"^cond_embeddings/embedding$", "backbone.conditioning.class_embeddings.weight"),
        (r"^classifier/CondEmbedding_0/dense0/", "backbone.conditioning.hidden/"),
        (r"^classifier/CondEmbedding_0/Dense_0/", "backbone.conditioning.output/"),
        (r"^noise_schedule/w$", "schedule.raw_powers"),
    )
    converted = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in (*common, *renaming):
            name = re.sub(pattern, replacement, name)
        name = name.replace("/", ".")
        if name.endswith(".kernel"):
            tensor = _kernel(name, tensor)
        elif name.endswith(".bias"):
            tensor = tensor.flatten()
        elif name.endswith("position_embeddings"):
            tensor = tensor.unsqueeze(0)
        converted[re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)] = tensor
    return converted


def _kernel(name: str, kernel: torch.Tensor) -> torch.Tensor:
    """flax's kernel, whose last axis is the output, as torch's weight."""
    if kernel.ndim == 4:
        return kernel.permute(3, 2, 0, 1).contiguous()
    if kernel.ndim == 3:  # of attention: (in, heads, width), and (heads, width, out)
        kernel = kernel.flatten(0, 1) if name.endswith("o_proj.kernel") else kernel.flatten(1)
    weight = kernel.T.contiguous()
    return weight[:, :, None, None] if "shortcut" in name else weight


def _transformer_renaming(form: MD4TransformerConfig) -> tuple[tuple[str, str], ...]:
    root = "^classifier/Transformer_0/"
    # The reference numbers its layers in the order in which they are made.
    dense = ["embedding_projection"] if form.embedding_size else []
    dense += ["head.modulation"] if form.is_conditioned else []
    dense += ["head.linear"]
    return (
        (r"^classifier/(Transformer_0/)?Embed_0/", "backbone.token_embeddings/"),
        *((rf"{root}Dense_{number}/", f"backbone.{name}/") for number, name in enumerate(dense)),
        (rf"{root}RMSNorm_0/", "backbone.head.norm.norm/"),
        (rf"{root}TransformerBlock_(\d+)/", r"backbone.layers.\1."),
        (r"\.Dense_0/", ".modulation/"),
        (r"\.RMSNorm_0/", ".attention_norm.norm/"),
        (r"\.RMSNorm_1/", ".feed_forward_norm.norm/"),
        (r"attention/w([qkvo])/", r"attention.\1_proj/"),
        (r"feed_forward/w1/", "feed_forward.gate_proj/"),
        (r"feed_forward/w2/", "feed_forward.down_proj/"),
        (r"feed_forward/w3/", "feed_forward.up_proj/"),
    )


def _unet_renaming(form: MD4UNetConfig) -> tuple[tuple[str, str], ...]:
    root = "^classifier/UNet5DWrapper_0/UNet_0/"
    levels = len(form.channel_multipliers)
    count = form.num_layers * levels + levels - 1
    blocks = [f"down.{number}" for number in range(count)]
    blocks += [] if form.num_dit_layers else ["middle.block_1", "middle.block_2"]
    blocks += [f"up.{number}" for number in range(count + levels)]
    adds = form.is_conditioned and not form.num_dit_layers
    return (
        (r"^classifier/Embed_0/", "backbone.token_embeddings/"),
        *((rf"{root}ResBlock_{number}/", f"backbone.{name}.") for number, name in enumerate(blocks)),
        (rf"{root}Conv_0/", "backbone.stem/"),
        (rf"{root}Conv_1/", "backbone.head/"),
        (rf"{root}GroupNorm_0/", "backbone.norm.norm/"),
        (rf"{root}CondGroupNorm_0/Dense_0/", "backbone.norm.modulation/"),
        (rf"{root}CondGroupNorm_0/GroupNorm_0/", "backbone.norm.norm/"),
        (rf"{root}SelfAttention_0/GroupNorm_0/", "backbone.middle.attention.norm/"),
        (
            rf"{root}SelfAttention_0/MultiHeadDotProductAttention_0/(query|key|value|out)/",
            lambda found: f"backbone.middle.attention.attention.{found[1].replace('out', 'o')[0]}_proj/",
        ),
        (rf"{root}DiT_0/x_embedder/proj/", "backbone.middle.embedding/"),
        (rf"{root}DiT_0/pos_embed$", "backbone.middle.position_embeddings"),
        (rf"{root}DiT_0/final_layer/Dense_0/", "backbone.middle.head.modulation/"),
        (rf"{root}DiT_0/final_layer/linear/", "backbone.middle.head.linear/"),
        (rf"{root}DiT_0/final_layer/RMSNorm_0/", "backbone.middle.head.norm.norm/"),
        (rf"{root}DiT_0/blocks_(\d+)/Dense_0/", r"backbone.middle.layers.\1.modulation/"),
        (rf"{root}DiT_0/blocks_(\d+)/RMSNorm_0/", r"backbone.middle.layers.\1.attention_norm.norm/"),
        (rf"{root}DiT_0/blocks_(\d+)/RMSNorm_1/", r"backbone.middle.layers.\1.feed_forward_norm.norm/"),
        (rf"{root}DiT_0/blocks_(\d+)/attn/w([qkvo])/", r"backbone.middle.layers.\1.attention.\2_proj/"),
        (rf"{root}DiT_0/blocks_(\d+)/mlp/(fc[12])/", r"backbone.middle.layers.\1.feed_forward.\2/"),
        (r"\.(Cond)?GroupNorm_0/Dense_0/", ".norm_1.modulation/"),
        (r"\.(Cond)?GroupNorm_1/Dense_0/", ".norm_2.modulation/"),
        (r"\.(CondGroupNorm_0/)?GroupNorm_0/", ".norm_1.norm/"),
        (r"\.CondGroupNorm_1/GroupNorm_0/|\.GroupNorm_1/", ".norm_2.norm/"),
        (r"\.Conv_0/", ".convolution_1/"),
        (r"\.Conv_1/", ".convolution_2/"),
        (r"\.Dense_0/", ".condition/" if adds else ".shortcut/"),
        (r"\.Dense_1/", ".shortcut/"),
    )


def tiny_network() -> MD4UNetConfig:
    """A U-ViT of the catalogue's tiny configs, without the zeros that would keep gradients from it."""
    return MD4UNetConfig(
        vocab_size=8,
        conditioning_size=8,
        image_size=8,
        num_channels=3,
        num_layers=1,
        channel_multipliers=[1],
        num_dit_layers=1,
        dit_hidden_size=16,
        dit_num_attention_heads=2,
        num_groups=2,
        dropout=0.0,
        zero_init=False,
    )


def tiny_config() -> MD4Config:
    return MD4Config(backbone_config=tiny_network(), timesteps=8)


def example_inputs(config: MD4Config, batch: int) -> dict[str, torch.Tensor]:
    """Pictures, or texts, of random tokens."""
    form = config.backbone_config
    ids = torch.randint(form.vocab_size, (batch, *form.data_shape))
    return {"input_ids": ids} if config.takes_text else {"pixel_values": pixels_of_tokens(ids, form.vocab_size)}


register_variant(
    config=MD4Config,
    pretraining=MD4ForPreTraining,
    model=MD4Model,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    example_inputs=example_inputs,
)
