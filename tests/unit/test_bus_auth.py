# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.bus.auth and lbapp.bus.keyfile: proofs, keys, the window against replay, the key file."""

from __future__ import annotations

import hmac
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.bus import auth, keyfile
from lbapp.bus.auth import WINDOW, Role, Window

KEY = bytes(32)
CS, DFS, SAID = b"c" * 32, b"d" * 32, b"s" * 32


def test_a_proof_depends_on_everything():
    right = auth.proof(KEY, Role.CS, SAID, CS, DFS)
    others = [auth.proof(b"\x01" + KEY[1:], Role.CS, SAID, CS, DFS), auth.proof(KEY, Role.DFS, SAID, CS, DFS),
              auth.proof(KEY, Role.CS, CS, CS, DFS), auth.proof(KEY, Role.CS, SAID, DFS, DFS),
              auth.proof(KEY, Role.CS, SAID, CS, CS), auth.proof(KEY, Role.CS, SAID, DFS, CS)]
    assert len({right, *others}) == 7
    assert auth.proves(right, KEY, Role.CS, SAID, CS, DFS)
    assert not any(auth.proves(other, KEY, Role.CS, SAID, CS, DFS) for other in others)


def test_every_key_of_a_session_is_another():
    keys = auth.derive(KEY, SAID, CS, DFS)
    assert len({keys.ssmb_cs, keys.ssmb_dfs, keys.csmb_cs, keys.csmb_dfs, auth.proof(KEY, Role.CS, SAID, CS, DFS)}) == 5
    assert keys.session
    assert keys.ssmb(Role.CS) == keys.ssmb_cs and keys.csmb(Role.DFS) == keys.csmb_dfs
    again = auth.derive(KEY, SAID, CS, b"e" * 32)
    assert not set(keys) & set(again)


def test_a_transcript_keeps_messages_apart():
    assert auth.transcript([b"ab", b"c"]) != auth.transcript([b"a", b"bc"])


@given(st.lists(st.integers(0, 3 * WINDOW), max_size=300))
def test_the_window_takes_each_number_once(numbers):
    window, seen, top = Window(), set(), 0
    for number in numbers:
        expected = number > 0 and number not in seen and number > top - WINDOW
        assert window.fresh(number) == expected
        if expected:
            window.mark(number)
            seen.add(number)
            top = max(top, number)


def test_the_window_jumps_and_has_a_floor():
    window = Window()
    window.mark(2**64 - 1)
    assert not window.fresh(2**64 - 1) and window.fresh(2**64 - 2) and not window.fresh(2**64 - 1 - WINDOW)
    window = Window()
    window.mark(10)
    window.raise_floor(20)
    assert not window.fresh(9) and not window.fresh(20) and window.fresh(21)


# ------------------------------------------------------------------ the key file


def test_the_key_is_made_once_and_read_again(tmp_path):
    path = tmp_path / "run" / "bus.key"
    key = keyfile.ensure(path)
    assert len(key) == auth.KEY_BYTES and key != bytes(32)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keyfile.ensure(path) == keyfile.read(path) == key
    assert [entry.name for entry in path.parent.iterdir()] == ["bus.key"]


def test_a_key_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "bus.key"
    keyfile.ensure(path)
    for mode in (0o640, 0o604, 0o620, 0o700):
        path.chmod(mode)
        with pytest.raises(keyfile.KeyFileError, match="chmod 600"):
            keyfile.read(path)


def test_what_is_no_key_is_refused(tmp_path):
    path = tmp_path / "bus.key"
    with pytest.raises(keyfile.KeyFileError, match="No such file"):
        keyfile.read(path)
    path.write_bytes(bytes(31))
    path.chmod(0o600)
    with pytest.raises(keyfile.KeyFileError, match="31 bytes"):
        keyfile.read(path)
    with pytest.raises(keyfile.KeyFileError, match="31 bytes"):
        keyfile.ensure(path)
    path.write_bytes(bytes(5000))
    with pytest.raises(keyfile.KeyFileError, match="expected 32 to 4096"):
        keyfile.read(path)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(keyfile.KeyFileError, match="no regular file"):
        keyfile.read(path)
    with pytest.raises(keyfile.KeyFileError, match="cannot make"):
        keyfile.ensure(path / "below" / "bus.key")


def test_what_is_concealed_is_seen_with_the_key_and_the_place_alone():
    keys = auth.derive(KEY, SAID, CS, DFS)
    data = bytes(range(32))
    hidden = auth.conceal(keys.concealing, 7, data)
    # Exclusive or with HMAC-SHA256 of the place, eight bytes.
    stream = hmac.digest(keys.concealing, (7).to_bytes(8, "big"), "sha256")
    assert bytes(a ^ b for a, b in zip(hidden, stream, strict=True)) == data
    assert auth.conceal(keys.concealing, 7, hidden) == data
    assert auth.conceal(keys.concealing, 8, hidden) != data
    assert auth.conceal(auth.derive(KEY, SAID, CS, b"e" * 32).concealing, 7, hidden) != data
    assert auth.conceal(keys.concealing, 7, data[:5]) == hidden[:5]
    assert len({keys.concealing, keys.csmb_cs, keys.csmb_dfs, keys.ssmb_cs, keys.ssmb_dfs}) == 5, "for nothing else"
