"""The C++ plugin reads the fields that the exporter writes and passes the arguments that the kernel
takes.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ssd_export.export.functions import DOMAIN, OP_TYPE, AttentionNode
from ssd_export.export.plugin_flavor import PLUGIN_VERSION
from ssd_export.kernels.image import KernelImage, Variant
from ssd_export.policy.table import Rule
from tests.plugins import python_plugin

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins" / "src"
NODE = AttentionNode(Rule(-1, 6, True, age_quota=True), 21, 2, 6, 1.0, 1, 16, "float16", True, 24)
IMAGE = KernelImage(75, Variant("float16", 16), "k", 4, 0, 32, 1024, 80, "k.ptx", "", "k.cubin", "")
ONNX_TYPES = {int: "kIntegers", float: "kReals", str: "kTexts", bytes: "kTexts"}


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
    attributes = NODE.attributes() | IMAGE.attributes(b"image")
    assert declared_fields() == {
        name: ONNX_TYPES[type(value)] for name, value in attributes.items()
    }


def test_the_python_stand_in_declares_the_same_fields() -> None:
    stand_in = dict.fromkeys(python_plugin.INTEGERS, "kIntegers") | dict.fromkeys(
        python_plugin.REALS, "kReals"
    )
    stand_in |= dict.fromkeys(python_plugin.IMAGES + python_plugin.TEXTS, "kTexts")
    assert stand_in == declared_fields()


def test_name_and_namespace_are_the_node_s() -> None:
    header = (ROOT / "plugins" / "include" / "ssd_export" / "decode_attention_plugin.h").read_text()
    assert f'kPluginName[] = "{OP_TYPE}"' in header
    assert f'kPluginNamespace[] = "{DOMAIN}"' in header
    assert f'kPluginVersion[] = "{PLUGIN_VERSION}"' in header


# What the plugin passes for a parameter of the kernel, where the names differ.
PASSED = {
    "query_ptr": "inputs[kQuery]",
    "key_ptr": "inputs[kKey]",
    "value_ptr": "inputs[kValue]",
    "position_ptr": "inputs[kPosition]",
    "prompt_length_ptr": "inputs[kPromptLength]",
    "cache_key_ptr": "inputs[kPastKey]",
    "cache_value_ptr": "inputs[kPastValue]",
    "cache_position_ptr": "inputs[kPastPosition]",
    "cache_score_ptr": "score",
    "logits_ptr": "workspace",
    "out_ptr": "outputs[0]",
    "key_stride": "token_stride",
    "value_stride": "token_stride",
}


def kernel_parameters() -> list[str]:
    tree = ast.parse((ROOT / "ssd_export" / "kernels" / "decode_attention.py").read_text())
    kernel = next(
        node for node in tree.body if getattr(node, "name", "") == "decode_attention_kernel"
    )
    return [argument.arg for argument in kernel.args.args if argument.annotation is None]


def test_arguments_are_the_kernel_s_in_order() -> None:
    source = (SOURCES / "decode_attention_plugin.cpp").read_text()
    passed = (
        re.search(r"const\* arguments\[\] = \{(.*?)\};", source, re.DOTALL)[1]
        .replace("\n", " ")
        .split(",")
    )
    names = [
        re.sub(r"^&(fields_\.|sizes\.)?", "", argument.strip())
        for argument in passed
        if argument.strip()
    ]
    assert names == [PASSED.get(name, name) for name in kernel_parameters()] + [
        "scratch",
        "scratch",
    ]


def test_inputs_and_outputs_are_the_node_s() -> None:
    """In the order of the node contract in export/functions.py; tests/export checks that the graph
    keeps to it.
    """
    source = (SOURCES / "decode_attention_plugin.cpp").read_text()
    given = re.search(r"kInputNames\[\] = \{(.*?)\};", source, re.DOTALL)[1]
    wanted = [
        "query",
        "key",
        "value",
        "position",
        "prompt_length",
        "past_key",
        "past_value",
        "past_position",
    ]
    assert re.findall(r'"(\w+)"', given) == [*wanted, "past_score"]
