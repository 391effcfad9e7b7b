"""Folders that are made once a run, by whichever worker comes first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.made_once import made_once

ROOT = Path(__file__).parents[1]
MAKE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from tests.made_once import made_once
def make(folder):
    with (folder / "makers").open("a") as file:
        file.write("one\\n")
    time.sleep(0.2)
    (folder / "last").touch()
assert (made_once(Path(sys.argv[1]), make) / "last").exists(), "used before it was made"
"""


def test_of_several_processes_one_makes_it_and_all_wait(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="needs flock (POSIX)")
    command = [sys.executable, "-S", "-c", MAKE, str(tmp_path / "made")]
    site = os.pathsep.join([str(ROOT), str(Path(pytest.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": site}
    started = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert (tmp_path / "made" / "makers").read_text() == "one\n"


def test_what_could_not_be_made_is_tried_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        pytest.skip("needs what is not here")

    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match="what is not here"):
            made_once(tmp_path / "made", fail)
    made = made_once(tmp_path / "made", lambda folder: (folder / "file").write_text("made"))
    assert made_once(tmp_path / "made", fail) == made and (made / "file").read_text() == "made"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_builds_share_an_object_where_source_and_options_are_equal(tmp_path: Path) -> None:
    """The launcher of the C++ builds: tests/engines/object_cache.py."""
    launcher = ROOT / "tests" / "engines" / "object_cache.py"
    source, objects = tmp_path / "answer.c", tmp_path / "objects"

    def answer(build: str, text: str, *options: str) -> int:
        """What a program of that source prints, compiled in a build folder, as exit code."""
        source.write_text(text)
        folder = tmp_path / build
        folder.mkdir(exist_ok=True)
        names = ["-MD", "-MT", "a.o", "-MF", "a.o.d", "-o", "a.o", "-c", str(source)]
        launched = [sys.executable, "-SE", str(launcher), str(objects), "cc"]
        subprocess.run([*launched, *options, *names], cwd=folder, check=True)
        assert str(source) in (folder / "a.o.d").read_text()
        subprocess.run([*launched, "a.o", "-o", "a"], cwd=folder, check=True)
        return subprocess.run([folder / "a"], check=False).returncode

    text = "int main(void) { return ANSWER; }\n"
    assert answer("first", text, "-DANSWER=1") == answer("second", text, "-DANSWER=1") == 1
    assert len(list(objects.iterdir())) == 1
    assert answer("second", text, "-DANSWER=2") == 2, "other options"
    assert answer("second", text.replace("ANSWER", "3"), "-DANSWER=2") == 3, "another source"
    assert len(list(objects.iterdir())) == 3


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_warning_is_printed_in_every_build_and_an_error_fails_each(tmp_path: Path) -> None:
    launcher = ROOT / "tests" / "engines" / "object_cache.py"
    command = [sys.executable, "-SE", launcher, tmp_path / "objects", "cc", "-Wall", "-o", "a.o"]

    def compiled(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "a.c").write_text(text)
        return subprocess.run(
            [*command, "-c", tmp_path / "a.c"], cwd=tmp_path, capture_output=True, text=True
        )

    for _ in range(2):
        warned = compiled("int main(void) { int unused; return 0; }\n")
        assert warned.returncode == 0 and "warning: unused variable" in warned.stderr
        failed = compiled("int main(void) { return nothing; }\n")
        assert failed.returncode != 0 and "error:" in failed.stderr


def test_the_longest_files_are_there_and_come_first(pytestconfig: pytest.Config) -> None:
    """One that was renamed would lose its place without a word."""
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    gone = [name for name in conftest.LONGEST if not (ROOT / name).is_file()]
    assert not gone, "name them anew in tests/conftest.py"
    items = [
        SimpleNamespace(path=ROOT / name) for name in ("tests/test_x.py", *conftest.LONGEST[::-1])
    ]
    conftest.pytest_collection_modifyitems(items)
    assert [item.path for item in items] == [
        ROOT / name for name in (*conftest.LONGEST, "tests/test_x.py")
    ]
