"""The host draws what the graphs and torch draw, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssd_export.runtime import draw, torch_runner
from ssd_export.runtime.prompt_batch import sampling_inputs
from ssd_export.sampling import Sampling

WAYS = (
    Sampling(),
    Sampling(cfg_scale=3, temperature=0.7),
    Sampling(temperature=0),
    Sampling(top_k=1),
    Sampling(top_k=5),
    Sampling(top_k=64),
    Sampling(top_k=1000),
)


@pytest.mark.parametrize("rows_per_image", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_as_torch_draws(rows_per_image: int, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    rows = rows_per_image * len(WAYS)
    logits = numbers.normal(size=(rows, 64)).astype(np.float32).round(1)  # some are equal
    noise = numbers.gumbel(size=(len(WAYS), 64)).astype(np.float32)
    inputs = sampling_inputs(WAYS)
    wanted = torch_runner.draw_tokens(
        torch.from_numpy(logits),
        torch.from_numpy(noise),
        **{name: torch.from_numpy(values) for name, values in inputs.items()},
    )
    found = draw.draw_tokens(logits, noise, inputs)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted.numpy())
