"""The C++ tokenizer gives the ids of Python's `tokenizers`, prompt by prompt."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ssd_export.errors import UserError
from ssd_export.model.families.janus import ASSISTANT, BEGIN_OF_IMAGE, BOS, PAD, PROMPT, USER
from ssd_export.model.prompt import TemplateEncoder
from tests.engines.builds import Builds
from tests.engines.cases import run_cases

# Blocks of Unicode: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Thai, Georgian,
# Hangul, Vietnamese's, punctuation, currencies, arrows, symbols, Japanese, Chinese, Korean, full
# width, Deseret, emoji, mathematical letters.
BLOCKS = """0020-007e 00a0-024f 0370-03ff 0400-052f 0530-058f 0590-05ff 0600-06ff 0900-097f
0e00-0e7f 10a0-10ff 1100-11ff 1e00-1eff 2000-206f 20a0-20cf 2190-21ff 2600-27bf
3000-30ff 4e00-9fff ac00-d7a3 ff00-ffef 10400-1044f 1f300-1faff 1d400-1d7ff"""
PLAIN = "a red circle above two blue squares don't we'll I'M 3 cats, 42 dogs!"
CONTROL = [USER, ASSISTANT, BOS, PAD, BEGIN_OF_IMAGE, "<|ref|>", "<cat>"]
WORDS = [*PLAIN.split(" "), *CONTROL, "\N{SNOWMAN}", "\r\n", "\t"]
COUNT = 1000


def prompts() -> list[str]:
    """1,000 prompts, the same on every run: words, control tokens spelled out, every script."""
    rng = random.Random(7)
    made: list[str] = []
    while len(made) < COUNT:
        parts = [one_part(rng) for _ in range(rng.randint(1, 6))]
        made.append(rng.choice([" ", "", "  ", "\n", "\u3000"]).join(parts))
    return made


def one_part(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(WORDS)
    first, last = (int(number, 16) for number in rng.choice(BLOCKS.split()).split("-"))
    letters = [chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6))]
    # Later Unicode versions gave some places a letter: engines of different age differ in those.
    return "".join(letter for letter in letters if unicodedata.category(letter) not in ("Cn", "Cs"))


def byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def deepseek_like() -> pre_tokenizers.PreTokenizer:
    """The kinds of parts of the published Janus-Pro tokenizers, in their order."""
    patterns = [
        "[\r\n]",
        r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u0370-\u0373\u03a3-\u03f5\u0400-\u0481]+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    ]
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def other_parts() -> pre_tokenizers.PreTokenizer:
    """What else the C++ tokenizer has: removed separators, plain strings, digits in runs."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("-", "removed"),
            pre_tokenizers.Split(Regex(r"\p{Lu}"), "isolated", invert=True),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
        ]
    )


def trained(parts: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = parts
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f": {prompt}\n\n" for prompt in prompts()], trainer)
    tokenizer.add_special_tokens([BOS, PAD, BEGIN_OF_IMAGE])
    tokenizer.add_tokens(
        [
            AddedToken("\N{SNOWMAN}", special=False, normalized=True),
            AddedToken("cat", special=False, normalized=False, single_word=True),
            AddedToken("dog", special=False, normalized=False, lstrip=True, rstrip=True),
            AddedToken(USER, special=False, normalized=False),
            AddedToken(ASSISTANT, special=False, normalized=False, rstrip=True),
            AddedToken("<|ref|>", special=False, normalized=False),
        ]
    )
    return tokenizer.to_str()


TOKENIZERS: dict[str, Callable[[], str]] = {
    "byte level": lambda: trained(byte_level()),
    "as DeepSeek's": lambda: trained(deepseek_like()),
    "other parts": lambda: trained(other_parts()),
    "whole words first": lambda: trained(byte_level(), ignore_merges=True),
}


def expected(encoder: TemplateEncoder, prompt: str) -> list[int] | str:
    try:
        encoded = encoder.encode([prompt], 100_000)
    except UserError as error:
        return str(error)
    return encoded.ids[0, : encoded.prompt_length[0]].tolist()


def ids_of(
    build: Builds,
    bundle: Path,
    manifest_rewriter: Callable[[Path], None],
    texts: list[str],
    tokenizer: str | None,
    folder: Path,
) -> list[list[int] | str]:
    if tokenizer is not None:
        (bundle / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        manifest_rewriter(bundle)
    (made,) = run_cases(build("release"), [{"bundle": str(bundle), "encode": texts}], folder)
    assert "error" not in made.facts, made.facts
    return made.facts["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["the demo's", *TOKENIZERS])
def test_ids_are_pythons(
    name: str,
    build: Builds,
    exported: Callable[..., Path],
    manifest_rewriter: Callable[[Path], None],
    demo_tokenizer: str,
    tmp_path: Path,
) -> None:
    content = demo_tokenizer if name == "the demo's" else TOKENIZERS[name]()
    texts = prompts()
    found = ids_of(build, exported(), manifest_rewriter, texts, content, tmp_path)
    encoder = TemplateEncoder(json.loads(content), PROMPT)
    wrong = [
        (text, ids, wanted)
        for text, ids in zip(texts, found, strict=True)
        if ids != (wanted := expected(encoder, text))
    ]
    assert not wrong, f"{len(wrong)} of {len(texts)}, the first: {wrong[0]}"
    assert sum(isinstance(ids, list) for ids in found) > COUNT * 0.9


@pytest.fixture(scope="session")
def demo_tokenizer() -> str:
    from ssd_export.model.find import DEMO_CHECKPOINT

    return (DEMO_CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_the_library_does_not_have_is_named_and_ids_still_serve(
    build: Builds,
    exported: Callable[..., Path],
    manifest_rewriter: Callable[[Path], None],
    demo_tokenizer: str,
    tmp_path: Path,
) -> None:
    spec = json.loads(demo_tokenizer)
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "add_prefix_space": True}
    (refused,) = ids_of(build, exported(), manifest_rewriter, ["a"], json.dumps(spec), tmp_path)
    assert (
        refused
        == "tokenizer.json has a pre-tokenizer Metaspace, which ssd_runtime does not have; give"
        " token"
        " ids (`ssd-export prompts`)"
    )
