"""A stack of edits as a folder: a file an edit and a record that names them."""

import json
from dataclasses import replace
from pathlib import Path

from mechunlearn.edit.edits import load_edit, save_edit
from mechunlearn.edit.stack import EditStack
from mechunlearn.files import whole_file, whole_folder

FORMAT = "mechunlearn edit stack 1"


def save_stack(stack: EditStack, folder: str | Path) -> None:
    """Write a folder with a file an edit and the record stack.json, all or nothing."""
    with whole_folder(Path(folder)) as partial:
        write_stack(stack, partial)


def write_stack(stack: EditStack, folder: Path) -> None:
    """Write a stack's files beside others in a folder; without stack.json, which is last, they are no stack."""
    for number, edit in enumerate(stack.edits, start=1):
        save_edit(edit, folder / _file(number))
    record = {
        "format": FORMAT,
        "base_name": stack.base_name,
        "base_sha256": stack.base_sha256,
        "edits": [{"method": edit.method, "base_sha256": edit.base_sha256} for edit in stack.edits],
    }
    with whole_file(folder / "stack.json") as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_stack(path: str | Path) -> EditStack:
    """Read what `save_stack` wrote, or a single edit: its file, or the folder with edit.safetensors.

    Whether the edits fit a model is checked when they are applied.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a damaged stack, or one whose edits are not those of its record.
    """
    path = Path(path)
    record_file = path / "stack.json"
    if not record_file.is_file():
        single = path / "edit.safetensors" if path.is_dir() else path
        if not single.is_file():
            raise FileNotFoundError(f"no edit at {path}; give a folder with stack.json or edit.safetensors in it")
        edit = load_edit(single)
        return EditStack(base_name=edit.base_name, base_sha256=edit.base_sha256, edits=(edit,))
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError("another format")
        expected = [each["base_sha256"] for each in record["edits"]]
        stack = EditStack(base_name=record["base_name"], base_sha256=record["base_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{record_file} is no saved stack ({type(error).__name__}: {error}); save it anew") from None
    edits = tuple(load_edit(path / _file(number)) for number in range(1, len(expected) + 1))
    if wrong := [i for i, (edit, sha) in enumerate(zip(edits, expected, strict=True), 1) if edit.base_sha256 != sha]:
        raise ValueError(f"{path / _file(wrong[0])} is not the edit that stack.json names; save the stack anew")
    return replace(stack, edits=edits)


def _file(number: int) -> str:
    return f"edit-{number}.safetensors"
