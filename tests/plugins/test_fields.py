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
from ssd_export.export.plugin_flavor import KINDS, OF_GROUPS, OF_LAYER, STEP, NodeKind
from ssd_export.kernels.image import KERNELS, NODE_KERNELS, KernelCode, KernelImage, Variant
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
}
KERNEL_PARTS = ("image", "name", "shared_bytes")


def declared_fields() -> dict[str, str]:
    """Field name -> the table in attention_fields.cpp that it stands in."""
    source = (SOURCES / "attention_fields.cpp").read_text()
    tables = re.findall(r"constexpr \w+ (k\w+)\[\] = \{\n(.*?)\n\};", source, re.DOTALL)
    rows = {
        table: re.findall(r'^    \{"(\w+)", &Fields::(\w+)[,}]', body, re.MULTILINE)
        for table, body in tables
    }
    assert all(name == member for table in rows.values() for name, member in table)
    return {name: table for table, names in rows.items() for name, _ in names}


def declared_kinds() -> dict[str, dict[str, object]]:
    """What node_kind.cpp says of each kind, by its name."""
    source = (SOURCES / "node_kind.cpp").read_text()
    tables = dict(re.findall(r"constexpr \w+ (k\w+)\[\] = \{(.*?)\};", source, re.DOTALL))
    names = {table: tuple(re.findall(r'"(\w+)"', body)) for table, body in tables.items()}
    names["none"] = ()
    found = {}
    kinds = re.findall(r"^NodeKind const k\w+\{(.*?)^\};", source, re.DOTALL | re.MULTILINE)
    for body in kinds:
        body = re.sub(r"//.*", "", body).replace("{nullptr, 0}", "table_of(none)")
        name, version = re.findall(r'"(\w+)"', body)
        inputs, outputs, kernels = (names[one] for one in re.findall(r"table_of\((\w+)\)", body))
        found[name] = {
            "version": version,
            "inputs": inputs,
            "outputs": outputs,
            "kernels": kernels,
            "has_places": "true" in body,
        }
    return found


def test_fields_are_the_attributes_of_the_node() -> None:
    attributes = NODE.attributes() | {name: [1] for name in OF_GROUPS}
    assert attributes.keys() == {*OF_GROUPS, *OF_LAYER}
    attributes |= IMAGE.attributes(dict.fromkeys(KERNELS, b"image"))
    of_kernels = {
        f"kernel_{name}_{part}" for name in NODE_KERNELS[OP_TYPE] for part in KERNEL_PARTS
    }
    assert attributes.keys() >= of_kernels
    assert declared_fields() == {
        name: ONNX_TYPES[type(value)]
        for name, value in attributes.items()
        if name not in of_kernels
    }
    macro = (SOURCES / "node_kind.cpp").read_text().partition("#define SSD_KERNEL(kernel)")[2]
    parts = [f'"kernel_" kernel "_{part}"' for part in KERNEL_PARTS]
    assert re.findall(r'"kernel_" kernel "_\w+"', macro) == parts


def test_the_python_stand_in_declares_the_same_fields() -> None:
    stand_in = dict.fromkeys(python_plugin.INTEGERS, "kIntegers")
    stand_in |= dict.fromkeys(python_plugin.LISTS, "kLists")
    stand_in |= dict.fromkeys(python_plugin.REALS, "kReals")
    stand_in |= dict.fromkeys(python_plugin.TEXTS, "kTexts")
    assert stand_in == declared_fields()


def test_kinds_are_the_exporter_s() -> None:
    header = (HEADERS / "node_kind.h").read_text()
    assert f'kPluginNamespace[] = "{DOMAIN}"' in header
    assert STEP.op_type == OP_TYPE
    assert declared_kinds() == {
        kind.op_type: {
            "version": kind.version,
            "inputs": kind.inputs,
            "outputs": kind.outputs,
            "kernels": NODE_KERNELS[kind.op_type],
            "has_places": kind is not STEP,
        }
        for kind in KINDS
    }


FUNCTIONS = {
    "of_layer": ("layer_launch", "layer_attention", "decode_layer_kernel"),
    "of_part": ("layer_launch", "split_attention", "attend_split_kernel"),
    "of_sum": ("layer_launch", "split_attention", "combine_splits_kernel"),
    "of_evict": ("window_launch", "window_attention", "evict_window_kernel"),
    "of_attend": ("window_launch", "window_attention", "attend_window_kernel"),
    "of_write": ("window_launch", "window_attention", "write_window_kernel"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_are_the_kernel_s_in_order(function: str) -> None:
    launcher, file, kernel_name = FUNCTIONS[function]
    tree = ast.parse((ROOT / "ssd_export" / "kernels" / f"{file}.py").read_text())
    kernel = next(node for node in tree.body if getattr(node, "name", "") == kernel_name)
    parameters = [argument.arg for argument in kernel.args.args if argument.annotation is None]
    source = (SOURCES / f"{launcher}.cpp").read_text()
    passed = re.search(rf" {function}\(.*?places_of\((.*?)\);", source, re.DOTALL)[1]
    assert re.findall(r"\ba\.(\w+)", passed) == [*parameters, "scratch", "scratch"]


def test_numbers_that_both_sides_know_are_the_same() -> None:
    header = (HEADERS / "attention_fields.h").read_text()
    assert f"kMaxGroups = {MAX_GROUPS};" in header
    kernels = (ROOT / "ssd_export" / "kernels" / "constants.py").read_text()
    filled = re.search(r"PROGRAMS_A_MULTIPROCESSOR = (\d+)", kernels)[1]
    source = (SOURCES / "layer_launch.cpp").read_text()
    assert f"kProgramsAMultiprocessor = {filled};" in source


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.op_type)
def test_places_of_inputs_are_the_kind_s(kind: NodeKind) -> None:
    header = (HEADERS / "node_kind.h").read_text()
    places = {name: int(place) for name, place in re.findall(r"\bk(\w+) = (\d)", header)}
    spelled = {name: "".join(part.title() for part in name.split("_")) for name in kind.inputs}
    assert [places[spelled[name]] for name in kind.inputs] == list(range(len(kind.inputs)))


def test_parts_of_a_cache_are_the_exporter_s() -> None:
    names = re.search(r"kPartNames\[\] = \{(.*?)\};", (SOURCES / "layer_shapes.cpp").read_text())
    parts = part_names(Rule(0, 0, True), "model")
    assert re.findall(r'"(\w+)"', names[1]) == [f"past_{part}" for part in parts]
