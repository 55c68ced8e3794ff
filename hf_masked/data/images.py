"""Torch data sets of pictures.

Samples are asked for as (epoch, index), so that each crop is a function of (seed, epoch, index), whatever the
workers, processes and the order of the batches. A picture that cannot be used never ends a run: another takes its
place, and its name travels with the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from hf_masked.data.bad_images import MIN_SEEN, Pictures, decode_picture, too_many_bad
from hf_masked.data.keyed import ORDER, KeyedDataset
from hf_masked.data.sets import PictureSets
from hf_masked.data.sources import ImageSource, StreamingImageSource, check_channels
from hf_masked.processing.decoding import BadImageError
from hf_masked.randomness import sample_keys

# Pictures of a stream that are decoded before they are prepared together: drawing for them one by one is slow.
CHUNK = 32


class KeyedImageDataset(KeyedDataset):
    """What the data sets of pictures share whose samples are asked for as (epoch, index).

    Args:
        source: the pictures.
        processor: its `prepare_training`, `prepare` and `prepare_resident` make pictures into uint8 of one size.
        seed: the run's seed.
        training: random crops, instead of the central one.
        max_bad_share: more bad pictures than this share of the source end the run.
        sets: which pictures make a sample, where it is more than one; `pixels` and `labels` then have the pictures of
            a set outermost after the batch, and an index is that of a set.
    """

    def __init__(
        self,
        source: ImageSource,
        processor,
        seed: int = 0,
        training: bool = True,
        max_bad_share: float = 0.1,
        sets: PictureSets | None = None,
    ):
        self.processor = processor
        self.seed = seed
        self.training = training
        self.sets = sets
        self._pictures = Pictures(source, processor, max_bad_share)
        self._labels = source.labels()

    def __len__(self) -> int:
        return len(self._pictures if self.sets is None else self.sets)

    def name(self, index: int, epoch: int = 0) -> str:
        """What the source calls the picture or pictures of a sample."""
        numbers = self._numbers(torch.tensor([index]), epoch).flatten().tolist()
        return ", ".join(self._pictures.name(number) for number in numbers)

    def _numbers(self, indices: torch.Tensor, epochs: int | torch.Tensor) -> torch.Tensor:
        """The numbers of the samples' pictures, int64 (batch,) or (batch, pictures)."""
        return indices if self.sets is None else self.sets.pictures(indices, self.seed, epochs)

    def _batch(self, pixels, indices, numbers, epochs, asked) -> dict:
        """A batch of the pictures `numbers`; sets are drawn again only where there are bad pictures to name."""
        bad = []
        if self._pictures.bad:
            bad = self._pictures.faults(self._numbers(torch.tensor(asked), torch.tensor(epochs)).flatten().tolist())
        batch = {"pixels": pixels, "indices": indices, "epoch": torch.tensor(epochs[0]), "bad": bad}
        return batch if self._labels is None else {**batch, "labels": self._labels[numbers]}


class ImageDataset(KeyedImageDataset):
    """Pictures decoded when they are asked for, for `DataLoader(..., sampler=KeyedSampler(...),
    collate_fn=collate_samples)`.

    A bad picture is replaced by the next good one (index + 1, + 2, ...), cropped by that one's own key; a set with a
    bad picture by the next good set.

    Args:
        See `KeyedImageDataset`.
    """

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """A batch.

        Args:
            keys: (epoch, index) of each sample.

        Returns:
            pixels: uint8 (batch, channels, height, width); (batch, pictures, ...) for sets, and for views.
            indices: int64 (batch,), of the samples that were used.
            epoch: int64 (), of the first sample.
            labels: int64 (batch,), for sets (batch, pictures), if the source has labels.
            bad: names and faults of the pictures that were asked for and are bad.

        Raises:
            ValueError: if more than `max_bad_share` of the pictures turn out bad.
        """
        epochs, asked = zip(*keys, strict=True)
        images, used = zip(*(self._good_sample(index, epoch) for epoch, index in keys), strict=True)
        indices = torch.tensor(used)
        if self.training:
            pixels = self.processor.prepare_training(list(images), indices, self.seed, torch.tensor(epochs))
        else:
            pixels = self.processor.prepare(list(images))
        return self._batch(pixels, indices, self._numbers(indices, torch.tensor(epochs)), epochs, asked)

    def _good_sample(self, index: int, epoch: int):
        if self.sets is None:
            return self._pictures.good_one(index)
        return self._pictures.good_set(index, self.sets, self.seed, epoch)


class ResidentImageDataset(KeyedImageDataset):
    """Pictures of one size, all on the device as uint8 from the start: for small sets.

    Args:
        device: where the pictures stay and are cropped.
        kwargs: see `KeyedImageDataset`.

    Raises:
        ValueError: for pictures of several sizes, or too many bad ones; with `sets` for any bad one, which would leave
            others without their company.
    """

    resident = True

    def __init__(self, source: ImageSource, processor, *args, device: torch.device | str = "cpu", **kwargs):
        super().__init__(source, processor, *args, **kwargs)
        images = source.as_tensor()
        self._used = torch.arange(len(source))
        if images is None:
            images, self._used = self._pictures.decode_all()
        if self.sets is not None and self._pictures.bad:
            raise ValueError(
                f"{len(self._pictures.bad)} pictures of {source.name} are bad, for example "
                f"{next(iter(self._pictures.bad.values()))}: remove the samples that they belong to, or read the set "
                "with --resident_data false, which leaves them out."
            )
        self._images = check_channels(images, processor.num_channels, source.name).to(device)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """See `ImageDataset.__getitems__`; `pixels` are on the device, the rest on the CPU."""
        epochs, asked = zip(*keys, strict=True)
        indices = torch.tensor(asked) if self.sets is not None else self._used[torch.tensor(asked)]
        numbers = self._numbers(indices, torch.tensor(epochs))
        channels = self.processor.num_channels
        images = self._images[numbers.to(self._images.device)].expand(*numbers.shape, channels, -1, -1)
        if self.training:
            pixels = self.processor.prepare_training(images, indices, self.seed, torch.tensor(epochs))
        else:
            pixels = self.processor.prepare_resident(images)
        return self._batch(pixels, indices, numbers, epochs, asked)


@dataclass
class StreamPosition:
    """Where one process stands in a stream that is shared out into parts, one for each worker of each process.

    Args:
        epoch: the pass.
        places: how many samples of each part were used.
        next_worker: whose turn it is.
    """

    epoch: int = 0
    places: dict[int, int] = field(default_factory=dict)
    next_worker: int = 0


class StreamingImageDataset(IterableDataset):
    """Pictures in passing, one sample at a time, for `DataLoader(..., collate_fn=collate_samples)`.

    A sample's index is its place in the shuffled stream, shared out among all workers of all processes; where ranks
    share single pictures (see `StreamingImageSource.samples`) it does not depend on how many there are. Processes and
    workers are split here: give the loader to nothing that splits it again (accelerate's `prepare`).

    Args:
        source: the stream.
        processor, seed, training: see `ImageDataset`; without training the order is the stream's own.
        buffer_size: pictures in each worker's shuffle buffer.
        rank, world_size: which of how many processes this is.

    Attributes:
        position: the samples that are left out; `note` moves it behind those that were used.
    """

    def __init__(
        self,
        source: StreamingImageSource,
        processor,
        seed: int = 0,
        training: bool = True,
        buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.source = source
        self.processor = processor
        self.seed = seed
        self.training = training
        self.buffer_size = buffer_size
        self.rank = rank
        self.world_size = world_size
        self.position = StreamPosition()
        self._epoch = torch.tensor(0).share_memory_()  # persistent workers see it change

    def note(self, batch: dict, num_workers: int) -> None:
        """Takes note of a batch that was used.

        Args:
            batch: of `collate_samples`.
            num_workers: of the loader.
        """
        workers, epoch = max(1, num_workers), int(batch["epoch"])
        if epoch != self.position.epoch:
            self.position = StreamPosition(epoch)
        place, part = divmod(int(batch["indices"][-1]), self.world_size * workers)
        self.position.places[part] = place + 1
        self.position.next_worker = (part + 1) % workers

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the crops of the next pass."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict]:
        """Samples as dicts: `pixels` (channels, height, width), `indices`, `epoch`, `labels` if there are any, `bad`.

        Raises:
            ValueError: if there is no good picture among the first `MIN_SEEN`.
        """
        epoch = int(self._epoch)
        position = self.position if self.position.epoch == epoch else StreamPosition(epoch)
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        # The loader asks its workers in turn, beginning with the first: it gets the part whose turn it is.
        part = self.rank * workers + (position.next_worker + number) % workers
        start = position.places.get(part, 0)
        decoded = self._decoded(epoch, part, self.world_size * workers, start)
        last, bad = None, []
        while chunk := list(islice(decoded, CHUNK)):
            bad += [str(image) for _, image, _ in chunk if isinstance(image, BadImageError)]
            good = [sample for sample in chunk if not isinstance(sample[1], BadImageError)]
            if good:
                if last is not None:
                    yield last
                *others, last = self._samples(epoch, good, bad)
                yield from others
                bad = []
            elif last is None and len(bad) >= MIN_SEEN:
                break
        if last is not None:
            last["bad"] += bad  # held back, so that names which no sample follows are not lost
            yield last
        elif bad and (start == 0 or len(bad) >= MIN_SEEN):
            raise ValueError(too_many_bad(bad, len(bad), len(bad)))

    def _decoded(self, epoch: int, part: int, parts: int, start: int):
        order = int(sample_keys(self.seed, epoch, [0], purpose=ORDER)) % 2**63 if self.training else None
        samples = self.source.samples(order, self.buffer_size, part, parts, start)
        for place, (content, name, label) in enumerate(samples, start):
            try:
                image = decode_picture(content, name, self.processor.num_channels, self.processor.shrink)
            except BadImageError as error:
                image = error
            yield place * parts + part, image, label

    def _samples(self, epoch: int, decoded: list[tuple], bad: list[str]) -> list[dict]:
        """Samples of decoded pictures; the first one carries the names of the bad."""
        indices, images, labels = zip(*decoded, strict=True)
        if self.training:
            pixels = self.processor.prepare_training(list(images), indices, self.seed, epoch)
        else:
            pixels = self.processor.prepare(list(images))
        columns = {"pixels": pixels, "indices": indices}
        if labels[0] is not None:
            columns["labels"] = labels
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return [{**row, "epoch": epoch, "bad": [] if place else bad} for place, row in enumerate(rows)]
