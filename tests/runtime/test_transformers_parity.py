"""The exported graphs in ONNX Runtime generate transformers' own tokens: full cache, fp32, greedy,
576 of 576.
"""

from __future__ import annotations

import numpy as np
import pytest

from ssd_export.runtime.generate import ImageGenerator
from tests.janus_checkpoints import TinyJanus, build_model, oracle_tokens, train_tokenizer
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint

pytestmark = pytest.mark.slow

# These weights are large: torch in float32 is up to 3e-5 x cfg_scale away from float64 in the
# guided logits, so a smaller difference between the two likeliest tokens may fall either way.
GAP = 5e-5

MATRIX = [
    (TinyJanus(seed=3), "transformers", False, 5.0),
    (TinyJanus(seed=3), "original", False, 2.0),
    (TinyJanus(seed=4, num_layers=3), "transformers", True, 2.0),
    (TinyJanus(seed=21, num_layers=3), "original", True, 5.0),
    (TinyJanus(seed=20, num_layers=4), "transformers", False, 5.0),
    (TinyJanus(seed=6, num_layers=4, num_kv_heads=2), "original", False, 5.0),
    (TinyJanus(seed=7, num_kv_heads=2), "transformers", False, 2.0),
    (TinyJanus(seed=8, num_kv_heads=1), "original", True, 2.0),
    (TinyJanus(seed=9, num_heads=6, num_kv_heads=3, hidden_size=96), "transformers", False, 5.0),
    (TinyJanus(seed=10, num_layers=3, role_tokens_added=False), "transformers", False, 2.0),
    (TinyJanus(seed=11, channel_multipliers=(1, 2), rope_theta=5000.0), "original", False, 5.0),
    (
        TinyJanus(seed=20, head_dim=32, num_heads=2, num_kv_heads=2, codebook_size=300),
        "transformers",
        False,
        2.0,
    ),
]


@pytest.mark.parametrize(("tiny", "layout", "sharded", "cfg_scale"), MATRIX)
def test_greedy_tokens_equal_transformers(
    tiny: TinyJanus, layout: str, sharded: bool, cfg_scale: float
) -> None:
    tokenizer = train_tokenizer(tiny.role_tokens_added)
    wanted, gap = oracle_tokens(build_model(tiny), tokenizer, PROMPTS, cfg_scale)
    path = bundle(checkpoint(tiny, layout, sharded), "full", 1.0)
    with ImageGenerator.from_bundle(path) as generator:
        generated = generator(PROMPTS, num_images=3, cfg_scale=cfg_scale, temperature=0).tokens
    assert gap > GAP * cfg_scale, (
        f"the two likeliest tokens differ by {gap}: choose another seed, this one proves nothing"
    )
    assert len(np.unique(wanted)) > 24, "too few different tokens to prove anything"
    np.testing.assert_array_equal(generated, np.repeat(np.asarray(wanted), 3, axis=0))
