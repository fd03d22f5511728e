"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A scratch file that takes the name `path` when the body succeeds and vanishes when it fails.

    The folder is made if there is none; an older file of that name stays until then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)  # the mode of mkstemp and of safetensors hides it from others
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
