"""Measured text in a document: a part between two comments that a command writes and nobody edits.

    <!-- sweep: written by `ssd-export sweep --docs` -->  ...  <!-- /sweep -->
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.evaluate.sweep_report import markdown
from ssd_export.runtime.pictures import write_file


def write_sweep_part(document: Path, whole: dict, pictures: list[Path]) -> None:
    """Replaces (or appends) the document's sweep part: table, plot and sheet from sweep.json; copies the pictures beside it.

    Raises: UserError where the document's folder is missing or cannot be written.
    """
    links = []
    for picture in pictures:
        copy = document.with_name(f"{document.stem}-{picture.name}")
        try:
            shutil.copyfile(picture, copy)
        except OSError as error:
            raise UserError(f"cannot write {copy} ({error.strerror}); choose another --docs") from error
        links.append(f"![{picture.stem}]({copy.name})")
    replace_part(document, "sweep", "\n\n".join([markdown(whole).strip(), *links]))


def replace_part(document: Path, name: str, text: str) -> None:
    """Puts the text between the document's comments of that name; what stands around them stays."""
    part = f"<!-- {name}: written by `ssd-export {name} --docs` -->\n{text}\n<!-- /{name} -->"
    old = document.read_text(encoding="utf-8") if document.exists() else ""
    pattern = re.compile(rf"<!-- {name}: .*?<!-- /{name} -->", re.DOTALL)
    new = pattern.sub(lambda _: part, old) if pattern.search(old) else f"{old}\n{part}\n".lstrip("\n")
    write_file(document, lambda file: file.write(new.encode()))
