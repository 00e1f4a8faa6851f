"""Files appear whole or not at all, with the mode that the umask says."""

import errno
import os
import stat

import numpy as np
import pytest

from spo_jax.errors import UserError
from spo_jax.files import atomic_write, check_place, write_text
from spo_jax.formats.safetensors_io import write_params, write_tensors
from spo_jax.images import write_png


@pytest.fixture
def umask():
    """Sets the umask and puts the old one back."""
    old = os.umask(0)
    yield os.umask
    os.umask(old)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_what_is_written_follows_the_umask(tmp_path, umask, mask):
    umask(mask)
    write_tensors(tmp_path / "lora.safetensors", {"a": np.ones(2, np.float32)})
    write_params(tmp_path / "params.safetensors", {"a": {"kernel": np.ones((2, 2), np.float32)}})
    write_text(tmp_path / "config.json", "{}")
    write_png(tmp_path / "picture.png", np.zeros((4, 4, 3), np.uint8))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes
    assert len(modes) == 4


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_place_is_tried_without_leaving_a_trace(tmp_path):
    write_text(tmp_path / "there.txt", "old")
    for path in (tmp_path / "there.txt", tmp_path / "new" / "x.txt"):
        check_place(path)
    assert (tmp_path / "there.txt").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "there.txt"]


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def forbidden(path, _content):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.write_bytes", forbidden)
    with pytest.raises(UserError, match=r"--to=.*x cannot be written \(Permission denied\); choose another place"):
        check_place(tmp_path / "x", "--to")
