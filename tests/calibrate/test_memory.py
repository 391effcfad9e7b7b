"""Measuring an image holds one layer's work at a time: more layers add the hidden states between
them, no more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch.profiler import ProfilerActivity, profile

from benchmarks.calibration_memory import of_all_layers, report
from ssd_export.calibrate.calibration import ABLATION, FISHER, CalibrationSpec, add_image
from ssd_export.calibrate.measure import HeadSums
from ssd_export.calibrate.neighborhood import Neighborhood
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.families.janus import GRID
from ssd_export.model.load import load_model
from ssd_export.policy.menu import scored, window
from ssd_export.sampling import Sampling
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

pytestmark = pytest.mark.slow

PROMPT, BYTES_FLOAT = 9, 4
TOKENS = PROMPT + 575
ROWS = 2
SPEC = CalibrationSpec(
    ("x",), 1, Neighborhood(1, 48), 0, Sampling(5.0, 1.0), 16, (window(32), scored(64, GRID))
)


def peak_of_tensors(
    num_layers: int, costs: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, int]:
    """(bytes of tensors at the peak of add_image, hidden size)."""
    tiny = TinyJanus(num_layers=num_layers, num_heads=4, num_kv_heads=2)
    checkpoint = open_checkpoint(
        write_transformers_checkpoint(tmp_path_factory.mktemp("layers"), tiny)
    )
    model, rng = load_model(checkpoint), np.random.default_rng(0)
    prompts = [rng.standard_normal((PROMPT, checkpoint.config.hidden_size), np.float32)] * ROWS
    tokens = rng.integers(0, checkpoint.config.codebook_size, 576)
    sums = HeadSums.zero(checkpoint.config, len(SPEC.options))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        add_image(sums, model, prompts, tokens, replace(SPEC, costs=costs))
    events = [
        event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = np.cumsum(
        [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    )
    return int(held.max()), checkpoint.config.hidden_size


@pytest.mark.parametrize("costs", [ABLATION, FISHER])
def test_layers_add_their_hidden_states_alone(
    costs: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one, _ = peak_of_tensors(1, costs, tmp_path_factory)
    few, hidden_size = peak_of_tensors(2, costs, tmp_path_factory)
    many, _ = peak_of_tensors(8, costs, tmp_path_factory)
    state = ROWS * TOKENS * hidden_size * BYTES_FLOAT
    attention = ROWS * 4 * TOKENS * TOKENS * BYTES_FLOAT
    assert attention > 12 * state  # so that keeping it in one layer more would be seen
    assert few > 2 * attention  # one layer's logits and probabilities are there
    assert few - one < 2 * state  # and not those of the layer before it
    assert 5.5 * state < many - few < 7 * state


def test_the_whole_model_is_computed_from_two_numbers_of_layers() -> None:
    def run(num_layers: int) -> dict:
        peaks = {
            "load": 1e9 + num_layers * 1e8,
            "generate": 1.5e9 + num_layers * 2e8,
            "measure": 1.2e9 + num_layers * 1.5e8,
        }
        return {"num_layers": num_layers, "seconds": 3.0, "peaks": peaks}

    whole = of_all_layers([run(4), run(2)], 24)
    assert whole == pytest.approx({"load": 3.4e9, "generate": 6.3e9, "measure": 4.8e9})
    results = report({"janus-pro-1b": [run(2), run(4)]})
    assert results["figures"] == {"janus-pro-1b-gb": "6.30"}
    assert [row[1] for row in results["tables"][0]["rows"]] == [2, 4, "all 24, computed"]
