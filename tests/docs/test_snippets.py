"""What documents tell a reader to type works: every block is executed, or says why it is not."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.policy.head_map import SHAPE, HeadMap
from tests.docs.snippets import (
    COMMON_EXPORT,
    EXECUTED,
    ROOT,
    Scratch,
    matches,
    our_commands,
    parse,
    snippets,
)
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "docs/how-to/*.md", "plugins/README.md", "engines/*.md")
    for path in ROOT.glob(pattern)
)
NEEDS_A_REASON = ("bash", "python", "diff", "cpp", "c")


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, few of them, with a head map."""
    folder = tmp_path_factory.mktemp("checkpoint") / "Janus-Pro-1B"
    folder.mkdir()
    write_transformers_checkpoint(folder, TinyJanus())
    config = open_checkpoint(folder).config
    metric = ((0.1, 0.9, 0.1, 0.8),) * config.num_layers
    shape = {name: getattr(config, name) for name in SHAPE}
    HeadMap(**shape, metric=metric, threshold=0.5).save(folder / "head_map.json")
    return folder


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("common")


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_runs(
    document: str, tmp_path: Path, tiny_checkpoint: Path, common: Path
) -> None:
    blocks = snippets(document)
    copy = any(block.needs_a_copy for block in blocks)
    scratch = Scratch(tmp_path, copy, {"path/to/Janus-Pro-1B": str(tiny_checkpoint)}, common)
    for block in blocks:
        scratch.execute(block)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_that_are_not_run_have_options_that_exist(document: str) -> None:
    for block in snippets(document):
        if block.language == "bash":
            for arguments in our_commands(block.text):
                try:
                    parse(arguments)
                except click.UsageError as error:
                    pytest.fail(f"{block.where}: {error.format_message()}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_block_that_is_not_run_says_why(document: str) -> None:
    for block in snippets(document):
        if block.language in NEEDS_A_REASON and block.language not in EXECUTED:
            reason = block.asked("not run") or block.asked("file") or block.asked("from")
            assert reason, f"{block.where}: say why it is not run, or run it"
        assert block.language, f"{block.where}: name the language of the block"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_block_from_a_file_stands_in_it(document: str) -> None:
    for block in snippets(document):
        if path := block.asked("from"):
            assert block.text in (ROOT / path).read_text(encoding="utf-8"), block.where


def test_comments_are_those_that_mean_something() -> None:
    known = ("not run", "needs", "with", "file", "from", "output", "measured", "/measured")
    for document in DOCUMENTS:
        for block in snippets(document):
            name = block.comment.partition(":")[0]
            assert not name or name.startswith(known), f"{block.where}: {block.comment}"


def test_expected_output_is_compared() -> None:
    said = ["first 1", "second 2", "third 3"]
    assert matches(["first ...", "...", "third 3"], said)
    assert matches(["...", "third ..."], said)
    assert not matches(["first 2", "..."], said)
    assert not matches(["first ...", "third 3"], said)
    assert not matches(["...", "fourth"], said)


def test_a_failing_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text(
        "```bash\necho one\n```\n<!-- output -->\n```text\ntwo\n```\n\n```bash\nfalse\n```\n"
    )
    monkeypatch.setattr("tests.docs.snippets.ROOT", tmp_path)
    (tmp_path / "cli.py").touch()
    (tmp_path / "here").mkdir()
    scratch = Scratch(tmp_path / "here", copy=False, replaced={})
    first, output, second = snippets("page.md")
    scratch.execute(first)
    with pytest.raises(AssertionError, match=r"page\.md:5: one"):
        scratch.execute(output)
    with pytest.raises(AssertionError, match=r"page\.md:9: exit code 1"):
        scratch.execute(second)


def test_the_common_export_runs_once_and_not_over_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text(f"```bash\necho before\n{COMMON_EXPORT}echo after\n```\n")
    (tmp_path / "cli.py").write_text(
        "from pathlib import Path\n"
        "Path('bundles').mkdir(exist_ok=True)\n"
        "with Path('bundles/runs').open('a') as file:\n"
        "    file.write('one\\n')\n"
        "with Path(__file__).resolve().with_name('runs').open('a') as file:\n"
        "    file.write('one\\n')\n"
        "print('exported')\n"
    )
    monkeypatch.setattr("tests.docs.snippets.ROOT", tmp_path)
    (tmp_path / "common").mkdir()
    (block,) = snippets("page.md")
    for number, runs in enumerate((1, 1, 2)):
        name = min(number, 1)  # the second folder twice: there a bundle is, and --force counts
        folder = tmp_path / f"scratch{name}"
        folder.mkdir(exist_ok=True)
        (folder / "cli.py").unlink(missing_ok=True)
        scratch = Scratch(folder, False, {}, tmp_path / "common")
        scratch.execute(block)
        assert scratch.said == "before\nexported\nafter\n"
        assert len((tmp_path / "runs").read_text().split()) == runs
    assert (tmp_path / "scratch0" / "bundles" / "runs").read_text() == "one\n"


def test_options_that_do_not_exist_are_found() -> None:
    parse(["export", "--budget", "0.2"])
    for wrong in (["export", "--budgte", "0.2"], ["exprt"], ["generate", "x", "--seed"]):
        with pytest.raises(click.UsageError):
            parse(wrong)
