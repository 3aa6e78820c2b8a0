"""Waveforms as memory-mapped samples, and windows of them."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flexbench.errors import UserError
from flexbench.interface import Batch
from flexbench.tasks.store import create_array


class WaveSplit:
    """Windows of recordings, zero where they reach beyond their recording, with one label each.

    Args:
        samples: (total,) int16, recordings end to end; may be memory-mapped.
        starts: (examples,) where in `samples` a window begins.
        bounds: (examples, 2) where the recording that it is of begins and ends.
        labels: (examples,) integers.
        length: samples in a window.
        every: take each so many-th sample: 2 halves the rate.
        patch: samples that make up one step, its channels.
        mean, deviation: what standardises a sample.
    """

    def __init__(
        self,
        samples: np.ndarray,
        starts: np.ndarray,
        bounds: np.ndarray,
        labels: np.ndarray,
        *,
        length: int,
        every: int = 1,
        patch: int = 1,
        mean: float = 0.0,
        deviation: float = 1.0,
    ) -> None:
        self.samples = samples
        self.starts = starts
        self.bounds = bounds
        self.labels = labels
        self.length = length
        self.every = every
        self.patch = patch
        self.mean = mean
        self.deviation = deviation

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        indices = np.asarray(indices)
        places = self.starts[indices, None] + np.arange(0, self.length, self.every)
        low, high = self.bounds[indices].T[:, :, None]
        inside = (places >= low) & (places < high)
        found = self.samples[places.clip(0, len(self.samples) - 1)]
        values = (np.where(inside, found, 0) - np.float32(self.mean)) / np.float32(self.deviation)
        return Batch(
            inputs=torch.from_numpy(values.reshape(len(indices), -1, self.patch)),
            labels=torch.from_numpy(self.labels[indices].astype(np.int64)),
        )


def read_wave(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples (length,) int16 and rate of a one-channel 16-bit RIFF file.

    Raises:
        UserError: it is not one.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise UserError(f"{name} is not 16-bit audio of one channel; fetch it again")
            frames = file.readframes(file.getnframes())
            return np.frombuffer(frames, dtype="<i2").astype(np.int16), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise UserError(f"{name} is not a RIFF wave ({error}); fetch it again") from error


def write_samples(folder: Path, recordings: Iterable[np.ndarray], what: str) -> np.ndarray:
    """Write recordings of int16 end to end as `samples.npy`, one in memory at a time.

    Returns:
        (recordings + 1,) int64: where each begins, and the end.
    """
    lengths = []
    spool = folder / "spool"
    with spool.open("wb") as out:
        for recording in tqdm(recordings, desc=what, unit=" clips", leave=False, disable=None):
            lengths.append(len(recording))
            out.write(recording.astype("<i2").tobytes())
    samples = create_array(folder / "samples.npy", (sum(lengths),), np.int16)
    if samples.size:
        samples[:] = np.memmap(spool, dtype="<i2", mode="r")
    spool.unlink()
    return np.cumsum([0, *lengths], dtype=np.int64)


def moments(samples: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Mean and deviation of the samples of the recordings at `bounds`, read one by one: (2,)."""
    total, square, count = 0.0, 0.0, 0
    for low, high in bounds:
        recording = samples[low:high].astype(np.float64)
        total += recording.sum()
        square += np.square(recording).sum()
        count += len(recording)
    mean = total / count
    return np.array([mean, np.sqrt(square / count - mean**2)])
