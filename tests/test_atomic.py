"""Files and folders that are whole or not there: after an exception, a kill at any system call, or a rival writer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killed import dies_at
from usaf_ext import atomic
from usaf_ext.atomic import atomic_directory, atomic_file


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=["swap", "two renames"])
def renaming(request, monkeypatch):
    """Both ways to put a folder in place of another."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


def write_folder(path: Path, text: str) -> None:
    with atomic_directory(path) as folder:
        (folder / "inner").mkdir()
        (folder / "a").write_text(text)
        (folder / "inner" / "b").write_text(text)


def read_folder(path: Path) -> str:
    text = (path / "a").read_text()
    assert (path / "inner" / "b").read_text() == text
    assert names(path) == {"a", "inner"}
    return text


def test_a_file_is_new_or_replaced(tmp_path):
    for text in ("one", "two"):
        with atomic_file(tmp_path / "deep" / "x.json") as temporary:
            temporary.write_text(text)
            assert temporary.name == "x.json"
        assert (tmp_path / "deep" / "x.json").read_text() == text
        assert names(tmp_path / "deep") == {"x.json"}


def test_a_folder_is_new_or_replaced(tmp_path, renaming):
    for text in ("one", "two"):
        write_folder(tmp_path / "run", text)
        assert read_folder(tmp_path / "run") == text
        assert names(tmp_path) == {"run"}


def test_an_exception_leaves_the_old(tmp_path, renaming):
    write_folder(tmp_path / "run", "old")
    (tmp_path / "file").write_text("old")

    def interrupted(manager, error, inner=""):
        with manager as temporary:
            (temporary / inner).write_text("new")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            interrupted(atomic_directory(tmp_path / "run"), error, "a")
        for name in ("file", "absent"):
            with pytest.raises(error):
                interrupted(atomic_file(tmp_path / name), error)
    assert read_folder(tmp_path / "run") == "old"
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == {"run", "file"}


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "run", "old")
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    rename = os.rename

    def fails(source, target):
        if Path(source).name == "run" and Path(source).parent.name.startswith(".run."):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"):
        write_folder(tmp_path / "run", "new")
    assert read_folder(tmp_path / "run") == "old"
    assert names(tmp_path) == {"run"}


def test_refuses_the_other_kind(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "file"):
        pytest.fail("the body ran")
    with pytest.raises(IsADirectoryError), atomic_file(tmp_path / "folder"):
        pytest.fail("the body ran")
    assert names(tmp_path) == {"file", "folder"}


def test_follows_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert read_folder(tmp_path / "real") == "new"


def test_everything_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    log = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), rename(a, b)))
    write_folder(tmp_path / "run", "new")
    renamed = log.index("rename")
    assert {"a", "b", "inner", "run"} <= set(log[:renamed])
    assert log[renamed + 1 :] == [tmp_path.name]


def test_only_leftovers_of_dead_writers_of_this_target_go(tmp_path):
    (tmp_path / ".run.abcd1234.tmp").mkdir()
    (tmp_path / ".run.abcd1234.tmp" / "run").mkdir()
    (tmp_path / ".run.json.abcd1234.tmp").mkdir()  # of run.json
    (tmp_path / ".run.notes.tmp").write_text("somebody's own")
    with atomic_directory(tmp_path / "run") as first:
        (first / "a").write_text("first")
        with atomic_directory(tmp_path / "run") as second:  # a rival, while the first one writes
            (second / "a").write_text("second")
        assert (first / "a").read_text() == "first"
        assert (tmp_path / "run" / "a").read_text() == "second"
    assert (tmp_path / "run" / "a").read_text() == "first"
    assert names(tmp_path) == {"run", ".run.json.abcd1234.tmp", ".run.notes.tmp"}


def test_special_characters_in_the_name(tmp_path):
    for name in ("a[1]*", "b?.json"):
        (tmp_path / f".{name}.abcd1234.tmp").mkdir()
        with atomic_file(tmp_path / name) as temporary:
            temporary.write_text("x")
    assert names(tmp_path) == {"a[1]*", "b?.json"}


@pytest.mark.parametrize("old", [None, "old"])
def test_a_killed_folder_writer_leaves_the_old_or_the_new(tmp_path, renaming, old):
    seen = set()
    for call in range(200):
        target = tmp_path / str(call) / "run"
        if old:
            write_folder(target, old)
        killed = dies_at(call, lambda target=target: write_folder(target, "new"))
        if renaming == "two renames" and old and not target.exists():
            with pytest.raises(ZeroDivisionError), atomic_directory(target):  # the next writer puts the old back,
                raise ZeroDivisionError  # even if it fails
            seen.add("put back")
        found = read_folder(target) if target.exists() else None
        assert found in (old, "new")
        seen.add(found)
        if not killed:
            break
        write_folder(target, "next")
        assert read_folder(target) == "next"
        assert names(target.parent) == {"run"}  # nothing is left behind
    assert not killed
    assert call > 15
    assert seen == {old, "new"} | ({"put back"} if renaming == "two renames" and old else set())


@pytest.mark.parametrize("old", [None, "old"])
def test_a_killed_file_writer_leaves_the_old_or_the_new(tmp_path, old):
    def write(path, text):
        with atomic_file(path) as temporary:
            temporary.write_text(text)

    seen = set()
    for call in range(200):
        target = tmp_path / str(call) / "x.json"
        if old:
            write(target, old)
        killed = dies_at(call, lambda target=target: write(target, "new"))
        found = target.read_text() if target.exists() else None
        assert found in (old, "new")
        seen.add(found)
        if not killed:
            break
        write(target, "next")
        assert names(target.parent) == {"x.json"}
    assert not killed
    assert seen == {old, "new"}
