"""ssd-export calibrate: measures every head of a checkpoint and writes its head map."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.config import ONLINE_TAU, TAU
from ssd_export.errors import UserError
from ssd_export.runtime.runners import check_threads
from ssd_export.sampling import MAX_IMAGES, as_count

if TYPE_CHECKING:
    from ssd_export.calibrate.calibration import Calibration, CalibrationSpec
    from ssd_export.calibrate.neighborhood import Neighborhood
    from ssd_export.calibrate.online import Agreement, AgreementOfImages
    from ssd_export.calibrate.sequences import ImagesSpec
    from ssd_export.config import ModelConfig
    from ssd_export.model.checkpoint import Checkpoint
    from ssd_export.model.decoder import ImageTokenModel
    from ssd_export.model.prompt import Prompt
    from ssd_export.policy.head_map import HeadMap

DEMO_PROMPTS = 64


@dataclass(frozen=True)
class CalibrateSpec:
    """Options of calibrate; tau or semantic_share decides which heads are semantic."""

    model: str
    prompts: Path | None
    prompt_embeds: Path | None
    num_images: int
    neighborhood: str | None
    tau: float | None
    semantic_share: float | None
    seed: int
    prompt_slots: int | None
    lora: Path | None
    prompt_template: str | None
    costs: str | None
    threads: int | None
    out: Path
    plot: Path | None
    compare: str | None
    online: bool

    @property
    def threshold(self) -> float:
        """The metric above which a head is semantic, where --tau decides."""
        usual = ONLINE_TAU if self.online else TAU
        return usual if self.tau is None else self.tau


@verb(
    options.model,
    options.lora,
    options.prompt_template,
    option(
        "--prompts",
        type=options.FILE,
        metavar="FILE",
        help=(
            "Prompts to generate: UTF-8 text, one a line.  [default: a varied list; for the "
            "demo, its own scenes]"
        ),
    ),
    options.prompt_embeds,
    options.num_images.but(default=16, help="Images to measure on; prompts are used in turn."),
    option(
        "--neighborhood",
        metavar="1d:TOKENS|2d:RADIUS",
        help=(
            "What counts as near: the last TOKENS image tokens, or RADIUS grid rows and columns"
            " around.  [default: the tokens of two grid rows]"
        ),
    ),
    option(
        "--tau",
        type=float,
        metavar="SHARE",
        help=(
            "A head is semantic if more than this share of its attention is outside the"
            f" neighborhood.  [default: {TAU}; with --online {ONLINE_TAU}]"
        ),
    ),
    option(
        "--semantic-share",
        type=float,
        metavar="SHARE",
        help="Share of the heads to call semantic, in place of --tau.  [default: not used]",
    ),
    options.seed,
    options.prompt_slots,
    option(
        "--costs",
        type=click.Choice(["ablation", "fisher"]),
        help=(
            "Measures what each cache option costs a head: ablation tries every option, "
            "fisher estimates from one gradient an image, in minutes where trying takes "
            "hours.  [default: ablation up to 500 million parameters, fisher above]"
        ),
    ),
    options.threads.but(help="CPU threads.  [default: all that this process may use]"),
    options.out.but(
        default=Path("head_map.json"),
        metavar="FILE.json",
        help="The head map. Export finds head_map.json in the checkpoint's folder by itself.",
    ),
    option(
        "--plot",
        type=options.FILE,
        metavar="FILE.png",
        help=(
            "Plot the map, with the attention of two heads and on grid columns beside it.  "
            "[default: not plotted]"
        ),
    ),
    option(
        "--compare",
        metavar="janus-pro-1b|FILE",
        help=(
            "Report how well the metric agrees with another head map of this model.  "
            "[default: no comparison]"
        ),
    ),
    option(
        "--online",
        is_flag=True,
        help=(
            "Type the heads from the first 100 tokens of one image, without costs, as HeadKV does"
            " (arXiv 2605.20600); the other images show how far images agree. Compares with"
            " --compare, else with the model's own head map."
        ),
    ),
    needs=("export",),
)
def command(**asked: Any) -> None:
    """Measure the attention heads of a checkpoint.

    Generates images with the full cache and writes a head map: how far each head looks beyond its
    neighborhood, and what each way of serving it from fewer slots costs. `export --policy ssd-auto`
    allocates any budget by it. An interrupted run continues when it is started again.
    """
    spec = CalibrateSpec(**asked)
    _check_numbers(spec)
    _check_places(spec)
    if spec.online:
        _type_online(spec)
    else:
        _calibrate(spec)


def _check_numbers(spec: CalibrateSpec) -> None:
    if spec.tau is not None and spec.semantic_share is not None:
        raise UserError("--tau and --semantic-share decide the same thing; give one of them")
    as_count(spec.num_images, "--num-images", way_out="use 16", most=MAX_IMAGES)
    for given, name in ((spec.costs, "--costs"), (spec.plot, "--plot")):
        if spec.online and given is not None:
            raise UserError(f"--online measures types alone, of unfinished images; drop {name}")
    if not 0 <= spec.threshold <= 1:  # NaN is not, either
        raise UserError(f"--tau {spec.threshold:g} is outside [0, 1]; use {TAU}")
    if spec.semantic_share is not None and not 0 <= spec.semantic_share <= 1:
        raise UserError(
            f"--semantic-share {spec.semantic_share:g} is outside [0, 1]; use 0.5 for half of the"
            " heads"
        )
    if spec.prompts is not None and spec.prompt_embeds is not None:
        raise UserError("--prompts and --prompt-embeds say the same thing; give one of them")
    options.check_seed(spec.seed)
    check_threads(spec.threads, "--threads")
    options.check_prompt_slots(spec.prompt_slots)


def _check_places(spec: CalibrateSpec) -> None:
    """Everything that will be written can be: found out before the work."""
    from ssd_export.files import check_file

    check_file(spec.out)
    check_file(_state_file(spec))
    if spec.plot is not None:
        if spec.plot.suffix.lower() != ".png":
            raise UserError(
                f"--plot {spec.plot} does not end in .png; use {spec.plot.with_suffix('.png')}"
            )
        check_file(spec.plot)


def _state_file(spec: CalibrateSpec) -> Path:
    """The file from which an interrupted run goes on."""
    return spec.out.with_name(spec.out.name + ".partial")


def _images_spec(spec: CalibrateSpec) -> tuple[Checkpoint, ImagesSpec]:
    """The checkpoint, opened, and the images of it that are asked for."""
    from ssd_export.calibrate.sequences import ImagesSpec
    from ssd_export.export.exporter import generation_defaults
    from ssd_export.model.checkpoint import open_checkpoint
    from ssd_export.model.families import prompt_slots_of
    from ssd_export.model.find import model_folder
    from ssd_export.sampling import Sampling

    _, folder = model_folder(spec.model)
    checkpoint = open_checkpoint(folder, spec.lora, spec.prompt_template)
    defaults = generation_defaults(checkpoint)
    images = ImagesSpec(
        prompts=_prompts(spec, checkpoint.config),
        num_images=spec.num_images,
        neighborhood=_neighborhood(spec, checkpoint.config),
        seed=spec.seed,
        sampling=Sampling(defaults.cfg_scale, defaults.temperature),
        prompt_slots=prompt_slots_of(checkpoint.config, spec.prompt_slots),
    )
    return checkpoint, images


def _calibrate(spec: CalibrateSpec) -> None:
    from ssd_export.calibrate.calibration import ABLATION, FISHER, CalibrationSpec, calibrate
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.model.load import is_small, load_model
    from ssd_export.model.torch_threads import set_torch_threads
    from ssd_export.policy.menu import menu
    from ssd_export.version import TOOL_VERSION

    set_torch_threads(spec.threads)
    checkpoint, images = _images_spec(spec)
    other = None if spec.compare is None else _other_map(spec.compare, checkpoint.config)
    model = load_model(checkpoint)
    what = CalibrationSpec(
        **vars(images),
        options=menu(checkpoint.config.grid),
        costs=spec.costs or (ABLATION if is_small(model) else FISHER),
    )
    began = time.perf_counter()
    state_file = _state_file(spec)
    with ProgressReport() as progress:
        done = calibrate(
            checkpoint,
            model,
            what,
            state_file,
            threshold=spec.threshold,
            tool_version=TOOL_VERSION,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    head_map = done.head_map
    if spec.semantic_share is not None:
        head_map = head_map.with_semantic_share(spec.semantic_share)
    head_map.save(spec.out)
    for line in _summary(spec, head_map, done, seconds):
        click.echo(line)
    if other is not None:
        click.echo(_comparison(head_map, other, spec.compare or ""))
    for line in _predictions(head_map, checkpoint.config, what.prompt_slots):
        click.echo(line)
    if spec.plot is not None:
        _plot(spec.plot, checkpoint, model, head_map, what, done)
    state_file.unlink(missing_ok=True)


def _type_online(spec: CalibrateSpec) -> None:
    from ssd_export.calibrate.online import (
        Agreement,
        AgreementOfImages,
        type_online,
        with_agreement,
    )
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.model.load import load_model
    from ssd_export.model.torch_threads import set_torch_threads
    from ssd_export.version import TOOL_VERSION

    set_torch_threads(spec.threads)
    checkpoint, what = _images_spec(spec)
    config = checkpoint.config
    other = _other_map(spec.compare, config) if spec.compare else checkpoint.head_map(None)
    began = time.perf_counter()
    with ProgressReport() as progress:
        maps = type_online(
            checkpoint,
            load_model(checkpoint),
            what,
            threshold=spec.threshold,
            tool_version=TOOL_VERSION,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    if spec.semantic_share is not None:
        maps = [each.with_semantic_share(spec.semantic_share) for each in maps]
    offline = None if other is None else Agreement.of(maps[0], other)
    images = AgreementOfImages.of(maps)
    with_agreement(maps[0], what, offline, images).save(spec.out)
    name = spec.compare or "the model's own head map"
    for line in _online_summary(spec, maps[0], seconds, name, offline, images):
        click.echo(line)


def _online_summary(
    spec: CalibrateSpec,
    head_map: HeadMap,
    seconds: float,
    name: str,
    offline: Agreement | None,
    images: AgreementOfImages | None,
) -> list[str]:
    heads = head_map.num_layers * head_map.num_kv_heads
    return [
        _type_line(spec, head_map),
        f"{spec.num_images} images in {seconds:.1f} s; {head_map.provenance}, the first one's",
        (
            "against a map of many images: none to compare with; run `ssd-export calibrate`, then"
            " give --compare FILE"
            if offline is None
            else f"against {name}: the same type for {offline.same_type:.1%} of {heads} heads"
            f" ({offline.same_type_at_share:.1%} were as many semantic), rank correlation"
            f" {offline.rank_correlation:.3f}"
        ),
        (
            "between images: needs two images or more"
            if images is None
            else f"between {spec.num_images} images: the same type for {images.mean:.1%} of the"
            f" heads, mean of all pairs; {images.least:.1%} in the least alike;"
            f" {images.always_same:.1%} of the heads have one type in every image"
        ),
    ]


def _neighborhood(spec: CalibrateSpec, config: ModelConfig) -> Neighborhood:
    from ssd_export.calibrate.neighborhood import Neighborhood

    if spec.neighborhood is None:
        return Neighborhood.default(config.grid)
    return Neighborhood.parse(spec.neighborhood, config.grid)


def _type_line(spec: CalibrateSpec, head_map: HeadMap) -> str:
    heads = head_map.num_layers * head_map.num_kv_heads
    return (
        f"{spec.out}: {round(head_map.semantic_share * heads)} of {heads} heads semantic"
        f" ({head_map.semantic_share:.3f}) at tau {head_map.threshold:.3g}, neighborhood"
        f" {head_map.neighborhood}"
    )


def _prompts(spec: CalibrateSpec, config: ModelConfig) -> tuple[Prompt, ...]:
    from ssd_export.calibrate.prompts import VARIED, read_prompts
    from ssd_export.demo.language import categories_of, speaks_demo
    from ssd_export.model.families import family_of

    if spec.prompts is not None:
        return read_prompts(spec.prompts)
    if spec.prompt_embeds is not None:
        from ssd_export.model.prompt_embeds import read_prompt_embeds

        return tuple(read_prompt_embeds(spec.prompt_embeds))
    if not speaks_demo(config):
        family = family_of(config)
        if family.reads_text(config):
            return VARIED
        if not family.takes_classes(config):
            raise UserError(
                "this model reads captions as embeddings: write 24 or more with `ssd-export"
                " embed-prompts` and give --prompt-embeds FILE.safetensors"
            )
        return tuple(map(str, family.example_prompts(config, len(VARIED))))
    import numpy as np

    from ssd_export.demo.scenes import is_held_out, random_scene

    categories = categories_of(config)

    rng = np.random.default_rng(spec.seed)
    scenes = (
        random_scene(rng, categories[index % len(categories)]).caption
        for index in range(100 * DEMO_PROMPTS)
    )
    return tuple([caption for caption in scenes if not is_held_out(caption)][:DEMO_PROMPTS])


def _other_map(name: str, config: ModelConfig) -> HeadMap:
    from ssd_export.policy.head_map import BUILT_IN_DIRECTORY, HeadMap

    built_in = BUILT_IN_DIRECTORY / f"{name}.json"
    other = HeadMap.load(built_in if built_in.is_file() else name)
    shape, own = (other.num_layers, other.num_heads), (config.num_layers, config.num_heads)
    if shape != own:
        raise UserError(
            f"--compare {name} has {shape[0]} layers of {shape[1]} heads, the model {own[0]} of"
            f" {own[1]}; compare with a map of the same model"
        )
    return other


def _summary(
    spec: CalibrateSpec, head_map: HeadMap, done: Calibration, seconds: float
) -> list[str]:
    heads = head_map.num_layers * head_map.num_kv_heads
    semantic = round(head_map.semantic_share * heads)
    resumed = f" ({done.num_resumed} of them by an earlier run)" if done.num_resumed else ""
    lines = [
        _type_line(spec, head_map),
        (
            f"{spec.num_images} images{resumed} in {seconds:.1f} s, costs by"
            f" {head_map.statistics['costs']}"
        ),
    ]
    if semantic in (0, heads):
        lines.append(
            f"all heads are of one kind at tau {head_map.threshold:.3g}: use --semantic-share 0.5"
            " for half and half"
        )
    if done.stability is None:
        lines.append("stability: needs two prompts or more, and as many images")
    else:
        lines.append(
            f"stability: rank correlation {done.stability:.3f} of the metric between two disjoint"
            " sets of prompts"
        )
    return lines


def _comparison(head_map: HeadMap, other: HeadMap, name: str) -> str:
    import numpy as np

    from ssd_export.calibrate.ranks import rank_correlation

    agree = (
        np.asarray(head_map.metric) > head_map.threshold,
        np.asarray(other.metric) > other.threshold,
    )
    same, total = int((agree[0] == agree[1]).sum()), agree[0].size
    correlation = rank_correlation(np.asarray(head_map.metric), np.asarray(other.metric))
    return (
        f"against {name}: rank correlation {correlation:.3f}, the same type for {same} of {total}"
        " heads"
    )


def _predictions(head_map: HeadMap, config: ModelConfig, prompt_slots: int) -> list[str]:
    from ssd_export.cli.allocation_table import predicted_lines
    from ssd_export.policy.usual import usual_policy

    lines = []
    for budget in (0.1, 0.2):
        table = usual_policy(
            "ssd-auto", config, budget=budget, prompt_slots=prompt_slots, head_map=head_map
        )
        lines += [f"budget {budget}: {line}" for line in predicted_lines(head_map, config, table)]
    return lines


def _plot(
    path: Path,
    checkpoint: Checkpoint,
    model: ImageTokenModel,
    head_map: HeadMap,
    what: CalibrationSpec,
    done: Calibration,
) -> None:
    from ssd_export.calibrate.attention_maps import (
        chosen_tokens,
        head_attention,
        most_typical_heads,
    )
    from ssd_export.calibrate.plots import attention_plot, column_plot, heat_map, plot_paths
    from ssd_export.calibrate.sequences import FullCacheImages
    from ssd_export.model.families import prompt_encoder
    from ssd_export.model.load import load_image_decoder
    from ssd_export.model.prompt import text_of
    from ssd_export.runtime.torch_runner import decode_pixels

    image = decode_pixels(load_image_decoder(checkpoint), done.first_image[None])[0]
    encoder = prompt_encoder(checkpoint.config, checkpoint.file)
    images = FullCacheImages(model, encoder, what.prompt_slots)
    prompt = images.batches(what.prompts[:1], what.sampling, what.seed).embeds[0]
    heads, queries = most_typical_heads(head_map), chosen_tokens(image, checkpoint.config.grid)
    maps = head_attention(model, prompt, done.first_image, heads, queries)
    heat, attention, columns = plot_paths(path)
    heat_map(head_map, heat)
    attention_plot(head_map, image, maps, heads, queries, text_of(what.prompts[0]), attention)
    column_plot(head_map, columns)
    click.echo(f"plots: {heat}, {attention}, {columns}")
