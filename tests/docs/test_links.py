"""Links between documents lead somewhere, and files that documents name are there."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[[^\[\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
SOURCE = re.compile(r"(?:[\w.-]+/)+[\w.-]+\.(?:py|cpp|h|toml|md|json)")
HEADING = re.compile(r"^#{1,6} (.*)$", re.MULTILINE)
WRITTEN_LATER = ("head_map.json", "engine.json", "bench.json", "verify.json", "export.json")


def tracked(pattern: str) -> list[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


DOCUMENTS = tracked("*.md")


@cache
def text_of(document: str) -> str:
    return FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))


def anchors(document: str) -> set[str]:
    """The anchors of a document's headings, as code hosts make them."""
    headings = (
        re.sub(r"[`*]", "", heading).lower() for heading in HEADING.findall(text_of(document))
    )
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings}


def test_links_and_names_are_seen() -> None:
    """The tests below say nothing of what these patterns overlook."""
    texts = [text_of(document) for document in DOCUMENTS]
    assert sum(len(LINK.findall(text)) for text in texts) > 100
    assert sum(len(SOURCE.findall(code)) for text in texts for code in CODE.findall(text)) > 25


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_to_a_file_and_a_heading(document: str) -> None:
    for target in LINK.findall(text_of(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target} is not there"
        if anchor:
            name = file.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{document}: {target} has no such heading"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    for code in CODE.findall(text_of(document)):
        for name in SOURCE.findall(code):
            places = (ROOT / name, ROOT / "ssd_export" / name, (ROOT / document).parent / name)
            bundle_file = name.startswith(("engines/", "reports/", "onnx/", "build/", "bundles/"))
            assert bundle_file or any(place.exists() for place in places), f"{document}: {name}"


def test_every_decision_is_listed_and_has_a_status() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "index.md").read_text(encoding="utf-8")
    records = sorted(path for path in folder.glob("*.md") if path.name != "index.md")
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        text = path.read_text(encoding="utf-8")
        title = re.match(rf"# {path.name[:4]}\. (.+)\n\nStatus: \w", text)
        assert title, f"{path.name} begins with its number, title and status"
        assert f"| [{title[1]}]({path.name}) |" in index, f"{path.name} is not in index.md"
        assert "**Measured.**" in text and "**Decided.**" in text and text.count("\n") <= 20


def test_a_measured_number_does_not_begin_a_line() -> None:
    """Markdown takes a line that begins with a comment for HTML, and ends the paragraph."""
    for document in DOCUMENTS:
        for line in text_of(document).splitlines():
            begins = re.match(r"\s*<!-- measured:[\w.-]+ -->\s*\S", line)
            assert not begins, f"{document}: {line}"
