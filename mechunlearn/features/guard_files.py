"""Guards and deletions in folders, as the command line keeps them."""

from pathlib import Path

from mechunlearn.edit.edits import Edit
from mechunlearn.features.deletion import CodeDeletion, load_deletion, save_deletion
from mechunlearn.features.guard import NAME, Guard, load_guard, save_guard

DELETION = "deletion.json"


def save_in(folder: Path, made: Guard | CodeDeletion) -> None:
    """Write a guard or a deletion into a folder."""
    if isinstance(made, Guard):
        save_guard(made, folder / NAME)
    else:
        save_deletion(made, folder / DELETION)


def load_from(folder: Path) -> Edit | None:
    """What `save_in` wrote; None where the folder holds neither.

    Raises:
        ValueError: a file of that name that is something else.
    """
    if (folder / NAME).is_file():
        return load_guard(folder / NAME)
    return load_deletion(folder / DELETION) if (folder / DELETION).is_file() else None
