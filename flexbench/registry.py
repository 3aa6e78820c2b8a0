"""Registries that fill themselves: one file an entry, found by importing a package's modules."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from flexbench.errors import UserError, did_you_mean

T = TypeVar("T", bound=type[Any])


class Registry(Generic[T]):
    """Named classes of one kind, from the modules of `package` and from an entry-point group.

    The package is imported on the first look-up, so that `import flexbench` stays cheap.

    Args:
        kind: what an entry is called in messages ("task", "model").
        package: the package whose modules, at any depth, hold the entries.
        entry_points: the entry-point group by which other distributions register theirs.
    """

    def __init__(self, kind: str, package: str, entry_points: str) -> None:
        self.kind = kind
        self.package = package
        self.entry_points = entry_points
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator that files the class under `name`, which must be free."""

        def file(cls: T) -> T:
            known = self._entries.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            cls.name = name
            self._entries[name] = cls
            return cls

        return file

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)
        for point in importlib.metadata.entry_points(group=self.entry_points):
            if point.name not in self._entries:
                self.register(point.name)(point.load())

    def names(self) -> list[str]:
        self._load()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """The class registered under `name`.

        Raises:
            UserError: no such entry; the message names the nearest one.
        """
        self._load()
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} '{name}'{did_you_mean(name, self._entries)}")
        return self._entries[name]
