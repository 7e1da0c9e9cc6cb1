"""Files that are whole or not there."""

import os

import pytest

from nnsight_fx import atomic


@pytest.mark.skipif(os.name != "posix", reason="an umask is POSIX's")
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_says_who_may_read(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        atomic.write(tmp_path / "a", b"one")
        atomic.write(tmp_path / "a", b"two")
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"two" and (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_what_was_there_stays_where_a_write_fails(tmp_path):
    atomic.write(tmp_path / "a", b"one")
    with pytest.raises(TypeError):
        atomic.write(tmp_path / "a", "no bytes")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == b"one" and os.listdir(tmp_path) == ["a"]
