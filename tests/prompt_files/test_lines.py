"""Files of prompts: what they say, and one line with the line number for what is none."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssd_export.errors import UserError
from ssd_export.prompt_files import lines as module
from ssd_export.prompt_files.lines import MAX_PROMPT_CHARACTERS, PromptLine, read_prompts

JSON_TEXT = '{"prompt": "a", "seed": 7, "negative_prompt": "blue"}\n\n{"prompt": "b"}\n'
CSV_TEXT = 'seed,prompt,cfg_scale\r\n7,"a, b\r\nc",\r\n\r\n,d,2.5\r\n'
HALF = PromptLine("d", cfg_scale=2.5)
SEVENTH, DOG = PromptLine("7", seed=1, is_class=True), PromptLine("dog", is_class=True)


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n two \r\n# three", {1: "one", 3: "two", 4: "# three"}),
        ("a.txt", b"\xef\xbb\xbfone\x0btwo\n", {1: "one\x0btwo"}),
        ("a.TXT", "a\u2028b", {1: "a\u2028b"}),
        ("a.jsonl", JSON_TEXT, {1: PromptLine("a", "blue", 7), 3: PromptLine("b")}),
        ("a.jsonl", '{"prompt": "a", "seed": null}', {1: PromptLine("a")}),
        ("a.csv", CSV_TEXT, {2: PromptLine("a, b\r\nc", seed=7), 5: HALF}),
        ("a.csv", "\nprompt\na\n", {3: "a"}),
        ("a.jsonl", '{"class": 7, "seed": 1}\n{"class": "dog"}', {1: SEVENTH, 2: DOG}),
        ("a.csv", "class,prompt\n dog ,\n,a\n", {2: DOG, 3: "a"}),
        ("a.csv", "class,seed\n7,1\n", {2: SEVENTH}),
    ],
)  # fmt: skip
def test_lines_by_their_number(
    tmp_path: Path, name: str, content: bytes | str, expected: dict[int, PromptLine | str]
) -> None:
    wanted = {n: PromptLine(p) if isinstance(p, str) else p for n, p in expected.items()}
    assert read_prompts(written(tmp_path, name, content)) == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", r"does not end in .txt, .csv, .jsonl"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", b"one\ntw\xff", "line 2: not UTF-8"),
        ("a.txt", "a\n" + "x" * (MAX_PROMPT_CHARACTERS + 1), "line 2: prompt has 32001 characters"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("a.jsonl", '["a"]', r"line 1: the whole is \[\"a\"\], expected an object"),
        ("a.jsonl", "[" * 100_000, "line 1: (nested|not)"),
        ("a.jsonl", '\n{"seed": 1}', "line 2: prompt is missing"),
        ("a.jsonl", '{"prompt": 3}', "line 1: prompt is 3, expected text"),
        ("a.jsonl", '{"prompt": "a", "sed": 1}', 'line 1: unknown field "sed"; use prompt, neg'),
        ("a.jsonl", '{"prompt": "a", "seed": 1.5}', "line 1: seed is 1.5, expected a whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed is true, expected"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed -1 is not a whole number in 0"),
        ("a.jsonl", '{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "line 1: "),
        ("a.jsonl", '{"prompt": "a", "cfg_scale": 1e39}', "line 1: cfg_scale 1e"),
        ("a.jsonl", '{"prompt": "a", "temperature": NaN}', "line 1: not JSON"),
        ("a.jsonl", '{"prompt": "a", "class": 1}', "line 1: prompt and class say the same thing"),
        ("a.jsonl", '{"class": [1]}', r"line 1: class is \[1\], expected a class's number or name"),
        ("a.jsonl", '{"class": ""}', "line 1: class is"),
        ("a.jsonl", '{"class": true}', "line 1: class is true"),
        ("a.jsonl", '{"prompt": "a", "is_class": true}', 'unknown field "is_class"'),
        ("a.csv", "prompt,class\na,1", "line 2: prompt and class say the same thing"),
        ("a.csv", "promt\na", 'line 1: unknown field "promt"'),
        ("a.csv", "seed\n1", "line 1: the header is .* one of them prompt"),
        ("a.csv", "prompt,prompt\na,b", "name each column once"),
        ("a.csv", "prompt\na\nb,c\n", "line 3: 2 columns where the header has 1; quote"),
        ("a.csv", "prompt,seed\na,1_0\n", 'line 2: seed is "1_0", expected a whole number'),
        ("a.csv", "prompt,top_k\na,-1\n", "line 2: top_k -1 is below 0"),
        ("a.csv", 'prompt\na\n"b\n', "line 3: not CSV"),
        ("a.csv", f"prompt\n{'x' * 200_000}\n", "line 2: not CSV"),
    ],
)
def test_what_is_no_file_of_prompts_is_one_line(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_prompts(written(tmp_path, name, content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_files_beyond_the_limits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "a.txt", "a\n" * 11)
    monkeypatch.setattr(module, "MAX_LINES", 10)
    with pytest.raises(UserError, match="more than 10 prompts; split it"):
        read_prompts(path)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 21)
    with pytest.raises(UserError, match="more than 21 bytes"):
        read_prompts(path)
    with pytest.raises(UserError, match="none.txt"):
        read_prompts(tmp_path / "none.txt")


values = st.one_of(
    st.none(), st.text(max_size=9), st.integers(), st.floats(), st.lists(st.integers(), max_size=2)
)
objects = st.dictionaries(
    st.sampled_from([*module.FIELDS, "other"]), values, max_size=7
).map(json.dumps)  # fmt: skip
texts = st.lists(st.one_of(objects, st.text(max_size=20)), max_size=5).map("\n".join)
SLOW = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=400, derandomize=True, **SLOW)
@given(
    name=st.sampled_from(["a.txt", "a.csv", "a.jsonl"]),
    content=st.one_of(texts.map(lambda text: text.encode("utf-8", "replace")), st.binary()),
)
def test_any_bytes_are_prompts_or_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    try:
        lines = read_prompts(written(tmp_path, name, content))
    except UserError as error:
        assert len(str(error)) < 900
    else:
        ends = content.count(b"\n") + content.count(b"\r") + 1
        assert lines and 1 <= min(lines) <= max(lines) <= ends
        assert all(line.prompt.strip() for line in lines.values())


printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]))
fields = st.fixed_dictionaries(
    {"prompt": printable.filter(str.strip)},
    optional={
        "negative_prompt": printable,
        "seed": st.integers(0, 2**64 - 1),
        "cfg_scale": st.floats(0, 1e6),
        "temperature": st.floats(0, 1e6),
        "top_k": st.integers(0, 2**31 - 1),
    },
)  # fmt: skip


@settings(max_examples=100, derandomize=True, **SLOW)
@given(rows=st.lists(fields, min_size=1, max_size=4))
def test_csv_and_jsonl_say_the_same(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    lines = [PromptLine(**row) for row in rows]
    text = "\n".join(map(json.dumps, rows))
    assert list(read_prompts(written(tmp_path, "a.jsonl", text)).values()) == lines
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, module.FIELDS)
        table.writeheader()
        table.writerows(rows)
    read = read_prompts(tmp_path / "a.csv").values()

    def without_empty(line: PromptLine) -> PromptLine:
        return replace(line, negative_prompt=line.negative_prompt or None)

    assert list(map(without_empty, read)) == list(map(without_empty, lines))
