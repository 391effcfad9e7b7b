"""One changed byte in any file of a real bundle, one file at a time, is noticed by the name of the
file: what every bundle needs when it is opened, engines and reports when they are read.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from ssd_export.bundle import open_bundle
from ssd_export.bundle.manifest import MANIFEST
from ssd_export.errors import UserError
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

pytestmark = pytest.mark.slow
ADDED = {
    "engines/rtx/decode_step.engine": bytes(range(256)),
    "engines/rtx/engine.json": b"{}",
    "reports/verify.json": b'{"ok": true}',
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = bundle(checkpoint(TinyJanus(num_layers=1)), "h2o", 0.1)
    copy = Path(shutil.copytree(made, tmp_path_factory.mktemp("whole") / "bundle"))
    return open_bundle(copy).add_files(ADDED).path


def test_each_file_of_a_real_bundle(whole: Path) -> None:
    names = sorted(open_bundle(whole).files)
    assert {"onnx/weights.safetensors", "onnx/decode_step.onnx", "tokenizer.json"} <= set(names)
    on_disk = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert on_disk == {*names, MANIFEST}
    chance = random.Random(0)
    for name in [*names, MANIFEST]:
        content = (whole / name).read_bytes()
        for place in (0, len(content) - 1, chance.randrange(len(content))):
            changed = bytearray(content)
            changed[place] ^= 1 << chance.randrange(8)
            (whole / name).write_bytes(bytes(changed))
            if name in ADDED:
                opened = open_bundle(whole)  # a bundle does without them
                with pytest.raises(UserError, match=name.rsplit("/")[-1]):
                    opened.file(name)
                assert any(name in fault for fault in opened.faults())
            else:
                with pytest.raises(UserError):
                    faults = open_bundle(whole).faults()
                    if name == MANIFEST and faults:  # it says of a file added later
                        raise UserError(faults[0])
        (whole / name).write_bytes(content)
    assert open_bundle(whole).faults() == []
