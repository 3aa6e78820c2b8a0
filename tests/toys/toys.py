"""A task and mixers that train in a blink, found by entry point as a user's own would be."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import DataUnavailable
from flexbench.interface import Batch, ProblemSpec
from flexbench.tasks.base import DataSource, Task, TaskData
from flexbench.tasks.store import Store


class Rows:
    """Noise, and a label that its mean decides."""

    def __init__(self, task: Toy, split: int, examples: int) -> None:
        self.task, self.split, self.examples = task, split, examples

    def __len__(self) -> int:
        return self.examples

    def batch(self, indices: np.ndarray) -> Batch:
        task = self.task
        if task.delay:
            time.sleep(task.delay)
        trap = indices.max() >= task.trap_from if self.split == 0 else False
        if trap and task.trap == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if trap and task.trap == "raise":
            raise RuntimeError("the trap is sprung")
        if trap and task.trap == "memory":
            raise MemoryError
        rows = [np.random.default_rng([self.split, i]).normal(size=task.length) for i in indices]
        values = torch.from_numpy(np.stack(rows)).float()
        labels = (values.mean(1) > 0).long()
        if self.split == 2 and task.flip_test:
            labels = 1 - labels
        if trap and task.trap == "nan":
            values = values * torch.nan
        return Batch(values.unsqueeze(-1), labels)


class Toy(Task):
    """Which sign has the mean of some noise?"""

    suite: ClassVar[str] = "toy"
    summary = "the sign of a mean"
    chance: ClassVar[float] = 0.5
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            stack=StackConfig(d_model=8, n_layers=1, dropout=0.1),
            training=TrainingConfig(steps=40, batch_size=8, evaluations=4, learning_rates=(1e-2,)),
        ),
        "small": Preset(
            stack=StackConfig(d_model=8, n_layers=1),
            training=TrainingConfig(
                steps=20, batch_size=8, evaluations=2, learning_rates=(1e-4, 3e-2)
            ),
        ),
    }
    omitted: ClassVar[dict[str, str]] = {"paper": "nothing is published"}

    length: int = 8
    examples: int = 64
    delay: float = 0.0
    trap: Literal["", "kill", "raise", "memory", "nan"] = ""
    trap_from: int = 0
    flip_test: bool = False
    available: bool = True

    def prepare(self, store: Store) -> None:
        if not self.available:
            raise DataUnavailable("'toy' cannot be had; run `python -m flexbench data fetch toy`")

    def load(self, store: Store) -> TaskData:
        if "TOY_LOG" in os.environ and multiprocessing.parent_process() is not None:
            with open(os.environ["TOY_LOG"], "a") as log:
                log.write("a worker loads\n")
        spec = ProblemSpec("values", classes=2, max_length=self.length, channels=1)
        splits = [Rows(self, split, self.examples) for split in range(3)]
        return TaskData(spec, *splits, source=DataSource("synthetic", "a seed"))

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {"majority": 0.5}


class ToyCausal(Toy):
    """The same, for models that do not look ahead."""

    suite: ClassVar[str] = "toy-causal"
    requires_causal: ClassVar[bool] = True


class Mixer(nn.Module):
    """A running mean between two linear maps; dropout makes it use the random state."""

    causal = True

    def __init__(self, d_model: int, d_inner: int = 8) -> None:
        super().__init__()
        self.inward = nn.Linear(d_model, d_inner)
        self.outward = nn.Linear(d_inner, d_model)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.outward(self.dropout(self.inward(x)).cumsum(1) / steps)


class Seer(Mixer):
    """The same, but it counts as seeing the future."""

    causal = False
