"""The C++ plugin reads the fields that the exporter writes and passes the arguments that the kernel
takes.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from ssd_export.bundle.graphs import part_names
from ssd_export.export.functions import DOMAIN, OP_TYPE, AttentionNode
from ssd_export.export.plugin_flavor import OF_GROUPS, OF_LAYER, PLUGIN_VERSION
from ssd_export.kernels.image import KERNELS, KernelCode, KernelImage, Variant
from ssd_export.policy.presets import MAX_GROUPS
from ssd_export.policy.table import Rule
from tests.plugins import python_plugin

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins" / "src"
HEADERS = ROOT / "plugins" / "include" / "ssd_export"
NODE = AttentionNode(Rule(-1, 6, True, age_quota=True), 21, 2, 6, 1.0, 1, 16, "float16", True, 24)
CODES = dict.fromkeys(KERNELS, KernelCode("k", 0, "k.ptx", "", "k.cubin", ""))
IMAGE = KernelImage(75, Variant("float16", 16), 4, 32, 1024, 32, 80, CODES)
ONNX_TYPES = {
    list: "kLists",
    int: "kIntegers",
    float: "kReals",
    str: "kTexts",
    bytes: "kTexts",
}


def declared_fields() -> dict[str, str]:
    """Field name -> the table in attention_fields.cpp that it stands in."""
    source = (SOURCES / "attention_fields.cpp").read_text()
    tables = re.findall(r"constexpr \w+ (k\w+)\[\] = \{\n(.*?)\n\};", source, re.DOTALL)
    rows = {
        table: re.findall(r'^    \{"(\w+)", &Fields::(\w+),', body, re.MULTILINE)
        for table, body in tables
    }
    assert all(name == member for table in rows.values() for name, member in table)
    return {name: table for table, names in rows.items() for name, _ in names}


def test_fields_are_the_attributes_of_the_node() -> None:
    attributes = NODE.attributes() | {name: [1] for name in OF_GROUPS}
    assert attributes.keys() == {*OF_GROUPS, *OF_LAYER}
    attributes |= IMAGE.attributes(dict.fromkeys(KERNELS, b"image"))
    assert declared_fields() == {
        name: ONNX_TYPES[type(value)] for name, value in attributes.items()
    }


def test_the_python_stand_in_declares_the_same_fields() -> None:
    stand_in = dict.fromkeys(python_plugin.INTEGERS, "kIntegers")
    stand_in |= dict.fromkeys(python_plugin.LISTS, "kLists")
    stand_in |= dict.fromkeys(python_plugin.REALS, "kReals")
    stand_in |= dict.fromkeys(python_plugin.IMAGES + python_plugin.TEXTS, "kTexts")
    assert stand_in == declared_fields()


def test_name_and_namespace_are_the_node_s() -> None:
    header = (HEADERS / "decode_attention_plugin.h").read_text()
    assert f'kPluginName[] = "{OP_TYPE}"' in header
    assert f'kPluginNamespace[] = "{DOMAIN}"' in header
    assert f'kPluginVersion[] = "{PLUGIN_VERSION}"' in header


FUNCTIONS = {
    "of_layer": ("layer_attention", "decode_layer_kernel"),
    "of_part": ("split_attention", "attend_split_kernel"),
    "of_sum": ("split_attention", "combine_splits_kernel"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_are_the_kernel_s_in_order(function: str) -> None:
    file, kernel_name = FUNCTIONS[function]
    tree = ast.parse((ROOT / "ssd_export" / "kernels" / f"{file}.py").read_text())
    kernel = next(node for node in tree.body if getattr(node, "name", "") == kernel_name)
    parameters = [argument.arg for argument in kernel.args.args if argument.annotation is None]
    source = (SOURCES / "layer_launch.cpp").read_text()
    passed = re.search(rf" {function}\(.*?places_of\((.*?)\);", source, re.DOTALL)[1]
    assert re.findall(r"\ba\.(\w+)", passed) == [*parameters, "scratch", "scratch"]


def test_numbers_that_both_sides_know_are_the_same() -> None:
    header = (HEADERS / "attention_fields.h").read_text()
    assert f"kMaxGroups = {MAX_GROUPS};" in header
    kernels = (ROOT / "ssd_export" / "kernels" / "constants.py").read_text()
    filled = re.search(r"PROGRAMS_A_MULTIPROCESSOR = (\d+)", kernels)[1]
    source = (SOURCES / "layer_launch.cpp").read_text()
    assert f"kProgramsAMultiprocessor = {filled};" in source


def test_inputs_are_the_node_s() -> None:
    """In the order of the node contract in export/plugin_flavor.py, which
    tests/export/test_plugin_flavor.py checks.
    """
    header = (HEADERS / "layer_shapes.h").read_text()
    assert "kHeads = 0, kPosition = 1, kPromptLength = 2, kFirstCache = 3;" in header
    names = re.search(r"kPartNames\[\] = \{(.*?)\};", (SOURCES / "layer_shapes.cpp").read_text())
    parts = part_names(Rule(0, 0, True), "model")
    assert re.findall(r'"(\w+)"', names[1]) == [f"past_{part}" for part in parts]
