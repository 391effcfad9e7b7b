"""generate --prompts: every line's own images, failures beside successes, and going on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ssd_export.errors import UserError
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.ort_runner import OrtRunner
from tests.cli.test_generate import fail_after
from tests.cli.test_generate import images as names_in
from tests.janus_checkpoints import TinyJanus
from tests.llamagen_checkpoints import TinyLlamaGen, write_llamagen_checkpoint
from tests.runtime.checkpoints import bundle, checkpoint

Run = Callable[..., SimpleNamespace]
LINES = [
    {"prompt": "a red circle"},
    {"prompt": "blue", "seed": 9, "negative_prompt": "a red circle"},
    {"prompt": "blue", "seed": 9, "cfg_scale": 1.5, "temperature": 0.5, "top_k": 3},
]


@pytest.fixture
def path() -> Path:
    return bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2)


@pytest.fixture
def generate(run: Run, path: Path) -> Callable[..., SimpleNamespace]:
    def call(file: str, *options: object) -> SimpleNamespace:
        return run("generate", "--prompts", file, "--bundle", path, "--threads", 1, *options)

    return call


def write_lines(name: str, lines: list[dict[str, object]] = LINES) -> str:
    Path(name).write_text("\n".join(map(json.dumps, lines)))
    return name


def results(folder: str = "out") -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def pixels(folder: str = "out") -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in Path(folder).glob("*.png")}


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all((first[n] == second[n]).all() for n in first)


def test_each_line_has_the_images_of_its_own_numbers(
    generate: Callable[..., SimpleNamespace], path: Path
) -> None:
    done = generate(write_lines("p.jsonl"), "--num-images", 2, "--batch", 4, "--seed", 5)
    assert done.code == 0, done.err
    assert done.out == "out: 6 images made, 0 were there, 0 failed\n"
    made = pixels()
    with ImageGenerator.from_bundle(path, num_threads=1) as generator:
        first = generator(["a red circle"], seed=5, num_images=2).images
        negative = generator(["blue"], seed=9, num_images=2, negative_prompt="a red circle").images
        third = generator(
            ["blue"], seed=9, num_images=2, cfg_scale=1.5, temperature=0.5, top_k=3
        ).images
    for line, images in enumerate((first, negative, third), 1):
        for number, image in enumerate(images):
            assert (made[f"{line:06d}-{number}.png"] == np.asarray(image)).all(), (line, number)
    with Image.open("out/000002-1.png") as image:
        assert image.text["negative_prompt"] == "a red circle" and image.text["seed_image"] == "1"
    assert [(r["line"], r["image"], r["file"]) for r in results()] == [
        (line, image, f"{line:06d}-{image}.png") for line in (1, 2, 3) for image in (0, 1)
    ]


def test_lines_without_a_seed_are_those_of_one_call(
    generate: Callable[..., SimpleNamespace], path: Path
) -> None:
    Path("p.txt").write_text("a red circle\n\nblue\n")
    assert generate("p.txt", "--seed", 3).code == 0
    with ImageGenerator.from_bundle(path, num_threads=1) as generator:
        expected = generator(["a red circle", "blue"], seed=3).images
    made = pixels()
    assert (made["000001-0.png"] == np.asarray(expected[0])).all()
    assert (made["000003-0.png"] == np.asarray(expected[1])).all()


def test_a_line_that_fails_is_listed_and_the_others_are_made(
    generate: Callable[..., SimpleNamespace],
) -> None:
    lines = [{"prompt": "word " * 99}, {"prompt": "blue"}, {"prompt": ""}]
    lines.append({"prompt": "a", "negative_prompt": "b", "cfg_scale": 1})
    done = generate(write_lines("p.jsonl", lines))
    assert done.code == 3 and done.out.endswith("1 images made, 0 were there, 3 failed\n")
    assert "line 1, image 0: the prompt 'word word" in done.err and "tokens long" in done.err
    assert "line 3, image 0: the prompt is empty" in done.err
    assert "line 4, image 0: a negative prompt does nothing at cfg_scale 1" in done.err
    errors = {r["line"]: r["error"] for r in results()}
    assert errors[2] is None and all(errors[line] for line in (1, 3, 4))
    again = generate(write_lines("p.jsonl", [{"prompt": "red"}, *lines[1:]]))
    assert again.code == 3 and again.out == "out: 1 images made, 1 were there, 2 failed\n"


@pytest.mark.parametrize(
    "error, code",
    [(KeyboardInterrupt(), 130), (SystemExit(143), 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_the_same_command_goes_on(
    generate: Callable[..., SimpleNamespace],
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("p.txt").write_text("a\nb\nc\nd\ne\n")
    assert generate("p.txt", "--batch", 2, "--out", "whole").code == 0
    with monkeypatch.context() as patch:
        fail_after(3, error, patch)
        assert generate("p.txt", "--batch", 2).code == code
    assert names_in(Path("out")) == ["000001-0.png", "000002-0.png", "000003-0.png"]
    with Path("out/results.jsonl").open("ab") as file:
        file.write(b'{"line": 4, "ima')  # as a process leaves it that is killed
    Path("out/000002-0.png").unlink()
    done = generate("p.txt", "--batch", 2)
    assert done.out == "out: 3 images made, 2 were there, 0 failed\n", done.err
    assert equal(pixels(), pixels("whole"))
    assert {(r["line"], r["error"]) for r in results()} == {(n, None) for n in range(1, 6)}
    assert generate("p.txt").out == "out: 0 images made, 5 were there, 0 failed\n"


def test_one_image_that_fails_takes_no_other_with_it(
    generate: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.txt").write_text("a\nb\nbad\nd\n")
    prefill = OrtRunner.prefill

    def failing(runner: OrtRunner, batch: object) -> None:
        if any(image.image == 2 for image in batch.images):
            raise RuntimeError("no such luck")
        prefill(runner, batch)

    monkeypatch.setattr(OrtRunner, "prefill", failing)
    done = generate("p.txt", "--batch", 4)
    assert done.code == 3 and "line 3, image 0: RuntimeError: no such luck" in done.err
    assert len(names_in(Path("out"))) == 3


def test_it_stops_where_nothing_works_any_more(
    generate: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.txt").write_text("a\n" * 40)

    def failing(runner: OrtRunner, batch: object) -> None:
        raise UserError("the device is gone")

    monkeypatch.setattr(OrtRunner, "prefill", failing)
    done = generate("p.txt", "--batch", 8)
    assert done.code == 1 and "16 images failed one after the other" in done.err
    assert len(results()) == 16


def test_a_full_disk_ends_it_and_what_is_made_stays(
    generate: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export.prompt_files import results as module

    write, written = module.write_file, []

    def full(path: Path, content: object) -> None:
        if len(written) == 2:
            raise UserError(f"no space left to write {path}; free some")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(module, "write_file", full)
    Path("p.txt").write_text("a\nb\nc\nd\n")
    done = generate("p.txt")
    assert done.code == 1 and "no space left to write out/000003-0.png" in done.err
    assert len(results()) == 2 and len(names_in(Path("out"))) == 2


def test_lookahead_makes_the_same_images(generate: Callable[..., SimpleNamespace]) -> None:
    file = write_lines("p.jsonl", LINES[:2])
    assert generate(file, "--batch", 2).code == 0
    done = generate(file, "--batch", 2, "--lookahead", 6, "--out", "ahead")
    assert done.code == 0, done.err
    assert equal(pixels(), pixels("ahead"))


def test_a_runner_without_lookahead_is_refused_before_an_image_fails(
    generate: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = property(lambda _: "one token a pass; use another runner", lambda *_: None)
    monkeypatch.setattr(OrtRunner, "no_window", reason)
    done = generate(write_lines("p.jsonl"), "--lookahead", 6)
    assert done.code == 1 and "one token a pass" in done.err
    assert not Path("out", "results.jsonl").exists()
    assert generate(write_lines("p.jsonl"), "--lookahead", 0).code == 1


def test_what_does_not_go_together_is_refused_first(
    generate: Callable[..., SimpleNamespace], run: Run, path: Path
) -> None:
    Path("p.txt").write_text("a\n")
    for options in (["--preview", "x"], ["--save-tokens", "t.npy"]):
        done = generate("p.txt", *options)
        assert done.code == 1 and "does not go with --prompts" in done.err
    assert generate("p.txt", "prompt").code == 2
    assert run("generate", "--bundle", path).code == 2
    assert "line 1" in generate(write_lines("p.jsonl", [{"promt": "a"}])).err
    assert "out" not in os.listdir()


def test_results_of_another_bundle_or_damaged_ones_are_no_results(
    generate: Callable[..., SimpleNamespace],
) -> None:
    Path("p.txt").write_text("a\n")
    assert generate("p.txt").code == 0
    file = Path("out/results.jsonl")
    content = file.read_text()
    bundle_hash = json.loads(content)["bundle_hash"]
    file.write_text(content.replace(bundle_hash, "0" * 64))
    assert "results.jsonl, line 1: an image of another bundle" in generate("p.txt").err
    file.write_text("what\n" + content)
    done = generate("p.txt")
    assert done.code == 1 and "results.jsonl, line 1: not JSON" in done.err
    assert file.read_text() == "what\n" + content


def test_a_class_is_for_a_model_of_classes(
    run: Run, generate: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    file = write_lines("p.jsonl", [{"class": 3, "seed": 4}, {"prompt": "3", "seed": 4}])
    refused = generate(file)
    assert refused.code == 1 and "give a PROMPT" in refused.err and not Path("out").exists()
    model = write_llamagen_checkpoint(tmp_path / "classes", TinyLlamaGen(num_layers=1))
    done = run("generate", "--prompts", file, "--bundle", bundle(model, "h2o", prompt_slots=1))
    assert done.code == 0, done.err
    first, second = pixels().values()
    assert (first == second).all()
