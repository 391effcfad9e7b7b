"""A compiler launcher: compiles a file once for all builds of a run that give it the same options.

    object_cache.py FOLDER COMPILER OPTION...

CMake calls it by CMAKE_CXX_COMPILER_LAUNCHER. The command without the names of its outputs, with
what the source holds, identifies an object: headers do not change while a run lasts, whose folder
this is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys

OUTPUTS = ("-o", "-MF", "-MT")


def identity(command: list[str], source: str) -> str:
    """The hash of a command without its outputs, and of its source."""
    before = ["", *command]
    kept = [word for word, last in zip(command, before) if not {word, last} & {*OUTPUTS}]
    with open(source, "rb") as file:
        return hashlib.sha256("\0".join(kept).encode() + file.read()).hexdigest()


def main(folder: str, *words: str) -> int:
    command = list(words)
    if "-c" not in command or "-o" not in command:
        return subprocess.call(command)
    target, source = (command[command.index(option) + 1] for option in ("-o", "-c"))
    kept = os.path.join(folder, identity(command, source))
    if os.path.exists(kept):
        shutil.copyfile(kept, target)
        if "-MF" in command:
            with open(command[command.index("-MF") + 1], "w") as file:
                file.write(f"{target}: {source}\n")
        return 0
    compiled = subprocess.run(command, stderr=subprocess.PIPE)
    sys.stderr.buffer.write(compiled.stderr)
    if compiled.returncode == 0 and not compiled.stderr:  # a warning is printed in every build
        os.makedirs(folder, exist_ok=True)
        shutil.copyfile(target, f"{kept}.{os.getpid()}")
        os.replace(f"{kept}.{os.getpid()}", kept)
    return compiled.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
