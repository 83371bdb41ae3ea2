/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The maps, and what everything else is written with. Part of fastpath.bpf.c.
 */
#ifndef MAPS_BPF_H
#define MAPS_BPF_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "fastpath.h"
#include "siphash.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2097152);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct fp_key);
	__type(value, struct fp_flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct fp_service_key);
	__type(value, struct fp_service);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct fp_rate);
} rates SEC(".maps");

/* Who is forgotten here begins with a full bucket. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct fp_client_key);
	__type(value, __u64);
} clients SEC(".maps");

/* UDP flows that were asked about and have had their token: the tick of it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fp_key);
	__type(value, __u32);
} lately SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct fp_target);
} targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fp_fragment_key);
	__type(value, struct fp_fragment);
} fragments SEC(".maps");

/* A wire-side interface -> the inner one in front of the switch; 0: the switch reads the wire itself. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u32);
} inner SEC(".maps");

/* The way back: an inner interface -> its wire. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u32);
} outer SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct fp_stats_key);
	__type(value, struct fp_stats);
} service_stats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, FP_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} closed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} queries SEC(".maps");

/* One for each connection in whose entries FP_SPLICE stands, by its serial, for just as long as these are there. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct fp_splice);
} splices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FP_REQUESTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct fp_request);
} requests SEC(".maps");

/* Clients whose first data is with the agent. Nobody has to clear up: those that nothing came for are forgotten. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct fp_key);
	__type(value, struct fp_pending);
} pending SEC(".maps");

/* Clients that sent what no cookie allows: the tick of the first time, and what they acknowledged. */
struct doubt {
	__u32 since;
	__u32 acknowledgment;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fp_key);
	__type(value, struct doubt);
} doubts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fp_cookies);
} cookies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FP_INSTALLS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct fp_install);
} installs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FP_INSTALLS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct fp_departure);
} departures SEC(".maps");

/* Where a connection is put together that is opened here: it would not fit on the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fp_install);
} decisions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct fp_wanted);
} wanted SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FP_SWEEPS);
	__type(key, __u32);
	__type(value, struct fp_sweep);
} sweeping SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fp_layout);
} layout SEC(".maps");

/* ------------------------------------------------------------------ small things */

#define barrier() asm volatile("" ::: "memory")

/* The compiler knows a value's bounds and leaves their check out; the verifier has to see it. */
#define known_again(value) asm volatile("" : "+r"(value))

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

/* Where a program run by the agent may be interrupted by a packet. */
static __always_inline void count_at_once(__u32 counter, __u64 many)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		__sync_fetch_and_add(value, many);
}

/* Not for programs of the type "syscall". */
static __always_inline __u32 ticks(void)
{
	return bpf_ktime_get_coarse_ns() >> FP_TICK_SHIFT;
}

static __always_inline void copy16(__u8 *to, const __u8 *from)
{
	__u32 *t = (__u32 *)to;
	const __u32 *f = (const __u32 *)from;

	t[0] = f[0];
	t[1] = f[1];
	t[2] = f[2];
	t[3] = f[3];
}

static __always_inline void copy6(__u8 *to, const __u8 *from)
{
	__u16 *t = (__u16 *)to;
	const __u16 *f = (const __u16 *)from;

	t[0] = f[0];
	t[1] = f[1];
	t[2] = f[2];
}

static __always_inline int zero6(const __u8 *mac)
{
	const __u16 *m = (const __u16 *)mac;

	return !(m[0] | m[1] | m[2]);
}

static __always_inline int zero16(const __u8 *address)
{
	const __u32 *a = (const __u32 *)address;

	return !(a[0] | a[1] | a[2] | a[3]);
}

static __always_inline int same16(const __u8 *one, const __u8 *other)
{
	const __u32 *a = (const __u32 *)one, *b = (const __u32 *)other;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline int mapped(const __u8 *address)
{
	const __u32 *a = (const __u32 *)address;

	return !(a[0] | a[1]) && a[2] == bpf_htonl(0xffff);
}

static __always_inline void map_address(__u8 *to, __u32 address)
{
	__u32 *t = (__u32 *)to;

	t[0] = 0;
	t[1] = 0;
	t[2] = bpf_htonl(0xffff);
	t[3] = address;
}

static __always_inline __u32 fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

static __always_inline __u16 fold16(__u64 sum)
{
	sum = fold32(sum);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* ones' complement sum of what is new and of the complement of what is old, as bpf_csum_diff */
static __always_inline __u64 difference(const __u8 *from, const __u8 *to, int ipv6)
{
	const __u32 *f = (const __u32 *)from, *t = (const __u32 *)to;
	__u64 sum = (__u64)(__u32)~f[3] + t[3];

	if (ipv6)
		sum += (__u64)(__u32)~f[0] + t[0] + (__u32)~f[1] + t[1] + (__u32)~f[2] + t[2];
	return sum;
}

/* Ticks from then to now; another processor, or a finer clock, may have been a moment later. */
static __always_inline __u32 silence(__u32 now, __u32 used)
{
	return (__s32)(now - used) < 0 ? 0 : now - used;
}

/* ------------------------------------------------------------------ keyed hash */

/* The client's address, or all of the key. */
static __noinline __u64 keyed_hash(const struct fp_key *key, int whole)
{
	__u32 zero = 0;
	struct fp_layout *l = bpf_map_lookup_elem(&layout, &zero);
	struct sip s;

	if (!l)
		return 0;
	sip_begin(&s, l->seed);
	sip_word(&s, two(key->source));
	sip_word(&s, two(key->source + 8));
	if (whole) {
		sip_word(&s, two(key->destination));
		sip_word(&s, two(key->destination + 8));
		sip_word(&s, two((const __u8 *)&key->source_port));
	}
	return sip_end(&s, whole ? sizeof(*key) : 16);
}

#endif
