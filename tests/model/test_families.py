"""A second family is a file and a row: found by its config.json, named in every message."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.model import families
from ssd_export.model.config_file import ConfigFile
from ssd_export.model.families import FAMILIES, PUBLISHED, family_of, identify, published_shape
from ssd_export.model.families.family import Layout
from ssd_export.model.families.janus import JANUS

SHAPE = PUBLISHED["janus-pro-1b"]
LAYOUT = Layout(
    "published", "other_model", lambda stored: f"own.{stored}", lambda file, shapes: SHAPE
)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> families.Family:
    family = replace(JANUS, name="other", title="Other", layouts=(LAYOUT,), example="someone/other")
    monkeypatch.setitem(FAMILIES, family.name, family)
    return family


def config_file(kind: object) -> ConfigFile:
    return ConfigFile(Path("config.json"), {"model_type": kind})


def test_a_config_is_of_the_family_that_has_its_model_type(other: families.Family) -> None:
    assert identify(config_file("janus"))[0] is JANUS
    assert identify(config_file("multi_modality")) == (JANUS, JANUS.layouts[1])
    assert identify(config_file("other_model")) == (other, LAYOUT)
    for kind in ("llama", None, ["janus"], 3):
        with pytest.raises(
            UserError, match="not a Janus-Pro or .*Other checkpoint .*'other_model'.*someone/other"
        ):
            identify(config_file(kind))


def test_a_model_knows_its_family(other: families.Family) -> None:
    assert family_of(SHAPE) is JANUS and family_of(replace(SHAPE, family="other")) is other
    with pytest.raises(UserError, match="family 'emu', and this ssd-export knows janus, .*other"):
        family_of(replace(SHAPE, family="emu"))


def test_both_layouts_give_one_set_of_names() -> None:
    transformers, original = (layout.canonical_name for layout in JANUS.layouts)
    pairs = {
        "model.language_model.layers.3.mlp.up_proj.weight": (
            "language_model.model.layers.3.mlp.up_proj.weight"
        ),
        "model.generation_aligner.hidden_layers.0.bias": "gen_aligner.layers.2.bias",
        "model.generation_head.vision_head.weight": "gen_head.vision_head.weight",
        "model.vqmodel.decoder.up.1.block.0.conv1.weight": (
            "gen_vision_model.decoder.conv_blocks.1.res.0.conv1.weight"
        ),
    }
    for one, two in pairs.items():
        assert transformers(one) == original(two)


def test_published_shapes_are_the_families_own() -> None:
    assert published_shape("deepseek-community/Janus-Pro-1B") is JANUS.published["janus-pro-1b"]
    assert all(config.grid == Grid(24, 24) for config in JANUS.published.values())
    assert published_shape("someone/else") is None
