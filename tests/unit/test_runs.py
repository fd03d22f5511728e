"""Folders appear whole or not at all, and nobody else's files are replaced."""

from pathlib import Path

import pytest

from mechunlearn.files import whole_folder


def test_a_folder_is_replaced_only_by_the_one_who_made_it(tmp_path: Path) -> None:
    target = tmp_path / "results"
    for text in ("first", "second"):
        with whole_folder(target) as partial:
            (partial / "a.txt").write_text(text)
    assert (target / "a.txt").read_text() == "second"
    with pytest.raises(KeyError), whole_folder(target) as partial:
        raise KeyError
    assert (target / "a.txt").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_files_that_were_not_made_here_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"), whole_folder(thesis):
        pass
    monkeypatch.chdir(thesis)
    for here in (Path(), Path("../thesis"), thesis / "chapter.txt"):
        with pytest.raises(FileExistsError), whole_folder(here):
            pass
    assert (thesis / "chapter.txt").read_text() == "years of work"
