"""embed-prompts: what it writes is what the published pipeline computes, generate reads it, and
what does not fit the model is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import T5EncoderModel

from ssd_export.errors import UserError
from ssd_export.model.prompt_embeds import read_prompt_embeds
from ssd_export.model.text_encoder import clean_prompt
from ssd_export.model.tokenizer_file import read_tokenizer
from tests.llamagen_checkpoints import CAPTION_TOKENS, TinyLlamaGen, write_llamagen_checkpoint
from tests.model.t5_encoders import WIDTH, write_t5, write_tokenizer

Run = Callable[..., SimpleNamespace]
PROMPTS = ("A red circle", "a blue square above a green circle on white")
TINY = TinyLlamaGen(num_layers=1, caption_dim=WIDTH)
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llamagen_checkpoint(tmp_path_factory.mktemp("llamagen"), TINY)


def published(encoder: Path, prompts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and mask by the published pipeline: all prompts padded on the right together, then
    turned round to the left.
    """
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=CAPTION_TOKENS)
    encoded = tokenizer.encode_batch([prompt.lower() for prompt in prompts])
    ids = torch.tensor([one.ids for one in encoded])
    mask = torch.tensor([one.attention_mask for one in encoded])
    with torch.no_grad():
        rows = T5EncoderModel.from_pretrained(encoder)(ids, mask).last_hidden_state
    turned = [
        torch.cat([row[own.sum() :], row[: own.sum()]]) for row, own in zip(rows, mask, strict=True)
    ]
    mask = mask.flip(-1)
    return torch.stack(turned) * mask[:, :, None], mask


def test_the_file_holds_what_the_published_pipeline_computes(
    run: Run, encoder: Path, model: Path
) -> None:
    done = run("embed-prompts", *PROMPTS, "--encoder", encoder, "--model", model, "--out", "p.st")
    assert done.code == 0, done.err
    assert "2 prompts, at most 10 tokens of 12, width 24" in done.out
    expected, mask = published(encoder, PROMPTS)
    with safe_open("p.st", "pt") as file:
        assert torch.equal(file.get_tensor("attention_mask"), mask)
        assert (file.get_tensor("prompt_embeds") - expected).abs().max() < ROUNDING
        made_by = file.metadata()
    assert json.loads(made_by["prompts"])[0] == "a red circle"
    assert made_by["encoder"] == encoder.name and len(made_by["tokenizer"]) == 64
    assert [len(rows) for rows in read_prompt_embeds(Path("p.st"))] == [4, 10]


def test_generate_reads_the_file(run: Run, encoder: Path, model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert run("export", "--model", model, "--policy", "h2o", "--out", bundle).code == 0
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS))
    asked = ("--prompts", "list.txt", "--encoder", encoder, "--bundle", bundle)
    assert run("embed-prompts", *asked).code == 0
    done = run("generate", "--prompt-embeds", "prompts.safetensors", "--save-tokens", "t.npy")
    assert done.code == 0, done.err
    tokens = np.load("t.npy")
    assert tokens.shape == (2, 256) and (tokens[0] != tokens[1]).any()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda folder: write_t5(folder, width=32), r"32 wide \(d_model\), and the model reads 24"),
        (lambda folder: edit(folder, model_type="clip_text_model"), "'clip_text_model', not t5"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer at"),
        (lambda folder: write_tokenizer(folder / "tokenizer.json", False), "not of this encoder"),
        (lambda folder: edit(folder, vocab_size=4), "cannot be read as a T5|not of this encoder"),
        (lambda folder: edit(folder, num_layers=3), "lacks the encoder's tensor"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read as a T5 encoder"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
            "cannot be read as a T5 encoder",
        ),
    ],
)
def test_another_encoder_is_refused(
    run: Run, model: Path, tmp_path: Path, change: Callable[[Path], object], complaint: str
) -> None:
    folder = write_t5(tmp_path / "t5")
    change(folder)
    done = run("embed-prompts", "a red circle", "--encoder", folder, "--model", model)
    assert done.code == 1 and not Path("prompts.safetensors").exists()
    assert re.search(complaint, done.err), done.err
    assert done.err.count("\n") == 1


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_prompts_that_do_not_fit_are_refused(run: Run, encoder: Path, model: Path) -> None:
    asked = ("--encoder", encoder, "--model", model)
    for prompt, complaint in (
        ("red " * 12, "13 tokens long, 12 fit: shorten it by 1 tokens"),
        ("***", "empty once it is cleaned"),
        ("", "empty once it is cleaned"),
    ):
        done = run("embed-prompts", prompt, *asked)
        assert done.code == 1 and complaint in done.err
    assert run("embed-prompts", *asked).code == 2
    done = run("embed-prompts", "red", "--encoder", encoder)
    assert done.code == 1 and "the model reads 2048" in done.err
    done = run("embed-prompts", "red", "--encoder", encoder, "--model", "demo")
    assert done.code == 1 and "reads no embeddings" in done.err


@pytest.mark.parametrize(
    ("typed", "cleaned"),
    [
        ("A Blue Porsche 356 parked.", "a blue porsche 356 parked."),
        ("  “Hello”,world —  (sign)*  ", '"hello", world - sign'),
        ("rock’n’roll...loud:", "rock'n'roll loud"),
        ("3.5 apples, 2/3 eaten", "3.5 apples, 2 3 eaten"),
    ],
)
def test_prompts_are_cleaned_as_captions_were(typed: str, cleaned: str) -> None:
    assert clean_prompt(typed) == cleaned


def test_a_map_of_letters_is_read_within_limits(tmp_path: Path) -> None:
    import base64

    path = tmp_path / "tokenizer.json"

    def write(texts: str) -> None:
        charsmap = base64.b64encode((4).to_bytes(4, "little") + b"trie" + texts.encode()).decode()
        spec = {
            "model": {"type": "Unigram"},
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap},
        }
        path.write_text(json.dumps(spec))

    write("ab\0صلى الله عليه وسلم\0")
    assert read_tokenizer(path)["model"]["type"] == "Unigram"
    write("x" * 100)
    with pytest.raises(UserError, match="100 times as long"):
        read_tokenizer(path)
    path.write_text(path.read_text().replace('charsmap": "', 'charsmap": "!'))
    with pytest.raises(UserError, match="precompiled_charsmap is damaged"):
        read_tokenizer(path)
