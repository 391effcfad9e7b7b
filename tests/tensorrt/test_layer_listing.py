"""What the builder lists is understood, and a buffer that is overwritten too early is found."""

from __future__ import annotations

from ssd_export.tensorrt.layer_listing import (
    Layer,
    Operand,
    hazards,
    parse_listing,
    unordered_dependencies,
)

LINE = (
    "\nName: {name}, LayerType: {kind}, Inputs: [{inputs}], Constants: [], Outputs: [{outputs}],"
    " TacticName: x_0x1, StreamId: {stream}{event}, Metadata: [ONNX Layer: a]"
)
TENSOR = (
    "{{ Name: {}, Dimensions: [2,-1], Strides: [4,1], StrideOrder: [1,0], Datatype: Half, Format:"
    " (Linear) Row major linear format }}"
)
ALIASES = {"present": "past"}


def listing(*lines: tuple[str, str, list[str], list[str], int, int | None]) -> str:
    texts = [
        LINE.format(
            name=name,
            kind=kind,
            inputs=", ".join(map(TENSOR.format, inputs)),
            outputs=", ".join(map(TENSOR.format, outputs)),
            stream=stream,
            event="" if event is None else f", EventId: {event}",
        )
        for name, kind, inputs, outputs, stream, event in lines
    ]
    return "Layers:" + "".join(texts)


def step(name: str, reads: str = "", writes: str = "", stream: int = 0) -> Layer:
    def tensors(names: str) -> tuple[Operand, ...]:
        return tuple(Operand(name, (1,), "Half") for name in names.split())

    return Layer(name, "kgen", tensors(reads), tensors(writes), stream)


def signal(event: int, stream: int) -> Layer:
    return Layer(f"signal {event}", "signal", stream=stream, event=event)


def wait(event: int, stream: int) -> Layer:
    return Layer(f"wait {event}", "wait", stream=stream, event=event)


def test_layers_tensors_streams_and_events_are_read() -> None:
    text = listing(
        ("a_myl0_0", "kgen", ["past", "w"], ["x"], 1, None),
        ("b_myl0_1", "signal", [], [], 1, 7),
    )
    ((first, second),) = parse_listing(text)
    assert first.inputs == (Operand("past", (2, -1), "Half"), Operand("w", (2, -1), "Half"))
    assert (first.kind, first.outputs, first.stream) == (
        "kgen",
        (Operand("x", (2, -1), "Half"),),
        1,
    )
    assert (second.kind, second.event, second.inputs) == ("signal", 7, ())
    assert Operand("y", (2, 3), "Half").num_bytes == 12


def test_profiles_are_told_apart_by_their_marks_or_their_compiler_runs() -> None:
    text = listing(
        ("a_myl0_0", "kgen", ["past"], ["x"], 0, None),
        ("b_myl1_0", "kgen", ["past"], ["x"], 0, None),
        ("c_myl1_1", "kgen", ["x"], ["present"], 0, None),
    )
    assert [[layer.name for layer in layers] for layers in parse_listing(text, 2)] == [
        ["a_myl0_0"],
        ["b_myl1_0", "c_myl1_1"],
    ]
    marked = listing(
        ("a_myl1_0", "kgen", ["past"], ["x"], 0, None),
        ("attend", "PluginV3", ["x"], ["y"], 0, None),
        ("a_myl3_0", "kgen", ["past [profile 1]"], ["x"], 0, None),
        ("shapes_myl5_0", "shape_call", [], [], 0, None),
        ("attend [profile 1]", "PluginV3", ["x"], ["y"], 0, None),
    )
    first, second = parse_listing(marked, 2)
    assert [layer.name for layer in first] == ["a_myl1_0", "attend"]
    assert [layer.name for layer in second] == ["a_myl3_0", "shapes_myl5_0", "attend"]
    assert second[0].reads("past"), "the mark is no part of a name"


def test_tensorrt_s_own_form_lists_kinds_alone() -> None:
    text = "Engine Layer Information:\nLayer(Myelin): x, Tactic: 0\nLayer(PluginV3): y, Tactic: 1"
    ((first, second),) = parse_listing(text)
    assert (first.kind, second.kind) == ("Myelin", "PluginV3")
    assert parse_listing("") == []


def test_a_reader_before_the_writer_is_safe_on_one_stream_and_across_a_signal() -> None:
    one_stream = [step("read", "past", "x"), step("write", "x", "present")]
    assert hazards(one_stream, ALIASES) == []
    two = [
        step("read", "past", "x", stream=1),
        signal(3, 1),
        wait(3, 0),
        step("write", "y", "present"),
    ]
    assert hazards(two, ALIASES) == []
    assert len(hazards([layer for layer in two if layer.kind == "kgen"], ALIASES)) == 1, "no signal"
    assert len(hazards([two[0], signal(4, 1), *two[2:]], ALIASES)) == 1, "another signal"
    assert len(hazards([signal(3, 1), two[0], *two[2:]], ALIASES)) == 1, "signaled before it reads"


def test_a_reader_behind_the_writer_is_found() -> None:
    late = [step("write", "x", "present"), step("read", "past", "y")]
    assert hazards(late, ALIASES) == [
        "read (stream 0) reads past, which write (stream 0) overwrites"
    ]


def test_a_kernel_that_reduces_and_overwrites_is_found_and_a_copy_is_not() -> None:
    assert hazards([step("both", "past x", "present")], ALIASES) == [
        "both reads past and overwrites it in the same kernel"
    ]
    assert hazards([step("move", "past", "present")], ALIASES) == []
    renamed = [step("scatter", "present row", "present"), step("attend", "present", "out")]
    assert hazards(renamed, ALIASES) == [], "the builder has made one tensor of both"


def test_a_read_that_nothing_orders_is_found() -> None:
    assert unordered_dependencies([step("a", "", "x", 0), step("b", "x", "", 1)]) == [
        "b reads x of a"
    ]
    ordered = [step("a", "", "x", 0), signal(1, 0), wait(1, 1), step("b", "x", "", 1)]
    assert unordered_dependencies(ordered) == []
