# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The least programs that can stand at a wire: every frame goes on to where a map says.

Imported in child processes too, some of them with green threads; so nothing of Mininet here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from pathlib import Path

from lbapp.dataflow.fastpath.ports import Programs, Wire, Wires
from lbapp.dataflow.ovs import Ovs

SOURCE = """
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, __u32); __type(value, __u32); }
    onward SEC(".maps");
static int lead(struct __sk_buff *skb)
{
    __u32 key = skb->ifindex, *index = bpf_map_lookup_elem(&onward, &key);
    return index ? bpf_redirect(*index, 0) : TC_ACT_OK;
}
SEC("tc") int wire(struct __sk_buff *skb) { return lead(skb); }
SEC("tc") int out(struct __sk_buff *skb) { return lead(skb); }
SEC("tc") int next(struct __sk_buff *skb) { return TC_ACT_UNSPEC; }
SEC("socket") int other(struct __sk_buff *skb) { return 0; }
char licence[] SEC("license") = "GPL";
"""


def bpf(command: int, attributes: bytes) -> int:
    number = {"x86_64": 321, "aarch64": 280}[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, command, ctypes.create_string_buffer(attributes, 128), 128)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


class Loaded:
    """The programs, and the map that tells them where frames go."""

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self.wire, self.out, self.other, self.onward = (
            self._open(pins / name) for name in ("wire", "out", "other", "maps/onward"))
        self.programs = Programs(self.wire, self.out)

    @staticmethod
    def _open(path: Path) -> int:
        name = ctypes.create_string_buffer(str(path).encode())
        return bpf(7, ctypes.addressof(name).to_bytes(8, sys.byteorder))

    def _update(self, command: int, key: int, value: int = 0) -> None:
        keys, values = (ctypes.c_uint32 * 1)(key), (ctypes.c_uint32 * 1)(value)
        fields = (self.onward, ctypes.addressof(keys), ctypes.addressof(values), 0)
        bpf(command, b"".join(field.to_bytes(8, sys.byteorder) for field in fields))

    def connect(self, wire: Wire) -> None:
        if wire.inner:
            self._update(2, wire.ifindex, wire.inner)
            self._update(2, wire.inner, wire.ifindex)

    def close(self) -> None:
        for descriptor in (self.wire, self.out, self.other, self.onward):
            os.close(descriptor)


def attach_and_wait(rundir: str, bridge: str, pins: str) -> None:
    """In a process of its own: attach, say so, and never end."""
    loaded = Loaded(Path(pins))
    Wires(Ovs(rundir), bridge, loaded.programs, loaded.connect).sync()
    print("attached", flush=True)
    signal.pause()
