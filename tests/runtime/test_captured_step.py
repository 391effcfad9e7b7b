"""The torch runner's captured step: over a double that replays operators on the same memory, and
with tensors that have no values, on which whatever waits for the device is an error.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssd_export.bundle import open_bundle
from ssd_export.cache.attention import decode_layer
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.plan.lookahead import OFF, AutoWindow, PassCost
from ssd_export.policy.schedule import rooms
from ssd_export.runtime.captured_step import CapturedStep
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.lookahead import Lookahead
from ssd_export.runtime.prompt_batch import PromptBatches, bundle_sampling
from ssd_export.runtime.torch_batch import BatchSize, TorchBatch
from ssd_export.runtime.torch_runner import TorchRunner
from ssd_export.runtime.torch_weights import load_modules
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint
from tests.runtime.recorded_step import RecordedStep

TINY = TinyJanus(seed=3, num_kv_heads=2)


@pytest.fixture(scope="module")
def path() -> Path:
    return bundle(checkpoint(TINY), "h2o", 0.2)


def runner_of(path: Path, recorder: RecordedStep | None) -> TorchRunner:
    opened = open_bundle(path)
    model, decoder = load_modules(opened, opened.config.model, "cpu")
    attend = decode_layer if recorder is None else recorder.wrap(decode_layer)
    capture = None if recorder is None else recorder.capture
    return TorchRunner(model, decoder, opened.config.policy, "cpu", attend, capture)


def tokens_of(path: Path, runner: TorchRunner, runs: list[dict]) -> list[np.ndarray]:
    with ImageGenerator(open_bundle(path), runner) as generator:
        return [generator(**run).tokens for run in runs]


class Alternating(AutoWindow):
    """Windows and single steps in turns."""

    def __call__(self, step: int) -> int:
        self.turn = not getattr(self, "turn", False)
        return 6 if self.turn else OFF


@pytest.mark.slow
def test_passes_of_lookahead_go_between_replayed_steps(path: Path) -> None:
    """A pass is queued operator by operator; the captured step goes on from where it ended."""
    recorder = RecordedStep()
    (wanted,) = tokens_of(path, runner_of(path, None), [{"prompts": PROMPTS[:1], "seed": 7}])
    runner, opened = runner_of(path, recorder), open_bundle(path)
    batch = PromptBatches.from_bundle(opened)(PROMPTS[:1], bundle_sampling(opened), 7)
    table, codes = opened.config.policy, opened.config.model.codebook_size
    window = Alternating(PassCost(0.0, 1.0, 0.0), rooms(table, batch.lengths.tolist()))
    ahead = Lookahead(runner, batch, table, window, codes)
    for _ in ahead:
        pass
    np.testing.assert_array_equal(runner.tokens(), wanted)
    assert recorder.num_captures == 1 and 0 < recorder.num_replays < ahead.passes


@pytest.mark.slow
def test_replayed_steps_sample_the_same_tokens(path: Path) -> None:
    """The second batch is of the first one's size: other prompts, seed and numbers, one capture."""
    recorder = RecordedStep()
    runs = [
        {"prompts": PROMPTS[:2], "seed": 7},
        {"prompts": PROMPTS[1:3], "seed": 8, "cfg_scale": 3.0, "temperature": 0.7},
        {"prompts": PROMPTS[:1], "seed": 9, "top_k": 5},
        {"prompts": PROMPTS[:1], "seed": 10, "temperature": 0.0},
    ]
    for ours, theirs in zip(
        tokens_of(path, runner_of(path, recorder), runs),
        tokens_of(path, runner_of(path, None), runs),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert recorder.num_captures == 4 - 1, "one for each size, and for top_k"
    assert recorder.num_replays == 4 * 575 - 3, "all steps but one before each capture"


@pytest.mark.slow
def test_a_step_that_depends_on_python_s_step_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the double is for: the token of the step that Python had at the capture."""
    draw = TorchRunner._draw
    run = [{"prompts": PROMPTS[:1], "seed": 7}]
    wanted = tokens_of(path, runner_of(path, None), run)[0]
    monkeypatch.setattr(
        TorchRunner, "_draw", lambda self, hidden: draw_at_python_s_step(self, hidden, draw)
    )
    assert (tokens_of(path, runner_of(path, RecordedStep()), run)[0] != wanted).any()


def draw_at_python_s_step(runner: TorchRunner, hidden: Tensor, draw: object) -> None:
    runner._ready.step.fill_(runner._ready._host_step)
    draw(runner, hidden)


@pytest.mark.slow
def test_a_step_that_asks_the_host_is_not_captured(path: Path) -> None:
    recorder = RecordedStep()
    runner = runner_of(path, recorder)
    runner._attention = decode_layer  # which asks whether any head is full
    run = [{"prompts": PROMPTS[:1], "seed": 7}]
    with pytest.warns(RuntimeWarning, match="cannot be captured .* asks the host within a step"):
        tokens = tokens_of(path, runner, run)[0]
    np.testing.assert_array_equal(tokens, tokens_of(path, runner_of(path, None), run)[0])
    assert recorder.num_replays == 0


def test_a_step_runs_once_before_it_is_captured() -> None:
    happened: list[str] = []

    def capture(step: object) -> object:
        happened.append("capture")
        return lambda: happened.append("replay")

    step = CapturedStep(lambda: happened.append("run"), capture)
    for _ in range(3):
        step()
    assert happened == ["run", "capture", "replay", "replay"]


def step_without_memory(path: Path, break_it: bool) -> None:
    """Every operator of a step on tensors that have shapes and a device, but no values: asking for
    one is an error, and so is a tensor of the host among them.
    """
    opened = open_bundle(path)
    config, table = opened.config.model, opened.config.policy
    with torch.device("meta"):
        model = ImageTokenModel(config).requires_grad_(False)

    def attend(query: Tensor, *others: object) -> Tensor:
        return torch.empty_like(query)  # the kernel is one launch

    runner = TorchRunner(model, None, table, "meta", attend, lambda step: step)
    size = BatchSize(num_images=2, rows=4, sorted_codes=5)
    runner._allocated = TorchBatch(size, config, table, torch.float32, "meta")
    runner._step()  # sends what is sent once
    if break_it:
        model.language_model.rope._copies.clear()
    sent = torch.Tensor.to

    def refuse(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        moved = sent(self, *args, **kwargs)
        assert moved.device == self.device, "a copy from the host within a step"
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", refuse)
        runner._step()


def test_a_step_never_waits_for_the_host(path: Path) -> None:
    step_without_memory(path, break_it=False)


def test_a_copy_from_the_host_is_seen(path: Path) -> None:
    with pytest.raises(AssertionError, match="a copy from the host within a step"):
        step_without_memory(path, break_it=True)


def test_the_reference_on_a_gpu_is_not_captured(path: Path) -> None:
    opened = open_bundle(path)
    model, _ = load_modules(opened, opened.config.model, "cpu")
    exact = TorchRunner(model, None, opened.config.policy, "cuda", decode_layer)
    assert not exact.queues_steps and exact._capture is None
    pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
    fast = TorchRunner(model, None, replace(opened.config.policy), "cuda")
    assert fast.queues_steps and fast._capture is not None
