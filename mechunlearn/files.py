"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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


_MARK = ".made-by-mechunlearn"  # what lies beside it may be replaced


def replaceable(folder: Path, *, read: Sequence[str | Path | None] = ()) -> Path:
    """The folder's full path, if nothing that was not made here would be lost by replacing it; see `whole_folder`.

    Args:
        read: what is read for it, and must not be replaced.

    Raises:
        FileExistsError: the folder holds what was not made here, or is one of those that are read.
    """
    folder = folder.resolve()
    if folder.exists() and any(name is not None and Path(name).resolve() == folder for name in read):
        raise FileExistsError(f"{folder} is read here and would be lost; give another folder to write")
    is_free = not folder.exists() or (folder.is_dir() and (not any(folder.iterdir()) or (folder / _MARK).exists()))
    if not is_free or folder == Path.cwd():
        raise FileExistsError(f"{folder} exists and was not made by mechunlearn; choose another folder, or remove it")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `folder` when the body succeeds and vanishes when it fails.

    Raises:
        FileExistsError: the folder holds files and was not made here; nobody's files are deleted.
    """
    folder = replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield partial
        (partial / _MARK).touch()
        partial.chmod(0o755)  # mkdtemp's own mode hides it from others
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
