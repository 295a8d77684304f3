"""Files are written whole or not at all, and never over a model."""

import os
import stat
import threading

import pytest

from kernelmux.errors import KernelmuxError
from kernelmux.files import new_folder, read_whole, replacing, write_whole


def test_a_file_is_there_once_it_is_whole_and_nothing_beside_it(tmp_path):
    path = tmp_path / "out.json"
    with replacing(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b", whole")
    assert path.read_bytes() == b"half, whole"
    assert [*tmp_path.iterdir()] == [path]


def test_where_writing_fails_the_file_is_what_it_was(tmp_path):
    path = tmp_path / "out.json"
    write_whole(path, "old é")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"new", 5])
    assert path.read_text("utf-8") == "old é"
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path):
    path, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(path)
    for text in ("first", "second"):
        write_whole(link, text)
        assert link.is_symlink()
        assert path.read_text() == text


def test_a_new_file_is_as_others_are_and_one_that_was_there_keeps_its_mode(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "out"
    plain.write_text("")
    write_whole(path, "")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o640)
    write_whole(path, "again")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such pipes")
def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_whole(path, "through")
    reader.join()
    assert read == ["through"]
    assert path.is_fifo()


@pytest.mark.parametrize("linked", [False, True])
def test_a_model_is_not_replaced(tmp_path, tiny, linked):
    path = tmp_path / "model"
    path.write_bytes(tiny.read_bytes())
    if linked:
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "model")
    with pytest.raises(KernelmuxError, match="is a model, which would be lost: name another file to write"):
        write_whole(path, "{}")
    assert (tmp_path / "model").read_bytes() == tiny.read_bytes()


def test_no_folder_is_the_systems_error_of_the_path_that_was_asked_for(tmp_path):
    path = tmp_path / "none" / "out"
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(path, "{}")
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught, new_folder(path):
        pass
    assert caught.value.filename == str(path)


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(KernelmuxError, match="is a folder: name a file to write"):
        write_whole(tmp_path, "{}")


def test_what_is_read_whole_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("kernelmux.files.LARGEST_TEXT", 1 << 20)
    (tmp_path / "text").write_bytes(b"x" * (1 << 20))
    assert len(read_whole(tmp_path / "text")) == 1 << 20
    for endless in ("/dev/zero", tmp_path / "more"):
        (tmp_path / "more").write_bytes(b"x" * ((1 << 20) + 1))
        with pytest.raises(OSError, match="more than 1 MB, which no such file has"):
            read_whole(endless)


def test_a_new_folder_is_there_once_it_is_whole_and_in_nothing_s_place(tmp_path):
    path = tmp_path / "made"
    with new_folder(path) as part:
        (part / "a").write_text("whole")
        assert not path.exists()
    assert (path / "a").read_text() == "whole"
    with pytest.raises(KernelmuxError, match="made is there already: name a new folder"), new_folder(path):
        pass
    with pytest.raises(TypeError), new_folder(tmp_path / "other") as part:
        (part / "a").write_bytes("half")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as part:
        (part / "b").write_text("in an empty one's place")
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["a", "b", "empty", "made"]
