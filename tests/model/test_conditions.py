"""Classes and embedded captions as prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ssd_export.errors import UserError
from ssd_export.model.conditions import CaptionEncoder, ClassEncoder
from ssd_export.model.prompt_embeds import read_prompt_embeds

CLASSES = ClassEncoder(10, True, {"goldfish": 1})
CAPTIONS = CaptionEncoder(num_tokens=6, caption_dim=4)


def test_a_class_is_its_number_or_its_name_and_no_class_the_row_after_the_last() -> None:
    encoded = CLASSES.encode(["3", " Goldfish ", "9"], 1)
    assert encoded.ids.tolist() == [[3], [1], [9], [10], [10], [10]]
    assert encoded.prompt_length.tolist() == [1] * 6
    assert ClassEncoder(10, False, {}).encode(["9"], 1).ids.tolist() == [[9]]
    assert CLASSES.encode(["3", "4"], 1, ["", "goldfish"]).ids[2:].tolist() == [[10], [1]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("10", r"class 10 is beyond .* 0 \.\. 9"),
        ("-1", "no class of this model"),
        ("a red circle", r"no class of this model: .* --class 0, or a name such as 'goldfish'"),
        (np.zeros((2, 4), np.float32), "classes, not embeddings"),
    ],
)
def test_what_is_no_class_is_refused(prompt: str | np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CLASSES.encode([prompt], 1)


def test_the_null_caption_has_the_end_of_its_rows() -> None:
    rng = np.random.default_rng(0)
    captions = [rng.standard_normal((count, 4), np.float32) for count in (2, 6)]
    encoded = CAPTIONS.encode(captions, 6)
    assert encoded.prompt_length.tolist() == [2, 6, 2, 6]
    table = np.arange(24, dtype=np.float32).reshape(6, 4)
    embeds = encoded.embeds(lambda ids: table[ids])
    np.testing.assert_array_equal(embeds[0, :2], captions[0])
    np.testing.assert_array_equal(embeds[1], captions[1])
    np.testing.assert_array_equal(embeds[2, :2], table[4:])
    np.testing.assert_array_equal(embeds[3], table)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red circle", "as embeddings, not as text .*--prompt-embeds"),
        (np.zeros((3, 5), np.float32), r"shape \[3, 5\], and this model takes \[tokens, 4\]"),
        (np.zeros((0, 4), np.float32), "of 0 tokens, and 1 to 5 fit"),
        (np.zeros((6, 4), np.float32), "1 to 5 fit: .* --prompt-slots 6"),
        (np.full((2, 4), np.nan, np.float32), "NaN or infinity"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(prompt: str | np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CAPTIONS.encode([prompt], 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_of_embeddings_gives_the_tokens_that_count(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    embeds = torch.randn(2, 5, 3).to(dtype)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    path = tmp_path / "prompts.safetensors"
    save_file({"prompt_embeds": embeds, "attention_mask": mask}, path)
    first, second = read_prompt_embeds(path)
    np.testing.assert_array_equal(first, embeds[0, 2:].float().numpy())
    np.testing.assert_array_equal(second, embeds[1, :2].float().numpy())
    save_file({"prompt_embeds": embeds}, path)
    assert [len(rows) for rows in read_prompt_embeds(path)] == [5, 5]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeds": torch.zeros(1, 2, 3)}, r"has no prompt_embeds \[N, T, width\]"),
        ({"prompt_embeds": torch.zeros(2, 3)}, r"has no prompt_embeds \[N, T, width\]"),
        (
            {"prompt_embeds": torch.zeros(1, 2, 3), "attention_mask": torch.ones(1, 3)},
            r"attention_mask of shape \[1, 3\] is no mask of \[1, 2\]",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 2, 3), "attention_mask": torch.zeros(1, 2).long()},
            "prompt 0 has no token that counts",
        ),
    ],
)
def test_files_of_something_else_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "prompts.safetensors")
    with pytest.raises(UserError, match=message):
        read_prompt_embeds(tmp_path / "prompts.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    save_file({"prompt_embeds": torch.zeros(1, 2, 3)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated or no safetensors file|is empty"):
            read_prompt_embeds(path)
