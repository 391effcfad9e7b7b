"""Measures how a precision changes the distribution that tokens are sampled from, scene by scene.

Two bundles of one policy are given the tokens of true scenes, step by step in ONNX Runtime as
`generate` uses it: rounding of weights, of activations in the fast kernels and of the cache are all
in it. Compared is softmax(guided logits / temperature), which is what a token is drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ssd_export.bundle import open_bundle
from ssd_export.demo.codes import encode_scene
from ssd_export.demo.scenes import Scene
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.prompt_batch import PromptBatches, bundle_sampling

BATCH = 32  # scenes at once


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
