"""The torch runner: made from modules, and on a GPU the Triton kernel or one clear error."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssd_export.bundle import open_bundle
from ssd_export.cache.attention import decode_layer
from ssd_export.cache.window_attention import attend_layer_window
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.load import load_image_decoder, load_model
from ssd_export.model.permuted_heads import PermutedHeads
from ssd_export.policy.make import make_policy
from ssd_export.policy.schedule import eviction_steps
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import PromptBatches
from ssd_export.runtime.torch_runner import TorchRunner, step_attention, window_attention
from ssd_export.runtime.torch_weights import load_modules
from ssd_export.sampling import Sampling
from tests.janus_checkpoints import TinyJanus
from tests.kernels.interpreted import interpreted
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint, head_map_file

TINY = TinyJanus(seed=3, num_kv_heads=2)
MANY_HEADS = TinyJanus(seed=3)
TABLE = make_policy("h2o", open_checkpoint(checkpoint(TINY)).config, budget=0.2, prompt_slots=32)


@pytest.mark.slow
def test_a_checkpoint_s_modules_generate_what_its_bundle_does() -> None:
    """Heads of the bundle are permuted in the weights, those of the checkpoint on the way."""
    folder = checkpoint(MANY_HEADS)
    opened = open_bundle(bundle(folder, "ssd-row", 0.2, head_map=str(head_map_file(folder))))
    table, source = opened.config.policy, open_checkpoint(folder)
    assert any(order != tuple(sorted(order)) for order in table.head_order), "nothing is permuted"
    model = PermutedHeads(load_model(source), table)
    generated = []
    for runner in (
        TorchRunner(model, load_image_decoder(source), table),
        TorchRunner.from_bundle(opened, num_threads=1),
    ):
        with ImageGenerator(opened, runner) as generator:
            generated.append(generator(PROMPTS[:2], seed=7))
    np.testing.assert_array_equal(generated[0].tokens, generated[1].tokens)
    for ours, theirs in zip(generated[0].images, generated[1].images, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_without_an_image_decoder_there_are_no_pixels() -> None:
    runner = TorchRunner(load_model(open_checkpoint(checkpoint(TINY))), None, TABLE)
    with pytest.raises(ValueError, match="without an image decoder"):
        runner.decode_image(np.zeros((1, 576), np.int32))


def test_the_cpu_has_the_reference() -> None:
    assert step_attention("cpu", TABLE) is decode_layer
    assert window_attention("cpu") is attend_layer_window
    assert step_attention("cpu", replace(TABLE, kv_dtype="int8")) is decode_layer


def test_a_gpu_has_the_kernel() -> None:
    kernel = pytest.importorskip(
        "ssd_export.kernels.layer_attention", reason="needs Triton: ssd-export[kernels]"
    )
    assert step_attention("cuda", TABLE) is step_attention("cuda:1", TABLE)
    assert step_attention("cuda", TABLE) is kernel.decode_layer
    from ssd_export.kernels.window_attention import attend_layer_window as of_window

    assert window_attention("cuda") is of_window


def test_a_gpu_without_the_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no int8 keys and values; use --provider cpu"):
        step_attention("cuda", replace(TABLE, kv_dtype="int8"))
    for name in [name for name in sys.modules if name.startswith("ssd_export.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"needs Triton.*ssd-export\[kernels\].*--provider cpu"):
        step_attention("cuda", TABLE)


PREPARED = """
import numpy as np, sys, torch
from ssd_export.bundle import open_bundle
from ssd_export.graph_spec import CacheTensor
from functools import partial
from ssd_export.kernels.layer_attention import decode_layer
from ssd_export.kernels.window_attention import attend_layer_window
from ssd_export.policy.schedule import rooms
from ssd_export.runtime.loop import decode, single_steps
from ssd_export.runtime.prompt_batch import PromptBatches, bundle_sampling
from ssd_export.runtime.torch_runner import TorchRunner
from ssd_export.runtime.torch_weights import load_modules

opened = open_bundle(sys.argv[1])
table, start = opened.config.policy, int(sys.argv[2])
modules = load_modules(opened, opened.config.model, "cpu")
batch = PromptBatches.from_bundle(opened)(["a red circle"], bundle_sampling(opened), 1)
kernel = partial(decode_layer, num_splits=int(sys.argv[3]))
reference = TorchRunner(*modules, table)
runner = TorchRunner(*modules, table, attention=kernel, window=attend_layer_window)
places = [
    CacheTensor(layer, index, kind)
    for layer, groups in enumerate(table.layers)
    for index, group in enumerate(groups)
    for kind in ("key", "value", "position", "score")[: 3 + group.rule.by_score]
]
loop = decode(reference, batch, table, single_steps(start + 5))
for steps in loop:
    if steps.stop == start:
        break
ours = decode(runner, batch, table, single_steps(start + 5, first=start))
next(ours)
for place in places:
    runner.write_cache(place, reference.read_cache(place))
for step in range(start):
    runner.force_tokens(step, reference.tokens()[:, step])

def compare(what):
    np.testing.assert_array_equal(runner.tokens(), reference.tokens(), what)
    np.testing.assert_allclose(runner.logits(), reference.logits(), atol=1e-4)
    for place in places:
        values = runner.read_cache(place), reference.read_cache(place)
        np.testing.assert_allclose(*values, atol=0 if place.kind == "position" else 1e-4)
"""
STEPS = """
for (step,), _ in zip(loop, ours, strict=True):
    compare(f"step {step}")
"""
WINDOWS = """
room = np.array([rooms(table, lengths) for lengths in batch.lengths.reshape(2, 1).T.tolist()])
first, seen = np.array([start]), set()
for number in range(4):
    limit = np.minimum(room[[0], first], 3)
    drafts = np.repeat(reference.tokens()[:, first[0] - 1 : first[0]], 3, axis=1)[:, : limit[0]]
    drafts[:, 1:] += number % 2  # wrong ones, should the model go on repeating itself
    noise = lambda: np.zeros((1, limit[0], opened.config.model.codebook_size), np.float32)
    wanted, ours = (one.decode_window(first, limit, drafts, noise) for one in (reference, runner))
    for given, expected in zip(ours, wanted):
        np.testing.assert_array_equal(given, expected)
    compare(f"window {number}")
    seen.add((limit[0], wanted[1][0]))
    first = first + wanted[1]
assert any(kept < most for most, kept in seen), f"no draft was rejected: {seen}"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "num_splits", "lookahead"), [(STEPS, 1, None), (STEPS, 3, None), (WINDOWS, 1, 4)]
)
def test_the_kernels_generate_what_the_reference_does(
    work: str, num_splits: int, lookahead: int | None
) -> None:
    """Interpreted on the CPU, over the steps in which the scored groups evict."""
    folder = checkpoint(TINY)
    head_map = str(head_map_file(folder))
    path = bundle(folder, "ssd-row", 0.06, head_map=head_map, lookahead=lookahead)
    opened = open_bundle(path)
    length = PromptBatches.from_bundle(opened)(["a red circle"], Sampling(), 1).lengths[0]
    start = min(eviction_steps(opened.config.policy, [length])) - 2
    interpreted("-c", PREPARED + work, path, str(start), str(num_splits))


def test_a_prompt_is_computed_once_however_many_rows_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = open_bundle(bundle(checkpoint(TINY), "h2o", 0.2))
    model, _ = load_modules(opened, opened.config.model, "cpu")
    rows: list[int] = []
    forward = type(model).forward

    def counted(self: object, hidden: torch.Tensor, *others: object) -> torch.Tensor:
        rows.append(len(hidden))
        return forward(self, hidden, *others)

    monkeypatch.setattr(type(model), "forward", counted)
    batch = PromptBatches.from_bundle(opened)(
        [PROMPTS[0], PROMPTS[1], PROMPTS[0]], Sampling(), seed=1
    )
    first, place = batch.different_rows()
    assert first.tolist() == [0, 1, 3, 4] and place.tolist() == [0, 1, 0, 2, 3, 2]
    alone = replace(batch, embeds=batch.embeds[[0, 3]], lengths=batch.lengths[[0, 3]])
    alone = replace(alone, images=batch.images[:1], sampling=batch.sampling[:1])
    caches, logits = [], []
    for one in (batch, alone):
        with closing(TorchRunner(model, None, opened.config.policy)) as runner:
            runner.prefill(one)
            tensors = opened.config.graphs["decode_step"].cache_inputs
            caches.append([runner.read_cache(tensor) for tensor in tensors])
            logits.append(runner.logits())
    assert rows == [4, 2]
    for many, single in zip(*caches, strict=True):
        for row, wanted in ((0, 0), (2, 0), (3, 1), (5, 1)):
            np.testing.assert_allclose(many[row], single[wanted], atol=1e-5)
    np.testing.assert_allclose(logits[0][[0, 2, 3, 5]], logits[1][[0, 0, 1, 1]], atol=1e-4)
