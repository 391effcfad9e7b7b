"""The window of lookahead that build-engine builds for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.errors import UserError
from ssd_export.plan.lookahead import OFF
from ssd_export.tensorrt.profiles import Profile, profiles_of
from ssd_export.tensorrt.target import Batch
from ssd_export.tensorrt.window_plan import USUAL, planned_window
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

SMALL = Batch(1, 1, 8)


def opened(policy: str, budget: float = 0.2, **changes: object) -> Bundle:
    model = checkpoint(TinyJanus(seed=3, num_kv_heads=2))
    return open_bundle(bundle(model, policy, budget, **changes))


def test_auto_follows_the_bundle() -> None:
    assert planned_window(None, opened("full", 1.0), SMALL) == (USUAL, "")
    assert planned_window(None, opened("h2o", 0.2, lookahead=8), SMALL) == (USUAL, "")
    window, why = planned_window(None, opened("h2o"), SMALL)
    assert window == 0 and "export it with --lookahead 16, or build with --lookahead 16" in why
    assert planned_window(OFF, opened("full", 1.0), SMALL) == (0, "--lookahead off")


def test_what_is_asked_for_is_built_or_refused() -> None:
    full = opened("full", 1.0)
    assert planned_window(24, opened("h2o"), SMALL) == (24, "")
    with pytest.raises(UserError, match=r"outside 2 \.\. .*; use 16"):
        planned_window(10**6, full, SMALL)
    with pytest.raises(UserError, match="up to 16 images at once; use --batch 1:32:64"):
        planned_window(8, full, Batch(32, 32, 64))
    graphs = {n: g for n, g in full.config.graphs.items() if not n.startswith("decode_window")}
    earlier = replace(full, config=replace(full.config, graphs=graphs))
    with pytest.raises(UserError, match="without the graph that lookahead needs; export it again"):
        planned_window(8, earlier, SMALL)


def test_a_pass_has_one_width_and_few_images() -> None:
    prompt = (64,) * 3
    assert profiles_of("decode_window", Batch(1, 32, 128), 64, 4, 16) == (
        Profile((1, 1, 1), prompt, 16),
        Profile((2, 16, 16), prompt, 16),
    )
    assert Profile((1, 1, 1), prompt, 16).sizes("window", 2) == (16, 16, 16)
