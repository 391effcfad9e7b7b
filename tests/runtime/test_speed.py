"""One greedy picture of the demo model: ONNX Runtime against transformers' own generate, one thread each."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import JanusForConditionalGeneration

from ssd_export.demo.tokenizer import train_tokenizer
from ssd_export.export.exporter import DEMO_CHECKPOINT
from ssd_export.runtime.generate import ImageGenerator
from tests.janus_checkpoints import oracle_tokens
from tests.runtime.checkpoints import bundle

LEAST_RATIO = 5.0
PROMPTS = ("a red circle above a blue square on white",)


@pytest.mark.skipif(not DEMO_CHECKPOINT.is_dir(), reason="needs the demo checkpoint")
def test_five_times_faster_than_transformers_on_one_thread() -> None:
    model = JanusForConditionalGeneration.from_pretrained(DEMO_CHECKPOINT, dtype=torch.float32).eval()
    generator = ImageGenerator.from_bundle(bundle(DEMO_CHECKPOINT, "full", 1.0), num_threads=1)
    tokenizer, threads = train_tokenizer(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator(PROMPTS, cfg_scale=2.0, temperature=0)  # loads the graphs
        ours = _seconds(lambda: generator(PROMPTS, cfg_scale=2.0, temperature=0))
        theirs = _seconds(lambda: oracle_tokens(model, tokenizer, PROMPTS, 2.0))
    finally:
        torch.set_num_threads(threads)
    print(f"transformers {theirs:.2f} s, ONNX Runtime {ours:.2f} s, ratio {theirs / ours:.1f}")
    assert theirs / ours >= LEAST_RATIO, f"transformers {theirs:.2f} s, ONNX Runtime {ours:.2f} s"


def _seconds(work: object) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
