"""Cases for the C++ library: what is asked of it, and what Python makes of the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from ssd_export.bundle import open_bundle
from ssd_export.model import families
from ssd_export.model.prompt import TemplateEncoder
from ssd_export.plan.lookahead import PassCost
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.ort_operators import has_fused_step
from tests.engines.builds import run

DEMO_PROMPTS = ["a red circle above a blue square", "three small yellow triangles on black"]


@dataclass(frozen=True)
class Case:
    """options: as of ImageGenerator.stream. bundle: a name of the fixture `bundles`."""

    bundle: str
    prompts: tuple[str, ...] = ("a red circle on white",)
    options: dict[str, Any] = field(default_factory=dict)
    own_loop: bool = False

    def to_json(self, bundle: Path) -> dict[str, Any]:
        asked = {"prompts": self.prompts, "own_loop": self.own_loop, **self.options}
        if isinstance(asked.get("negative_prompt"), str):
            asked["negative_prompt"] = [asked["negative_prompt"]]
        if asked.get("lookahead") == "auto":
            asked["lookahead"] = LOOKAHEAD_AUTO
        return {"bundle": str(bundle), **asked}


TWO = tuple(DEMO_PROMPTS)
LOOKAHEAD_AUTO = -1
LONG = "a large green square on white, and two small red circles below a blue triangle"
CASES = {
    "defaults": Case("ssd-auto"),
    "another seed": Case("ssd-auto", TWO[:1], {"seed": 7}),
    "a seed of 64 bits": Case("ssd-auto", TWO[1:], {"seed": 2**64 - 1}),
    "greedy": Case("ssd-auto", TWO[:1], {"temperature": 0.0}),
    "top-k": Case("ssd-auto", TWO[:1], {"top_k": 5, "seed": 2}),
    "guidance": Case("ssd-auto", TWO[1:], {"cfg_scale": 3.0, "temperature": 0.7}),
    "a negative prompt": Case(
        "ssd-auto", TWO, {"negative_prompt": "blue", "cfg_scale": 3.0, "seed": 14}
    ),
    "negative prompts": Case(
        "linear",
        TWO,
        {"negative_prompt": [" ", LONG], "cfg_scale": 2.0, "num_images": 2, "max_batch": 3},
    ),
    "several images": Case("ssd-auto", TWO, {"num_images": 2, "seed": 3}),
    "a seed for each image": Case("ssd-auto", TWO, {"seeds": [5, 2**64 - 1], "max_batch": 1}),
    "batch after batch": Case("ssd-auto", TWO, {"num_images": 2, "max_batch": 3, "seed": 3}),
    "decoded two at a time": Case("ssd-auto", TWO, {"num_images": 2, "decoder_batch": 2}),
    "previews": Case("ssd-auto", TWO, {"preview": True}),
    "own loop": Case("ssd-auto", TWO, {"max_batch": 1, "preview": True}, own_loop=True),
    "a tenth of the cache": Case("ssd-auto-0.1", TWO[:1], {"seed": 4}),
    "everything kept": Case("full", TWO[:1], {"seed": 5}),
    "heavy hitters": Case("h2o", TWO, {"seed": 6}),
    "windows": Case("streaming-llm", TWO[:1], {"seed": 7}),
    "scores that decay": Case("linear", TWO, {"seed": 8}),
    "paper": Case("ssd", TWO[:1], {"seed": 9, "top_k": 40}),
    "int4": Case("int4", TWO[:1], {"seed": 10}),
    "int8": Case("int8", TWO[:1], {"seed": 11}),
    "int8 cache": Case("kv-int8", TWO, {"seed": 12}),
    "float16": Case("fp16", TWO[:1], {"seed": 13}),
    "lookahead": Case("ssd-auto", TWO[:1], {"lookahead": 8, "seed": 1}),
    "lookahead where it pays": Case(
        "ssd-auto", TWO[1:], {"lookahead": "auto", "preview": True, "seed": 2}
    ),
    "lookahead of two at once": Case("linear", TWO, {"lookahead": 6, "seed": 3}),
    "lookahead and top-k": Case("ssd-auto-0.1", TWO[:1], {"lookahead": 12, "top_k": 20}),
    "greedy lookahead": Case(
        "kv-int8", TWO, {"lookahead": 8, "temperature": 0.0, "max_batch": 1}, own_loop=True
    ),
}


@dataclass(frozen=True)
class Made:
    """tokens: int32 [N, tokens]; pixels: uint8 [N, height, width, 3]; facts: the rest of the
    line.
    """

    tokens: np.ndarray
    pixels: np.ndarray
    facts: dict[str, Any]


def run_cases(
    build: Path, cases: list[dict[str, Any]], folder: Path, **environment: str
) -> list[Made]:
    """What the library made of each case; an error is in `facts`."""
    asked, answered = folder / "cases.json", folder / "results.bin"
    asked.write_text(json.dumps(cases))
    ran = run([build / "tests" / "ssd_cases", asked, answered], env=environment or None)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert not ran.stderr, "the library printed: " + ran.stderr[-4000:]
    return read_results(answered, len(cases))


def read_results(path: Path, count: int) -> list[Made]:
    """The answers that ssd_cases wrote."""
    results = []
    with path.open("rb") as file:
        for _ in range(count):
            facts = json.loads(file.readline())
            tokens = np.frombuffer(file.read(4 * facts.get("tokens", 0)), np.int32)
            pixels = np.frombuffer(file.read(facts.get("pixels", 0)), np.uint8)
            count = facts.get("images", 0)
            size = round((len(pixels) / max(count, 1) / 3) ** 0.5)
            shape = (count, size, size, 3)
            results.append(
                Made(tokens.reshape(count, -1) if count else tokens, pixels.reshape(shape), facts)
            )
    return results


def generated_by_python(case: Case, bundle: Path) -> Made:
    """What Python generates; `auto` counts with the operators that are built into the library,
    whether Python has them here or not.
    """
    of = PassCost.of
    with (
        patch.object(PassCost, "of", lambda *asked: of(*asked[:-1], has_fused_step(asked[0]))),
        ImageGenerator.from_bundle(bundle) as generator,
    ):
        events = list(generator.stream(case.prompts, **case.options))
        cache, passes = generator.cache, generator.passes
    images = np.stack([np.asarray(image) for image in events[-1].images])
    shown = [
        None if event.images is None else [np.asarray(image) for image in event.images]
        for event in events
    ]
    rows = [event.row for event in events]
    facts = {"cache": cache, "shown": shown, "rows": rows, "passes": passes}
    return Made(events[-1].tokens, images, facts)


def checksum(images: list[np.ndarray]) -> int:
    """What ssd_cases writes of an event's pixels."""
    pixels = np.stack(images).astype(np.uint64).reshape(-1)
    return int((pixels * (np.arange(len(pixels), dtype=np.uint64) % np.uint64(251) + 1)).sum())


def prompt_encoder(bundle: Path) -> TemplateEncoder:
    opened = open_bundle(bundle)
    return families.prompt_encoder(opened.config.model, opened.file)
