"""The wheel holds all that runs, and the floors import only downwards."""

from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flexbench"

FLOORS = [
    {"errors", "registry", "config", "interface", "records", "cache", "__init__"},
    {"kernels"},
    {"models", "tasks", "ablations"},
    {"harness"},
    {"report", "validate", "progress", "listing", "bench", "bench_gpu", "inspection"},
    {"cli", "__main__"},
]
"""From the ground up; a module imports from its own floor's part of the house and from below."""

APART = [("models", "tasks"), ("kernels", "records"), ("kernels", "tasks")]
"""Pairs that know nothing of each other, whatever their floors."""


@functools.cache
def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module of the package, through its symlinks."""
    found = []
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder) / file
                parts = ["flexbench", *path.relative_to(PACKAGE).with_suffix("").parts]
                found.append((".".join(part for part in parts if part != "__init__"), path))
    return found


def part(name: str) -> str:
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def floor(name: str) -> int:
    (found,) = [level for level, parts in enumerate(FLOORS) if part(name) in parts]
    return found


def imports(name: str, path: Path, *, lazy: bool) -> Iterator[str]:
    """Modules of flexbench that a file imports; `lazy`: inside functions too."""
    known = {module for module, _ in modules()}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazy else _at_import(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("flexbench"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexbench"):
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function bodies, no TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _at_import(node)


def test_every_module_has_a_floor() -> None:
    for name, _ in modules():
        floor(name)


def test_imports_go_down() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(name, path, lazy=True)
        if floor(other) > floor(name)
    ]
    assert wrong == []


def test_models_tasks_and_kernels_know_nothing_of_each_other() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(name, path, lazy=True)
        for one, two in APART
        if {part(name), part(other)} == {one, two}
    ]
    assert wrong == []


def test_there_is_no_import_cycle() -> None:
    graph = {name: set(imports(name, path, lazy=False)) for name, path in modules()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
        else:
            (source / name).write_text("")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("flexbench", "kernels", "tasks", "ablations"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--quiet", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (built,) = folder.glob("flexbench-*.whl")
    return built


def test_the_wheel_holds_every_module_and_source(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for _, path in modules()}
    for pattern in ("**/*.cpp", "**/*.h"):
        for path in (ROOT / "kernels").glob(pattern):
            wanted.add(f"flexbench/kernels/{path.relative_to(ROOT / 'kernels')}")
    for path in (ROOT / "ablations").glob("*.yaml"):
        wanted.add(f"flexbench/ablations/{path.name}")
    wanted |= {f"flexbench/report/page.{kind}" for kind in ("css", "js")}
    assert wanted - held == set()
    assert any(name.endswith(".cpp") for name in held)


def test_the_wheel_adds_one_top_level_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flexbench"}


def test_every_module_imports_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    apart = ("__main__",) if find_spec("triton") else ("__main__", "triton", "device")
    names = [name for name, _ in modules() if name.split(".")[-1] not in apart]
    code = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        f"sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"for name in {names!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
