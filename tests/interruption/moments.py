"""Interrupts every writing verb at random moments and says what is left.

    python -m tests.interruption.moments [--verbs export,...] [--moments 50] [--finish 3]
                                         [--seed 0] [--out FILE.json]

SIGINT, SIGTERM and SIGKILL in turn, each to a fork that inherits what is loaded, so that moments
fall into the work and not into imports. A finding is: a traceback, another exit code than the
signal's, a hang, a result that is there and broken or other than an undisturbed one, something left
behind by a signal that can be caught. Every few moments the command is given again: it must end
with the result of an undisturbed run, and nothing beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssd_export.cli.main import main as command_line
from ssd_export.report.measurement import measurement, table, write_measurement
from tests.interruption.verbs import VERBS, WritingVerb, write_inputs

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
MOST_SECONDS = 300.0  # from the signal to the end, on the busiest machine


@dataclass
class Ended:
    """A run of a verb: its exit code (minus a signal's number), stderr, seconds."""

    code: int
    said: str
    seconds: float


@dataclass
class Count:
    """What became of a verb's moments."""

    verb: str
    seconds: float
    interrupted: int = 0
    finished_before: int = 0
    whole: int = 0
    absent: int = 0
    given_again: int = 0
    findings: list[str] = field(default_factory=list)


def run(
    verb: WritingVerb,
    inputs: Path,
    folder: Path,
    more: tuple[str, ...] = (),
    moment: float | None = None,
    how: signal.Signals = signal.SIGKILL,
) -> Ended:
    """Runs a verb in a fork; moment: seconds after which it is sent the signal."""
    log = folder.parent / f"{folder.name}.log"
    log.touch()  # SIGKILL may come before the fork has opened it
    began = time.monotonic()
    child = os.fork()
    if not child:
        _child([*map(str, verb.arguments(inputs, folder)), *more], log, folder)
    try:
        if moment is not None:
            time.sleep(moment)
            os.kill(child, how)
        code = _wait(child, MOST_SECONDS if moment is not None else 600.0)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Ended(-999, "it hung", time.monotonic() - began)
    return Ended(code, log.read_text(errors="replace"), time.monotonic() - began)


def _child(arguments: list[str], log: Path, folder: Path) -> None:
    """Becomes the command; never returns."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    code = 1
    try:
        command_line(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, seconds: float) -> int:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    raise TimeoutError


def names(folder: Path) -> set[str]:
    """What stands in the folder of a run, and beside the engines of its bundle."""
    inside = folder / "bundle"
    return {path.name for path in folder.iterdir()} | {
        f"bundle/{path.name}" for path in (inside.iterdir() if inside.is_dir() else ())
    }


def load(verb: WritingVerb, inputs: Path, folder: Path) -> None:
    """Imports what the verb imports, by running it here: forks inherit it. TensorRT is only loaded,
    because a builder's threads are not in a fork.
    """
    if verb.name == "build-engine":
        from ssd_export.tensorrt.flavors import load_flavor

        load_flavor("tensorrt-rtx")
        return
    here = Path.cwd()
    folder.mkdir(parents=True)
    verb.prepare(inputs, folder)
    os.chdir(folder)
    try:
        command_line([*map(str, verb.arguments(inputs, folder))])
    except SystemExit as ended:
        assert not ended.code, f"{verb.name} does not work undisturbed"
    finally:
        os.chdir(here)


def interrupt(
    verb: WritingVerb, inputs: Path, scratch: Path, moments: int, finish: int, chance: random.Random
) -> Count:
    """A verb's count. Raises: AssertionError where it does not work undisturbed."""
    load(verb, inputs, scratch / "loading")
    calm = scratch / "undisturbed"
    calm.mkdir(parents=True)
    verb.prepare(inputs, calm)
    before = names(calm)
    undisturbed = run(verb, inputs, calm)
    assert undisturbed.code == 0, undisturbed.said
    wanted, after = verb.digest(calm), names(calm)
    assert wanted is not None
    count = Count(verb.name, undisturbed.seconds)
    for number in range(moments):
        folder = scratch / f"{number:03d}"
        folder.mkdir()
        verb.prepare(inputs, folder)
        how = SIGNALS[number % len(SIGNALS)]
        moment = chance.uniform(0, 1.05 * undisturbed.seconds)
        ended = run(verb, inputs, folder, moment=moment, how=how)
        problem = _judge(verb, folder, ended, how, wanted, before, after, count)
        if not problem and number % finish == 0:
            problem = _finish(verb, inputs, folder, wanted, after, count)
        if problem:
            count.findings.append(f"{how.name} after {moment:.2f} s: {problem}")
            print(f"  {count.findings[-1]}\n{ended.said[-1500:]}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    return count


def _judge(
    verb: WritingVerb,
    folder: Path,
    ended: Ended,
    how: signal.Signals,
    wanted: str,
    before: set[str],
    after: set[str],
    count: Count,
) -> str:
    """What is wrong with a run that was interrupted, "" where nothing is."""
    if "Traceback" in ended.said:
        return "a traceback"
    if ended.code == 0:
        count.finished_before += 1
    elif ended.code == CODES[how] or (ended.code, how) == (-signal.SIGTERM, signal.SIGTERM):
        count.interrupted += 1  # SIGTERM before the program has asked for it ends it as usual
    else:
        return f"exit code {ended.code}"
    try:
        found = verb.digest(folder)
    except Exception as error:
        return f"a broken result ({type(error).__name__}: {error})"
    if found not in (None, wanted):
        return "another result than undisturbed"
    count.whole += found is not None
    count.absent += found is None
    left = names(folder) - before - after - set(verb.kept)
    if how != signal.SIGKILL and left:
        return f"left behind: {', '.join(sorted(left))}"
    return ""


def _finish(
    verb: WritingVerb, inputs: Path, folder: Path, wanted: str, after: set[str], count: Count
) -> str:
    """Gives the command again; what is wrong with its end."""
    count.given_again += 1
    if verb.digest(folder) is not None:
        return ""
    for path in folder.glob("*/.*"):
        os.utime(path, (0, 0))  # young ones are left to whoever may be making them
    unfinished = any((folder / name).exists() for name in verb.kept)
    ended = run(verb, inputs, folder, verb.resume if unfinished else ())
    if ended.code:
        return f"given again it ends with {ended.code}: {ended.said[-300:]}"
    if verb.digest(folder) != wanted:
        return "given again it has another result than undisturbed"
    left = names(folder) - after
    return f"left behind in the end: {', '.join(sorted(left))}" if left else ""


def results_of(counts: list[Count]) -> dict[str, Any]:
    """Table and figures for the documents."""
    cells = [
        [
            one.verb,
            one.interrupted,
            one.finished_before,
            one.absent,
            one.whole,
            one.given_again,
            len(one.findings),
        ]
        for one in counts
    ]
    note = (
        "SIGINT, SIGTERM and SIGKILL in turn at random moments of the work, by the seed. Whole:"
        " the result is there and equals an undisturbed one; given again: the command was run again"
        " and ended with the undisturbed result and nothing beside it."
    )
    columns = ["verb", "interrupted", "done before", "absent", "whole", "given again", "findings"]
    return {
        "rows": [vars(one) for one in counts],
        "tables": [table("Interruptions", columns, cells, note)],
        "figures": {
            "moments": str(sum(one.interrupted + one.finished_before for one in counts)),
            "findings": str(sum(len(one.findings) for one in counts)),
        },
    }


def main() -> int:
    """Runs what the module describes."""
    parser = argparse.ArgumentParser(description="Interrupts every writing verb.")
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--moments", type=int, default=50, help="of each verb")
    parser.add_argument("--finish", type=int, default=3, help="give every n-th command again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a measurement for the documents")
    asked = parser.parse_args()
    counts = []
    with tempfile.TemporaryDirectory(prefix="ssd-export-moments-") as place:
        scratch = Path(place)
        write_inputs(scratch / "inputs")
        for name in asked.verbs.split(","):
            chance = random.Random(f"{asked.seed} {name}")
            counts.append(
                interrupt(
                    VERBS[name],
                    scratch / "inputs",
                    scratch / name,
                    asked.moments,
                    asked.finish,
                    chance,
                )
            )
            print(vars(counts[-1]), flush=True)
    if asked.out:
        command = f"python -m tests.interruption.moments --moments {asked.moments}"
        write_measurement(asked.out, measurement(command, results_of(counts)))
    return 1 if any(one.findings for one in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
