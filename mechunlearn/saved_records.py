"""Records on disk, with tensors in one safetensors file or alone as JSON; read back whole, or refused in one line."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechunlearn.files import whole_file


def save_record(path: str | Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor], *, form: str) -> None:
    """Write one safetensors file, the record as JSON in its header, all or nothing; `form` names what it holds."""
    text = json.dumps({"format": form, **record}, allow_nan=False, sort_keys=True, default=dict)
    # copies, because safetensors refuses tensors that share memory
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with whole_file(path) as partial:
        save_file(copies, partial, metadata={"record": text})


def load_record(path: str | Path, *, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_record` wrote. Any error of a file that is something else is for `reading` to say."""
    with safe_open(str(path), framework="pt") as file:
        record = json.loads((file.metadata() or {})["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    check_format(record, form)
    return record, tensors


def check_format(record: dict[str, Any], form: str) -> None:
    """Take the format out of a record; raise ValueError where it is another one."""
    if record.pop("format") != form:
        raise ValueError("another format")


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Inside, a saved thing is read and put together; whatever is wrong with the file is one line.

    Args:
        what: how the thing is called; `save_<what>` writes one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no such thing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {what} file at {path}; write one with save_{what}")
    try:
        yield
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a saved {what} ({type(error).__name__}: {reason}); save it anew") from None
