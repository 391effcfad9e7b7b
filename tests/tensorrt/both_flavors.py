"""Builds the plain and the plugin flavor of one bundle and prints the engine.json of each, as JSON
lines.

A separate process, because what is registered with TensorRT stays: python -m
tests.tensorrt.both_flavors BUNDLE. The plugin is the Python class of
tests/plugins/python_plugin.py; kernels come from $SSD_EXPORT_KERNELS.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt.build import build_engines
from ssd_export.tensorrt.flavors import load_flavor
from ssd_export.tensorrt.plan import BuildSpec, plan_build
from ssd_export.tensorrt.target import Batch
from tests.plugins.python_plugin import register


def main(bundle: Path) -> None:
    build_plan.gpu_here = lambda: None  # the same engines on every machine
    creator = register(load_flavor("tensorrt-rtx").trt)
    for plugin in ("off", "on"):
        spec = BuildSpec(
            bundle, "ada", plugin=plugin, top_k=True, batch=Batch(1, 1, 2), lookahead=8
        )
        print(json.dumps(asdict(build_engines(plan_build(spec, library=lambda: None)))), flush=True)
    del creator


if __name__ == "__main__":
    main(Path(sys.argv[1]))
