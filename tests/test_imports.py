"""Imports point one way, and a board can load the runtime without torch: read from the sources."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ssd_export"
# The ground stands on nothing; each room may import the ground, and from the rooms what stands
# here.
GROUND = {
    "cgroups",
    "config",
    "dtypes",
    "errors",
    "extras",
    "files",
    "graph_spec",
    "locks",
    "machine",
    "noise",
    "os_errors",
    "sampling",
    "typed_json",
    "version",
    "worker_processes",
}
ROOMS: dict[str, set[str]] = {
    "policy": set(),
    "bundle": {"policy"},
    "cache": {"policy"},
    "plan": {"bundle", "policy"},
    "kernels": {"cache", "policy"},
    "model": {"policy"},
    "export": {"bundle", "model", "plan", "policy"},
    "runtime": {"bundle", "cache", "kernels", "model", "plan", "policy"},
    "tensorrt": {"bundle", "export", "kernels", "plan", "policy", "runtime"},
    "demo": {"model"},
    "calibrate": {"cache", "model", "policy", "runtime"},
    "report": {"bundle", "runtime"},
    "metrics": {"cache", "demo", "model", "policy", "runtime"},
}
ABOVE = {
    "verify",
    "bench",
    "sweep",
    "serve",
    "prompt_files",
    "deploy",
    "doctor",
}  # may import every room but each other
TOP = {"cli"}  # imported by nothing
TORCH_FREE = ("bundle", "cli", "plan", "policy", "runtime", "tensorrt", *sorted(GROUND))
NEEDS_TORCH = {
    f"runtime/{name}.py"
    for name in ("captured_step", "torch_batch", "torch_runner", "torch_weights")
}
HEAVY_FOR_HELP = {
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnx_ir",
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
    """The source behind a dotted name of ours: ssd_export.policy.table.Rule -> policy/table.py."""
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


def allowed(part: str) -> set[str]:
    """The parts that a part may import."""
    if part in GROUND:
        return {"cgroups", "config", "dtypes", "errors", "files", "os_errors"}
    if part in ROOMS:
        return GROUND | ROOMS[part]
    above = {"__main__": TOP, **dict.fromkeys(TOP, ABOVE)}
    return GROUND | ROOMS.keys() | above.get(part, set())


def test_imports_point_one_way() -> None:
    wrong = []
    for source in SOURCES:
        part = part_of(source)
        assert part in GROUND | ROOMS.keys() | ABOVE | TOP | {"__init__", "__main__"}, (
            f"{part} is new: give it its place here and in docs/architecture.md"
        )
        for name in sorted(imports(source)):
            target = own_source(name) if name.startswith("ssd_export.") else None
            other = part_of(target) if target else part
            if other != part and other not in allowed(part):
                wrong.append(f"{source} imports {name}")
    assert not wrong


def test_the_rooms_form_no_circle() -> None:
    left = {room: set(targets) for room, targets in ROOMS.items()}
    while left:
        free = [room for room, targets in left.items() if not targets & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in free}


def test_a_board_loads_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers"}
    for source in SOURCES:
        if part_of(source) in TORCH_FREE and source not in NEEDS_TORCH:
            assert not loaded_by(source) & heavy, source
            assert not {name.split(".")[0] for name in imports(source)} & heavy, source


def test_transformers_is_for_tests_one_baseline_and_the_text_encoder() -> None:
    users = [
        source
        for source in SOURCES
        if "transformers" in {name.split(".")[0] for name in imports(source)}
    ]
    assert users == ["bench/transformers_baseline.py", "model/text_encoder.py"]


def test_verbs_load_nothing_heavy_before_they_run() -> None:
    for source in SOURCES:
        if part_of(source) in TOP:
            assert not loaded_by(source) & HEAVY_FOR_HELP, source


def test_the_reader_of_imports_sees_what_it_should() -> None:
    assert "ssd_export.config.Grid" in imports("policy/table.py")
    assert own_source("ssd_export.policy.table.Rule") == "policy/table.py"
    assert own_source("ssd_export.cache") == "cache/__init__.py"
    assert "torch" in loaded_by("cache/rules.py")
