"""Files are written as `open` would, whole or not at all."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from selfindex import BalanceProfile
from selfindex.files import write_tensors


def write(path, number=1):
    write_tensors({"x": torch.full((3,), number)}, path, {})


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def umask():
    old = os.umask(0)
    yield os.umask
    os.umask(old)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_that_the_umask_gives(mask, umask, tmp_path):
    umask(mask)
    write(tmp_path / "one")
    with open(tmp_path / "other", "w"):
        pass
    assert mode(tmp_path / "one") == mode(tmp_path / "other") == 0o666 & ~mask
    BalanceProfile({0: torch.ones(2, 8)}).save(tmp_path / "profile")
    assert mode(tmp_path / "profile") == 0o666 & ~mask


@pytest.mark.parametrize("old", [0o600, 0o664])
def test_an_older_file_keeps_its_mode(old, umask, tmp_path):
    umask(0o022)
    path = tmp_path / "file"
    path.touch()
    path.chmod(old)
    write(path)
    assert mode(path) == old
    assert load_file(path)["x"].tolist() == [1, 1, 1]


def test_what_a_link_points_to_is_written(tmp_path):
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "there").mkdir()
    for number in (1, 2):
        write(tmp_path / "link", number)
        assert (tmp_path / "link").is_symlink()
        assert load_file(tmp_path / "there/file")["x"][0] == number
    assert [x.name for x in (tmp_path / "there").iterdir()] == ["file"]


def test_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "folder")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match=r"regular file|No such device"):
            write(path)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "nowhere" / "file")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["folder", "pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_file_or_folder_is_left_alone(tmp_path):
    write(tmp_path / "file")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(PermissionError):
        write(tmp_path / "file", 2)
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        write(tmp_path / "new")
    tmp_path.chmod(0o755)
    assert load_file(tmp_path / "file")["x"][0] == 1
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["selfindex.files.save_file", "os.replace"])
def test_a_failure_leaves_the_older_file_and_nothing_else(error, place, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(type(error)):
        write(path, 2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
