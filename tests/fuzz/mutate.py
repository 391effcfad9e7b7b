"""Wrong files from whole ones: a value of a JSON document replaced, bytes changed, parts of two
files put together.
"""

from __future__ import annotations

import json
from random import Random

from tests.bundle.mutations import REMOVED, WRONG_VALUES, mutated, places

MOST_BYTES = 1 << 20  # of an input: more of the same finds nothing else
BYTES = (b"\x00", b"\xff", b'"', b"{", b"[", b",", b"\n", b"\r", b"../", b"1e999", b"\xed\xa0\x80")
LENGTHS = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def mutate(random: Random, content: bytes, other: bytes, is_json: bool) -> bytes:
    """One to four changes of a file; other: a second one to take parts of."""
    for _ in range(random.choice((1, 1, 2, 4))):
        change = random.choice(_JSON + _BYTES if is_json else _BYTES)
        content = change(random, content, other)[:MOST_BYTES]
    return content


def _value(random: Random, content: bytes, other: bytes) -> bytes:
    """Another value somewhere in a JSON document; the document as it is where it is none."""
    try:
        text = content.decode()
        where = places(json.loads(text))
    except (ValueError, RecursionError):
        return content
    if not where:
        return content
    wrong = random.choice((REMOVED, *WRONG_VALUES))
    return mutated(text, random.choice(where), wrong)


def _swap(random: Random, content: bytes, other: bytes) -> bytes:
    """A value of the document at another of its places."""
    try:
        document = json.loads(content)
        where = places(document)
    except (ValueError, RecursionError):
        return content
    if len(where) < 2:
        return content
    source, target = random.choice(where), random.choice(where)
    value = document
    for key in source:
        value = value[key]
    text = json.dumps(value)
    parent = document
    for key in target[:-1]:
        parent = parent[key]
    parent[target[-1]] = json.loads(text)
    return json.dumps(document).encode()


def _flip(random: Random, content: bytes, other: bytes) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 3, 16))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _insert(random: Random, content: bytes, other: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    piece = random.choice(BYTES) * random.choice((1, 1, 2, 1000))
    return content[:at] + piece + content[at:]


def _length(random: Random, content: bytes, other: bytes) -> bytes:
    """A number of four or eight bytes, as headers hold lengths."""
    size = random.choice((4, 8))
    if len(content) < size:
        return content
    at = random.choice((0, random.randrange(len(content) - size + 1)))
    value = random.choice(LENGTHS) & (1 << 8 * size) - 1
    return (
        content[:at] + value.to_bytes(size, random.choice(("little", "big"))) + content[at + size :]
    )


def _cut(random: Random, content: bytes, other: bytes) -> bytes:
    first, last = sorted(random.randrange(len(content) + 1) for _ in range(2))
    return random.choice((content[:first], content[first:], content[:first] + content[last:]))


def _splice(random: Random, content: bytes, other: bytes) -> bytes:
    return content[: random.randrange(len(content) + 1)] + other[random.randrange(len(other) + 1) :]


_BYTES = (_flip, _insert, _length, _cut, _splice)
_JSON = (_value, _value, _value, _swap)
