"""The smallest ONNX model, y = x + x, as bytes: a board has onnxruntime and not onnx.

Protocol Buffers: a field is its number and wire type, (number << 3) | type, then a varint (type 0)
or a length and that many bytes (type 2). Field numbers: onnx.proto3.
"""

from __future__ import annotations

IR_VERSION, OPSET = 8, 18  # what the oldest onnxruntime reads
FLOAT = 1  # TensorProto.DataType
VALUE = 3.0  # of the input [1]; the output is twice as much


def one_node_model() -> bytes:
    """A ModelProto whose graph takes x float32 [1] and gives y = x + x."""
    node = _text(1, "x") + _text(1, "x") + _text(2, "y") + _text(4, "Add")
    graph = (
        _field(1, node) + _text(2, "one_node") + _field(11, _value("x")) + _field(12, _value("y"))
    )
    return _number(1, IR_VERSION) + _field(7, graph) + _field(8, _number(2, OPSET))


def _value(name: str) -> bytes:
    """A ValueInfoProto: float32 [1]."""
    shape = _field(1, _number(1, 1))
    return _text(1, name) + _field(2, _field(1, _number(1, FLOAT) + _field(2, shape)))


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the top bit set on all but the last."""
    high = b""
    while value >= 128:
        high += bytes([value & 127 | 128])
        value >>= 7
    return high + bytes([value])
