"""Codebooks that follow what is assigned to them.

That several processes give what one gives, the conformance suite shows (`-k vqkd`): it compares the whole state.
"""

import logging

import torch
from torch.nn import functional as F

from hf_masked.modeling.parts.codebooks import EMACodebook, code_colors, cosine_kmeans


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def codebook(num_codes: int = 12, dim: int = 4, seed: int = 0, **settings) -> EMACodebook:
    torch.manual_seed(seed)
    return EMACodebook(num_codes, dim, **{"kmeans_init": False} | settings)


def test_nearest_code_has_the_smallest_distance_in_half_precision_too():
    book, rows = codebook(200), unit(500, 4)
    expected = torch.cdist(rows, book.vectors).argmin(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book.nearest(rows), expected)


def test_one_update_is_the_papers_written_as_loops():
    book, rows = codebook(decay=0.9), unit(9, 4).repeat(3, 1) + 0.01
    rows = F.normalize(rows, dim=1)
    old = book.vectors.clone()
    codes, ids = book.train()(rows.view(3, 9, 4))
    assert torch.equal(codes, old[ids]) and ids.shape == (3, 9)
    assert torch.equal(book.vectors, old), "the assignment is that of before the update"
    book.update()
    for code in range(12):
        assigned = [row for row, chosen in zip(rows, ids.flatten().tolist(), strict=True) if chosen == code]
        if not assigned:
            assert torch.equal(book.vectors[code], old[code]), "unused codes stay"
            continue
        mean = F.normalize(torch.stack(assigned).mean(dim=0), dim=0)
        torch.testing.assert_close(book.vectors[code], F.normalize(0.9 * old[code] + 0.1 * mean, dim=0))
        torch.testing.assert_close(book.usage[code], torch.tensor(0.1 * len(assigned)))
    assert 0 < len(ids.unique()) < 12


def test_codes_stay_of_unit_length_over_many_updates():
    book = codebook(decay=0.5).train()
    for step in range(200):
        book(unit(40, 4, seed=step))
        book.update()
    torch.testing.assert_close(book.vectors.norm(dim=1), torch.ones(12), rtol=0, atol=1e-6)


def test_accumulated_batches_are_one_large_batch():
    rows = unit(40, 4)
    whole, parts = codebook().train(), codebook().train()
    whole(rows)
    for part in rows.split(10):
        parts(part)
    for book in (whole, parts):
        book.update()
    torch.testing.assert_close(parts.vectors, whole.vectors)
    torch.testing.assert_close(parts.usage, whole.usage)


def test_nothing_moves_in_eval_mode_or_without_a_note():
    book = codebook(kmeans_init=True).eval()
    before = {name: value.clone() for name, value in book.named_buffers()}
    book(unit(40, 4))
    book.update()
    for name, value in book.named_buffers():
        assert torch.equal(value, before[name]), name


def test_no_parameter_and_no_gradient():
    book, rows = codebook().train(), unit(20, 4).requires_grad_()
    codes, _ = book(rows)
    assert not list(book.parameters()) and not codes.requires_grad


def test_first_training_batch_makes_the_codebook_and_later_ones_do_not():
    book, rows = codebook(kmeans_init=True).train(), unit(100, 4)
    book(rows)
    assert torch.equal(book.vectors, cosine_kmeans(rows, 12)) and book.begun
    book(unit(100, 4, seed=1))
    assert torch.equal(book.vectors, cosine_kmeans(rows, 12))
    loaded = codebook(kmeans_init=True, seed=1).train()
    loaded.load_state_dict(book.state_dict())
    loaded(unit(100, 4, seed=2))
    assert torch.equal(loaded.vectors, book.vectors), "a loaded codebook has begun"


def test_kmeans_finds_clusters_and_keeps_means_without_rows():
    centres = torch.eye(6)[:3]
    rows = F.normalize(centres.repeat_interleave(50, 0) + 0.05 * torch.randn(150, 6), dim=1)
    means = cosine_kmeans(rows, 12)
    assert ((rows @ means.T).amax(dim=1) > 0.98).all()
    few = cosine_kmeans(rows[:3], 12)  # more means than rows: some of them are equal, and all are rows
    torch.testing.assert_close((few @ rows[:3].T).amax(dim=1), torch.ones(12))


def test_perplexity_counts_codes_in_use():
    book = codebook(num_codes=4, dim=4).train()
    book.vectors.copy_(torch.eye(4))
    book(torch.eye(4)[[0, 1, 0, 1]])
    book.update()
    torch.testing.assert_close(book.perplexity(), torch.tensor(2.0))


def test_standstill_is_told_once(caplog):
    book, weight = codebook().train(), torch.nn.Parameter(torch.zeros(2))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            book.watch(weight)
            weight.data += 1
    assert caplog.text.count("codebook stands still") == 1


def test_colors_of_near_codes_are_near():
    angle = torch.linspace(0, 1, 20)
    colors = code_colors(torch.stack([angle.cos(), angle.sin()], dim=1), 1)
    assert colors.shape == (20, 1) and colors.min() == 0 and colors.max() == 1
    steps = colors[1:, 0] - colors[:-1, 0]
    assert (steps > 0).all() or (steps < 0).all()
