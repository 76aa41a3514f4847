"""Reading one page of a file natively: past the page cache or through it, in pieces, interrupted, and not at all."""

from __future__ import annotations

import os
import shutil

import pytest
from native_memory import NativePageFiles, trouble_pread
from usaf_ext.errors import StoreError

PAGE = 3 * 4096


@pytest.fixture
def open_page(tmp_path):
    """open_page(offset=4096) -> (reader, path, the page's bytes), closed at the end."""
    opened = []

    def make(offset=4096):
        path = tmp_path / "pages"
        data = os.urandom(offset + PAGE + 4096)
        path.write_bytes(data)
        files = NativePageFiles(path, len(data), offset, PAGE)
        opened.append(files)
        return files, path, data[offset : offset + PAGE]

    yield make
    trouble_pread()
    for files in opened:
        files.close()


@pytest.mark.parametrize("offset", [0, 4096, 8192, 8, 512, 4097])
@pytest.mark.parametrize("at_most", [0, 4096, 8192])
def test_reads_the_page(open_page, offset, at_most):
    files, _, expected = open_page(offset)
    trouble_pread(interrupted=3, at_most=at_most)
    assert files.read() == expected
    if offset % 4096:
        assert not files.direct
        trouble_pread(at_most=1000)  # past the cache only the end of a file gives part of a block
        assert files.read() == expected


def test_reads_past_the_page_cache_where_the_file_system_allows_it(open_page):
    files, path, expected = open_page()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    assert files.direct
    assert files.read() == expected


def test_a_file_cut_off_and_put_back(open_page):
    files, path, expected = open_page()
    whole = path.read_bytes()
    for size in (0, 4096, 4100, 4096 + 8192, 4096 + PAGE - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match=rf"{path.name}: cannot be read: truncated"):
            files.read()
        with pytest.raises(StoreError, match=rf"expected a file of {len(whole)} bytes, it has {size}"):
            files.read()
        path.write_bytes(whole)
        assert files.read() == expected
    path.write_bytes(whole[: 4096 + PAGE])  # cut off behind the page
    assert files.read() == expected


def test_a_removed_file_stays_readable_while_it_is_open(open_page, tmp_path):
    files, path, expected = open_page()
    shutil.copy(path, tmp_path / "copy")
    path.unlink()
    assert files.read() == expected
    trouble_pread(failing=1)
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        files.read()
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        files.read()
    (tmp_path / "copy").rename(path)
    assert files.read() == expected


def test_refuses_a_file_of_another_size_and_a_folder(open_page, tmp_path):
    _, path, _ = open_page()
    with pytest.raises(StoreError, match=r"pages: .*expected a file of 99999 bytes, it has"):
        NativePageFiles(path, 99999, 0, PAGE)
    with pytest.raises(StoreError, match="cannot be read"):
        NativePageFiles(tmp_path, 99999, 0, PAGE)
    with pytest.raises(StoreError, match="none: cannot be read: No such file"):
        NativePageFiles(tmp_path / "none", 99999, 0, PAGE)
    for offset in (-1, path.stat().st_size - PAGE + 1):
        with pytest.raises(ValueError, match=f"no {PAGE} bytes at {offset} of file 0"):
            NativePageFiles(path, path.stat().st_size, offset, PAGE)
