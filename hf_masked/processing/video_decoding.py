"""From whatever holds a video (a file, a folder of frames, an array) to its frames, of which those are decoded that
are asked for."""

import bisect
import os
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from hf_masked.extras import import_extra
from hf_masked.processing.decoding import BadImageError, open_image

# Lower-case endings of files that are opened with PyAV.
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


class Video(ABC):
    """Frames that are asked for by number.

    Attributes:
        name: for messages.
        num_frames: how many there are.
        fps: frames per second, or None where nobody knows.
    """

    name: str
    num_frames: int
    fps: float | None = None

    @abstractmethod
    def frames(self, numbers: list[int]) -> list[Image.Image | torch.Tensor]:
        """Some frames.

        Args:
            numbers: ascending, each once, from 0.

        Returns:
            Pillow pictures, or uint8 tensors (height, width), (height, width, channels) or (channels, height, width).

        Raises:
            BadImageError: for what cannot be decoded.
        """


class ArrayVideo(Video):
    """A video in memory.

    Args:
        frames: uint8 array or tensor (frames, height, width), (frames, height, width, channels) or (frames, channels,
            height, width); or a list of Pillow pictures or arrays of one size.
        fps: frames per second, or None.
        name: for messages.

    Raises:
        BadImageError: for anything else, or no frame.
    """

    def __init__(self, frames, fps: float | None = None, name: str = "a video"):
        self.name, self.fps = name, fps
        if not isinstance(frames, list | tuple):
            frames = torch.as_tensor(np.asarray(frames))
            if frames.ndim not in (3, 4) or frames.dtype != torch.uint8:
                raise BadImageError(
                    f"{name}: an array of {frames.dtype} {tuple(frames.shape)}; expected uint8 (frames, height, "
                    "width), (frames, height, width, channels) or (frames, channels, height, width)"
                )
        if not len(frames):
            raise BadImageError(f"{name}: no frames")
        self.num_frames, self._frames = len(frames), frames

    def frames(self, numbers):
        return [self._frames[number] for number in numbers]


class FrameFolder(Video):
    """A folder whose pictures, in the order of their names, are the frames.

    Args:
        files: the pictures' paths, in their order.
        name: for messages.
    """

    def __init__(self, files: list[Path], name: str):
        self.name, self.num_frames, self._files = name, len(files), files

    def frames(self, numbers):
        return [open_image(self._files[number], str(self._files[number])) for number in numbers]


class VideoFile(Video):
    """A file that PyAV opens.

    Its packets are listed first, which decodes nothing; decoding then starts at the last key frame before the first
    frame that is asked for, and stops after the last one. Files without time stamps are decoded from the beginning.

    Args:
        path: of the file.

    Raises:
        BadImageError: for what is no video, or an empty one.
        MissingPackageError: without PyAV.
    """

    def __init__(self, path: str | os.PathLike):
        self.name, self._av = str(path), load_av()
        with self._opened() as container:
            rate = container.streams.video[0].average_rate
            # The packet that ends the stream has no size.
            packets = [packet for packet in container.demux(video=0) if packet.size]
            stamps = [packet.pts for packet in packets]
            self._stamps = sorted(stamps) if None not in stamps and len(set(stamps)) == len(stamps) else None
        self.fps = float(rate) if rate else None
        self.num_frames = len(packets)
        if not packets:
            raise BadImageError(f"{self.name}: no frames")

    def frames(self, numbers):
        with self._opened() as container:
            decoded = self._decoded(container, numbers)
        if len(decoded) < len(numbers):
            raise BadImageError(
                f"{self.name}: {len(numbers) - len(decoded)} of {len(numbers)} frames cannot be decoded"
            )
        return decoded

    def _decoded(self, container, numbers: list[int]) -> list[Image.Image]:
        wanted, found = set(numbers), []
        if self._stamps is not None:
            container.seek(self._stamps[numbers[0]], stream=container.streams.video[0])
        for count, frame in enumerate(container.decode(video=0)):
            number = count if self._stamps is None else bisect.bisect_left(self._stamps, frame.pts)
            if number in wanted:
                found.append(frame.to_image())
            if number >= numbers[-1]:
                break
        return found

    def _opened(self):
        return _Opened(self._av, self.name)


class _Opened:
    """`with` a container that PyAV has opened; its errors become a `BadImageError`."""

    def __init__(self, av: ModuleType, path: str):
        self._av, self._path = av, path

    def __enter__(self):
        try:
            self._container = self._av.open(self._path)
            if not self._container.streams.video:
                self._container.close()
                raise BadImageError(f"{self._path}: no video stream")
            # Several threads would race those of the other workers for the same cores.
            self._container.streams.video[0].thread_type = "NONE"
            return self._container
        except (self._av.error.FFmpegError, OSError) as error:
            raise BadImageError(f"{self._path}: {type(error).__name__}: {error}") from error

    def __exit__(self, kind, error, traceback):
        self._container.close()
        if isinstance(error, self._av.error.FFmpegError | OSError):
            raise BadImageError(f"{self._path}: {type(error).__name__}: {error}") from error


def load_av() -> ModuleType:
    """PyAV.

    Raises:
        MissingPackageError: if it is not installed.
    """
    av = import_extra("av", "av", "video")
    av.logging.set_level(av.logging.PANIC)  # what is wrong with a file, the exceptions say
    return av


def open_video(content, name: str | None = None) -> Video:
    """A video from a `Video`, the path of a file or of a folder of frames, or what `ArrayVideo` takes.

    Args:
        content: as said.
        name: for messages, of arrays.

    Raises:
        BadImageError: for what is none of these.
    """
    if isinstance(content, Video):
        return content
    if not isinstance(content, str | os.PathLike):
        return ArrayVideo(content, name=name or "a video")
    path = Path(content)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        return FrameFolder(files, str(path))
    return VideoFile(path)


__all__ = ["VIDEO_SUFFIXES", "ArrayVideo", "FrameFolder", "Video", "VideoFile", "load_av", "open_video"]
