"""Exports to one folder, each killed a little later than the one before, until one is done; prints
what each left.

A separate process: python -m tests.export.killed_exports MODEL OUT. Every export is a fork of it
that sends itself SIGKILL, so nothing depends on how fast the machine is. One JSON line an export:
{"moment", "killed", "hashes"}, the hashes of the bundles that open in the bundle's folder and in
the unfinished one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

from ssd_export.bundle import open_bundle
from ssd_export.errors import UserError
from ssd_export.export import journal
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.export.journal import unfinished_folder

LATER_EACH_TIME = 4  # moments
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def killed_at(moment: int, folder: Path) -> None:
    """Kills this process at the n-th checkpoint: half of a tensor written, a whole one, or a file
    in folder touched.
    """
    passed = 0

    def passes() -> None:
        nonlocal passed
        passed += 1
        if passed > moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_in_halves(stream: journal.WeightsStream, data: memoryview) -> None:
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            write(stream, half)
            passes()

    write, journal.WeightsStream.write = journal.WeightsStream.write, write_in_halves
    sys.addaudithook(
        lambda event, args: (
            passes() if event in EVENTS and str(args[0]).startswith(str(folder)) else None
        )
    )


def export(model: str, out: Path, resume: bool) -> None:
    export_bundle(
        ExportSpec(
            model=model,
            policy="h2o",
            groups=3,
            prompt_slots=32,
            dtype="fp16",
            out=out,
            force=True,
            weights="int4",
            resume=resume,
        )
    )


def is_killed(model: str, out: Path, moment: int) -> bool:
    """Whether an export was killed by its moment. The first begins, the others go on."""
    child = os.fork()
    if not child:
        killed_at(moment, out.parent.resolve())
        export(model, out, resume=moment > 0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        sys.exit(f"the export that was to be killed at moment {moment} ended with status {status}")
    return status != 0


def hashes(out: Path) -> list[str]:
    found = []
    for place in (out, unfinished_folder(out)):
        try:
            found.append(open_bundle(place).hash)
        except UserError:
            continue
    return found


def main(model: str, out: Path) -> None:
    torch.set_num_threads(1)  # the threads of a pool are not there in a fork
    with tempfile.TemporaryDirectory() as elsewhere:
        export(
            model, Path(elsewhere) / "b", resume=False
        )  # forks inherit what is loaded by the first export
    killed, moment = True, 0
    while killed:
        killed = is_killed(model, out, moment)
        print(json.dumps({"moment": moment, "killed": killed, "hashes": hashes(out)}), flush=True)
        moment += LATER_EACH_TIME


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
