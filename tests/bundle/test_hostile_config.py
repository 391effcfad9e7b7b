"""ssd_config.json with anything wrong in it: one line that names the place, in bounded time; and
what passes is safe to use.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.bundle import CONFIG, BundleConfig, open_bundle
from ssd_export.bundle.config_reader import parse_config
from ssd_export.cli.inspect import bundle_facts
from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.policy.make import make_policy
from ssd_export.typed_json import to_json
from tests.bundle.mutations import REMOVED, WRONG_VALUES, mutated, places
from tests.bundle.small_bundles import MODEL, small_config, write_small_bundle

MOST_SECONDS = 5.0  # of processor time for one document; a whole one takes 5 ms
MOST_LETTERS = 2000
OF_ALL_CONTENTS = st.sampled_from((REMOVED, *WRONG_VALUES))


@cache
def whole() -> str:
    return to_json(small_config(policy=make_policy("streaming-llm", MODEL, budget=0.2)))


def refusal(content: bytes) -> str:
    """The message that refuses a document, or "" where it passes."""
    began = time.process_time()
    try:
        parse_config(content, "b/ssd_config.json")
        return ""
    except UserError as error:
        message = str(error)
    finally:
        assert time.process_time() - began < MOST_SECONDS
    assert message.startswith("b/ssd_config.json") and "export it again" in message
    assert message.isprintable() and len(message) < MOST_LETTERS
    return message


def test_a_whole_document_passes() -> None:
    assert refusal(whole().encode()) == ""
    assert parse_config(whole().encode(), "") == small_config(
        policy=make_policy("streaming-llm", MODEL, budget=0.2)
    )


@settings(max_examples=400)
@given(place=st.sampled_from(places(json.loads(whole()))), wrong=OF_ALL_CONTENTS)
def test_one_wrong_value_anywhere(place: tuple, wrong: str) -> None:
    refusal(mutated(whole(), place, wrong))


def test_every_wrong_value_outside_the_graphs() -> None:
    """The 479 of the tracker, and more: every key removed, every value of every type."""
    outside = [place for place in places(json.loads(whole())) if place[0] != "graphs"]
    kept = [
        place for place in outside if len(place) < 3 or place[1] not in ("layers", "head_order")
    ]
    kept += [place for place in outside if place[1:3] == ("layers", 0)]
    for place in kept:
        for wrong in (REMOVED, *list(WRONG_VALUES)[::2]):
            refusal(mutated(whole(), place, wrong))


@settings(max_examples=25)
@given(place=st.sampled_from(places(json.loads(whole()))), wrong=OF_ALL_CONTENTS)
def test_what_passes_can_be_used(
    tmp_path_factory: pytest.TempPathFactory, place: tuple, wrong: str
) -> None:
    """The manifest is made to fit, so that only the content is wrong."""
    path = written(tmp_path_factory.mktemp("b") / "b", mutated(whole(), place, wrong))
    try:
        bundle = open_bundle(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        json.dumps(bundle_facts(bundle), allow_nan=False)


def written(path: Path, content: bytes) -> Path:
    from tests.scene_bundles import rewrite_manifest

    write_small_bundle(path, small_config(policy=make_policy("streaming-llm", MODEL, budget=0.2)))
    (path / CONFIG).write_bytes(content)
    rewrite_manifest(path)
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: replace_model(c, head_dim=0), r"model\.head_dim is 0, expected 1 to 1024"),
        (lambda c: replace_model(c, head_dim=7), r"model\.head_dim is 7, expected a multiple of 2"),
        (lambda c: replace_model(c, num_layers=10**12), r"model\.num_layers is 1000000000000"),
        (lambda c: replace_model(c, num_layers=2), r"policy\.layers is 3, expected .* 2 layers"),
        (lambda c: replace_model(c, num_kv_heads=3), r"num_kv_heads is 3, expected a divisor"),
        (lambda c: replace_model(c, num_kv_heads=1), r"policy\.layers\[0\]: heads .*expected 1"),
        (lambda c: replace_model(c, grid=Grid(0, 24)), r"model\.grid\.height is 0, expected 1 to"),
        (lambda c: replace_model(c, grid=Grid(24, 25)), r"policy\.grid is .24 x 24., .* 24 x 25"),
        (lambda c: replace_model(c, rows_per_image=3), r"rows_per_image is 3, expected 1, or 2"),
        (lambda c: replace_vq(c, (1,) * 11), r"channel_multipliers is 11, expected a list of 1 to"),
        (lambda c: replace_vq(c, (0,)), r"channel_multipliers\[0\] is 0, expected 1 to"),
        (lambda c: replace_model(c, max_positions=600), r"policy\.prompt_slots is 64, .*1 to 24"),
        (lambda c: replace_model(c, codebook_size=65), r"graphs\.prefill\.inputs\[2\]\.shape is"),
        (lambda c: replace_model(c, vocab_size=99), r"text_embeddings\.shape is \[100, 32\]"),
        (lambda c: replace(c, dtype="float32"), r"text_embeddings\.dtype is .float16., expected"),
        (lambda c: replace(c, layers_of_the_model=2), "layers_of_the_model is 2, expected 3"),
        (lambda c: replace(c, graphs={}), r"graphs is \[\], expected one named decode_step"),
        (lambda c: replace(c, model_name="a\nb"), "model_name is .*expected one line"),
        (
            lambda c: replace(c, policy=replace(c.policy, head_order=((0, 0),) * 3)),
            "layer 0: the head order is not a permutation",
        ),
        (
            lambda c: replace(c, policy=replace(c.policy, kv_dtype="int4")),
            "unknown --kv-dtype 'int4'",
        ),
        *(
            (
                lambda c, tokens=tokens: replace(c, policy=replace(c.policy, lookahead=tokens)),
                rf"policy\.lookahead is {tokens}, expected 2 to 64",
            )
            for tokens in (0, 1, -8, 65, 10**12)
        ),
        (
            lambda c: replace(c, policy=replace(c.policy, lookahead=64)),
            r"layer 0: \d+ image slots and evict_every=\d+ are not multiples of lookahead=64",
        ),
        (
            lambda c: replace(c, generation=replace(c.generation, cfg_scale=1e39)),
            r"cfg_scale 1e\+39 is outside",
        ),
        (
            lambda c: replace(c, graphs={**c.graphs, "evil": c.graphs["prefill"]}),
            r"graphs\.evil is .evil., expected one of prefill",
        ),
    ],
)
def test_values_of_the_right_type_that_cannot_be(
    change: Callable[[BundleConfig], BundleConfig], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(to_json(change(small_config())).encode(), "ssd_config.json")


def replace_model(config: BundleConfig, **changes: object) -> BundleConfig:
    return replace(config, model=replace(config.model, **changes))


def replace_vq(config: BundleConfig, multipliers: tuple[int, ...]) -> BundleConfig:
    return replace_model(config, vq=replace(config.model.vq, channel_multipliers=multipliers))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: replace(c.text_embeddings, offset=1), r"end at byte 6401 and .* has 6400"),
        (lambda c: replace(c.text_embeddings, file="/etc/passwd"), "has no /etc/passwd"),
        (lambda c: replace(c.text_embeddings, file="../outside"), r"has no \.\./outside"),
        (lambda c: replace(c.text_embeddings, file="tokenizer.json"), "tokenizer.json has 2;"),
    ],
)
def test_the_embeddings_stand_inside_a_file_of_the_bundle(
    tmp_path: Path, change: Callable, message: str
) -> None:
    config = small_config()
    path = written(
        tmp_path / "b", to_json(replace(config, text_embeddings=change(config))).encode()
    )
    with pytest.raises(UserError, match=message):
        open_bundle(path)


def test_a_graph_without_its_file_is_named(tmp_path: Path) -> None:
    from tests.scene_bundles import rewrite_manifest

    path = write_small_bundle(tmp_path / "b", small_config())
    (path / "onnx" / "prefill.onnx").unlink()
    rewrite_manifest(path)
    with pytest.raises(UserError, match="has no onnx/prefill.onnx; export it again"):
        open_bundle(path)
