"""The lock of a folder."""

import errno

import pytest
from filelock import FileLock

from soundwave.data.locks import locked


def test_a_second_one_is_refused_until_the_first_one_ends(tmp_path):
    file, busy = tmp_path / ".lock", ValueError("is in use")
    with locked(file, tmp_path, busy), pytest.raises(ValueError, match="is in use"), locked(file, tmp_path, busy):
        pytest.fail("two have the lock")
    with locked(file, tmp_path, busy):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_locks_the_work_goes_on_and_it_is_said(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    said = []
    with locked(tmp_path / ".lock", tmp_path / "out", ValueError(), said.append):
        said.append("work")
    cannot = f"{tmp_path}/out cannot be locked (No locks available): make sure that no other process writes there"
    assert said == [cannot, "work"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="Read-only"), locked(tmp_path / ".lock", tmp_path, ValueError()):
        pytest.fail("it went on")
