"""Measures how a precision changes the distribution that tokens are sampled from, scene by scene.

Two bundles of one policy are given the tokens of true scenes, step by step in ONNX Runtime as
`generate` uses it: rounding of weights, of activations in the fast kernels and of the cache are all
in it. Compared is softmax(guided logits / temperature), which is what a token is drawn from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.bundle import open_bundle
from ssd_export.demo.codes import encode_scene
from ssd_export.demo.scenes import Scene
from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.metrics.intervals import Mean
from ssd_export.metrics.scene_score import draw_scenes
from ssd_export.report.environment import busy_note
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.prompt_batch import PromptBatches, bundle_sampling
from ssd_export.sweep.spec import SCENE_SEED

JSON = Path("docs/measurements/precision_divergence.json")
BATCH = 32  # scenes at once
PRECISIONS = {
    "fp32": "",
    "int8": "--weights int8",
    "int8, head kept": "--weights int8 --head-weights none",
    "int4": "--weights int4",
    "int4, head kept": "--weights int4 --head-weights none",
    "int4, head too": "--weights int4 --head-weights int4",
    "kv8": "--kv-dtype int8",
}
COLUMNS = ["precision", "KL, thousandths of a nat a token (95 %)", "of one scene, at most"]


def divergences(model: str, num_scenes: int) -> dict[str, np.ndarray]:
    """KL from fp32's sampling distribution of each scene in nats, for every other precision."""
    scenes = draw_scenes(num_scenes, SCENE_SEED)
    found = {}
    with temporary_bundle(PolicyChoice(model)) as reference:
        for name, options in PRECISIONS.items():
            if options:
                with temporary_bundle(PolicyChoice(model, **choice_of(options))) as bundle:
                    found[name] = divergence(reference, bundle, scenes)
    return found


def choice_of(options: str) -> dict[str, Any]:
    """Fields of a PolicyChoice of the command line's options."""
    words = options.split()
    return {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(words[::2], words[1::2], strict=True)
    }


def divergence(reference: Path, bundle: Path, scenes: Sequence[Scene]) -> np.ndarray:
    """Mean KL(reference || bundle) per image token of each scene in nats, float64 [N]."""
    parts = [scenes[start : start + BATCH] for start in range(0, len(scenes), BATCH)]
    return np.concatenate([_of_part(reference, bundle, part) for part in parts])


def _of_part(reference: Path, bundle: Path, scenes: Sequence[Scene]) -> np.ndarray:
    total, num_tokens = np.zeros(len(scenes)), 0
    with ExitStack() as stack:
        both = [_log_probabilities(stack, path, scenes) for path in (reference, bundle)]
        for wanted, found in zip(*both, strict=True):
            total += (np.exp(wanted) * (wanted - found)).sum(axis=-1)
            num_tokens += 1
    return total / num_tokens


def _log_probabilities(
    stack: ExitStack, path: Path, scenes: Sequence[Scene]
) -> Iterator[np.ndarray]:
    """float64 [N, V] of each image token, given the scene's own tokens before it."""
    opened = open_bundle(path)
    runner = OrtRunner(opened, num_threads=1)
    stack.enter_context(ImageGenerator(opened, runner))
    tokens = np.stack([encode_scene(scene) for scene in scenes]).astype(np.int32)
    sampling = bundle_sampling(opened)
    batch = PromptBatches.from_bundle(opened)([scene.caption for scene in scenes], sampling, 0)
    runner.prefill(batch)
    for step in range(tokens.shape[1]):
        if step:
            runner.evict(step)
            runner.decode_step(step)
        conditional, unconditional = np.split(runner.logits().astype(np.float64), 2)
        guided = unconditional + sampling.cfg_scale * (conditional - unconditional)
        yield _log_softmax(guided / sampling.temperature)
        runner.force_tokens(step, tokens[:, step])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def results_of(model: str, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """The table and the figures by name."""
    num_scenes = len(next(iter(found.values())))
    rows = [
        [f"`{PRECISIONS[name]}`", kl_text(values), f"{1e3 * values.max():.2f}"]
        for name, values in found.items()
    ]
    title = f"KL from fp32 of what a token of {model} is sampled from, {num_scenes} scenes"
    note = (
        "The bundle's own policy, guidance and temperature in ONNX Runtime, given the tokens of"
        " true scenes: weights, activations of the fast kernels and the cache are rounded as"
        " `generate` rounds them."
    )
    kept = {name: values.tolist() for name, values in found.items()}
    return {"tables": [table(title, COLUMNS, rows, note)], "divergences": kept}


def kl_text(values: np.ndarray) -> str:
    """Mean and half of its 95 % interval, in thousandths of a nat."""
    mean = Mean.of(values.tolist())
    return f"{1e3 * mean.value:.3f} ± {1e3 * mean.half_width:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--num-scenes", type=int, default=64)
    parser.add_argument("--json", type=Path, default=JSON)
    asked = parser.parse_args(arguments)
    note = busy_note()
    results = results_of(asked.model, divergences(asked.model, asked.num_scenes))
    for row in [COLUMNS, *results["tables"][0]["rows"]]:
        print(" | ".join(row))
    command = f"python -m benchmarks.precision_divergence --num-scenes {asked.num_scenes}"
    write_measurement(asked.json, measurement(command, results, note))


if __name__ == "__main__":
    main()
