"""Threads of a runner: how many, and that a pool with nothing to do leaves the cores to others."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch

from ssd_export.bundle import open_bundle
from ssd_export.machine import thread_limit
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.ort_session import open_session
from ssd_export.runtime.small_models import SMALL_HIDDEN_SIZE, chosen_threads
from ssd_export.runtime.torch_runner import TorchRunner
from ssd_export.runtime.torch_weights import load_modules
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


def test_a_small_model_takes_one_thread_on_every_runner() -> None:
    """A second thread of torch's made an image of the demo model ten times as expensive."""
    before = torch.get_num_threads()
    opened = open_bundle(bundle(checkpoint(TinyJanus()), "full", 1.0))
    try:
        for kind in (OrtRunner, TorchRunner):
            assert kind.from_bundle(opened).num_threads == 1
            assert kind.from_bundle(opened, num_threads=2).num_threads == 2
        large = replace(opened.config.model, hidden_size=SMALL_HIDDEN_SIZE + 64)
        assert chosen_threads(large, None) == thread_limit()
    finally:
        torch.set_num_threads(before)


def test_modules_are_made_without_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening calls no initializer, and every weight is the file's."""
    opened = open_bundle(bundle(checkpoint(TinyJanus()), "full", 1.0))
    calls = []
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: calls.append(1))
    model, decoder = load_modules(opened, opened.config.model, "cpu")
    assert not calls
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not any(parameter.is_meta for parameter in decoder.parameters())
