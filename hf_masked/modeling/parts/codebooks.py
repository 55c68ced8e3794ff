"""Codebooks: unit vectors that follow what is assigned to them, for methods that turn patches into tokens."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_masked.modeling.parts.gather import gather_rows, num_processes
from hf_masked.modeling.parts.momentum import StandstillWatch

# Rows whose similarities to all codes are held at once where the rows of all processes are clustered.
ROWS = 1 << 14


class EMACodebook(nn.Module):
    """Unit vectors, each a moving average of the unit vectors nearest to it (BEiT v2, section 2.1 and appendix).

    No gradient moves it. A forward pass in training only notes what is assigned to which code; `update()` moves the
    codes once per step of the optimizer, by the sums over all processes and all accumulated batches. So several
    processes, and accumulation, give what one large batch gives, and a compiled forward holds no communication.

    A model that holds one calls `update()` in its `update_twins()`, `watch()` in its `train()` and `init_weights()` in
    its `_init_weights`, and names `noted_buffers` in `_ddp_params_and_buffers_to_ignore`: DDP would overwrite the
    notes of one process with those of another.

    Args:
        num_codes, dim: of the codebook.
        decay: m in `code <- normalized(m * code + (1 - m) * normalized(mean of what was assigned))`.
        kmeans_init: begin with the means of the first training batch, over all processes. A compiled forward cannot
            do so and begins with random unit vectors, as does a codebook without it.
    """

    noted_buffers = ("sums", "counts")

    def __init__(self, num_codes: int, dim: int, decay: float = 0.99, kmeans_init: bool = True):
        super().__init__()
        self.decay = decay
        self.kmeans_init = kmeans_init
        self.register_buffer("vectors", F.normalize(torch.randn(num_codes, dim), dim=1))
        self.register_buffer("usage", torch.zeros(num_codes))
        self.register_buffer("begun", torch.tensor(not kmeans_init))
        self.register_buffer("sums", torch.zeros(num_codes, dim), persistent=False)
        self.register_buffer("counts", torch.zeros(num_codes), persistent=False)
        self._known_begun = False
        self._watch = StandstillWatch("codebook")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random unit vectors and empty notes, of what has not been loaded."""
        init.copy_(self.vectors, F.normalize(torch.randn_like(self.vectors, dtype=torch.float32), dim=1))
        init.zeros_(self.usage)
        init.copy_(self.begun, torch.tensor(not self.kmeans_init, device="cpu"))
        init.zeros_(self.sums)
        init.zeros_(self.counts)

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest code of each vector; in training it is noted for the next update.

        Args:
            vectors: float32 (..., dim), of unit length.

        Returns:
            codes: float32 (..., dim), without gradient, as they are before the update.
            ids: int64 (...).
        """
        rows = vectors.detach().flatten(0, -2)
        if self.training and self.kmeans_init and not torch.compiler.is_compiling():
            self._begin(rows)
        with torch.no_grad():
            ids = self.nearest(rows)
            codes = self.vectors.float()[ids]
            if self.training:
                self.sums.index_add_(0, ids, rows.to(self.sums.dtype))
                self.counts.index_add_(0, ids, torch.ones_like(ids, dtype=self.counts.dtype))
        return codes.view_as(vectors), ids.view(vectors.shape[:-1])

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        """Of float32 unit vectors (n, dim) the codes with the highest cosine, int64 (n,), whatever the autocast."""
        with torch.autocast(rows.device.type, enabled=False):
            return (rows @ self.vectors.float().T).argmax(dim=1)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the codes to which something was assigned since the last update, in any process."""
        noted = torch.cat([self.sums, self.counts.unsqueeze(1)], dim=1).float()
        if num_processes() > 1:
            dist.all_reduce(noted)
        sums, counts = noted[:, :-1], noted[:, -1]
        old = self.vectors.float()
        new = F.normalize(self.decay * old + (1 - self.decay) * F.normalize(sums, dim=1), dim=1)
        self.vectors.copy_(torch.where(counts.unsqueeze(1) > 0, new, old))
        self.usage.copy_(self.decay * self.usage + (1 - self.decay) * counts)
        self.sums.zero_()
        self.counts.zero_()
        self._watch.stop()

    def watch(self, parameter: nn.Parameter) -> None:
        """Warns once if a parameter of the encoder has changed and the codebook has never been updated."""
        self._watch.look_at(parameter)

    def perplexity(self) -> torch.Tensor:
        """How many codes are in use, float32 scalar: the exponential of the entropy of their running counts."""
        shares = self.usage.float() / self.usage.float().sum().clamp(min=1e-12)
        return torch.special.entr(shares).sum().exp()

    @torch.no_grad()
    def _begin(self, rows: torch.Tensor) -> None:
        # The device is asked until the answer is yes: once, or after loading.
        if not self._known_begun and not self.begun.item():
            self.vectors.copy_(cosine_kmeans(gather_rows(rows), len(self.vectors)))
            if num_processes() > 1:
                dist.broadcast(self.vectors, src=0)
            self.begun.fill_(True)
        self._known_begun = True


@torch.no_grad()
def cosine_kmeans(rows: torch.Tensor, num_means: int, iterations: int = 10) -> torch.Tensor:
    """Unit vectors that stand for clusters of unit vectors (`norm_ema_quantizer.py`, `kmeans`).

    It begins with random rows, distinct where there are enough; the choice is a function of the number of rows alone,
    so that all processes make the same. A mean to which nothing is assigned stays.

    Args:
        rows: float32 (n, dim), of unit length.

    Returns:
        float32 (num_means, dim).
    """
    generator = torch.Generator().manual_seed(0)
    if len(rows) >= num_means:
        chosen = torch.randperm(len(rows), generator=generator)[:num_means]
    else:
        chosen = torch.randint(len(rows), (num_means,), generator=generator)
    means = rows[chosen.to(rows.device)]
    for _ in range(iterations):
        ids = torch.cat([(part @ means.T).argmax(dim=1) for part in rows.split(ROWS)])
        sums = torch.zeros_like(means).index_add_(0, ids, rows)
        filled = torch.bincount(ids, minlength=num_means) > 0
        means = torch.where(filled.unsqueeze(1), F.normalize(sums, dim=1), means)
    return means


def code_colors(vectors: torch.Tensor, channels: int) -> torch.Tensor:
    """A colour for each code, near codes having near colours: the ranks along the codebook's principal directions.

    Args:
        vectors: (codes, dim).

    Returns:
        float32 (codes, channels) in [0, 1].
    """
    centred = vectors.float() - vectors.float().mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh  # (directions, dim), the longest first
    chosen = directions[torch.arange(channels, device=directions.device) % len(directions)]
    ranks = (centred @ chosen.T).argsort(dim=0).argsort(dim=0)
    return ranks.float() / max(len(vectors) - 1, 1)
