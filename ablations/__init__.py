"""Ablations: one design choice each, as declarations (`*.yaml`) to read, copy and edit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from flexbench.config import PRESETS, StrictModel
from flexbench.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent

Measure = Literal[
    "accuracy", "tokens_per_second", "computed_token_ratio", "flops_per_token", "peak_memory"
]


class Plot(StrictModel):
    """What is plotted against what: each y against the factor x, or one bar a variant."""

    x: str | None = None
    log: bool = Field(False, description="of x")
    y: tuple[Measure, ...] = Field(("accuracy",), min_length=1)


class Ablation(StrictModel):
    """A baseline and its variants, which differ from it in what they set and in nothing else.

    Keys of settings are those of `--set`; one that begins with the name of a declared task or model
    is for its cells alone.

    Attributes:
        question: what it answers, in one sentence.
        model: the baseline's.
        settings: of every cell.
        changes: by label, what a variant sets; "model" names another model.
        grid: by key, values; every combination is a variant, the baseline's own left out.
        tasks: by preset and "suite/task", what its cells set besides; a list of tasks sets nothing
            there, and where there are no presets it stands for all.
        seeds: how many, by preset, where it is not as many as a sweep has.
    """

    question: str
    model: str
    settings: dict[str, Any] = {}
    changes: dict[str, dict[str, Any]] = {}
    grid: dict[str, tuple[Any, ...]] = {}
    tasks: dict[str, dict[str, dict[str, Any]]]
    seeds: dict[str, PositiveInt] = {}
    plot: Plot = Plot()

    @field_validator("tasks", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        presets = dict.fromkeys(PRESETS, value) if isinstance(value, list) else value
        if not isinstance(presets, dict):
            return presets
        return {
            preset: {task: {} for task in tasks} if isinstance(tasks, list) else tasks
            for preset, tasks in presets.items()
        }

    @field_validator("tasks", "seeds")
    @classmethod
    def _by_preset(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name not in PRESETS:
                raise ValueError(f"unknown preset '{name}'{did_you_mean(name, PRESETS)}")
        return value

    @model_validator(mode="after")
    def _one_way_to_vary(self) -> Self:
        if bool(self.changes) == bool(self.grid):
            raise ValueError("an ablation has changes or a grid, and one of the two")
        varied = {key for _, factors in self.variants() for key in factors}
        if self.plot.x is not None and self.plot.x not in varied:
            hint = did_you_mean(self.plot.x, varied)
            raise ValueError(f"no variant sets the plot's x, '{self.plot.x}'{hint}")
        return self

    def variants(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Label and settings of the baseline, whose label is empty, and of every variant."""
        yield "", {}
        yield from self.changes.items()
        for values in product(*self.grid.values()) if self.grid else ():
            factors = dict(zip(self.grid, values, strict=True))
            yield (
                ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in factors.items()),
                factors,
            )

    @property
    def models(self) -> list[str]:
        """All that are named, the baseline's first."""
        others = (change["model"] for change in self.changes.values() if "model" in change)
        return list(dict.fromkeys([self.model, *others]))


class _Loader(yaml.SafeLoader):
    """Safe, and with YAML 1.2's booleans, so that `off` is text."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("true|false"), list("tf"))


def names() -> list[str]:
    """The declared ablations."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(which: str) -> tuple[str, Ablation]:
    """Name and declaration of a declared ablation, or of the user's own, which is a path.

    Raises:
        UserError: there is no such ablation or file, or it is not a declaration.
    """
    path = Path(which)
    if path.suffix not in (".yaml", ".yml"):
        if which not in names():
            raise UserError(f"unknown ablation '{which}'{did_you_mean(which, names())}")
        path = FOLDER / f"{which}.yaml"
    elif path.stem in names() and path.resolve() != (FOLDER / f"{path.stem}.yaml").resolve():
        raise UserError(f"'{path.stem}' is a declared ablation; give {path} another name")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no declaration: it has no keys")
    return path.stem, Ablation.parse(found, where=path.stem)
