"""The relations of the linear-relational-embedding study, one JSON file a relation."""

from pathlib import Path

from mechunlearn.facts import FactSet
from mechunlearn.sources import SOURCES
from mechunlearn.sources.collecting import Draft, collect, draft
from mechunlearn.sources.reading import Row, read_json

KEYS = ("name", "prompt_templates", "samples")


@SOURCES.register("lre", source="Hernandez et al. 2024; arXiv:2308.09124 (evandez/relations, MIT)")
def lre(path: str | Path) -> FactSet:
    """Read one relation file, or every JSON file in a folder and below, in order of path.

    The relation is the file's name field with underscores for spaces. The first template is the prompt; the other
    templates and the zero-shot ones are the paraphrases (some are a question followed by the start of its answer).
    Some subjects have several objects: the first is kept, and the others are no choices of it.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without JSON files, a malformed file, row or template.
    """
    path = Path(path)
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: got a folder without .json files, allowed: LRE relation files")
    drafts = [item for file in files for item in _read_relation(file)]
    return collect(path.name if path.is_dir() else path.stem, drafts, conflicts="first")


def _read_relation(path: Path) -> list[Draft]:
    content = read_json(path)
    found = tuple(content) if isinstance(content, dict) else ()
    if not isinstance(content, dict) or (set(KEYS) - set(found)):
        missing = [key for key in KEYS if key not in found]
        raise ValueError(f"{path}: missing columns: {', '.join(missing)}; columns there: {', '.join(found) or 'none'}")
    file = Row(path=path, number=0, fields=content)
    templates = (*file.texts("prompt_templates"), *file.texts("prompt_templates_zs"))
    samples = content["samples"]
    if not templates or not isinstance(samples, list) or not samples:
        raise ValueError(
            f"{path}: got {len(templates)} templates and {samples!r:.40} as samples, allowed: at least one each"
        )
    drafts = []
    for number, sample in enumerate(samples, start=1):
        row = Row(path=path, number=number, fields=sample if isinstance(sample, dict) else {})
        drafts.append(
            draft(
                row,
                subject=row.text("subject"),
                relation=file.text("name").replace(" ", "_"),
                prompt=templates[0],
                target_true=row.text("object"),
                paraphrases=templates[1:],
            )
        )
    return drafts
