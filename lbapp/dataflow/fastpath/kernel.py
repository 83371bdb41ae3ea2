# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""eBPF objects, maps and ring buffers of the kernel, by libbpf.

Owns the library's calls, pinning and mapped memory. Knows nothing of what is in a map. Every call is a system
call that does not wait, so it works in green threads as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

BPFFS = Path("/sys/fs/bpf")
ANY, NOEXIST, EXIST = 0, 1, 2
BATCH = 4096
_BUSY, _DISCARD, _LENGTH = 1 << 31, 1 << 30, (1 << 30) - 1
_LIBRARIES = ("libbpf.so.1",)
_LOG_LINES = 40


class KernelError(Exception):
    """The kernel or libbpf refused. The message says what, and why; ``errno`` is its number or 0."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(f"{message}: {os.strerror(number)}" if number else message)
        self.errno = number


class _RunOptions(ctypes.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = [
        ("sz", ctypes.c_size_t), ("data_in", ctypes.c_void_p), ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32), ("data_size_out", ctypes.c_uint32), ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p), ("ctx_size_in", ctypes.c_uint32), ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32), ("repeat", ctypes.c_int), ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32), ("cpu", ctypes.c_uint32), ("batch_size", ctypes.c_uint32),
    ]


_CONTEXT_WORDS, _CONTEXT_MARK, _CONTEXT_IFINDEX = 11, 2, 10
"""struct __sk_buff, up to its interface: in words of 32 bits."""

_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Library:
    """libbpf, and what it has to say."""

    def __init__(self) -> None:
        for name in _LIBRARIES:
            try:
                self.calls = ctypes.CDLL(name, use_errno=True)
            except OSError:
                continue
            break
        else:
            raise KernelError("libbpf is not installed (Debian package libbpf1)")
        self.lines: list[str] = []
        self._libc = ctypes.CDLL(None)
        self._print = _PRINT(self._say)
        pointers = ("bpf_object__open_file", "bpf_object__next_map", "bpf_object__next_program")
        for function in (*pointers, "libbpf_set_print"):
            getattr(self.calls, function).restype = ctypes.c_void_p
        for function in ("bpf_map__name", "bpf_program__name"):
            getattr(self.calls, function).restype = ctypes.c_char_p
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        for function, arguments in {
            "bpf_object__open_file": (ctypes.c_char_p, pointer), "bpf_object__load": (pointer,),
            "bpf_object__close": (pointer,), "bpf_object__next_map": (pointer, pointer),
            "bpf_object__next_program": (pointer, pointer), "bpf_map__name": (pointer,),
            "bpf_program__name": (pointer,), "bpf_map__fd": (pointer,), "bpf_program__fd": (pointer,),
            "bpf_map__set_max_entries": (pointer, ctypes.c_uint32),
            "bpf_map__set_pin_path": (pointer, ctypes.c_char_p), "bpf_obj_get": (ctypes.c_char_p,),
            "bpf_map_lookup_elem": (integer, pointer, pointer),
            "bpf_map_update_elem": (integer, pointer, pointer, ctypes.c_uint64),
            "bpf_map_delete_elem": (integer, pointer),
            "bpf_map_update_batch": (integer, pointer, pointer, pointer, pointer),
            "bpf_map_delete_batch": (integer, pointer, pointer, pointer),
            "bpf_map_lookup_batch": (integer, pointer, pointer, pointer, pointer, pointer, pointer),
            "bpf_prog_test_run_opts": (integer, pointer), "libbpf_set_print": (_PRINT,),
        }.items():
            getattr(self.calls, function).argtypes = arguments
        self.calls.libbpf_set_print(self._print)

    def _say(self, level: int, form: bytes, arguments: int) -> int:
        buffer = ctypes.create_string_buffer(8192)
        self._libc.vsnprintf(buffer, ctypes.c_size_t(len(buffer)), ctypes.c_char_p(form), ctypes.c_void_p(arguments))
        if level <= 1:
            self.lines += buffer.value.decode(errors="replace").strip().splitlines()
            del self.lines[:-_LOG_LINES]
        return 0


_loaded: list[_Library] = []


def _library() -> _Library:
    if not _loaded:
        _loaded.append(_Library())
    return _loaded[0]


def possible_processors() -> int:
    """How many values an element of a map per processor has."""
    last = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


def mount(where: Path = BPFFS) -> None:
    """Mount the file system for pins unless it is there.

    Raises:
        KernelError: it cannot be mounted.
    """
    with contextlib.suppress(OSError):
        if any(line.split()[1:3] == [str(where), "bpf"] for line in Path("/proc/mounts").read_text().splitlines()):
            return
    try:
        where.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "bpf", "bpf", str(where)], stdin=subprocess.DEVNULL, check=False,
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{where}: {error}") from None
    if done.returncode:
        raise KernelError(f"{where}: {done.stderr.strip() or 'cannot be mounted'}")


# ------------------------------------------------------------------ maps


class Map:
    """A map, by file descriptor (which stays its owner's)."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.fd = name, fd
        self._calls = _library().calls
        found = self._information()
        self.key_size, self.value_size = found["key_size"], found["value_size"]
        self.max_entries = found["max_entries"]
        self.stride = (self.value_size + 7 & ~7) * possible_processors() if found["map_type"] in (5, 6) else (
            self.value_size)

    def _information(self) -> dict[str, int]:
        found = {}
        for line in Path(f"/proc/self/fdinfo/{self.fd}").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            with contextlib.suppress(ValueError):
                found[name] = int(value.strip(), 0)
        return found

    def memory(self) -> int:
        """Bytes of kernel memory, as the kernel reckons it."""
        return self._information().get("memlock", 0)

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key; of a map per processor, all of its values."""
        value = ctypes.create_string_buffer(max(self.stride, 1))  # its own: another thread may be reading as well
        code = self._calls.bpf_map_lookup_elem(self.fd, key, value)
        if code:
            self._check(code, "reading", errno.ENOENT)
            return None
        return value.raw[:self.stride]

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> bool:
        """Set a value. False if NOEXIST or EXIST kept it from being set."""
        code = self._calls.bpf_map_update_elem(self.fd, key, value, flags)
        return self._check(code, "writing", errno.EEXIST if flags == NOEXIST else errno.ENOENT)

    def delete(self, key: bytes) -> bool:
        """Delete an element. False if there was none."""
        return self._check(self._calls.bpf_map_delete_elem(self.fd, key), "deleting from", errno.ENOENT)

    def update_all(self, items: Mapping[bytes, bytes]) -> None:
        """Set many values by few calls; each is set or replaced at once."""
        keys = list(items)
        for start in range(0, len(keys), BATCH):
            some = keys[start:start + BATCH]
            count = ctypes.c_uint32(len(some))
            self._check(self._calls.bpf_map_update_batch(
                self.fd, b"".join(some), b"".join([items[key] for key in some]), ctypes.byref(count), None), "writing")

    def delete_all(self, keys: Iterable[bytes]) -> None:
        """Delete elements, those that are there."""
        for key in keys:
            self.delete(key)

    def chunks(self, size: int = BATCH) -> Iterator[tuple[memoryview, memoryview]]:
        """All elements, many at a time: their keys and values, valid until the next step.

        Elements that come or go meanwhile may be missed or met twice.
        """
        position = ctypes.create_string_buffer(max(self.key_size, 8))
        start = keys = values = None
        while True:
            if keys is None or values is None:
                keys = ctypes.create_string_buffer(size * self.key_size)
                values = ctypes.create_string_buffer(size * self.stride)
                key_view, value_view = memoryview(keys).cast("B"), memoryview(values).cast("B")
            count = ctypes.c_uint32(size)
            code = self._calls.bpf_map_lookup_batch(self.fd, start, position, keys, values, ctypes.byref(count), None)
            if code == -errno.ENOSPC and size < self.max_entries:
                # A bucket holds more than fits. The kernel has said which: it goes on there, with more room.
                size, start, keys = size * 4, position, None
                continue
            self._check(code, "listing", errno.ENOENT)
            yield key_view[:count.value * self.key_size], value_view[:count.value * self.stride]
            if code:
                return
            start = position

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All elements."""
        for keys, values in self.chunks():
            for index in range(len(keys) // self.key_size):
                yield (bytes(keys[index * self.key_size:(index + 1) * self.key_size]),
                       bytes(values[index * self.stride:(index + 1) * self.stride]))

    def mapped(self) -> mmap.mmap:
        """The memory of an array that can be mapped."""
        size = (self.value_size + 7 & ~7) * self.max_entries
        return mmap.mmap(self.fd, size + -size % mmap.PAGESIZE)

    def _check(self, code: int, what: str, expected: int = 0) -> bool:
        if code >= 0:
            return True
        if -code == expected:
            return False
        raise KernelError(f"{what} the map {self.name}", -code)


class Ring:
    """A ring buffer's reading end. There must be one only."""

    def __init__(self, ring: Map) -> None:
        self.fd, self.size = ring.fd, ring.max_entries
        self._positions = mmap.mmap(self.fd, mmap.PAGESIZE)
        # The kernel maps the data twice, one behind the other: no record is ever cut.
        self._memory = mmap.mmap(self.fd, mmap.PAGESIZE + 2 * self.size, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._consumed = memoryview(self._positions).cast("Q")
        self._produced = memoryview(self._memory).cast("Q")
        self._data = memoryview(self._memory)[mmap.PAGESIZE:]

    def close(self) -> None:
        """Unmap."""
        for view in (self._consumed, self._produced, self._data):
            view.release()
        self._positions.close()
        self._memory.close()

    def pending(self, limit: int) -> memoryview:
        """What waits, at most ``limit`` bytes of it, with the headers; to be released before the next call."""
        consumed = self._consumed[0]
        start = consumed & (self.size - 1)
        return self._data[start:start + min(self._produced[0] - consumed, limit)]

    def consume(self, length: int) -> None:
        """So much of what waited has been read."""
        self._consumed[0] += length

    def drain(self, limit: int) -> list[bytes]:
        """At most so many records."""
        found: list[bytes] = []
        read = 0
        with self.pending(self.size) as waiting:
            words = waiting.cast("I") if len(waiting) % 4 == 0 else waiting
            end = len(waiting)
            while read < end and len(found) < limit:
                header = words[read >> 2]
                if header & _BUSY:
                    break
                length = header & _LENGTH
                if not header & _DISCARD:
                    found.append(bytes(waiting[read + 8:read + 8 + length]))
                read += 8 + length + 7 & ~7
            words.release()
        if read:
            self.consume(read)
        return found


BUSY, DISCARD = _BUSY, _DISCARD


# ------------------------------------------------------------------ programs


class Object:
    """A loaded object: its maps and programs by name, for as long as it is not closed.

    Args:
        path: the compiled object.
        pins: where maps are pinned; those that are there already are taken over. None: nothing is pinned.
        pinned: whether a map, by name, is.
        sizes: how many elements maps may have, by name, where not what the source says.

    Raises:
        KernelError: no libbpf, no permission, an old kernel, or a program the verifier refuses.
    """

    def __init__(self, path: Path, pins: Path | None = None, pinned: Callable[[str], bool] = bool,
                 sizes: Mapping[str, int] = MappingProxyType({})) -> None:
        library = _library()
        library.lines.clear()
        self._calls = library.calls
        self._object: int | None = self._calls.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise KernelError(f"{path}", ctypes.get_errno())
        try:
            self._prepare(pins, pinned, sizes)
            code = self._calls.bpf_object__load(self._object)
            if code:
                raise KernelError(self._why(), -code)
            self.maps = {name: Map(name, self._calls.bpf_map__fd(one)) for name, one in self._maps()}
            self.programs = {name: self._calls.bpf_program__fd(one) for name, one in self._programs()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors of all maps and programs. What is pinned or attached stays."""
        if self._object:
            self._calls.bpf_object__close(self._object)
            self._object = None

    def _maps(self) -> Iterator[tuple[str, int]]:
        one = self._calls.bpf_object__next_map(self._object, None)
        while one:
            yield self._calls.bpf_map__name(one).decode(), one
            one = self._calls.bpf_object__next_map(self._object, one)

    def _programs(self) -> Iterator[tuple[str, int]]:
        one = self._calls.bpf_object__next_program(self._object, None)
        while one:
            yield self._calls.bpf_program__name(one).decode(), one
            one = self._calls.bpf_object__next_program(self._object, one)

    def _prepare(self, pins: Path | None, pinned: Callable[[str], bool], sizes: Mapping[str, int]) -> None:
        for name, one in self._maps():
            size = sizes.get(name)
            if pins is not None and pinned(name):
                old = pinned_map(pins / name)
                if old is not None:
                    size = old.max_entries  # whoever wants another has to take the old one down first
                    os.close(old.fd)
                self._calls.bpf_map__set_pin_path(one, os.fsencode(pins / name))
            if size:
                self._calls.bpf_map__set_max_entries(one, size)

    @staticmethod
    def _why() -> str:
        lines = [line for line in _library().lines if line and "BEGIN PROG LOAD LOG" not in line]
        return "eBPF programs cannot be loaded" + (f" ({lines[-1]})" if lines else "")


def pinned_map(path: Path) -> Map | None:
    """A pinned map; None if there is none. Its descriptor is the caller's to close."""
    fd = _library().calls.bpf_obj_get(os.fsencode(path))
    if fd < 0:
        if fd in (-errno.ENOENT, -errno.ENOTDIR):
            return None
        raise KernelError(str(path), -fd)
    return Map(path.name, fd)


def unpin(pins: Path) -> None:
    """Remove a folder of pins, and the one around it if it was the last; what nobody uses any more is then gone."""
    shutil.rmtree(pins, ignore_errors=True)
    with contextlib.suppress(OSError):
        pins.parent.rmdir()


class Prepared:
    """A program that takes a packet, to be run again and again (BPF_PROG_TEST_RUN): the packet is always the same, of
    its context (struct __sk_buff) only the mark and the interface are told. Not for several threads.

    Args:
        program: its descriptor.
        size: of the packet, which is all zeros.
    """

    def __init__(self, program: int, size: int) -> None:
        self._program = program
        self._packet = ctypes.create_string_buffer(size)
        self._context = (ctypes.c_uint32 * _CONTEXT_WORDS)()
        self._options = _RunOptions(
            sz=ctypes.sizeof(_RunOptions), data_in=ctypes.addressof(self._packet), data_size_in=size,
            ctx_in=ctypes.addressof(self._context), ctx_size_in=ctypes.sizeof(self._context))
        self._reference = ctypes.byref(self._options)
        self._call = _library().calls.bpf_prog_test_run_opts

    def __call__(self, mark: int, ifindex: int = 0) -> int:
        """Run it; what it returned. Without an interface, the packet's is the loopback one.

        Raises:
            KernelError: the kernel refused.
        """
        self._context[_CONTEXT_MARK], self._context[_CONTEXT_IFINDEX] = mark, ifindex
        self._options.data_size_out = 0  # the last packet's: the kernel would refuse a longer one
        code = self._call(self._program, self._reference)
        if code:
            raise KernelError("running a program", -code)
        return int(self._options.retval)


def run(program: int, data: bytes | None = None, context: Any = None, *, repeat: int = 0, room: int = 0,
        flags: int = 0) -> tuple[int, bytes, int]:
    """Run a program (BPF_PROG_TEST_RUN).

    Args:
        program: its descriptor.
        data: the packet, for programs that take one.
        context: a ctypes object or writable buffer that is read, and written afterwards.
        repeat: how often.
        room: for the packet as it is afterwards.
        flags: as for the system call.

    Returns:
        What it returned, the packet afterwards, nanoseconds a run.

    Raises:
        KernelError: the kernel refused.
    """
    out = ctypes.create_string_buffer(room) if room else None
    options = _RunOptions(sz=ctypes.sizeof(_RunOptions), repeat=repeat, flags=flags)
    if data is not None:
        options.data_in = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
        options.data_size_in = len(data)
    if out is not None:
        options.data_out, options.data_size_out = ctypes.addressof(out), room
    if context is not None:
        options.ctx_in = ctypes.addressof(context)
        options.ctx_size_in = ctypes.sizeof(context)
        if data is not None:
            options.ctx_out, options.ctx_size_out = options.ctx_in, options.ctx_size_in
    code = _library().calls.bpf_prog_test_run_opts(program, ctypes.byref(options))
    if code:
        raise KernelError("running a program", -code)
    return options.retval, out.raw[:options.data_size_out] if out is not None else b"", options.duration
