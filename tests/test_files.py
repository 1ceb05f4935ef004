"""Which recordings a file, a folder or a pattern stands for."""

import os

import pytest

from soundwave.data.files import find_recordings


@pytest.fixture
def folder(tmp_path):
    for name in ("in/a.wav", "in/.hidden.wav", "in/.cache/b.wav", "in/notes.txt", "elsewhere/c.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_linked_folders_are_read_and_hidden_ones_are_not(folder):
    os.symlink(folder / "elsewhere", folder / "in/linked")
    found, passed_over = find_recordings([str(folder / "in")])
    assert found == [folder / "in/a.wav", folder / "in/linked/c.flac"]
    assert passed_over == [folder / "in/notes.txt"]


def test_links_that_lead_back_end(folder):
    os.symlink(folder / "in", folder / "in/again")
    assert find_recordings([str(folder / "in")])[0] == [folder / "in/a.wav"]


def test_a_file_that_several_names_stand_for_comes_once(folder):
    names = [str(folder / name) for name in ("in/a.wav", "in", "in/*.wav")]
    assert find_recordings(names)[0] == [folder / "in/a.wav"]
