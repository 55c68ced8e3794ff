"""Pictures for people: grids of what a model masks and predicts, loss curves, embedding plots."""

import io
import textwrap
from pathlib import Path

import torch
from PIL import Image

# Inches of one small picture in a grid.
CELL = 1.3


def picture_grid(panels: dict[str, torch.Tensor], rows: int = 8) -> Image.Image:
    """One row per picture, one named column per panel.

    Args:
        panels: name -> float (batch, channels, height, width) in [0, 1]. One channel is drawn gray, of three or more
            the first three are drawn as red, green and blue.
        rows: pictures drawn at most.

    Returns:
        An RGB picture.
    """
    plt = _pyplot()
    first = next(iter(panels.values()))
    rows = min(rows, len(first))
    ratio = first.shape[-2] / first.shape[-1]
    figure, axes = plt.subplots(
        rows, len(panels), figsize=(CELL * len(panels) + 0.4, CELL * ratio * rows + 0.5), squeeze=False
    )
    for column, (name, panel) in enumerate(panels.items()):
        axes[0, column].set_title(name.replace(" (", "\n("), fontsize=7)
        for row in range(rows):
            axes[row, column].imshow(_drawable(panel[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for axis in axes.flat:
        axis.axis("off")
    return _rendered(figure)


def retrieval_grid(
    pictures: torch.Tensor, similarity: torch.Tensor, neighbours: torch.Tensor, classes: list[str] | None = None
) -> Image.Image:
    """One row per query: the picture, then its nearest neighbours with their similarity.

    Args:
        pictures: float (n, channels, height, width) in [0, 1]; the queries are the first.
        similarity: float (queries, count), see `hf_masked.evaluation.retrieval.nearest`.
        neighbours: int64 (queries, count).
        classes: of the pictures; neighbours of the query's class are framed green, others red.
    """
    plt = _pyplot()
    queries, count = neighbours.shape
    ratio = pictures.shape[-2] / pictures.shape[-1]
    size = CELL * (count + 1) + 0.4, (CELL * ratio + 0.2) * queries + 0.3
    figure, axes = plt.subplots(queries, count + 1, figsize=size, squeeze=False)
    for row in range(queries):
        shown = [row, *neighbours[row].tolist()]
        titles = [classes[row] if classes else "query", *(f"{value:.2f}" for value in similarity[row].tolist())]
        for axis, number, title in zip(axes[row], shown, titles, strict=True):
            axis.imshow(_drawable(pictures[number]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=7, pad=2)
            axis.set_xticks([])
            axis.set_yticks([])
            same = classes is not None and classes[number] == classes[row]
            colour = "black" if classes is None or number == row else "tab:green" if same else "tab:red"
            axis.spines[:].set(color=colour, linewidth=0.5 if colour == "black" else 2)
    return _rendered(figure)


def clip_grid(panels: dict[str, torch.Tensor], clips: int, frames: int = 8) -> Image.Image:
    """One row per clip and panel, named on the left, with frames that are evenly spread over the clip.

    Args:
        panels: name -> float (batch, frames, channels, height, width) in [0, 1].
        clips, frames: drawn at most.

    Returns:
        An RGB picture.
    """
    plt = _pyplot()
    batch, length, _, height, width = next(iter(panels.values())).shape
    clips, columns = min(clips, batch), min(frames, length)
    chosen = torch.linspace(0, length - 1, columns).round().int().tolist()
    rows = clips * len(panels)
    size = (CELL * columns + 1.0, CELL * height / width * rows + 0.3)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04}
    )
    drawn = [(name, panel[clip]) for clip in range(clips) for name, panel in panels.items()]
    for row, (name, panel) in zip(axes, drawn, strict=True):
        row[0].text(
            -0.06, 0.5, name.replace(" (", "\n("), fontsize=7, ha="right", va="center", transform=row[0].transAxes
        )
        for axis, frame in zip(row, panel[chosen], strict=True):
            axis.imshow(_drawable(frame), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.axis("off")
    return _rendered(figure)


def scatter_grid(panels: dict[str, tuple[torch.Tensor, ...]], rows: int = 8) -> Image.Image:
    """One row per point cloud, one named column per panel, all panels of a row seen from the same place.

    Args:
        panels: name -> layers, float (batch, points, 3) each: the first is drawn gray, the second red on top.
        rows: clouds drawn at most.
    """
    plt = _pyplot()
    rows = min(rows, len(next(iter(panels.values()))[0]))
    figure, axes = plt.subplots(
        rows,
        len(panels),
        figsize=(1.8 * len(panels), 1.8 * rows + 0.3),
        squeeze=False,
        subplot_kw={"projection": "3d"},
    )
    for column, (name, layers) in enumerate(panels.items()):
        axes[0, column].set_title(name, fontsize=8)
        for row in range(rows):
            axis = axes[row, column]
            for layer, colour in zip(layers, ("dimgray", "tab:red"), strict=False):
                axis.scatter(*layer[row].T.numpy(), s=1.2, color=colour, linewidths=0)
            # Of the first panel's cloud, so that what is left out leaves a gap and moves nothing.
            whole = next(iter(panels.values()))[0][row]
            centre, radius = whole.mean(dim=0).tolist(), (whole - whole.mean(dim=0)).abs().max().item()
            axis.set(**{f"{side}lim": (c - radius, c + radius) for side, c in zip("xyz", centre, strict=True)})
            axis.set_box_aspect((1, 1, 1), zoom=1.4)
            axis.axis("off")
    return _rendered(figure)


def disparity_picture(disparity: torch.Tensor, largest: float | None = None) -> Image.Image:
    """A disparity map in colours, dark for far and bright for near, with their scale in pixels.

    Args:
        disparity: float (height, width).
        largest: disparity of the brightest colour; by default the largest there is.
    """
    plt = _pyplot()
    height, width = disparity.shape
    figure, axis = plt.subplots(figsize=(6, 6 * height / width))
    shown = axis.imshow(disparity.numpy(), cmap="inferno", vmin=0, vmax=largest or disparity.max().item())
    axis.axis("off")
    bar = figure.colorbar(shown, ax=axis, fraction=0.046 * height / width, pad=0.02)
    bar.set_label("disparity in pixels", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return _rendered(figure)


def loss_curve(log_history: list[dict], path: str | Path) -> Path:
    """Draws loss and online kNN accuracy of a Trainer's `state.log_history` over the epochs."""
    plt = _pyplot()
    losses = [(line["epoch"], line["loss"]) for line in log_history if "loss" in line]
    accuracies = [(line["epoch"], line["knn_accuracy"]) for line in log_history if "knn_accuracy" in line]
    figure, axis = plt.subplots(figsize=(6, 3.5))
    axis.plot(*zip(*losses, strict=True), color="tab:blue") if losses else None
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss", color="tab:blue")
    if accuracies:
        right = axis.twinx()
        right.plot(*zip(*accuracies, strict=True), color="tab:orange", marker="o")
        right.set_ylabel("online kNN accuracy", color="tab:orange")
    return _saved(figure, path)


def embedding_plot(
    features: torch.Tensor, labels: torch.Tensor, path: str | Path, class_names: list[str] | None = None
) -> Path:
    """Draws features in two dimensions (t-SNE of at most 50 principal components), one colour per class.

    Args:
        features: float (n, dim); a thousand or two are enough.
        labels: int64 (n,).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    plt = _pyplot()
    components = PCA(min(50, *features.shape), random_state=0).fit_transform(features.numpy())
    points = TSNE(init="pca", random_state=0, perplexity=min(30, len(features) / 4)).fit_transform(components)
    figure, axis = plt.subplots(figsize=(6, 5))
    for label in labels.unique().tolist():
        chosen = (labels == label).numpy()
        axis.scatter(*points[chosen].T, s=6, label=class_names[label] if class_names else str(label))
    axis.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xticks([])
    axis.set_yticks([])
    return _saved(figure, path)


def attribution_of_texts(
    attributions: torch.Tensor, tokens_a: list[str], tokens_b: list[str], title: str
) -> Image.Image:
    """The matrix of what pairs of tokens add to a similarity (red) and take from it (blue), with its tokens.

    Args:
        attributions: float (tokens of a, tokens of b).
        tokens_a, tokens_b: their names.
        title: a line above.
    """
    plt = _pyplot()
    rows, columns = attributions.shape
    figure, axis = plt.subplots(figsize=(0.45 * columns + 1.6, 0.36 * rows + 1.2))
    largest = attributions.abs().max().item() or 1.0
    shown = axis.imshow(attributions.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    axis.set_xticks(range(columns), tokens_b, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(range(rows), tokens_a, fontsize=8)
    if rows * columns <= 600:  # beyond that figures would not be legible
        for i in range(rows):
            for j in range(columns):
                value = attributions[i, j].item()
                color = "white" if abs(value) > 0.6 * largest else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    axis.set_title(textwrap.fill(title, max(40, 8 * columns)), fontsize=7, loc="left")
    figure.colorbar(shown, ax=axis, fraction=0.03, pad=0.02).ax.tick_params(labelsize=6)
    return _rendered(figure)


def attribution_of_pictures(
    attributions: torch.Tensor,
    pictures: tuple[torch.Tensor, torch.Tensor],
    grids: list[tuple[int, int]],
    pairs: list[tuple[int, int, float]],
    title: str,
) -> Image.Image:
    """Two pictures, and between them the same shaded by what each patch adds to their similarity (red) and takes from
    it (blue), the strongest pairs of patches joined.

    Args:
        attributions: float (patches of a, patches of b), without other tokens.
        pictures: float (channels, height, width) in [0, 1].
        grids: (rows, columns) of patches of both.
        pairs: (patch of a, patch of b, attribution) to be joined by lines.
        title: a line above.
    """
    plt = _pyplot()
    from matplotlib.patches import ConnectionPatch

    figure, (left, *shaded, right) = plt.subplots(1, 4, figsize=(12, 3.4))
    for axis, picture in zip((left, right), pictures, strict=True):
        axis.imshow(_drawable(picture), cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
    sums = attributions.sum(dim=1), attributions.sum(dim=0)
    largest = max(values.abs().max().item() for values in sums) or 1.0
    for axis, picture, (rows, columns), values in zip(shaded, pictures, grids, sums, strict=True):
        extent = (0, columns, rows, 0)
        # In gray, for the colours are the attribution's.
        axis.imshow(picture.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
        shade = axis.imshow(
            values.view(rows, columns).numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, alpha=0.6, extent=extent
        )
        axis.axis("off")
    figure.colorbar(shade, ax=[left, *shaded, right], fraction=0.015, pad=0.01).ax.tick_params(labelsize=6)
    strongest = max(abs(value) for *_, value in pairs) or 1.0
    for first, second, value in pairs:
        places = zip((first, second), grids, strict=True)
        ends = [(place % columns + 0.5, place // columns + 0.5) for place, (_, columns) in places]
        line = ConnectionPatch(
            *ends,
            "data",
            "data",
            axesA=shaded[0],
            axesB=shaded[1],
            color="tab:red" if value > 0 else "tab:blue",
            linewidth=0.5 + abs(value) / strongest,
            alpha=0.8,
        )
        figure.add_artist(line)
        for axis, end in zip(shaded, ends, strict=True):
            axis.plot(*end, marker="o", markersize=3, color="black")
    figure.suptitle(textwrap.fill(title, 160), fontsize=7)
    return _rendered(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _drawable(picture: torch.Tensor):
    channels = picture[:3] if picture.shape[0] >= 3 else picture[:1]
    return channels.permute(1, 2, 0).squeeze(-1).clamp(0, 1).numpy()


def _rendered(figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    _pyplot().close(figure)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _saved(figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _rendered(figure).save(path)
    return path
