"""The numbers of a family's grid stand in its file: read from the sources, docstrings left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAMILIES = "ssd_export/model/families/"
FAMILY = f"{FAMILIES}janus.py"
NUMBERS = {24, 575, 576}  # Janus' grid width, its last step, its image tokens
IN_TEXT = re.compile(r"(?<![\w.])(575|576|24 x 24)(?![\w.])")
ROWS = re.compile(r"\b2 \* (\w+\.)*(num_images|batch|images|num_prompts)\b|\brows\s*=\s*2\b")
# What is another 24: the source, the text of its line, and why.
OTHERS = {
    ("ssd_export/export/kv_update.py", "OPSET = 24"): "the opset",
    ("ssd_export/calibrate/plots.py", "s=24"): "points, the area of a mark",
    ("ssd_export/demo/checker.py", "MAX_GROUND_TINT = 24"): "levels of color",
    ("ssd_export/demo/train.py", "NUM_ASKING = 24"): "tokens that an image is measured at",
    ("ssd_export/plan/lookahead.py", "WINDOWS = "): "tokens of a pass",
    ("ssd_export/policy/allocation.py", "PRICES = 24"): "steps of a bisection",
    ("ssd_export/policy/menu.py", "MOSTLY_RECENT_PARTS"): "parts of 36",
    ("ssd_export/policy/allocation.py", "np.geomspace(1, 1e-4, 24)"): "prices that are tried",
    ("ssd_export/sweep/report.py", "MAX_SHEET_ROWS = 24"): "rows of a contact sheet",
    ("ssd_export/tensorrt/stub_library.py", "SYMBOL_BYTES"): "bytes of an ELF symbol",
}


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "ssd_export").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def docstrings(tree: ast.Module) -> set[ast.Constant]:
    """Every string that stands as a statement."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def numbers_of_bits(tree: ast.Module) -> set[ast.Constant]:
    """Exponents of 2: 1 << 24, 2.0**-24."""
    exponents = (
        node.right
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.LShift, ast.Pow))
    )
    return {
        constant
        for exponent in exponents
        for constant in ast.walk(exponent)
        if isinstance(constant, ast.Constant)
    }


def found(name: str, text: str) -> list[str]:
    """Each place where a number of Janus' grid, or "two rows an image", stands in code."""
    tree, lines = ast.parse(text), text.splitlines()
    left_out, places = docstrings(tree) | numbers_of_bits(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or node in left_out:
            continue
        line = lines[node.lineno - 1]
        is_number = type(node.value) is int and node.value in NUMBERS
        is_text = isinstance(node.value, str) and IN_TEXT.search(node.value)
        if is_text or (is_number and not _is_another(name, line)):
            places.append(f"{name}:{node.lineno}: {line.strip()}")
    for number, line in enumerate(lines, start=1):
        if ROWS.search(line.split("#")[0]):
            places.append(f"{name}:{number}: {line.strip()}")
    return places


def _is_another(name: str, line: str) -> bool:
    return any(name == source and part in line for source, part in OTHERS)


def test_the_grid_and_its_rows_stand_in_the_family_file_alone() -> None:
    wrong = [
        place
        for name, text in sources()
        if not name.startswith(FAMILIES)
        for place in found(name, text)
    ]
    assert not wrong, "\n".join(wrong)
    assert found(FAMILY, dict(sources())[FAMILY]), "the family's own file has them"


def test_every_exception_is_needed() -> None:
    texts = dict(sources())
    for source, part in OTHERS:
        assert part in texts[source], f"{source} has no {part!r} any more: take it off the list"


def test_the_reader_sees_what_it_should() -> None:
    for code in ("x = 576", "f(range(575))", "w = 24", 'help = "of the 576"', "r = 2 * num_images"):
        assert found("ssd_export/new.py", code), code
    for code in ('"""The 576 tokens."""', "x = 5760", "x = 240", "x = 1  # 576", "x = 1 << 24"):
        assert not found("ssd_export/new.py", code), code
