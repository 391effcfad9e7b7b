"""Writes a class for each of TensorRT's abstract ones whose functions all end the process, from the
headers of any version: a double then defines those that are called.

    python write_stubs.py INCLUDE_DIR stubs.h
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CLASSES = ("VRuntime", "VCudaEngine", "VExecutionContext", "VRuntimeConfig", "VRuntimeCache",
           "VHostMemory", "IPluginRegistry")  # fmt: skip
HEADERS = ("NvInferImpl.h", "NvInferRuntimeCommon.h")


def stub(name: str, body: str) -> str:
    """The class `name`Stub."""
    parent = f"nvinfer1::apiv::{name}" if name.startswith("V") else f"nvinfer1::{name}"
    lines = [f"class {name}Stub : public {parent} {{", "public:"]
    for signature in re.findall(r"virtual\s+([^;{}]*?\([^;{}]*?)\s*=\s*0\s*;", body):
        text = " ".join(signature.split())
        if "~" not in text:
            called = re.search(r"(\w+)\s*\(", text)
            assert called is not None, text
            lines.append(f'    {text} override {{ unused("{name}::{called[1]}"); }}')
    return "\n".join([*lines, "};"])


def main(include: Path, target: Path) -> None:
    """Writes the stubs of the classes that this version has."""
    text = "\n".join((include / header).read_text() for header in HEADERS)
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    found = {
        name: re.search(rf"class {name}\b[^;{{]*\{{(.*?)\n\}};", text, re.DOTALL)
        for name in CLASSES
    }
    stubs = [stub(name, match[1]) for name, match in found.items() if match]
    head = "#pragma once\nusing namespace nvinfer1;\n[[noreturn]] void unused(char const* call);\n"
    target.write_text(head + "\n".join(stubs) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
