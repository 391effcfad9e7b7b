"""Imports point one way, and a board can load the runtime without torch: read from the sources."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ssd_export"
CORE = {"config", "errors"}
# What each part of ssd_export may import from the others. evaluate and cli stand on top.
ARROWS = {
    "errors": set(),
    "config": {"errors"},
    "specs": CORE,
    "bundle": CORE,
    "cache": CORE,
    "plan": CORE | {"specs", "bundle", "cache"},
    "kernels": CORE | {"cache"},
    "model": CORE | {"cache", "plan"},
    "demo": CORE | {"cache", "model"},
    "export": CORE | {"specs", "bundle", "cache", "kernels", "model", "plan"},
    "build": CORE | {"specs", "bundle", "cache", "kernels", "export", "plan"},
    "runtime": CORE | {"specs", "bundle", "build", "cache", "kernels", "model", "plan"},
    "calibrate": CORE | {"cache", "model", "runtime"},
}
ARROWS["evaluate"] = set(ARROWS)
ARROWS["cli"] = set(ARROWS)
TORCH_FREE = (
    "runtime",
    "build",
    "export/plugin_flavour.py",
    "plan",
    "cache/policy.py",
    "cache/table.py",
    "cache/head_map.py",
    "cache/layout.py",
    "specs.py",
    "bundle.py",
    "config.py",
    "errors.py",
    "cli",
)
NEEDS_TORCH = {"runtime/torch_runner.py"}
HEAVY_FOR_HELP = {
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnx_ir",
    "onnxscript",
    "rich",
    "PIL",
    "matplotlib",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
}
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def imports(source: str, on_load: bool = False) -> frozenset[str]:
    """Dotted names that a source imports: anywhere, or only those that loading it executes."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if on_load and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_for_types_only(node)
        ):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: write imports absolutely"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((PACKAGE / source).read_text(encoding="utf-8")))
    return frozenset(names)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def part_of(source: str) -> str:
    return source.split("/")[0].removesuffix(".py")


def own_source(name: str) -> str | None:
    """The source behind a dotted name of ours: ssd_export.cache.table.Rule -> cache/table.py."""
    parts = name.split(".")[1:]
    while parts:
        for source in ("/".join(parts) + ".py", "/".join(parts) + "/__init__.py"):
            if source in SOURCES:
                return source
        parts.pop()
    return None


@cache
def loaded_by(source: str) -> frozenset[str]:
    """Top-level names of the packages outside ours that loading the source loads, through our own
    modules.
    """
    seen, todo, outside = {source}, [source], set()
    while todo:
        for name in imports(todo.pop(), on_load=True):
            if name.split(".")[0] != "ssd_export":
                outside.add(name.split(".")[0])
            elif (target := own_source(name)) and target not in seen:
                seen.add(target)
                todo.append(target)
    return frozenset(outside)


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "__init__.py"])
def test_imports_point_one_way(source: str) -> None:
    part = part_of(source)
    assert part in ARROWS, f"{part} is new: give it its place in ARROWS and in docs/architecture.md"
    used = {
        part_of(target)
        for name in imports(source)
        if name.startswith("ssd_export.") and (target := own_source(name))
    } - {part}
    assert used <= ARROWS[part], f"{source} may not import {sorted(used - ARROWS[part])}"


def test_the_arrows_form_no_circle() -> None:
    left = {
        part: targets - {part}
        for part, targets in ARROWS.items()
        if part not in ("cli", "evaluate")
    }
    while left:
        free = [part for part, targets in left.items() if not targets & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        left = {part: targets for part, targets in left.items() if part not in free}


def test_nothing_imports_cli() -> None:
    for source in SOURCES:
        if part_of(source) != "cli":
            assert not [name for name in imports(source) if name.startswith("ssd_export.cli")], (
                source
            )


@pytest.mark.parametrize(
    "source",
    [source for source in SOURCES if source.startswith(TORCH_FREE) and source not in NEEDS_TORCH],
)
def test_the_runtime_loads_neither_torch_nor_transformers(source: str) -> None:
    assert not loaded_by(source) & {"torch", "transformers"}
    assert not {name.split(".")[0] for name in imports(source)} & {"torch", "transformers"}


def test_transformers_is_for_tests_and_one_baseline_only() -> None:
    users = [
        source
        for source in SOURCES
        if "transformers" in {name.split(".")[0] for name in imports(source)}
    ]
    assert users == ["evaluate/transformers_baseline.py"]


@pytest.mark.parametrize("source", [source for source in SOURCES if part_of(source) == "cli"])
def test_verbs_load_nothing_heavy_before_they_run(source: str) -> None:
    assert not loaded_by(source) & HEAVY_FOR_HELP


def test_the_reader_of_imports_sees_what_it_should() -> None:
    assert "ssd_export.config.GRID" in imports("cache/table.py")
    assert own_source("ssd_export.cache.table.Rule") == "cache/table.py"
    assert own_source("ssd_export.cache") == "cache/__init__.py"
    assert "torch" in loaded_by("cache/rules.py")
