"""ssd-export eval: the scene score of a bundle, or of a model under a policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.errors import UserError

if TYPE_CHECKING:
    from ssd_export.metrics.scene_score import DrawOptions, Progress, SceneScore


@dataclass(frozen=True)
class EvalSpec:
    """What is scored: a bundle, or (bundle None) a model under a policy, exported for the
    occasion.
    """

    bundle: Path | None
    model: str
    policy: str | None
    budget: float
    head_map: str | None
    runner: str
    provider: str | None
    weights: str = "none"
    kv_dtype: str = "model"


@click.command()
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=(
        "The bundle to score.  [default: the one exported last from this folder, unless --model,"
        " --policy, --budget, --head-map, --weights or --kv-dtype says what to export for the"
        " occasion]"
    ),
)
@click.option(
    "--model", metavar="demo|DIR|HUB_ID", help="The checkpoint to export.  [default: demo]"
)
@click.option(
    "--policy", metavar="NAME", help="Its cache policy, as for export.  [default: the model's best]"
)
@click.option(
    "--budget",
    type=float,
    metavar="SHARE",
    help="Its share of the image-token slots.  [default: 0.2]",
)
@options.head_map
@click.option(
    "--weights", metavar="none|int8|int4", help="How its matrices are stored.  [default: none]"
)
@click.option(
    "--kv-dtype", metavar="model|int8", help="How its keys and values are stored.  [default: model]"
)
@click.option(
    "--num-prompts",
    type=int,
    default=300,
    show_default=True,
    metavar="COUNT",
    help="Captions, drawn evenly over the four categories from those unseen in training.",
)
@options.seed("Decides captions and pictures.")
@options.runner
@options.provider
@options.batch
@options.cfg_scale
@options.temperature
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every verdict.")
@click.option(
    "--sheet",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help=(
        "Write all pictures with their captions, wrong ones framed in red.  [default: not written]"
    ),
)
def command(
    bundle: Path | None,
    model: str | None,
    policy: str | None,
    budget: float | None,
    head_map: str | None,
    weights: str | None,
    kv_dtype: str | None,
    num_prompts: int,
    seed: int,
    runner: str,
    provider: str | None,
    batch: int | None,
    cfg_scale: float | None,
    temperature: float | None,
    as_json: bool,
    sheet: Path | None,
) -> None:
    """Score how often pictures show what their captions say.

    A rule-based checker judges every picture: ground, number, colour, shape, relation. Captions are
    unseen in the demo model's training; the score comes with a 95 % interval. A policy given
    instead of a bundle is exported to a temporary folder first.
    """
    asked = {
        "--model": model,
        "--policy": policy,
        "--budget": budget,
        "--head-map": head_map,
        "--weights": weights,
        "--kv-dtype": kv_dtype,
    }
    given = [name for name, value in asked.items() if value is not None]
    if bundle is not None and given:
        raise UserError(
            f"--bundle and {given[0]} exclude each other: a bundle has its model and policy;"
            " drop one"
        )
    _check_numbers(num_prompts, seed, batch, budget)
    if weights not in (None, "none", "int8", "int4"):
        raise UserError(f"unknown --weights {weights!r}; choose one of none, int8, int4")
    options.check_kv_dtype(kv_dtype or "model")
    if sheet is not None:
        from ssd_export.runtime.pictures import check_pictures

        check_pictures(sheet, 1)
    if bundle is None and not given:
        from ssd_export.bundle import resolve_bundle

        bundle = resolve_bundle(None)

    from ssd_export.metrics.scene_score import DrawOptions

    spec = EvalSpec(
        bundle,
        model or "demo",
        policy,
        0.2 if budget is None else budget,
        head_map,
        runner,
        provider,
        weights or "none",
        kv_dtype or "model",
    )
    score, facts = _score(
        spec, num_prompts, batch, DrawOptions(seed, cfg_scale=cfg_scale, temperature=temperature)
    )
    if sheet is not None:
        _write_sheet(sheet, score)
    if as_json:
        click.echo(json.dumps(facts | score.to_dict(), indent=1))
    else:
        _print_score(facts, score)


def _check_numbers(num_prompts: int, seed: int, batch: int | None, budget: float | None) -> None:
    if num_prompts < 1:
        raise UserError(f"--num-prompts {num_prompts} scores nothing; use 300")
    options.check_seed(seed)
    if batch is not None and batch < 1:
        raise UserError(f"--batch {batch} draws nothing; use 16")
    if budget is not None:
        options.check_budget(budget)


@contextmanager
def _bundle(spec: EvalSpec, progress: Progress) -> Iterator[Path]:
    if spec.bundle is not None:
        yield spec.bundle
        return
    from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle

    choice = PolicyChoice(
        spec.model,
        spec.policy,
        spec.budget,
        spec.head_map,
        weights=spec.weights,
        kv_dtype=spec.kv_dtype,
    )
    with temporary_bundle(choice, progress) as path:
        yield path


def _score(
    spec: EvalSpec, num_prompts: int, batch: int | None, drawing: DrawOptions
) -> tuple[SceneScore, dict[str, Any]]:
    """The score, and what it is the score of. batch None: as many pictures at once as suits the
    model.
    """
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.metrics.scene_score import draw_scenes, score_scenes
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.runtime.runners import find_runner
    from ssd_export.sweep.jobs import default_batch

    scenes = draw_scenes(num_prompts, drawing.seed)
    with ProgressReport() as progress, _bundle(spec, progress) as path:  # noqa: SIM117 - the path is made by the first
        with ImageGenerator.from_bundle(
            path, runner=spec.runner, provider=spec.provider
        ) as generator:
            drawing = replace(drawing, batch=batch or default_batch(generator.config))
            score = score_scenes(generator, scenes, drawing, progress)
            defaults = generator.bundle.config.generation
            facts = {
                "model": generator.bundle.config.model_name,
                "policy": generator.table.name,
                "budget": generator.table.budget,
                "image_slots_mean": generator.table.image_slots_mean,
                "bundle_hash": generator.bundle.hash,
                "dtype": generator.bundle.config.dtype,
                "precision": asdict(generator.bundle.config.precision),
                "kv_dtype": generator.table.kv_dtype,
                "runner": spec.runner,
                "provider": find_runner(spec.runner).provider(spec.provider),
                "num_prompts": num_prompts,
                "seed": drawing.seed,
                "batch": drawing.batch,
                "cfg_scale": (
                    defaults.cfg_scale if drawing.cfg_scale is None else drawing.cfg_scale
                ),
                "temperature": (
                    defaults.temperature if drawing.temperature is None else drawing.temperature
                ),
            }
    return score, facts


def _write_sheet(path: Path, score: SceneScore) -> None:
    from ssd_export.report.contact_sheet import Entry, captioned_sheet
    from ssd_export.runtime.pictures import write_png

    judged = zip(score.images, score.scenes, score.verdicts, strict=True)
    entries = [
        Entry(image, scene.caption, "; ".join(verdict.reasons)) for image, scene, verdict in judged
    ]
    write_png(path, captioned_sheet(entries), {})


def _print_score(facts: dict[str, Any], score: SceneScore) -> None:
    for name, share in [*score.by_category.items(), ("overall", score.overall)]:
        low, high = share.interval
        click.echo(
            f"{name:12} {100 * share.value:5.1f} %  ({100 * low:.1f} to {100 * high:.1f} %)  "
            f"{share.hits} of {share.total}"
        )
    click.echo(
        f"{facts['model']}, policy {facts['policy']}, budget {facts['budget']:g}, weights"
        f" {facts['precision']['weights']}, kv-dtype {facts['kv_dtype']}:"
        f" {score.seconds / len(score.images):.2f} s a picture in batches of {facts['batch']},"
        f" {score.ms_per_token:.3f} ms a token, cache {score.cache.bytes_per_image:,} bytes an"
        " image"
    )
