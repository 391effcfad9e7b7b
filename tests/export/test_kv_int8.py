"""A bundle whose cache is int8: torch and ONNX Runtime agree, the policy is what it was, and the
bytes are counted.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ssd_export.bundle import open_bundle
from ssd_export.bundle.graphs import head_groups
from ssd_export.errors import UserError
from ssd_export.graph_spec import CacheTensor
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.verify.spec import VerifySpec
from ssd_export.verify.verify import verify
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint, export_spec, head_map_file

pytestmark = pytest.mark.slow

TINY = TinyJanus(seed=3, num_kv_heads=2)


def bundle_of(policy: str = "ssd-row", **changes: object) -> Path:
    model = checkpoint(TINY)
    return bundle(
        model,
        policy,
        1.0 if policy == "full" else 0.2,
        head_map=str(head_map_file(model)),
        **changes,
    )


def generate(path: Path, runner: str) -> tuple[np.ndarray, ImageGenerator]:
    generator = ImageGenerator.from_bundle(path, runner=runner, num_threads=1)
    return generator(PROMPTS[:2], seed=7).tokens, generator


@pytest.mark.parametrize("policy", ["full", "ssd-row", "h2o", "linear"])
def test_verify_climbs_to_the_image(policy: str) -> None:
    """Every rung: attention functions, caches, logits and slots of all steps, tokens, pixels."""
    report = verify(VerifySpec(bundle_of(policy, kv_dtype="int8"), against="torch"))
    assert report["ok"], json.dumps(report["rungs"][-1])
    assert report["not_run"] == []


def test_slots_hold_what_the_policy_says() -> None:
    """The window groups rank by position alone: their slots are those of a float cache."""
    positions = []
    for kv_dtype in ("model", "int8"):
        _, generator = generate(bundle_of(kv_dtype=kv_dtype), "ort")
        positions.append(
            {
                (layer, index): generator.runner.read_cache(CacheTensor(layer, index, "position"))
                for layer, index, group in head_groups(generator.table)
                if not group.rule.by_score
            }
        )
    assert positions[0], "no group ranks by position"
    for place, position in positions[0].items():
        np.testing.assert_array_equal(position, positions[1][place])


@pytest.mark.parametrize("runner", ["ort", "torch"])
def test_bytes_are_counted_with_their_scales(runner: str) -> None:
    _, generator = generate(bundle_of(kv_dtype="int8"), runner)
    config = generator.config
    wanted = 0
    for _, _, group in head_groups(generator.table):
        row = config.head_dim + 4  # codes, and a float32 scale
        wanted += 4 * group.num_heads * group.num_slots * (2 * row + 4 + 4 * group.rule.by_score)
    assert generator.runner.cache_bytes() == generator.cache.bytes == wanted
    whole = generator.table.full_image_cache_bytes(config, 4, 2)
    assert generator.cache.full_image_bytes_per_image == whole, (
        "the saving is measured by a full cache in the model's dtype"
    )


def test_half_precision_models_take_it_too() -> None:
    path = bundle_of(kv_dtype="int8", dtype="fp16")
    tokens = [generate(path, runner)[0] for runner in ("ort", "torch")]
    assert all(len(np.unique(generated)) > 8 for generated in tokens)


def test_int8_weights_and_cache_go_together() -> None:
    report = verify(
        VerifySpec(bundle_of(kv_dtype="int8", weights="int8"), against="torch", level="logits")
    )
    assert report["ok"], json.dumps(report["rungs"][-1])


def test_a_bundle_says_what_its_cache_is() -> None:
    opened = open_bundle(bundle_of(kv_dtype="int8"))
    table = opened.config.policy
    assert table.kv_dtype == "int8"
    dtypes = {
        cache.kind: tensor.dtype
        for cache, tensor in opened.config.graphs["decode_step"].cache_inputs.items()
    }
    assert dtypes == {
        "key": "int8",
        "value": "int8",
        "key_scale": "float32",
        "value_scale": "float32",
        "position": "int32",
        "score": "float32",
    }
    config = opened.config.model
    plain = open_bundle(bundle_of()).config.policy
    assert table.cache_bytes(config, 4, 2) < plain.cache_bytes(config, 4, 2)


def test_an_unknown_kv_dtype_is_refused() -> None:
    from ssd_export.export.exporter import export_bundle

    with pytest.raises(UserError, match="unknown --kv-dtype 'int2'; choose one of model, int8"):
        export_bundle(export_spec(checkpoint(TINY), kv_dtype="int2"))
