"""A large model's runner holds the weights once: the prompt's session goes before the steps', and
the other way round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssd_export.bundle import open_bundle
from ssd_export.runtime import ort_runner
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.ort_runner import WITH_WEIGHTS, OrtRunner
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint


def test_one_copy_of_the_weights_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches of two sizes, top-k among them: the images of a runner that holds all
    sessions.
    """
    opened = open_bundle(bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2))
    held: list[set[str]] = []
    open_session = ort_runner.open_session
    small, large = OrtRunner(opened), OrtRunner(opened)
    large.opens_again = True
    large._leave_only("none of them")

    def opening(path: Path, *arguments: Any) -> Any:
        held.append(
            {name for name in [*large._sessions, path.stem] if name.startswith(WITH_WEIGHTS)}
        )
        return open_session(path, *arguments)

    generated = []
    for runner in (large, small):
        monkeypatch.setattr(
            ort_runner, "open_session", opening if runner is large else open_session
        )
        generator = ImageGenerator(opened, runner)
        generated.append(
            [
                generator(PROMPTS[:3], max_batch=2, seed=5).tokens,
                generator(PROMPTS[:1], top_k=3, seed=5).tokens,
            ]
        )
    for one, all_of_them in zip(*generated, strict=True):
        np.testing.assert_array_equal(one, all_of_them)
    assert max(map(len, held)) == 1
    assert {name for names in held for name in names} == {
        "prefill",
        "decode_step",
        "prefill_top_k",
        "decode_step_top_k",
    }
