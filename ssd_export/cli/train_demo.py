"""ssd-export train-demo: the demo model from nothing."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_export.errors import UserError


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-training"),
    show_default=True,
    metavar="DIR",
    help="Where states, log and the checkpoint go; an interrupted run there is resumed.",
)
@click.option(
    "--steps",
    type=int,
    default=5600,
    show_default=True,
    metavar="COUNT",
    help="Steps of the transformer.",
)
@click.option(
    "--decoder-steps",
    type=int,
    default=1500,
    show_default=True,
    metavar="COUNT",
    help="Steps of the image decoder.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and pictures.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda",
    help="Where the transformer is trained.",
)
def command(out: Path, steps: int, decoder_steps: int, seed: int, device: str) -> None:
    """Train the demo model: captioned scenes, image decoder, transformer. Hours on two cores,
    minutes on a GPU.
    """
    if min(steps, decoder_steps) < 1:
        raise UserError(f"--steps {steps} and --decoder-steps {decoder_steps} must be at least 1")
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.demo.recipe import train_demo
    from ssd_export.demo.train import Recipe
    from ssd_export.demo.train_decoder import DecoderRecipe

    with ProgressReport() as progress:
        outcome = train_demo(
            Recipe(steps, seed=seed), DecoderRecipe(decoder_steps, seed=seed), out, progress, device
        )
    click.echo(
        f"{out / 'checkpoint'}: loss {outcome.token_loss:.4f} per token, decoder off by"
        f" {outcome.decoder_levels:.2f} levels"
    )
