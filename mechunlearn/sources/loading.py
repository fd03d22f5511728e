"""One way in: a bundled name, a file or folder whose format is recognised, or a data set on the hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mechunlearn.facts import FactSet
from mechunlearn.sources import SOURCES
from mechunlearn.sources.bundled import BUNDLED, load_bundled
from mechunlearn.sources.reading import SUFFIXES, read_rows

T = TypeVar("T")
HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
MARKS: tuple[tuple[str, frozenset[str]], ...] = (  # the first format all of whose marks are there
    ("counterfact_tracing", frozenset({"relation", "relation_id", "target_true", "target_false"})),
    ("counterfact", frozenset({"requested_rewrite"})),
    ("counterfact", frozenset({"subject", "target_new", "ground_truth"})),
    ("lre", frozenset({"prompt_templates", "samples"})),
    ("sports", frozenset({"athlete", "sport"})),
    ("trivia", frozenset({"question", "answer", "sport"})),
    ("tofu", frozenset({"question", "answer"})),
    ("table", frozenset({"subject"})),  # the table's own reader names the columns that are missing
)


def load_facts(
    name_or_path: str | Path, *, format: str = "auto", file: str | None = None, **options: object
) -> FactSet:
    """Load facts by name or path.

    Args:
        name_or_path: a bundled data set (people, sports, world), a file or folder, or ``owner/name`` or
            ``owner/name@revision`` on the Hugging Face hub. Bundled names win over files of the same name.
        format: a source's name, or "auto": recognised by the columns.
        file: which file of a hub data set, if it has several.
        options: the source's own options.

    Raises:
        FileNotFoundError: no such data set, file or folder; the hub cannot be reached.
        ValueError: an unknown format or option, a file that is not recognised, a malformed row.
    """
    if str(name_or_path) in BUNDLED and format == "auto":
        if options:
            raise ValueError(f"data set {name_or_path!r}: got option {next(iter(options))!r}, allowed: none")
        return load_bundled(str(name_or_path))
    path = Path(name_or_path)
    hub = HUB_NAME.fullmatch(str(name_or_path))
    if not path.exists():
        if not hub or path.suffix.lower() in SUFFIXES:
            raise FileNotFoundError(
                f"{name_or_path}: no such file, folder or data set; bundled ones: {', '.join(BUNDLED)}"
            )
        path = download(hub["repo"], revision=hub["revision"], file=file)
    source = SOURCES.get(recognise(path) if format == "auto" else format)
    return source.function(path, **source.validate(options))


def recognise(path: Path) -> str:
    """The format of a file or folder, told by the columns of its first row.

    Raises:
        ValueError: none of the known formats.
    """
    if path.is_dir():
        if (path / "facts.csv").is_file():
            raise ValueError(f"{path}: got a bundled data set's folder, allowed: its name, one of {', '.join(BUNDLED)}")
        if next(path.rglob("*.json"), None) is None:
            raise ValueError(
                f"{path}: got a folder without .json files, allowed: a folder of LRE relations, or one file"
            )
        return "lre"
    columns = frozenset(read_rows(path)[0].fields)
    for name, marks in MARKS:
        if marks <= columns:
            return name
    raise ValueError(
        f"{path}: got columns {', '.join(sorted(columns))}, which no known format has; give format=, one of "
        f"{', '.join(SOURCES.names())}"
    )


def download(repo: str, *, revision: str | None = None, file: str | None = None) -> Path:
    """Fetch one data file of a hub data set into the hub's cache.

    Raises:
        FileNotFoundError: no network and not in the cache, no such data set or file.
        ValueError: several data files and none chosen.
    """
    from huggingface_hub import HfApi, hf_hub_download

    if file is None:
        listed = _reach(repo, lambda: HfApi().dataset_info(repo, revision=revision, timeout=10).siblings) or ()
        file = _only_data_file(repo, [entry.rfilename for entry in listed])
    chosen = file
    return Path(_reach(repo, lambda: hf_hub_download(repo, chosen, repo_type="dataset", revision=revision)))


def _reach(repo: str, fetch: Callable[[], T]) -> T:
    """Ask the hub, and make one clear error of whatever goes wrong."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return fetch()
    except HfHubHTTPError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{repo}: the hub answered {reason!r}, allowed: a public data set and its file"
        ) from None
    except Exception as error:  # noqa: BLE001 - the hub's client changes its network library, so no class is stable
        raise FileNotFoundError(
            f"{repo}: no such file or folder here, and the hub cannot be reached ({type(error).__name__}); give the "
            f"path of a downloaded file, or use a bundled data set: {', '.join(BUNDLED)}"
        ) from None


def _only_data_file(repo: str, files: list[str]) -> str:
    files = [name for name in files if Path(name).suffix.lower() in SUFFIXES and name != "dataset_infos.json"]
    if len(files) == 1:
        return files[0]
    shown = ", ".join(files[:12]) or "none"
    raise ValueError(f"{repo}: got {len(files)} data files, allowed: one; give file=, one of: {shown}")
