"""Files that are there whole or not at all."""

import errno

import pytest

from safe_lab.whole_file import whole_file


def test_file_has_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "figures.json"
    path.write_bytes(b"before")
    with whole_file(path) as stream:
        stream.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_names_the_file_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "figures.json"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match=r"No space left.*figures\.json") as found, whole_file(path) as stream:
        stream.write(b"aft")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert found.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
