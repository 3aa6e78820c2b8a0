"""One trial: a model trained on a task from a seed, to a record."""

from __future__ import annotations

import functools
import io
import json
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbench.config import TrainingConfig
from flexbench.errors import UserError
from flexbench.harness import checkpoint
from flexbench.harness.environment import environment
from flexbench.harness.events import Notice, Observer, Progress
from flexbench.harness.locks import Machine, trial_lock
from flexbench.harness.scores import Answers, accuracy, scores
from flexbench.interface import IGNORED, Batch, ProblemSpec
from flexbench.models import build, is_matched, resolve
from flexbench.models.base import registry as model_registry
from flexbench.models.stack import SequenceModel
from flexbench.records import (
    CannotWrite,
    Outcome,
    Record,
    TrialConfig,
    read_record,
    write_atomic,
    write_json,
)
from flexbench.registry import Registry
from flexbench.tasks.base import FurtherTest, Split, TaskData
from flexbench.tasks.base import registry as task_registry
from flexbench.tasks.store import Store

CHECKPOINT_SECONDS = 20.0
PROGRESS_SECONDS = 0.3
PAUSE_SECONDS = 1.0
CALIBRATION_EXAMPLES = 256
FLOP_EXAMPLES = 32


def train_trial(
    config: TrialConfig,
    results: Path,
    store: Store,
    observe: Observer = lambda event: None,
    *,
    baseline: int | None = None,
    wait: bool = True,
) -> Record:
    """Train to the end and write the record, going on from a checkpoint where there is one.

    A trial that has finished or diverged is read, not trained again; one that failed or ran out of
    memory is tried once more. On the CPU the record of an interrupted trial equals that of an
    uninterrupted one to the bit, `seconds` and `environment` apart.

    Args:
        config: what to train.
        results: the results directory.
        store: where the task's data lie prepared.
        observe: told of progress, a few times a second, and of notices.
        baseline: backbone parameters of the model that this one is matched to, for the record.
        wait: wait for a trial that another process works on, rather than raise Busy.

    Raises:
        Busy: another process works on it.
        CannotWrite: the results directory is read-only or the disk full.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is left.
    """
    directory = config.directory(results)
    with trial_lock(directory, wait=wait):
        record = settled(config, results, observe)
        if record is not None:
            return record
        for left in [directory / "record.json", *directory.glob(".*")]:
            left.unlink(missing_ok=True)  # a failure to be tried again; a killed process's scraps
        write_json(directory / "config.json", config)
        machine = Machine()
        with machine.shared(), _numerics(config):
            return _attempt(_Trial(config, directory, store, observe, machine, baseline))


def settled(
    config: TrialConfig, results: Path, observe: Observer = lambda event: None
) -> Record | None:
    """The trial's record if it needs no more training: it finished, or it diverged."""
    own = config.directory(results)
    try:
        record = read_record(own / "record.json")
    except ValueError as error:
        observe(Notice(f"{error}; the trial is done again"))
        return None
    if record is None:
        record = _before_options(config, own)
    return record if record is not None and record.outcome in ("finished", "diverged") else None


def _before_options(config: TrialConfig, own: Path) -> Record | None:
    """The record of the same trial from before an option was added, under its hash of then."""
    for path in sorted(own.parent.glob(f"{config.preset}-seed{config.seed}-*/record.json")):
        try:
            record = read_record(path)
        except ValueError:
            continue  # another trial's; the report names it
        if record is not None and completed(record.config).hash == config.hash:
            return record
    return None


def completed(config: TrialConfig) -> TrialConfig:
    """The config with options that came after it, at their defaults: they change no number.

    Options of tasks and models that are not registered, or that today's no longer takes, are left
    as they are.
    """
    task = _completed(task_registry, config.task, config.task_options)
    model = _completed(model_registry, config.model, config.model_options)
    return config.model_copy(update={"task_options": task, "model_options": model})


def _completed(registry: Registry[Any], name: str, options: dict[str, Any]) -> dict[str, Any]:
    try:
        return registry.get(name).parse(options).model_dump(mode="json")
    except UserError:
        return options


def record_loss(config: TrialConfig, results: Path, reason: str) -> Record:
    """Write and return the record of a trial whose process died without one."""
    return _write_record(config, config.directory(results), "failed", error=reason)


class Diverged(Exception):
    """The loss or a gradient is not finite."""


def _attempt(trial: _Trial) -> Record:
    """Train; turn whatever goes wrong with the trial itself into its record."""
    outcome: Outcome
    try:
        return trial.run()
    except CannotWrite:
        raise
    except Diverged as error:
        outcome, text = "diverged", str(error)
    except Exception as error:
        outcome = "out of memory" if _out_of_memory(error) else "failed"
        text = traceback.format_exc()
    record = _write_record(
        trial.config, trial.directory, outcome, seconds=trial.state.seconds, error=text
    )
    if outcome == "diverged":
        (trial.directory / "checkpoint.pt").unlink(missing_ok=True)
    return record


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "can't allocate memory" in text or "out of memory" in text


def _write_record(config: TrialConfig, directory: Path, outcome: Outcome, **values: Any) -> Record:
    record = Record(
        hash=config.hash,
        config=config,
        outcome=outcome,
        environment=environment(config.device),
        **values,
    )
    write_json(directory / "record.json", record)
    return record


# -- what a trial is made of ------------------------------------------------------------------


class Order:
    """Which examples each step trains on: a function of seed and step alone, for every model.

    Every epoch is a permutation of its own; what does not fill a batch is left out of it.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = min(batch_size, examples)
        self.seed = seed
        self._epoch = functools.lru_cache(maxsize=1)(self._permute)

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.examples)

    def __getitem__(self, step: int) -> np.ndarray:
        """The indices of step `step`, from 0."""
        epoch, place = divmod(step, self.examples // self.batch_size)
        return self._epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]


def evaluation_steps(training: TrainingConfig) -> frozenset[int]:
    """The numbers of steps after which to validate: evenly spaced, the last step among them."""
    count = min(training.evaluations, training.steps)
    return frozenset(round(training.steps * (i + 1) / count) for i in range(count))


def schedule(step: int, training: TrainingConfig) -> float:
    """The share of the peak learning rate at step `step`, from 0: linear up, then cosine down."""
    warmup = math.ceil(training.warmup * training.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (training.steps - warmup)))


def make_optimizer(
    model: nn.Module, training: TrainingConfig, learning_rate: float
) -> torch.optim.AdamW:
    """AdamW by the marks on parameters: what is not decayed, what learns at a capped rate.

    Each group carries its peak rate as `peak`; `schedule` scales it.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
            groups.setdefault((decayed, getattr(parameter, "_ssm", False)), []).append(parameter)
    capped = min(learning_rate, training.ssm_learning_rate or learning_rate)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": capped if ssm else learning_rate,
                "weight_decay": training.weight_decay if decayed else 0.0,
            }
            for (decayed, ssm), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=learning_rate,
        fused=True,
    )


def answer(model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy over asked positions, float32; their logits; their labels."""
    labels = batch.labels[batch.labels != IGNORED]
    with _precision(batch.inputs.device.type):
        logits = model.answers(batch)
    return F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels


def train_step(
    model: SequenceModel, optimizer: torch.optim.Optimizer, batch: Batch, clip: float
) -> tuple[float, int]:
    """One update. Returns the summed loss and the number of asked positions.

    Raises:
        Diverged: loss or gradients are not finite; the weights are left as they were.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, _, labels = answer(model, batch)
    (loss / len(labels)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    total, size = torch.stack([loss.detach(), norm]).tolist()
    if not (math.isfinite(total) and math.isfinite(size)):
        raise Diverged(f"loss {total / len(labels):g}, gradient norm {size:g}")
    optimizer.step()
    return total, len(labels)


@torch.no_grad()
def evaluate(
    model: SequenceModel,
    split: Split,
    batch_size: int,
    device: str,
    *,
    limit: int | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Answers:
    """What the model answers to a split.

    Leaves the model's mode and the random state as they were. `limit`: only the first so many
    examples. `watch` is called after every batch.
    """
    examples = len(split) if limit is None else min(limit, len(split))
    loss, asked, chosen = 0.0, [], []
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
            for start in range(0, examples, batch_size):
                indices = np.arange(start, min(start + batch_size, examples))
                batch = split.batch(indices).to(device)
                total, logits, labels = answer(model, batch)
                loss += total.item()
                asked.append(labels.cpu().numpy())
                chosen.append(logits.argmax(-1).cpu().numpy())
                watch()
    finally:
        model.train(training)
    truth = np.concatenate(asked)
    return Answers(loss / len(truth), truth, np.concatenate(chosen))


def _precision(device: str) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


@contextmanager
def _numerics(config: TrialConfig) -> Iterator[None]:
    """The trial's number of threads and, on the CPU, deterministic algorithms; undone after."""
    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.device == "cpu", warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        memory.fill_uninitialized_memory = fill


class _Signals:
    """Turns the first SIGINT or SIGTERM into a flag, read between steps; the second interrupts."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, *_: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


class _Interrupted(Exception):
    """A signal asked the trial to stop; raised only where its state is whole."""


@dataclass
class _State:
    """How far a trial has come, weights, optimiser and random states apart.

    `loss_sum` and `loss_count` are those since the last evaluation. `best` is an entry of
    `history`, `best_weights` the weights behind it.
    """

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def validated(self) -> bool:
        return bool(self.history) and self.history[-1]["step"] == self.step


class _Trial:
    """A trial under way in its directory; `run` does all of it."""

    def __init__(
        self,
        config: TrialConfig,
        directory: Path,
        store: Store,
        observe: Observer,
        machine: Machine,
        baseline: int | None,
    ) -> None:
        self.config = config
        self.training = config.training
        self.directory = directory
        self.store = store
        self.observe = observe
        self.machine = machine
        self.baseline = baseline
        self.state = _State()
        self.signals = _Signals()
        now = time.monotonic()
        self._counted = self._saved = self._paused = now
        self._told = -math.inf

    def run(self) -> Record:
        task = task_registry.get(self.config.task).parse(self.config.task_options)
        data = task.load(self.store)
        self._build(data.spec)
        try:
            self._resume()
        except Exception as error:
            reason = error if isinstance(error, checkpoint.Unusable) else "it does not fit"
            path = self.directory / "checkpoint.pt"
            self.observe(Notice(f"{path} is not used: {reason}; the trial starts again"))
            self._build(data.spec)
        with self.signals:
            try:
                self._train(data)
                return self._finish(data)
            except _Interrupted:
                self._save()
                raise KeyboardInterrupt from None

    def _build(self, spec: ProblemSpec) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        mixer = resolve(config.model).parse(config.model_options)
        self.model = build(spec, config.stack, mixer).to(config.device)
        self.optimizer = make_optimizer(self.model, self.training, config.learning_rate)
        self.state = _State()

    # -- training ----------------------------------------------------------------------------

    def _train(self, data: TaskData) -> None:
        order = Order(len(data.train), self.training.batch_size, self.config.seed)
        points = evaluation_steps(self.training)
        self.model.train()
        while True:
            if self.state.step in points and not self.state.validated:
                self._validate(data)
                self._save()
            if self.state.step == self.training.steps:
                return
            self._step(data.train, order)
            self._between()

    def _step(self, split: Split, order: Order) -> None:
        state = self.state
        batch = split.batch(order[state.step])
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(state.step, self.training)
        try:
            loss, asked = train_step(
                self.model, self.optimizer, batch.to(self.config.device), self.training.clip
            )
        except Diverged as error:
            raise Diverged(f"step {state.step + 1}: {error}") from None
        state.step += 1
        self.model.after_step(state.step / self.training.steps, loss / asked)
        state.tokens += batch.tokens
        state.loss_sum += loss
        state.loss_count += asked

    def _validate(self, data: TaskData) -> None:
        state = self.state
        self.model.eval()
        self.model.calibrate(self._calibration(data.train))
        answers = evaluate(
            self.model,
            data.validation,
            self.training.evaluation_batch_size,
            self.config.device,
            limit=self.training.validation_examples,
            watch=self._breathe,
        )
        if not math.isfinite(answers.loss):
            raise Diverged(f"step {state.step}: validation loss {answers.loss:g}")
        entry = {
            "step": state.step,
            "learning_rate": self.config.learning_rate * schedule(state.step - 1, self.training),
            "train_loss": state.loss_sum / state.loss_count,
            "validation_loss": answers.loss,
            "validation_accuracy": accuracy(answers),
            "tokens": state.tokens,
            "settled": self.model.settled,
            **self.model.diagnostics(),
        }
        state.history.append(entry)
        state.loss_sum, state.loss_count = 0.0, 0
        if state.best is None or _rank(entry) > _rank(state.best):
            state.best = entry
            weights = self.model.state_dict().items()
            state.best_weights = {name: value.detach().clone() for name, value in weights}
        self.model.train()
        lines = "".join(f"{json.dumps(line, sort_keys=True)}\n" for line in state.history)
        write_atomic(self.directory / "history.jsonl", lines.encode())

    def _calibration(self, split: Split) -> Iterator[Batch]:
        """The same training examples every time, for what a model sets before an evaluation."""
        size = self.training.evaluation_batch_size
        for start in range(0, min(CALIBRATION_EXAMPLES, len(split)), size):
            indices = np.arange(start, min(start + size, CALIBRATION_EXAMPLES, len(split)))
            yield split.batch(indices).to(self.config.device)

    def _finish(self, data: TaskData) -> Record:
        """Read the test set, this once, with the best weights; write everything down."""
        state, config = self.state, self.config
        assert state.best is not None
        self.model.load_state_dict(state.best_weights)
        self.model.eval()
        facts = self._facts(data)
        answers = self._test(data.test, self.training.evaluation_batch_size)
        diagnostics = self.model.diagnostics()
        further = {
            f"test_accuracy@{name}": accuracy(self._test(test.split, self._room(data.spec, test)))
            for name, test in data.further.items()
        }
        self._count_time()
        best, correct = io.BytesIO(), io.BytesIO()
        torch.save(state.best_weights, best)
        np.save(correct, np.packbits(answers.correct), allow_pickle=False)
        write_atomic(self.directory / "best.pt", best.getvalue())
        write_atomic(self.directory / "correct.npy", correct.getvalue())
        record = _write_record(
            config,
            self.directory,
            "finished",
            metrics={
                **{f"test_{name}": score for name, score in scores(answers, data.spec).items()},
                **further,
                "test_loss": answers.loss,
                "test_examples": len(answers.labels),
                "validation_accuracy": state.best["validation_accuracy"],
                "validation_loss": state.best["validation_loss"],
                "best_step": state.best["step"],
            },
            model_facts=facts,
            diagnostics=diagnostics,
            data_source=asdict(data.source),
            seconds=state.seconds,
        )
        (self.directory / "checkpoint.pt").unlink(missing_ok=True)
        return record

    def _test(self, split: Split, batch_size: int) -> Answers:
        device = self.config.device
        return evaluate(self.model, split, batch_size, device, watch=self._breathe)

    def _room(self, spec: ProblemSpec, test: FurtherTest) -> int:
        """How many sequences of a further test fit where a batch of the task's own does."""
        return max(1, self.training.evaluation_batch_size * spec.max_length // test.max_length)

    def _facts(self, data: TaskData) -> dict[str, float | None]:
        backbone = self.model.backbone_parameters()
        example = data.validation.batch(np.arange(min(FLOP_EXAMPLES, len(data.validation))))
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "backbone_parameters": backbone,
            "baseline_parameters": self.baseline,
            "matched": None if self.baseline is None else is_matched(backbone, self.baseline),
            "state_size": self.model.state_size(),
            "flops_per_token": self.model.flops_per_token(data.spec.max_length, example),
        }

    # -- between steps -----------------------------------------------------------------------

    def _between(self) -> None:
        self._breathe()
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self._save()

    def _breathe(self) -> None:
        """Heed signals, let a measurement of speed pass, tell how far we are."""
        if self.signals.received:
            raise _Interrupted
        now = time.monotonic()
        if now - self._paused > PAUSE_SECONDS:
            self._count_time()
            self.machine.pause()
            self._counted = self._paused = time.monotonic()
        if now - self._told > PROGRESS_SECONDS:
            self._told = now
            state = self.state
            last = state.history[-1] if state.history else None
            self.observe(
                Progress(
                    self.config,
                    state.step,
                    self.training.steps,
                    state.loss_sum / state.loss_count if state.loss_count else None,
                    last["validation_accuracy"] if last else None,
                )
            )

    def _count_time(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self._counted
        self._counted = now

    # -- checkpoints -------------------------------------------------------------------------

    def _save(self) -> None:
        self._count_time()
        random = {"cpu": torch.get_rng_state()}
        if self.config.device == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        state = {
            "progress": vars(self.state),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random,
        }
        checkpoint.save(self.directory / "checkpoint.pt", self.config.hash, state)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one; whatever this raises, it is not usable."""
        found = checkpoint.load(self.directory / "checkpoint.pt", self.config.hash)
        if found is None:
            return
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.state = _State(**found["progress"])
        torch.set_rng_state(found["random"]["cpu"])
        if self.config.device == "cuda":
            torch.cuda.set_rng_state(found["random"]["cuda"])


def _rank(entry: dict[str, float]) -> tuple[float, ...]:
    """Which checkpoint is kept: the best of those where the model does what its options ask."""
    return entry["settled"], *merit(entry)


def merit(entry: dict[str, float]) -> tuple[float, float]:
    """Higher is better; of equals the earlier entry stays."""
    return entry["validation_accuracy"], -entry["validation_loss"]
