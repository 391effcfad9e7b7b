"""Rungs that generate: caches of the first steps, logits and slots of a whole image, tokens from
one seed, pixels.

Subject and reference go in lockstep: the reference samples, the subject is given the same token, so
one wrong step is seen where it happens and not in all that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ssd_export.bundle import Bundle
from ssd_export.bundle.graphs import head_groups, part_names
from ssd_export.graph_spec import CacheTensor
from ssd_export.metrics.similarity import psnr, ssim
from ssd_export.model.families import family_of
from ssd_export.noise import GumbelNoise
from ssd_export.runtime.finite import check_logits
from ssd_export.runtime.loop import decode, single_steps
from ssd_export.runtime.prompt_batch import PromptBatch, PromptBatches, bundle_sampling
from ssd_export.runtime.runner import InspectableRunner
from ssd_export.sampling import Sampling
from ssd_export.verify.checks import Divergence, Rung
from ssd_export.verify.compression import check_compression, check_evicted
from ssd_export.verify.contract import heads_of_layer
from ssd_export.verify.tolerances import ONE_CODE, error, tolerance_of

NUM_IMAGES = 2
FIRST_STEPS = 8
TOP_K = 50  # of the tokens that are drawn with top-k
MAX_TIE_SHARE = 0.1  # of the steps: more of them are no accident
RACE_ROUNDING = 4 * 2.0**-24  # of guidance and race in float32, against their greatest number
LEAST_TIE = 1e-2  # of the relative tie tolerance: absolute, for scores near 0
Progress = Callable[[str, int, int], None]


class Ladder:
    """Subject against reference on one batch of two prompts."""

    def __init__(
        self,
        bundle: Bundle,
        subject: InspectableRunner,
        reference: InspectableRunner,
        seed: int,
        progress: Progress,
    ) -> None:
        self.table = bundle.config.policy
        self.config = bundle.config.model
        self._dtype = bundle.config.dtype
        self.tolerance = tolerance_of(self._dtype, self.table.kv_dtype)
        self.subject, self.reference, self._progress = subject, reference, progress
        self._bundle, self._seed = bundle, seed
        self.batch = prompt_batch(bundle, seed)
        self._groups = list(head_groups(self.table))
        self._num_tokens = self.config.grid.num_tokens
        self._tokens = np.zeros((NUM_IMAGES, self._num_tokens), np.int32)
        self._ties: list[int] = []  # steps
        self._first_tie: dict[int, int] = {}  # step by image
        self._borders: set[tuple[int, int]] = (
            set()
        )  # (image, step) where rounding explains another token

    def with_subject(self, subject: InspectableRunner) -> Ladder:
        """Another subject beside the same reference, on the same prompts."""
        return Ladder(self._bundle, subject, self.reference, self._seed, self._progress)

    def compression(self) -> Rung:
        """Slots, bytes and budget of the caches of a running batch."""
        next(self._decode(self.subject, 1))
        return check_compression(self.subject, self.table, self.config, self._dtype, NUM_IMAGES)

    def layers(self) -> Rung:
        """Keys, values, positions and scores of every head, after the prefill and the first
        steps.
        """
        greatest = 0.0
        for step in self._lockstep("layers", FIRST_STEPS):
            worst, divergence = self._compare_caches(step)
            greatest = max(greatest, worst)
            if divergence:
                return Rung("layers", {"greatest_error": greatest}, divergence)
        return Rung("layers", {"steps": FIRST_STEPS, "greatest_error": greatest})

    def logits(self) -> Rung:
        """Slots, logits and draws of all image tokens; at the end the tokens that were evicted are
        counted.
        """
        greatest, divergence = 0.0, None
        ranked: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._ties, self._first_tie, self._borders = [], {}, set()
        for step in self._lockstep("logits", self._num_tokens):
            for runner in (self.reference, self.subject):
                check_logits(runner.logits(), step, self._dtype)
            divergence = self._compare_positions(step, ranked)
            if divergence is None and step not in self._ties[-1:]:
                size = error(self.subject.logits(), self.reference.logits())
                greatest = max(greatest, size)
                divergence = (
                    self._logits_divergence(step, size)
                    if size > self.tolerance.logits
                    else self._compare_draws(step)
                )
            if divergence is None and len(self._ties) > MAX_TIE_SHARE * self._num_tokens:
                divergence = Divergence(
                    f"other tokens than the reference's were evicted {len(self._ties)} times,"
                    " always of equal scores",
                    step,
                )
            if divergence:
                break
        figures = {
            "steps": step + 1,
            "greatest_error": greatest,
            "steps_with_ties": len(self._ties),
            "border_draws": len(self._borders),
        }
        if divergence is None:
            evicted, divergence = check_evicted(self.subject, self.table, self.batch.lengths)
            figures |= evicted
        return Rung("logits", figures, divergence)

    def tokens(self) -> Rung:
        """The subject on its own, from the same seed: each image's tokens equal up to what
        rounding explains.
        """
        for steps in self._decode(self.subject, self._num_tokens):
            self._progress("tokens", steps.stop, self._num_tokens)
        different = self.subject.tokens() != self._tokens
        figures: dict[str, Any] = {"agreement": float(1 - different.mean())}
        for image in np.flatnonzero(different.any(axis=1)).tolist():
            step = int(np.flatnonzero(different[image])[0])
            if (image, step) not in self._borders and self._first_tie.get(
                image, self._num_tokens
            ) > step:
                return Rung(
                    "tokens", figures, Divergence("another token was drawn", step, row=image)
                )
            figures.setdefault("rounding_parts_them_at_step", []).append(step)
        why_not = self.subject.no_top_k or self.reference.no_top_k
        if why_not:
            return Rung("tokens", figures | {"top_k_not_run": why_not})
        return Rung("tokens", figures | {"top_k_steps": FIRST_STEPS}, self._top_k_divergence())

    def decoded(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens int32 [1, image tokens] that the reference drew, and what the subject decodes
        from them.
        """
        for one in self._tokens:
            yield one[None], self.subject.decode_image(one[None])[0]

    def image(self) -> Rung:
        """The images that both decode from the reference's tokens."""
        pairs = [
            (self.subject.decode_image(one[None])[0], self.reference.decode_image(one[None])[0])
            for one in self._tokens
        ]
        figures = {
            "psnr": min(psnr(*pair) for pair in pairs),
            "ssim": min(ssim(*pair) for pair in pairs),
        }
        self._progress("image", 1, 1)
        for name, least in (("psnr", self.tolerance.min_psnr), ("ssim", self.tolerance.min_ssim)):
            if not figures[name] >= least:
                return Rung(
                    "image",
                    figures,
                    Divergence(
                        f"the image's {name} is {figures[name]:.4g}, at least {least:g} is"
                        " asked for"
                    ),
                )
        return Rung("image", figures)

    def _top_k_divergence(self) -> Divergence | None:
        """The first sample that differs with top-k, whose graphs are separate ones."""
        images = range(NUM_IMAGES)
        sampling = tuple(replace(one, top_k=TOP_K) for one in self.batch.sampling)
        batch = replace(self.batch, sampling=sampling)
        parts = single_steps(FIRST_STEPS)
        both = (decode(one, batch, self.table, parts) for one in (self.reference, self.subject))
        for (step,), _ in zip(*both, strict=True):
            ours, wanted = (one.tokens()[:, step] for one in (self.subject, self.reference))
            for image in images:
                if ours[image] != wanted[image] and not self._explained(step, image, ours[image]):
                    return Divergence(
                        f"another token was drawn with top-k {TOP_K}", step, row=image
                    )
            self.subject.force_tokens(step, wanted)
        return None

    def _explained(self, step: int, image: int, token: int) -> bool:
        """Whether the difference of the logits explains another draw among TOP_K tokens."""
        subject, reference = (
            self._guided(runner.logits()[image::NUM_IMAGES], self.batch.sampling[image])
            for runner in (self.subject, self.reference)
        )
        moved = 2 * np.abs(subject - reference).max()
        least = np.sort(reference)[-TOP_K] - moved
        among = np.where(reference < least, -np.inf, reference)
        return self._is_border(subject, reference, int(token), image, step, among)

    def _decode(self, runner: InspectableRunner, num_tokens: int) -> Iterator[range]:
        return decode(runner, self.batch, self.table, single_steps(num_tokens))

    def _lockstep(self, stage: str, num_steps: int) -> Iterator[int]:
        """Yields each step once both have taken it; then the subject is given the reference's
        token.
        """
        both = (self._decode(runner, num_steps) for runner in (self.reference, self.subject))
        for (step,), _ in zip(*both, strict=True):
            self._tokens[:, step] = self.reference.tokens()[:, step]
            yield step
            self.subject.force_tokens(step, self._tokens[:, step])
            self._progress(stage, step + 1, num_steps)

    def _compare_caches(self, step: int) -> tuple[float, Divergence | None]:
        """(greatest error, first divergence) over layers, groups, parts and heads, in this
        order.
        """
        greatest = 0.0
        for layer, index, group in self._groups:
            for part in sorted(part_names(group.rule, self.table.kv_dtype), key="position".__ne__):
                allowed = self._allowed(part)
                ours, reference = (
                    runner.read_cache(CacheTensor(layer, index, part))
                    for runner in (self.subject, self.reference)
                )
                for head in range(group.num_heads):
                    size = error(ours[:, head], reference[:, head])
                    if size > allowed:
                        return greatest, self._at(
                            part, step, layer, index, head, ours, reference, size, allowed
                        )
                    greatest = max(greatest, size)
        return greatest, None

    def _at(
        self,
        what: str,
        step: int,
        layer: int,
        group: int,
        place: int,
        ours: np.ndarray,
        reference: np.ndarray,
        size: float,
        allowed: float,
    ) -> Divergence:
        rows = [error(a, b) for a, b in zip(ours[:, place], reference[:, place], strict=True)]
        return Divergence(
            what,
            step,
            layer,
            group,
            self._head(layer, group, place),
            int(np.argmax(rows)),
            size,
            allowed,
        )

    def _head(self, layer: int, group: int, place: int) -> int:
        """The checkpoint's number of a head by its place in the group."""
        return [head for index, _, head in heads_of_layer(self.table, layer) if index == group][
            place
        ]

    def _logits_divergence(self, step: int, size: float) -> Divergence:
        _, cause = self._compare_caches(step)
        if cause is None:
            what = (
                "logits (all caches agree: the query, output or MLP of the last layer, or what"
                " follows)"
            )
            return Divergence(
                what, step, self.config.num_layers - 1, error=size, allowed=self.tolerance.logits
            )
        what = f"logits; of the caches {cause.what} differs first"
        return Divergence(
            what, step, cause.layer, cause.group, cause.head, cause.row, size, self.tolerance.logits
        )

    def _compare_draws(self, step: int) -> Divergence | None:
        """Whether both drew the same tokens from logits that agree; a border is noted, everything
        else is a fault.
        """
        ours = self.subject.tokens()[:, step]
        for image in np.flatnonzero(ours != self._tokens[:, step]).tolist():
            subject, reference = (
                self._guided(runner.logits()[image::NUM_IMAGES], self.batch.sampling[image])
                for runner in (self.subject, self.reference)
            )
            if not self._is_border(subject, reference, int(ours[image]), image, step):
                return Divergence("another token was drawn from equal logits", step, row=image)
            self._borders.add((image, step))
        return None

    def _guided(self, logits: np.ndarray, sampling: Sampling) -> np.ndarray:
        if len(logits) == 1:
            return logits[0].astype(np.float64)
        conditional, unconditional = logits.astype(np.float64)
        return unconditional + sampling.cfg_scale * (conditional - unconditional)

    def _is_border(
        self,
        ours: np.ndarray,
        reference: np.ndarray,
        token: int,
        image: int,
        step: int,
        among: np.ndarray | None = None,
    ) -> bool:
        """Whether the subject's token wins the race but for the measured difference of the guided
        logits. among: those in the race, the others being -inf; None: all of them.
        """
        noise = GumbelNoise([self.batch.images[image]], len(reference))(range(step, step + 1))
        scaled = self.batch.sampling[image].temperature * noise[0, 0].astype(np.float64)
        race = (reference if among is None else among) + scaled
        greatest = np.abs(race[np.isfinite(race)]).max()
        moved = 2 * np.abs(ours - reference).max() + RACE_ROUNDING * greatest
        return bool(race.max() - race[token] <= moved)

    def _compare_positions(
        self, step: int, ranked: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]
    ) -> Divergence | None:
        """The first head that holds other tokens or in other slots. Of equal scores either may go:
        then the subject is given all of the reference's caches, and the step is noted. ranked:
        positions and scores before the step.
        """
        before = dict(ranked)
        for layer, index, group in self._groups:
            if group.rule.by_score:
                ranked[layer, index] = (
                    self.reference.read_cache(CacheTensor(layer, index, "position")),
                    self.reference.read_cache(CacheTensor(layer, index, "score")),
                )
        for layer, index, _ in self._groups:
            ours, reference = (
                runner.read_cache(CacheTensor(layer, index, "position"))
                for runner in (self.subject, self.reference)
            )
            places = np.argwhere((ours != reference).any(axis=2)).tolist()
            for row, place in places:
                position, score = (
                    part[row, place] for part in before.get((layer, index), (reference, reference))
                )
                if not self._is_tie(ours[row, place], reference[row, place], position, score):
                    equal = (ours >= 0).sum() == (reference >= 0).sum()
                    what = (
                        "another slot or token is held"
                        if equal
                        else "another number of slots is filled"
                    )
                    return Divergence(
                        what, step, layer, index, self._head(layer, index, place), row
                    )
            if places:  # deeper layers have seen the other token in this step
                self._ties.append(step)
                for row, _ in places:
                    self._first_tie.setdefault(row % NUM_IMAGES, step)
                self._copy_caches()
                break
        return None

    def _allowed(self, part: str) -> float:
        if part in ("key", "value") and self.table.kv_dtype == "int8":
            return ONE_CODE
        return 0.0 if part == "position" else self.tolerance.cache

    def _copy_caches(self) -> None:
        for layer, index, group in self._groups:
            for part in part_names(group.rule, self.table.kv_dtype):
                tensor = CacheTensor(layer, index, part)
                self.subject.write_cache(tensor, self.reference.read_cache(tensor))

    def _is_tie(
        self, ours: np.ndarray, reference: np.ndarray, position: np.ndarray, score: np.ndarray
    ) -> bool:
        """Whether both evicted equally many tokens, and those that only one evicted had equal
        scores.
        """
        score_of = dict(zip(position.tolist(), score.tolist(), strict=True))
        evicted = [set(position.tolist()) - set(held.tolist()) for held in (ours, reference)]
        first, second = evicted[0] - evicted[1], evicted[1] - evicted[0]
        if not first or len(first) != len(second):
            return False
        scores = [score_of[token] for token in first | second]
        allowed = self.tolerance.tie * max(scores) + self.tolerance.tie * LEAST_TIE
        return max(scores) - min(scores) <= allowed


def prompt_batch(bundle: Bundle, seed: int) -> PromptBatch:
    """Two prompts with the bundle's guidance and temperature."""
    model = bundle.config.model
    prompts = family_of(model).example_prompts(model, NUM_IMAGES)
    return PromptBatches.from_bundle(bundle)(prompts, bundle_sampling(bundle), seed)
