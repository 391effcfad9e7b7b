"""The contract rung: ssd-auto's heads are served as the head map's costs say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssd_export.bundle import open_bundle
from ssd_export.export.exporter import export_bundle
from ssd_export.export.temporary_bundle import PolicyChoice
from ssd_export.model.families.janus import GRID
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.menu import scored, window
from ssd_export.verify.contract import check_contract

MENU = (
    scored(48, GRID),
    window(64),
    window(128),
    scored(64, GRID),
    scored(128, GRID),
    window(GRID.num_tokens),
)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    plain = HeadMap.load(checkpoint / "head_map.json")
    falling = np.array([9.0, 6.0, 4.0, 5.0, 3.0, 0.0])
    scale = 10.0 ** -np.arange(plain.num_layers * plain.num_kv_heads).reshape(
        plain.num_layers, plain.num_kv_heads, 1
    )
    costs = tuple(tuple(map(tuple, layer)) for layer in (scale * falling).tolist())
    replace(plain, cost_options=MENU, costs=costs).save(folder / "map.json")
    return export_bundle(
        PolicyChoice(str(checkpoint), "ssd-auto", 0.1, str(folder / "map.json")).export_spec(
            folder / "b"
        )
    )


def changed(
    bundle: Path,
    to: Path,
    change: Callable[[HeadMap], HeadMap],
    manifest_rewriter: Callable[[Path], None],
) -> Path:
    shutil.copytree(bundle, to)
    change(HeadMap.load(to / "head_map.json")).save(to / "head_map.json")
    manifest_rewriter(to)
    return to


def test_what_export_allocated_is_what_the_map_says(bundle: Path) -> None:
    rung = check_contract(open_bundle(bundle))
    assert rung.ok and rung.figures["head_map"]


def test_what_export_allocated_for_lookahead_is_what_the_map_says(
    checkpoint: Path,
    bundle: Path,
    tmp_path: Path,
    manifest_rewriter: Callable[[Path], None],
) -> None:
    choice = PolicyChoice(
        str(checkpoint), "ssd-auto", 0.2, str(bundle / "head_map.json"), lookahead=16
    )
    path = export_bundle(choice.export_spec(tmp_path / "b"))
    made = open_bundle(path)
    assert made.config.policy.lookahead == 16
    assert check_contract(made).ok
    other = changed(
        path,
        tmp_path / "other",
        lambda m: replace(m, cost_options=(*m.cost_options[:4], scored(96, GRID), MENU[-1])),
        manifest_rewriter,
    )
    rung = check_contract(open_bundle(other))
    assert not rung.ok and "no option of 128" in rung.to_dict()["first_divergence"]["what"]


@pytest.mark.parametrize(
    "change, what",
    [
        (
            lambda m: replace(m, costs=tuple(layer[::-1] for layer in m.costs[::-1])),
            "the heads' options cost",
        ),
        (
            lambda m: replace(m, cost_options=(scored(49, GRID), *m.cost_options[1:])),
            "no option of 48 image slots",
        ),
        (lambda m: replace(m, cost_options=(), costs=()), "has no costs"),
    ],
    ids=["costs of other heads", "another menu", "no costs"],
)
def test_a_map_that_says_something_else(
    bundle: Path,
    tmp_path: Path,
    manifest_rewriter: Callable[[Path], None],
    change: Callable[[HeadMap], HeadMap],
    what: str,
) -> None:
    rung = check_contract(open_bundle(changed(bundle, tmp_path / "b", change, manifest_rewriter)))
    assert not rung.ok and what in rung.to_dict()["first_divergence"]["what"]
