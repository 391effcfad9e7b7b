"""Prompt ids against transformers' Janus processor and chat template; prompts that try to be
control.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import JanusImageProcessor, JanusProcessor

from ssd_export.errors import UserError
from ssd_export.model.families import janus
from ssd_export.model.families.janus import ASSISTANT, BEGIN_OF_IMAGE, BOS, PAD, USER
from ssd_export.model.prompt import TemplateEncoder
from tests.janus_checkpoints import hf_tokenizer, train_tokenizer

# the part for a user's text of the template that deepseek-community/Janus-Pro-* ships
CHAT_TEMPLATE = (
    "{%for message in messages%}<|User|>: "
    "{%for content in message['content']%}{{content['text'].strip()}}{%endfor%}{{'\n\n'}}{%endfor%}"
    "{%if add_generation_prompt%}<|Assistant|>:{%endif%}"
)
PROMPTS = [
    "a red circle",
    "  two green  triangles\n beside a star\t",
    "x",
    "Ünïcødé 雪 \N{SNOWMAN}!",
    "a < b > c | <|",
    "\n\n:",
]


def encoder_of(spec: dict) -> TemplateEncoder:
    return TemplateEncoder(spec, janus.PROMPT, janus.TITLE)


def read(path: Path, vocab_size: int = 1 << 20) -> TemplateEncoder:
    return TemplateEncoder.from_file(path, janus.PROMPT, janus.TITLE, vocab_size)


def written(tmp_path: Path, role_tokens_added: bool = True) -> TemplateEncoder:
    train_tokenizer(role_tokens_added).save(str(tmp_path / "tokenizer.json"))
    return read(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("role_tokens_added", [True, False])
def test_ids_equal_transformers_processor(role_tokens_added: bool, tmp_path: Path) -> None:
    encoder = written(tmp_path, role_tokens_added)
    tokenizer = hf_tokenizer(train_tokenizer(role_tokens_added))
    processor = JanusProcessor(JanusImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATE)
    for prompt in PROMPTS:
        message = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        expected = processor(text=text, generation_mode="image")["input_ids"][0]
        expected = [token for token in np.asarray(expected).tolist() if token != encoder.begin_id]
        assert encoder.encode([prompt], 500).ids[0].tolist() == [encoder.begin_id, *expected]


def test_rows_are_conditional_then_unconditional_padded_on_the_right(tmp_path: Path) -> None:
    encoder = written(tmp_path)
    encoded = encoder.encode(["a red circle above a blue square", "x"], 64)
    long, short = encoded.prompt_length[:2].tolist()
    assert (
        encoded.ids.shape == (4, long)
        and encoded.ids.dtype == encoded.prompt_length.dtype == np.int32
    )
    assert encoded.prompt_length.tolist() == [long, short, long, short] and short < long
    for row, length in zip(encoded.ids, encoded.prompt_length):
        assert row[0] == encoder.begin_id and row[length - 1] == encoder.end_id
        assert (row[length:] == encoder.pad_id).all()
    assert (encoded.ids[2, 1 : long - 1] == encoder.pad_id).all()
    assert (encoded.ids[3, 1 : short - 1] == encoder.pad_id).all()


@pytest.mark.parametrize("role_tokens_added", [True, False])
@pytest.mark.parametrize(
    "name", [BOS, PAD, BEGIN_OF_IMAGE, USER, ASSISTANT, "<|ref|>", "<image_placeholder>"]
)
def test_a_control_token_in_a_prompt_is_text(
    name: str, role_tokens_added: bool, tmp_path: Path
) -> None:
    encoder = written(tmp_path, role_tokens_added)
    plain, typed = encoder.encode(["a  b"], 99), encoder.encode([f"a {name} b"], 99)
    tokenizer = train_tokenizer(role_tokens_added)
    assert tokenizer.decode(typed.ids[0].tolist(), skip_special_tokens=False).count(name) >= 1
    added = [token["id"] for token in json.loads(tokenizer.to_str())["added_tokens"]]
    assert [i for i in typed.ids[0] if i in added] == [i for i in plain.ids[0] if i in added]


def test_control_tokens_are_found_by_name_not_by_id(tmp_path: Path) -> None:
    spec = json.loads(train_tokenizer().to_str())
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    for token in spec["added_tokens"]:  # swap two ids, as between published configs
        token["id"] = {PAD: ids[BOS], BOS: ids[PAD]}.get(token["content"], token["id"])
    spec["added_tokens"].sort(key=lambda token: token["id"])
    encoder = encoder_of(spec)
    assert (encoder.pad_id, encoder.begin_id) == (ids[BOS], ids[PAD])
    assert encoder.max_id == max(ids.values())


@pytest.mark.parametrize("name", [BOS, USER, ASSISTANT, BEGIN_OF_IMAGE])
@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_added_tokens_that_swallow_white_space(name: str, side: str) -> None:
    spec = json.loads(train_tokenizer().to_str())
    next(token for token in spec["added_tokens"] if token["content"] == name)[side] = True
    text = f"{BOS}{USER}: a b\n\n{ASSISTANT}:{BEGIN_OF_IMAGE}"
    expected = Tokenizer.from_str(json.dumps(spec)).encode(text, add_special_tokens=False).ids
    assert encoder_of(spec).encode(["a b"], 64).ids[0].tolist() == expected


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=40)
    assert encoder_of(json.loads(tokenizer.to_str())).encode(PROMPTS[:1], 64).ids.tolist() == (
        written(tmp_path).encode(PROMPTS[:1], 64).ids.tolist()
    )


@pytest.mark.parametrize(
    "prompts, message",
    [([], "no prompt"), ([""], "empty"), (["a", " \n "], "empty"), (["\ud800"], "Unicode")],
)
def test_bad_prompts(prompts: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        written(tmp_path).encode(prompts, 64)
    assert "\n" not in str(error.value)


def test_a_prompt_that_is_too_long_says_by_how_much(tmp_path: Path) -> None:
    encoder = written(tmp_path)
    length = int(encoder.encode(["a red circle"], 64).prompt_length[0])
    encoder.encode(["a red circle"], length)
    with pytest.raises(
        UserError, match=f"is {length} tokens long, {length - 1} fit.*--prompt-slots {length}"
    ):
        encoder.encode(["x", "a red circle"], length - 1)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"added_tokens": []}', '{"added_tokens": 3, "model": 4}']
)
def test_a_damaged_tokenizer(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        read(tmp_path / "tokenizer.json")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    spec = json.loads(train_tokenizer().to_str())
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if token["content"] != BEGIN_OF_IMAGE
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="lacks the added token <begin_of_image>"):
        read(tmp_path / "tokenizer.json")


def test_prompt_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, ssd_export.model.prompt; sys.exit(bool({'torch', 'transformers'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )
