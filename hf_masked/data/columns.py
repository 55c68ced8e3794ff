"""Which column of a table holds the pictures, which the labels, and what one cell of it contains."""

import numpy as np

from hf_masked.processing.decoding import BadImageError

# What data sets call their labels, the likeliest first; "cls" is WebDataset's.
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "category")


def find_image_column(features, image_column: str | None = None) -> str:
    """The column of pictures: the given one, else the one Image feature, else the one that could hold pictures.

    Args:
        features: `datasets.Features`.
        image_column: its name, if the user gave one.

    Raises:
        ValueError: if there is no such column, or not exactly one that could be meant.
    """
    from datasets import Image

    if image_column is not None:
        _check_name("image_column", image_column, features)
        return image_column
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    candidates = images or [name for name, feature in features.items() if _could_be_pictures(feature)]
    if len(candidates) != 1:
        found = f"several could hold them ({', '.join(candidates)})" if candidates else "none looks like pictures"
        raise ValueError(f"No column of pictures given and {found}: set image_column to one of {', '.join(features)}.")
    return candidates[0]


def find_image_columns(features, image_column: str | None = None) -> list[str]:
    """Like `find_image_column`; names with commas between them are several columns."""
    if image_column is None or image_column in features:
        return [find_image_column(features, image_column)]
    return [find_image_column(features, name.strip()) for name in image_column.split(",")]


def find_label_column(features, label_column: str | None = None) -> str | None:
    """The column of labels: the given one, else a ClassLabel, else one with a usual name; None if there is none.

    Raises:
        ValueError: if there is no such column, or it holds neither integers nor strings.
    """
    from datasets import ClassLabel

    if label_column is not None:
        _check_name("label_column", label_column, features)
        if not _could_be_labels(features[label_column]):
            raise ValueError(
                f"label_column={label_column!r} holds {features[label_column]}; labels are integers or strings: "
                f"choose another of {', '.join(features)}."
            )
        return label_column
    known = [name for name in LABEL_NAMES if name in features and _could_be_labels(features[name])]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    candidates = [name for name in known if name in classes] or classes or known
    return candidates[0] if candidates else None


def read_cell(cell, where: str) -> tuple[bytes | str | np.ndarray, str]:
    """What a cell of a column of pictures holds.

    Args:
        cell: a pyarrow scalar: a {"bytes", "path"} struct, bytes, a path or URL, or nested lists of numbers.
        where: what to call the cell in messages.

    Returns:
        The encoded bytes, a local path, or an array of the nested lists' shape; and a name for messages: the path, if
        there is one, and `where`, unless the path is that of a file.

    Raises:
        BadImageError: for an empty cell, ragged lists, or a URL that cannot be read.
    """
    import pyarrow as pa

    if isinstance(cell, pa.ExtensionScalar):  # Array2D to Array5D of `datasets`
        cell = cell.value
    if isinstance(cell, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar) and cell.is_valid:
        return _nested_lists(cell.values, where), where
    content = None if cell is None else cell.as_py()
    if isinstance(content, dict):
        content, path = content["bytes"], content["path"]
        if content is None:
            content = path
        elif path is not None:
            where = f"{path} ({where})"
    if content is None:
        raise BadImageError(f"{where}: an empty cell")
    if not isinstance(content, str):
        return content, where
    return (_fetch(content) if "://" in content else content), content


def _nested_lists(values, where: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    shape = [len(values)]
    while pa.types.is_nested(values.type):
        lengths = pc.unique(pc.list_value_length(values))
        if len(lengths) != 1:
            raise BadImageError(f"{where}: lists of unequal lengths")
        shape.append(lengths[0].as_py())
        values = values.flatten()
    # A copy, for Arrow's memory is read-only, which torch warns of.
    return values.to_numpy(zero_copy_only=False).reshape(shape).copy()


def _fetch(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    # Each file system has its own errors for what is missing, forbidden or out of reach.
    except Exception as error:
        raise BadImageError(f"{url}: {type(error).__name__}: {error}") from error


def _check_name(argument: str, name: str, features) -> None:
    if name not in features:
        raise ValueError(f"{argument}={name!r} is no column: choose one of {', '.join(features)}.")


def _could_be_pictures(feature) -> bool:
    from datasets import Array2D, Array3D, LargeList, List, Value

    if isinstance(feature, Array2D | Array3D):
        return feature.dtype == "uint8"
    depth = 0
    while isinstance(feature, List | LargeList):
        feature, depth = feature.feature, depth + 1
    if not isinstance(feature, Value):
        return False
    return feature.dtype in ("binary", "large_binary") if depth == 0 else depth in (2, 3) and feature.dtype == "uint8"


def _could_be_labels(feature) -> bool:
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return True
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool", "string", "large_string"))
