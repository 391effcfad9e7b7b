"""Modules without initial values: their shapes, and what torch loads to make them."""

import subprocess
import sys

import torch

from ssd_export.model.uninitialized import shapes_alone

OPEN_A_CHECKPOINT = """
import sys
from ssd_export.export.exporter import ExportSpec, plan_export
from ssd_export.model.load import load_image_decoder, load_model

checkpoint = plan_export(ExportSpec(model="demo", budget=0.2)).checkpoint
load_model(checkpoint), load_image_decoder(checkpoint)
print("torch._dynamo" in sys.modules)
"""


def test_modules_have_shapes_and_no_memory() -> None:
    with shapes_alone():
        module = torch.nn.Embedding(1 << 40, 1 << 20)
    assert module.weight.shape == (1 << 40, 1 << 20) and module.weight.is_meta


def test_reading_a_checkpoint_does_not_load_torchs_compiler() -> None:
    """It takes 100 MB and a second or two, and nothing is compiled."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_A_CHECKPOINT], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
