"""ssd-export train-demo: the demo model from nothing."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.files import make_folder
from ssd_export.runtime.runners import check_threads
from ssd_export.sampling import as_count


@verb(
    options.out.but(
        default=Path("demo-training"),
        help="Folder for states, log and checkpoint; an interrupted run there is resumed.",
    ),
    option(
        "--classes",
        is_flag=True,
        help="The class-conditional demo model, with the image decoder of the other one.",
    ),
    option(
        "--steps",
        type=int,
        metavar="COUNT",
        help="Steps of the transformer.  [default: 5600; with --classes 8000]",
    ),
    option(
        "--decoder-steps",
        type=int,
        default=1500,
        metavar="COUNT",
        help="Steps of the image decoder.",
    ),
    options.seed.but(help="Random seed of weights and images."),
    option(
        "--device",
        default="cpu",
        metavar="cpu|cuda",
        help="Where the transformer is trained.",
    ),
    options.threads.but(help="CPU threads.  [default: all that this process may use]"),
    needs=("export",),
)
def command(
    out: Path,
    classes: bool,
    steps: int | None,
    decoder_steps: int,
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Train the demo model: captioned scenes, image decoder, transformer. Hours on two cores,
    minutes on a GPU.
    """
    steps = (8000 if classes else 5600) if steps is None else steps
    as_count(steps, "--steps", way_out="use 5600")
    as_count(decoder_steps, "--decoder-steps", way_out="use 1500")
    options.check_seed(seed)
    options.check_choice("--device", device, ("cpu", "cuda"))
    make_folder(out)
    check_threads(threads, "--threads")
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.demo.recipe import train_class_demo, train_demo
    from ssd_export.demo.train import Recipe, class_recipe
    from ssd_export.demo.train_decoder import DecoderRecipe
    from ssd_export.model.torch_threads import set_torch_threads

    set_torch_threads(threads)

    if classes:
        with ProgressReport() as progress:
            token = train_class_demo(class_recipe(steps, seed), out, progress, device).token_loss
        click.echo(f"{out / 'checkpoint'}: loss {token:.4f} per token")
        return
    with ProgressReport() as progress:
        outcome = train_demo(
            Recipe(steps, seed=seed), DecoderRecipe(decoder_steps, seed=seed), out, progress, device
        )
    click.echo(
        f"{out / 'checkpoint'}: loss {outcome.token_loss:.4f} per token, decoder off by"
        f" {outcome.decoder_levels:.2f} levels"
    )
