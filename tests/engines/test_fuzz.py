"""What reads the files of a bundle, and prompts, in the C++ library: mutated ones are read or
refused with a sentence, under AddressSanitizer and UndefinedBehaviorSanitizer.

More of it: `ssd_fuzz CORPUS SEED FIRST COUNT` with other seeds (engines/tests/fuzz.cpp).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.builds import Builds, memory_checked, run
from tests.scene_bundles import rewrite_manifest
from tests.tensorrt.engine_doubles import write_engines

SEED, COUNT = 2, 600
SMALL = 1 << 20  # bytes of the files that the manifest's folder has
PROMPTS = ("a red circle", "don't stop at 1234!  ", "été 日本 🎨 \u0301", "x" * 300)


def corpus(bundle: Path, folder: Path) -> Path:
    """Files to begin with, by the names of their readers, and a bundle without the large ones."""
    folder.mkdir()
    shutil.copytree(bundle, folder / "bundle")
    whole = write_engines(folder / "bundle", window=8)
    (engines,) = (folder / "bundle").glob("engines/*/engine.json")
    files = {
        "config.json": (bundle / "ssd_config.json").read_bytes(),
        "tokenizer.json": (bundle / "tokenizer.json").read_bytes(),
        "classes.json": json.dumps({"class_names": ["a", "b", "c", "d"]}).encode(),
        "engines.json": engines.read_bytes(),
        "weights.safetensors": small_weights(bundle / whole.config.text_embeddings.file),
    }
    files |= {f"prompt.{i}.txt": prompt.encode() for i, prompt in enumerate(PROMPTS)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for file in (folder / "bundle").rglob("*"):
        if file.is_file() and file.stat().st_size > SMALL:
            file.unlink()
    rewrite_manifest(folder / "bundle")
    shutil.copyfile(folder / "bundle" / "manifest.json", folder / "manifest.json")
    return folder


def small_weights(weights: Path) -> bytes:
    """The header of a weights file, every tensor in the same four bytes."""
    content = weights.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [0, 4]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


@pytest.mark.slow
def test_mutated_files_are_read_or_refused(
    build: Builds, bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    program = memory_checked(build) / "tests" / "ssd_fuzz"
    folder = corpus(bundles("ssd-auto"), tmp_path / "corpus")
    halt = {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    ran = run([program, folder, str(SEED), "0", str(COUNT)], env=halt)
    under_way = (folder / "run").read_text()
    assert ran.returncode == 0 and not ran.stderr, (
        f"run {under_way} of seed {SEED} ended with {ran.returncode}: {ran.stderr[-6000:]}"
    )
    taken, refused = (int(word) for word in ran.stdout.split() if word.isdigit())
    assert taken + refused == COUNT and min(taken, refused) > COUNT // 20
