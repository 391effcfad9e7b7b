"""Which prompt template a Janus checkpoint wants: found from its files, shown, and given."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ssd_export.bundle import open_bundle
from ssd_export.errors import UserError
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.families import prompt_encoder
from ssd_export.model.families.janus import find_prompt_template
from tests.janus_checkpoints import BEGIN_OF_IMAGE, BOS, TinyJanus, write_original_checkpoint

WITH_BARS = "{{ '<|User|>: ' + message }}\n\n<|Assistant|>:"
PLAIN = "{% if role == 'user' %}{{ 'User: ' + message }}"
PLAIN_JSON = json.dumps({"chat_template": PLAIN})


@pytest.mark.parametrize(
    ("folder", "files", "template"),
    [
        ("Janus-1.3B", {}, "janus"),
        ("Janus-Pro-1B", {}, "janus-pro"),
        ("my-fine-tune", {}, "janus-pro"),
        ("models--deepseek-ai--Janus-1.3B/snapshots/0123abcd", {}, "janus"),
        ("my-fine-tune", {"chat_template.jinja": PLAIN}, "janus"),
        ("Janus-1.3B-more", {"chat_template.jinja": WITH_BARS}, "janus-pro"),
        ("x", {"chat_template.json": PLAIN_JSON}, "janus"),
        ("x", {"tokenizer_config.json": PLAIN_JSON}, "janus"),
        ("Janus-Pro-7B", {"tokenizer_config.json": PLAIN_JSON}, "janus-pro"),
        ("x", {"chat_template.jinja": "{{ message }}"}, "janus-pro"),
        ("x", {"chat_template.json": "{broken"}, "janus-pro"),
        ("x", {"tokenizer_config.json": json.dumps({"chat_template": [1]})}, "janus-pro"),
    ],
)  # fmt: skip
def test_the_template_is_found_from_the_files(
    tmp_path: Path, folder: str, files: dict[str, str], template: str
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text)
    found, source = find_prompt_template(tmp_path / folder)
    assert found == template
    assert not files or source in files or "name" in source or "nothing" in source


def test_a_model_of_the_first_kind_reads_its_roles_as_words(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_original_checkpoint(tmp_path / "Janus-1.3B", TinyJanus()))
    encoder = prompt_encoder(checkpoint.config, checkpoint.file)
    ids = encoder.encode(["a red circle"], 64).ids[0].tolist()
    tokenizer = Tokenizer.from_file(str(checkpoint.file("tokenizer.json")))
    text = tokenizer.encode("User: a red circle\n\nAssistant:", add_special_tokens=False).ids
    control = [tokenizer.token_to_id(name) for name in (BOS, BEGIN_OF_IMAGE)]
    assert ids == [control[0], *text, control[1]]


def test_the_template_is_shown_given_and_travels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_original_checkpoint(tmp_path / "tuned", TinyJanus(num_layers=1))
    caplog.set_level(logging.INFO, "ssd_export")
    spec = ExportSpec(str(model), policy="h2o", out=tmp_path / "a", prompt_template="janus")
    bundle = open_bundle(export_bundle(spec))
    assert bundle.config.model.prompt_template == "janus"
    assert "prompts as janus: 'User: {prompt}\\n\\nAssistant:' (asked for)" in caplog.text
    usual = open_bundle(export_bundle(ExportSpec(str(model), policy="h2o", out=tmp_path / "b")))
    assert "prompts as janus-pro: " in caplog.text
    ids = [
        prompt_encoder(one.config.model, one.file).encode(["a red circle"], 64).ids.tolist()
        for one in (bundle, usual)
    ]
    assert ids[0] != ids[1]
    with pytest.raises(UserError, match="no such name; use janus-pro or janus"):
        open_checkpoint(model, prompt_template="chatml")


def test_longer_prompts_take_more_slots(tmp_path: Path) -> None:
    model = write_original_checkpoint(tmp_path / "model", TinyJanus(num_layers=1))
    long = " ".join(["red circle"] * 100)
    for slots, fits in ((64, False), (400, True)):
        spec = ExportSpec(str(model), policy="h2o", out=tmp_path / str(slots), prompt_slots=slots)
        bundle = open_bundle(export_bundle(spec))
        encoder = prompt_encoder(bundle.config.model, bundle.file)
        if fits:
            assert encoder.encode([long], slots).prompt_length[0] > 64
        else:
            with pytest.raises(UserError, match="export with --prompt-slots"):
                encoder.encode([long], slots)
