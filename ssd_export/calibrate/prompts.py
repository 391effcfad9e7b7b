"""The prompts of a calibration: a file of prompts, or a list that covers subjects, counts, places
and styles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.model.prompt import Prompt, text_of

VARIED = (
    "a red bicycle leaning against a brick wall",
    "three yellow tulips in a glass vase on a wooden table",
    "a portrait of an old fisherman, oil painting",
    "a cat sleeping on a stack of books",
    "an aerial photograph of a river delta at sunrise",
    "a blue cube on top of a green sphere",
    "two dogs running along a beach",
    "a bowl of ramen with an egg and spring onions",
    "a lighthouse in a storm, dramatic light",
    "a street in the rain at night with neon signs",
    "a white horse to the left of a red barn",
    "a watercolor of mountains in fog",
    "four hot air balloons above a desert",
    "a close-up of a dragonfly on a leaf",
    "a child's drawing of a house with a smoking chimney",
    "a steam locomotive crossing a stone bridge",
    "a plate with five strawberries, seen from above",
    "an astronaut riding a bicycle on the moon",
    "a kitchen with copper pans hanging on the wall",
    "a green parrot below a purple umbrella",
    "a black and white photograph of a jazz band",
    "a wooden boat on a calm lake in autumn",
    "a robot watering plants in a greenhouse",
    "a snowy owl flying over a forest",
)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines do not count.

    Raises: UserError if it cannot be read, is not UTF-8 or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 text, one prompt a line"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot read the prompts {path} ({error.strerror}); give --prompts an existing text"
            " file"
        ) from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    return prompts


def hash_of_prompts(prompts: Sequence[Prompt]) -> str:
    """sha256 of prompts: their text, one a line, then the numbers of embeddings."""
    digest = hashlib.sha256("\n".join(map(text_of, prompts)).encode())
    for prompt in prompts:
        if not isinstance(prompt, str):
            digest.update(prompt.tobytes())
    return digest.hexdigest()
