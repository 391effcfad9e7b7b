"""`ssd-export prompts`: the ids that generation itself would use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from tests.engines.cases import prompt_encoder

Run = Callable[..., SimpleNamespace]


def test_the_ids_are_those_of_generation(run: Run, exported: Callable[..., Path]) -> None:
    bundle = exported("full", 1.0)
    said = run("prompts", "a red circle", " zwei  Sterne ", "--bundle", bundle, "--out", "p.json")
    assert (said.code, said.out) == (0, "p.json: 2 prompts, at most 18 tokens of 64\n")
    written = json.loads(Path("p.json").read_text())
    encoder = prompt_encoder(bundle)
    for prompt in written["prompts"]:
        encoded = encoder.encode([prompt["text"]], 64)
        assert prompt["ids"] == encoded.ids[0, : encoded.prompt_length[0]].tolist()
    assert [prompt["text"] for prompt in written["prompts"]] == ["a red circle", " zwei  Sterne "]
    assert written["prompt_slots"] == 64


def test_what_cannot_be_encoded_or_written(run: Run, exported: Callable[..., Path]) -> None:
    bundle = exported("full", 1.0)
    empty = run("prompts", "a", " ", "--bundle", bundle)
    assert empty.code == 1 and "the prompt is empty" in empty.err
    assert not Path("prompts.json").exists()
    nowhere = run("prompts", "a", "--bundle", bundle, "--out", "no/where.json")
    assert nowhere.code == 1 and "there is no folder no" in nowhere.err
