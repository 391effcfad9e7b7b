"""A whole calibration: generating, resuming, determinism, the head map it makes, and export with
it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssd_export.calibrate import calibration
from ssd_export.calibrate.attention_maps import chosen_tokens
from ssd_export.calibrate.calibration import (
    FISHER,
    Calibration,
    CalibrationSpec,
    CalibrationState,
    calibrate,
)
from ssd_export.calibrate.measure import HeadSums
from ssd_export.calibrate.neighborhood import Neighborhood
from ssd_export.calibrate.ranks import rank_correlation
from ssd_export.calibrate.sequences import FullCacheImages
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.model.families import prompt_encoder
from ssd_export.model.families.janus import GRID
from ssd_export.model.load import load_model
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.menu import scored, window
from ssd_export.sampling import Sampling
from ssd_export.version import TOOL_VERSION
from tests.janus_checkpoints import (
    TinyJanus,
    build_model,
    oracle_tokens,
    train_tokenizer,
    write_transformers_checkpoint,
)

pytestmark = pytest.mark.slow

TINY = TinyJanus(num_layers=2, num_heads=4, num_kv_heads=2, codebook_size=64)
SPEC = CalibrationSpec(
    ("a red circle", "two green triangles on white", "x"),
    3,
    Neighborhood(1, 48),
    5,
    Sampling(2.0, 1.0),
    32,
    (window(32), window(128), scored(64, GRID), scored(128, GRID), window(576)),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_transformers_checkpoint(tmp_path_factory.mktemp("tiny"), TINY))


@pytest.fixture(autouse=True)
def one_image_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BATCH", 1)


def run(
    checkpoint: Checkpoint, state_file: Path, spec: CalibrationSpec = SPEC, **options: object
) -> Calibration:
    values = {"threshold": 0.7, "tool_version": TOOL_VERSION, **options}
    return calibrate(checkpoint, load_model(checkpoint), spec, state_file, **values)


@pytest.fixture(scope="module")
def finished(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "BATCH", 1)
        return run(checkpoint, tmp_path_factory.mktemp("run") / "state")


def test_generates_what_transformers_generates(checkpoint: Checkpoint) -> None:
    """Prompts of different length in one batch, greedy."""
    prompts = ["a red circle", "two green triangles beside the yellow star on white"]
    encoder = prompt_encoder(checkpoint.config, checkpoint.file)
    images = FullCacheImages(load_model(checkpoint), encoder, 64)
    tokens = images(images.batches(prompts, Sampling(2.0, 0.0), seed=0))
    wanted, gap = oracle_tokens(build_model(TINY), train_tokenizer(), prompts, cfg_scale=2.0)
    assert gap > 1e-4
    np.testing.assert_array_equal(tokens, wanted.numpy())


def test_the_head_map_is_whole_and_says_where_it_came_from(
    finished: Calibration, checkpoint: Checkpoint
) -> None:
    head_map = finished.head_map
    assert head_map.for_model(checkpoint.config, checkpoint.fingerprint()) is head_map
    assert (
        head_map.neighborhood == "1d:48"
        and head_map.threshold == 0.7
        and head_map.cost_options == SPEC.options
    )
    assert head_map.prompts_hash == SPEC.prompts_hash and head_map.tool_version == TOOL_VERSION
    assert head_map.statistics["num_images"] == 3 and head_map.statistics["prompt_slots"] == 32
    columns = np.array(head_map.statistics["column_share"])
    assert columns.shape == (2, 4, 24) and np.allclose(columns.sum(axis=-1), 1, atol=1e-3)
    costs = np.array(head_map.costs)
    assert (
        costs.shape == (2, 2, 5)
        and (costs[..., 0] > costs[..., 1]).all()
        and not costs[..., 4].any()
    )
    assert finished.stability is not None and finished.first_image.shape == (576,)


def test_stability_is_spearman_s_correlation_of_the_halves(checkpoint: Checkpoint) -> None:
    rng, config = np.random.default_rng(5), checkpoint.config
    sums = HeadSums.zero(config, 1)
    sums.num_images[:] = 3, 2
    sums.metric[:] = rng.random((2, config.num_layers, config.num_heads))
    ranks = sums.metric.reshape(2, -1).argsort(axis=1).argsort(axis=1)
    count = ranks.shape[1]
    wanted = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (count * (count**2 - 1))
    assert calibration.stability_of(sums) == pytest.approx(wanted)
    sums.metric[1] = 10 - sums.metric[0]
    assert calibration.stability_of(sums) == pytest.approx(-1)
    sums.num_images[1] = 0
    assert calibration.stability_of(sums) is None


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    checkpoint: Checkpoint, finished: Calibration, tmp_path: Path
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total * 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "state", progress=interrupt)
    told: list[tuple[int, int]] = []
    again = run(
        checkpoint,
        tmp_path / "state",
        progress=lambda stage, done, total: told.append((done, total)),
    )
    assert (
        again.num_resumed == 2 and told[0][0] * 3 == 2 * told[0][1] and told[-1][0] == told[-1][1]
    )
    assert again.head_map == finished.head_map
    np.testing.assert_array_equal(again.first_image, finished.first_image)


def test_only_the_same_run_is_resumed(
    checkpoint: Checkpoint, finished: Calibration, tmp_path: Path
) -> None:
    fingerprint = checkpoint.fingerprint()
    others = [
        replace(SPEC, seed=6),
        replace(SPEC, num_images=4),
        replace(SPEC, prompts=SPEC.prompts[:2]),
        replace(SPEC, neighborhood=Neighborhood(2, 1)),
        replace(SPEC, prompt_slots=40),
        replace(SPEC, options=SPEC.options[1:]),
        replace(SPEC, costs=FISHER),
        replace(SPEC, sampling=Sampling(3.0, 1.0)),
    ]
    identities = {spec.identity(fingerprint) for spec in (SPEC, *others)}
    assert len(identities) == 1 + len(others) and SPEC.identity("other") not in identities
    for content in (b"", b"damaged", b"PK\x03\x04"):
        (tmp_path / "state").write_bytes(content)
        assert CalibrationState.load(tmp_path / "state", SPEC.identity(fingerprint)) is None
    assert CalibrationState.load(tmp_path / "absent", SPEC.identity(fingerprint)) is None


def test_an_image_does_not_depend_on_how_many_there_are(
    checkpoint: Checkpoint, finished: Calibration, tmp_path: Path
) -> None:
    one = run(checkpoint, tmp_path / "state", replace(SPEC, num_images=1))
    np.testing.assert_array_equal(one.first_image, finished.first_image)
    assert one.stability is None


def test_prompts_and_places_that_will_not_do(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shorten it"):
        run(checkpoint, tmp_path / "state", replace(SPEC, prompts=("a red circle " * 20,)))
    with pytest.raises(UserError, match="choose another --out"):
        run(checkpoint, tmp_path / "no" / "state", replace(SPEC, num_images=1))


def test_rank_correlation() -> None:
    a = np.array([[1.0, 2.0], [3.0, 9.0]])
    assert rank_correlation(a, a**3) == pytest.approx(1) and rank_correlation(
        a, -a
    ) == pytest.approx(-1)
    assert rank_correlation(np.array([1, 1, 2.0]), np.array([1, 2, 3.0])) == pytest.approx(
        0.8660254
    )
    assert np.isnan(rank_correlation(a, np.ones((2, 2))))


def test_the_map_survives_its_file(finished: Calibration, tmp_path: Path) -> None:
    finished.head_map.save(tmp_path / "map.json")
    assert HeadMap.load(tmp_path / "map.json") == finished.head_map


def test_without_guidance_the_unconditional_row_counts_for_nothing(
    checkpoint: Checkpoint, finished: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    add = calibration.add_image
    monkeypatch.setattr(
        calibration,
        "add_image",
        lambda sums, model, ids, *rest: (lengths.append(len(ids)), add(sums, model, ids, *rest)),
    )
    for cfg_scale in (1.0, 2.0):
        run(
            checkpoint,
            tmp_path / "state",
            replace(SPEC, num_images=1, sampling=Sampling(cfg_scale, 1.0)),
        )
    assert lengths == [1, 2]


def test_the_plots_show_tokens_with_contrast_around_them() -> None:
    image = np.full((96, 96, 3), 200, np.uint8)
    image[30:34, 42:46] = 0  # grid row 7 or 8, column 10 or 11: in the upper part alone
    (token,) = chosen_tokens(image, GRID)
    assert token // 24 in (7, 8) and token % 24 in (10, 11)
    image[82:86, 22:26] = 90
    assert [query // 24 // 6 for query in chosen_tokens(image, GRID)] == [1, 3]
