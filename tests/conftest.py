"""What every test may rely on: property tests that choose the same examples each time, and caches
of this run alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.scene_bundles"]

ROOT = Path(__file__).parents[1]
# Files of about half a minute and more on one core, the longest first. A worker takes a file at a
# time: one of these at the end would run while the others have nothing left. The first two of
# tests/engines compile, which the others there wait for: they stand apart.
LONGEST = (
    "tests/docs/test_snippets.py",
    "tests/engines/test_generate.py",
    "tests/kernels/test_layer_attention.py",
    "tests/kernels/test_window_attention.py",
    "tests/engines/test_refusals.py",
    "tests/plugins/test_launcher.py",
    "tests/prompt_files/test_on_ray.py",
    "tests/test_packaging.py",
    "tests/demo/test_recipe.py",
    "tests/sweep/test_sweep.py",
    "tests/engines/test_tensorrt.py",
    "tests/engines/test_trt_lookahead.py",
    "tests/plan/test_against_measurement.py",
    "tests/interruption/test_places.py",
    "tests/model/test_hub.py",
    "tests/runtime/test_torch_runner.py",
    "tests/interruption/test_moments.py",
    "tests/kernels/test_compile.py",
    "tests/tensorrt/test_runner.py",
    "tests/model/test_transformers_parity.py",
    "tests/cli/test_eval.py",
    "tests/serve/test_server.py",
    "tests/engines/test_package.py",
    "tests/engines/test_misuse.py",
)

# The same examples on every run, however slow the machine is, and no database of them in the
# working folder.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m serial` imports the files of such tests alone: all of them take half a minute."""
    if config.option.markexpr == "serial" and collection_path.suffix == ".py":
        return "mark.serial" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others as they stand."""
    place = {ROOT / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for this process of the run: what the package remembers between runs, no test
    reads or leaves.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
