"""Threads of ONNX Runtime: a pool that has nothing to do leaves the cores to others."""

from __future__ import annotations

import time

import numpy as np
import onnxruntime as ort
import pytest

from ssd_export.runtime.ort_session import open_session
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

PAUSE = 0.1  # seconds; workers that spin do so for about 0.04


def idle_seconds(session: ort.InferenceSession, num_tokens: int) -> float:
    """Processor time of this process while nobody asks it for anything, the sum of ten pauses."""
    codes = np.zeros((1, num_tokens), np.int32)
    spent = []
    for _ in range(10):
        session.run(["pixels"], {"codes": codes})
        began = time.process_time()
        time.sleep(PAUSE)
        spent.append(time.process_time() - began)
    return sum(spent)


@pytest.mark.serial
def test_a_pool_of_two_threads_does_not_spin() -> None:
    folder = bundle(checkpoint(TinyJanus()), "full", 1.0)
    path = folder / "onnx" / "image_decoder.onnx"
    spinning = ort.SessionOptions()
    spinning.intra_op_num_threads = 2
    usual = ort.InferenceSession(str(path), spinning, providers=["CPUExecutionProvider"])
    num_tokens = 24 * 24
    spent = idle_seconds(usual, num_tokens)
    assert spent > 0.03, "ONNX Runtime's default no longer spins"
    del usual
    assert idle_seconds(open_session(path, "cpu", 2), num_tokens) < spent / 3
