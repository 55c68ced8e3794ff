"""Texts: where they come from, blocks of a fixed number of tokens, and the data set that is trained on.

Rows stay in the Arrow files of `datasets`; only the token ids of blocks are held in memory, four bytes each.
"""

import glob
import os
import re
from pathlib import Path

import numpy as np
import torch

from hf_masked.data.columns import find_label_column
from hf_masked.data.folders import SPLIT_FOLDERS, SPLITS, files_below
from hf_masked.data.keyed import KeyedDataset
from hf_masked.data.sets import PictureSets
from hf_masked.data.sources import class_indices, read_rows

# Endings of files with texts -> the builder of `datasets` that reads them.
TEXT_BUILDERS = {".txt": "text", ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

# What data sets call their texts, the likeliest first.
TEXT_NAMES = ("text", "sentence", "content", "document")

# Texts that are tokenized together.
CHUNK = 1000


class TextSource:
    """Texts that are asked for by number, those of empty rows left out.

    Args:
        rows: a `datasets.Dataset`.
        name: what they are, for people.
        text_column: the column of texts, or several, with commas between them, for texts that belong together; by
            default the one with a usual name, else the only one of strings.
        label_column: of integers or strings; by default the one with a usual name, else none.

    Attributes:
        name: what they are.
        class_names: the classes' names, or None.
        texts_per_row: how many texts belong together.

    Raises:
        ValueError: where no column can be meant, or no row has a text.
    """

    def __init__(self, rows, name: str, text_column: str | None = None, label_column: str | None = None):
        self.name = name
        self.class_names: list[str] | None = None
        label_column = find_label_column(rows.features, label_column)
        self._columns = find_text_columns(rows.features, text_column, label_column)
        self.texts_per_row = len(self._columns)
        self._rows = rows.select_columns(self._columns)
        self._numbers = _rows_with_text(self._rows, self._columns)
        if len(self._numbers) == 0:
            raise ValueError(f"{name} holds no text: all {len(rows)} rows are empty.")
        self._labels = None
        if label_column is not None:
            labels, self.class_names = class_indices(rows, label_column)
            self._labels = labels[torch.from_numpy(self._numbers)]

    def __len__(self) -> int:
        return len(self._numbers)

    def sample(self, index: int) -> str | list[str]:
        """A text; of several columns the texts of a row."""
        row = self._rows[int(self._numbers[index])]
        texts = [row[column] for column in self._columns]
        return texts[0] if len(texts) == 1 else texts

    def labels(self) -> torch.Tensor | None:
        """int64 (n,), -1 where a row has none; None without labels."""
        return self._labels


class TextBlocks:
    """Blocks of as many tokens as a model takes, cut from all texts one after the other.

    Between two texts stands the separator, and each block begins and ends as the tokenizer begins and ends a text. The
    end that fills no block is left out.

    Args:
        source: the texts.
        processor: a `TextProcessor`; its `max_length` is that of a block.

    Raises:
        ValueError: where all texts together do not fill a block.
    """

    def __init__(self, source: TextSource, processor):
        self.name = source.name
        tokenizer = processor.tokenizer
        self._before, self._after = _special_ids_around(tokenizer)
        self._length = processor.max_length - len(self._before) - len(self._after)
        if self._length < 1:
            raise ValueError(f"max_length is {processor.max_length}: there is no place for a token of the text.")
        separator = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
        parts = []
        for start in range(0, len(source), CHUNK):
            texts = [_joined(source.sample(number)) for number in range(start, min(start + CHUNK, len(source)))]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            parts += [np.array(ids + separator, dtype=np.int32) for ids in encoded]
        self._tokens = torch.from_numpy(np.concatenate(parts))
        if len(self) == 0:
            raise ValueError(
                f"{self.name} has {len(self._tokens)} tokens, which fill no block of {self._length}: lower "
                "--processor.max_length."
            )

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def sample(self, index: int) -> torch.Tensor:
        """int64 (max_length,), special tokens included."""
        block = self._tokens[index * self._length : (index + 1) * self._length].long()
        return torch.cat([torch.tensor(self._before).long(), block, torch.tensor(self._after).long()])

    def labels(self) -> None:
        return None


class TextDataset(KeyedDataset):
    """Texts, blocks of tokens, or sets of texts, for `DataLoader(..., sampler=KeyedSampler(...),
    collate_fn=collate_samples)`.

    Args:
        source: a `TextSource` or `TextBlocks`.
        processor: a `TextProcessor`.
        seed: the run's seed.
        sets: which texts make a sample, where it is more than one: see `hf_masked.data.sets`.
    """

    def __init__(self, source: TextSource | TextBlocks, processor, seed: int = 0, sets: PictureSets | None = None):
        self.source = source
        self.processor = processor
        self.seed = seed
        self.sets = sets

    def __len__(self) -> int:
        return len(self.source if self.sets is None else self.sets)

    def name(self, index: int, epoch: int = 0) -> str:
        numbers = self._numbers(torch.tensor([index]), epoch).flatten().tolist()
        return f"text {', '.join(map(str, numbers))} of {self.source.name}"

    def _numbers(self, indices: torch.Tensor, epochs: int | torch.Tensor) -> torch.Tensor:
        """Of the samples' texts, int64 (batch,), for sets (batch, texts)."""
        return indices if self.sets is None else self.sets.pictures(indices, self.seed, epochs)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """A batch, see `KeyedDataset`.

        Args:
            keys: (epoch, index) of each sample.

        Returns:
            tokens: what the processor's first half made of the samples.
            indices: int64 (batch,).
            epoch: int64 (), of the first sample.
            labels: int64 (batch,), for sets (batch, texts), if the source has labels.
            bad: empty; there are no texts that cannot be used.
        """
        epochs, indices = (torch.tensor(numbers) for numbers in zip(*keys, strict=True))
        numbers = self._numbers(indices, epochs)
        samples = [
            self.source.sample(row) if isinstance(row, int) else [self.source.sample(number) for number in row]
            for row in numbers.tolist()
        ]
        tokens = self.processor.prepare_training(samples, indices, self.seed, epochs)
        batch = {self.processor.raw_name: tokens, "indices": indices, "epoch": epochs[0], "bad": []}
        labels = self.source.labels()
        return batch if labels is None else {**batch, "labels": labels[numbers]}


def load_texts(
    dataset_name: str,
    split: str = "train",
    *,
    config_name: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
) -> TextSource:
    """Finds texts.

    Args:
        dataset_name: an id on the Hub; a local file, pattern or URL of Parquet, JSON, CSV or plain text (each line is
            a text); a folder of such files. In a folder whose plain text files lie in sub-folders, these are the
            classes, and each file is one text.
        split: of a folder it chooses the files whose name is the split's, or has it as a word ("valid" in
            "wikitext2_valid.txt" means validation), or whose first sub-folder has such a name; of a folder without
            any such names, all files are "train". Of everything else a split that `datasets` knows, slices included.
        config_name: the configuration, where a data set on the Hub has several.
        text_column, label_column: see `TextSource`.
        cache_dir: where `datasets` keeps its copies.

    Raises:
        ValueError: if there is no such data set, split or column, or no text.
    """
    folder = Path(dataset_name).expanduser()
    name = f"{dataset_name} ({split})"
    options = {"config_name": config_name, "cache_dir": cache_dir}
    if folder.is_dir():
        files = _files_of_split(folder, split)
        classes = sorted({os.path.basename(os.path.dirname(file)) for file in files})
        if len(classes) > 1 and "" not in classes and {Path(file).suffix for file in files} == {".txt"}:
            return TextSource(_documents_in_class_folders(folder, files, classes), name)
        paths = [str(folder / file) for file in files]
        rows = read_rows(dataset_name, _builder_of(files, dataset_name), "train", data_files=paths, **options)
    elif "://" in dataset_name or (files := sorted(glob.glob(str(folder)))):
        paths = dataset_name if "://" in dataset_name else files
        builder = _builder_of([dataset_name.partition("?")[0]], dataset_name)
        rows = read_rows(dataset_name, builder, split, data_files=paths, **options)
    elif dataset_name.startswith((".", "/", "~")) or dataset_name.count("/") > 1:
        raise ValueError(f"There is no folder or file {dataset_name!r}: check the path, seen from {os.getcwd()}.")
    else:
        rows = read_rows(dataset_name, dataset_name, split, **options)
    try:
        return TextSource(rows, name, text_column, label_column)
    except ValueError as error:
        raise ValueError(f"{dataset_name}: {error}") from error


def find_text_columns(features, text_column: str | None = None, label_column: str | None = None) -> list[str]:
    """The columns of texts: those given, else one with a usual name, else the only one of strings.

    Args:
        features: `datasets.Features`.
        text_column: one name, or several with commas between them.
        label_column: which holds no texts.

    Raises:
        ValueError: if there is no such column, or not exactly one that could be meant.
    """
    strings = [name for name, feature in features.items() if "string" in str(getattr(feature, "dtype", ""))]
    strings = [name for name in strings if name != label_column]
    if text_column is not None:
        columns = [name.strip() for name in text_column.split(",")]
        wrong = [name for name in columns if name not in strings]
        if wrong:
            raise ValueError(f"text_column={wrong[0]!r} is no column of texts: choose one of {', '.join(strings)}.")
        return columns
    known = [name for name in TEXT_NAMES if name in strings]
    if not known and len(strings) != 1:
        found = f"several could hold them ({', '.join(strings)})" if strings else "none holds strings"
        raise ValueError(f"No column of texts given and {found}: set text_column to one of {', '.join(features)}.")
    return (known or strings)[:1]


def _rows_with_text(rows, columns: list[str]) -> np.ndarray:
    """Numbers of the rows in which all columns hold more than white space."""
    import pyarrow.compute as pc

    keep = []
    for chunk in rows.with_format("arrow").iter(batch_size=CHUNK):
        lengths = [pc.utf8_length(pc.utf8_trim_whitespace(chunk[column])) for column in columns]
        keep.append(np.all([pc.fill_null(length, 0).to_numpy() > 0 for length in lengths], axis=0))
    return np.concatenate(keep).nonzero()[0] if keep else np.zeros(0, dtype=np.int64)


def _documents_in_class_folders(folder: Path, files: list[str], classes: list[str]):
    from datasets import ClassLabel, Dataset, Features, Value

    texts = [(folder / file).read_text(encoding="utf-8", errors="replace") for file in files]
    labels = [os.path.basename(os.path.dirname(file)) for file in files]
    features = Features({"text": Value("large_string"), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


def _files_of_split(folder: Path, split: str) -> list[str]:
    """Paths, relative to `folder`, of the files of a split.

    Raises:
        ValueError: if there are none.
    """
    files = [file for file in files_below(folder) if Path(file).suffix.lower() in TEXT_BUILDERS]
    if not files:
        raise ValueError(f"The folder '{folder}' holds no texts: put files there, of {', '.join(TEXT_BUILDERS)}.")
    named = [file for file in files if Path(file).stem == split]
    if named:
        return named
    split_of = {file: _split_of(file) for file in files}
    chosen = [file for file in files if split_of[file] == SPLIT_FOLDERS.get(split.lower(), split)]
    if not chosen and split in SPLITS["train"] and not any(split_of.values()):
        return files
    if not chosen:
        known = sorted({name for name in split_of.values() if name} | {Path(file).stem for file in files[:10]})
        raise ValueError(f"'{folder}' has no split {split!r}: choose one of {', '.join(known)}.")
    return chosen


def _split_of(file: str) -> str | None:
    words = [Path(file).parts[0], *re.split(r"[^a-z]+", Path(file).stem.lower())]
    return next((SPLIT_FOLDERS[word.lower()] for word in words if word.lower() in SPLIT_FOLDERS), None)


def _builder_of(files: list[str], dataset_name: str) -> str:
    suffixes = {Path(file).suffix.lower() for file in files}
    if len(suffixes) != 1 or not suffixes <= TEXT_BUILDERS.keys():
        raise ValueError(
            f"{dataset_name!r} has files of {', '.join(sorted(suffixes))}; expected one of {', '.join(TEXT_BUILDERS)}."
        )
    return TEXT_BUILDERS[suffixes.pop()]


def _special_ids_around(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _joined(sample: str | list[str]) -> str:
    return sample if isinstance(sample, str) else "\n".join(sample)


__all__ = ["TextBlocks", "TextDataset", "TextSource", "load_texts"]
