"""ssd-export eval: the scene score of a bundle, or of a model under a policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.errors import UserError
from ssd_export.extras import check_extras
from ssd_export.runtime.runners import find_runner
from ssd_export.typed_json import report_json

if TYPE_CHECKING:
    from ssd_export.metrics.scene_score import GenerateOptions, Progress, SceneScore
    from ssd_export.runtime.generate import ImageGenerator


EXPORT_OPTIONS = ("model", "policy", "budget", "head_map", "weights", "head_weights", "kv_dtype")


@dataclass(frozen=True)
class EvalSpec:
    """Options of eval: a bundle, or a model under a policy, exported to a temporary folder; None
    leaves an option to export's default.
    """

    bundle: Path | None
    model: str | None
    policy: str | None
    budget: float | None
    head_map: str | None
    weights: str | None
    head_weights: str | None
    kv_dtype: str | None
    num_prompts: int
    seed: int
    runner: str
    provider: str | None
    threads: int | None
    batch: int | None
    cfg_scale: float | None
    temperature: float | None
    sheet: Path | None

    @property
    def exports(self) -> dict[str, Any]:
        """The options that are given of an export for the occasion."""
        values = {name: getattr(self, name) for name in EXPORT_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}


@verb(
    options.bundle.but(
        help=(
            "The bundle to score.  [default: the one exported last from this folder, unless"
            " --model, --policy, --budget, --head-map, --weights, --head-weights or --kv-dtype"
            " says what to export for the occasion]"
        )
    ),
    options.model.but(default=None, help="The checkpoint to export.  [default: demo]"),
    options.policy,
    options.budget,
    options.head_map,
    options.weights.but(metavar="none|int8|int4"),
    options.head_weights.but(metavar="none|int8|int4"),
    options.kv_dtype,
    options.num_prompts,
    options.seed.but(help="Random seed of captions and images."),
    options.runner,
    options.provider,
    options.threads,
    options.batch,
    options.cfg_scale,
    options.temperature,
    options.as_json.but(help="Print one JSON object with every verdict."),
    option(
        "--sheet",
        type=options.FILE,
        metavar="FILE.png",
        help=(
            "Write all images with their captions, wrong ones framed in red.  [default: not"
            " written]"
        ),
    ),
)
def command(as_json: bool, **asked: Any) -> None:
    """Score how often images show what their captions say.

    A rule-based checker judges every image: ground, number, color, shape, relation. Captions are
    unseen in the demo model's training; the score comes with a 95 % interval. A policy given
    instead of a bundle is exported to a temporary folder first.
    """
    spec = EvalSpec(**asked)
    _check(spec)
    if spec.exports:
        check_extras(("export",))
    elif spec.bundle is None:
        from ssd_export.bundle import resolve_bundle

        spec = replace(spec, bundle=resolve_bundle(None))

    score, facts = _score(spec)
    if spec.sheet is not None:
        _write_sheet(spec.sheet, score)
    if as_json:
        click.echo(report_json(facts | score.to_dict()))
    else:
        _print_score(facts, score)


def _check(spec: EvalSpec) -> None:
    """Everything that can be refused before the work."""
    if spec.bundle is not None and spec.exports:
        name = next(iter(spec.exports)).replace("_", "-")
        raise UserError(
            f"--bundle and --{name} exclude each other: a bundle has its model and policy; drop one"
        )
    options.check_num_prompts(spec.num_prompts)
    options.check_seed(spec.seed)
    options.check_batch(spec.batch)
    options.check_runner(spec.runner, spec.provider, spec.threads)
    options.check_sampling(spec.cfg_scale, spec.temperature)
    if spec.budget is not None:
        options.check_budget(spec.budget)
    for name, format in (("--weights", spec.weights), ("--head-weights", spec.head_weights)):
        options.check_choice(name, format or "none", ("none", "int8", "int4"))
    options.check_kv_dtype(spec.kv_dtype or "model")
    if spec.sheet is not None:
        from ssd_export.runtime.images import check_images

        check_images(spec.sheet, 1)


@contextmanager
def _bundle(spec: EvalSpec, progress: Progress) -> Iterator[Path]:
    if spec.bundle is not None:
        yield spec.bundle
        return
    from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle

    choice = PolicyChoice(**{"model": "demo", "budget": 0.2, **spec.exports})
    with temporary_bundle(choice, progress) as path:
        yield path


def _score(spec: EvalSpec) -> tuple[SceneScore, dict[str, Any]]:
    """The score, and what it is the score of; without --batch, as many images at once as suits the
    model.
    """
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.demo.language import categories_of
    from ssd_export.metrics.scene_score import GenerateOptions, draw_scenes, score_scenes
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.runtime.small_models import default_batch

    with ProgressReport() as progress, _bundle(spec, progress) as path:  # noqa: SIM117 - the path is made by the first
        with ImageGenerator.from_bundle(
            path, spec.runner, spec.provider, spec.threads
        ) as generator:
            batch = spec.batch or default_batch(generator.config)
            generation = GenerateOptions(spec.seed, batch, spec.cfg_scale, spec.temperature)
            categories = categories_of(generator.config)
            scenes = draw_scenes(spec.num_prompts, spec.seed, categories=categories)
            score = score_scenes(generator, scenes, generation, progress)
            return score, _facts(spec, generator, generation)


def _facts(
    spec: EvalSpec, generator: ImageGenerator, generation: GenerateOptions
) -> dict[str, Any]:
    """The conditions under which the score was taken."""
    from ssd_export.runtime.prompt_batch import bundle_sampling

    config, table = generator.bundle.config, generator.table
    sampling = bundle_sampling(generator.bundle).changed(
        generation.cfg_scale, generation.temperature
    )
    return {
        "model": config.model_name,
        "policy": table.name,
        "budget": table.budget,
        "image_slots_mean": table.image_slots_mean,
        "bundle_hash": generator.bundle.hash,
        "dtype": config.dtype,
        "precision": asdict(config.precision),
        "kv_dtype": table.kv_dtype,
        "runner": spec.runner,
        "provider": find_runner(spec.runner).provider(spec.provider),
        "num_prompts": spec.num_prompts,
        "seed": generation.seed,
        "batch": generation.batch,
        "cfg_scale": sampling.cfg_scale,
        "temperature": sampling.temperature,
    }


def _write_sheet(path: Path, score: SceneScore) -> None:
    from ssd_export.report.contact_sheet import Entry, captioned_sheet
    from ssd_export.runtime.images import write_png

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
        f" {facts['precision']['weights']} (head {facts['precision']['head']}),"
        f" kv-dtype {facts['kv_dtype']}:"
        f" {score.seconds / len(score.images):.2f} s an image in batches of {facts['batch']},"
        f" {score.ms_per_token:.3f} ms a token, cache {score.cache.bytes_per_image:,} bytes an"
        " image"
    )
