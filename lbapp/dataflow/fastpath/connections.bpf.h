/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Connections: their two entries, their end, and the telling of it. Part of fastpath.bpf.c.
 */
#ifndef CONNECTIONS_BPF_H
#define CONNECTIONS_BPF_H

#include "maps.bpf.h"

#define EEXIST 17

static __always_inline struct fp_stats *stats_of(__u32 virtual_server, __u32 member)
{
	struct fp_stats_key key = {virtual_server, member};
	struct fp_stats *stats = bpf_map_lookup_elem(&service_stats, &key);

	if (!stats) {
		struct fp_stats none = {};

		bpf_map_update_elem(&service_stats, &key, &none, BPF_NOEXIST);
		stats = bpf_map_lookup_elem(&service_stats, &key);
	}
	return stats;
}

/* The key of the other direction: what comes back is addressed from where this one goes. */
static __always_inline void turn_round(struct fp_key *back, const struct fp_flow *flow, __u8 protocol)
{
	copy16(back->source, flow->destination);
	copy16(back->destination, flow->source);
	back->source_port = flow->destination_port;
	back->destination_port = flow->source_port;
	back->protocol = protocol;
	back->pad[0] = back->pad[1] = back->pad[2] = 0;
}

/* The other direction of a connection, and its key; not what has taken its place since. */
static __always_inline struct fp_flow *other_of(const struct fp_flow *flow, __u8 protocol, struct fp_key *back)
{
	struct fp_flow *other;

	turn_round(back, flow, protocol);
	other = bpf_map_lookup_elem(&flows, back);
	return other && other->serial == flow->serial && (other->state ^ flow->state) & FP_OUTBOUND ? other : 0;
}

/*
 * Whether the entry that was just read is still the key's. One deleted by another processor may be a different
 * connection's already: the memory is used again at once. The key lies in front of the value, and is written first.
 */
static __noinline int still(const struct fp_key *key, struct fp_flow *flow)
{
	struct fp_key own;

	barrier();
	return !bpf_probe_read_kernel(&own, sizeof(own), (void *)flow - sizeof(own))
	       && same16(own.source, key->source) && same16(own.destination, key->destination)
	       && two((__u8 *)&own.source_port) == two((__u8 *)&key->source_port);
}

/* A splice's translation ends with the entries that it is for. */
static __always_inline void forget_splice(const struct fp_flow *flow)
{
	__u32 serial = flow->serial;

	if (flow->state & FP_SPLICE)
		bpf_map_delete_elem(&splices, &serial);
}

/*
 * Tell of a connection's end, once. False where the ring has no room: then nothing has happened.
 * in and out are its two directions; out may be missing.
 */
static __noinline int report(const struct fp_key *key, struct fp_flow *in, struct fp_flow *out, __u32 reason, __u32 now)
{
	struct fp_closed *record;
	struct fp_stats *stats;

	if (in->state & FP_REPORTED)
		return 1;
	record = bpf_ringbuf_reserve(&closed, sizeof(*record), 0);
	if (!record)
		return 0;
	if (reason != FP_ALIVE && __sync_fetch_and_or(&in->state, FP_REPORTED) & FP_REPORTED) {
		bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);
		return 1;
	}
	record->key = *key;
	record->virtual_server = in->virtual_server;
	record->member = in->member;
	record->serial = in->serial;
	record->reason = reason;
	record->state = in->state | (out ? out->state & FP_ANSWERED : 0);
	record->duration = silence(now, in->opened);
	record->packets_in = in->packets;
	record->bytes_in = in->bytes;
	record->packets_out = out ? out->packets : 0;
	record->bytes_out = out ? out->bytes : 0;
	if (reason != FP_ALIVE) {
		count_at_once(FP_CLOSED_COUNT, 1);
		stats = stats_of(record->virtual_server, record->member);
		if (stats) {
			__sync_fetch_and_add(&stats->closed, 1);
			__sync_fetch_and_add(&stats->packets_in, record->packets_in);
			__sync_fetch_and_add(&stats->bytes_in, record->bytes_in);
			__sync_fetch_and_add(&stats->packets_out, record->packets_out);
			__sync_fetch_and_add(&stats->bytes_out, record->bytes_out);
		}
	}
	/* The agent looks every now and then: waking it for each would cost more than the packet. */
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return 1;
}

/* A closed connection makes room for one that wants the same tuple. */
static __noinline void forget(const struct fp_key *key, struct fp_flow *flow, __u32 now)
{
	struct fp_key back;
	struct fp_flow *other;

	other = other_of(flow, key->protocol, &back);
	if (flow->state & FP_OUTBOUND) {
		if (other && !report(&back, other, flow, FP_SHUTDOWN, now))
			count_at_once(FP_CLOSED_LOST, 1);
	} else if (!report(key, flow, other, FP_SHUTDOWN, now)) {
		count_at_once(FP_CLOSED_LOST, 1);
	}
	forget_splice(flow);
	if (other)
		bpf_map_delete_elem(&flows, &back);
	bpf_map_delete_elem(&flows, key);
}

/* FIN or RST in one direction, bits of fp_state. Both FINs, or an RST, end the connection: told once. */
static __noinline void follow(const struct fp_key *key, struct fp_flow *flow, __u32 bits, __u32 now)
{
	struct fp_key back;
	struct fp_flow *other;
	__u32 state;
	int over;

	other = other_of(flow, key->protocol, &back);
	state = __sync_fetch_and_or(&flow->state, bits);
	over = bits & FP_RST || state & FP_PEER_FIN;
	if (other && bits & FP_FIN && __sync_fetch_and_or(&other->state, FP_PEER_FIN) & FP_FIN)
		over = 1;
	if (!over)
		return;
	/* Both directions may come to this at once: the first one tells. The way back says it first, the way there last. */
	if (flow->state & FP_OUTBOUND) {
		__sync_fetch_and_or(&flow->state, FP_CLOSED);
		if (other && !(__sync_fetch_and_or(&other->state, FP_CLOSED | (bits & FP_RST)) & FP_CLOSED))
			report(&back, other, flow, FP_SHUTDOWN, now);
	} else {
		if (other)
			__sync_fetch_and_or(&other->state, FP_CLOSED | (bits & FP_RST));
		if (!(__sync_fetch_and_or(&flow->state, FP_CLOSED) & FP_CLOSED))
			report(key, flow, other, FP_SHUTDOWN, now);
	}
}

/*
 * Enter both directions of a connection, or none. flow is the way there; the way back follows from it, so that
 * each direction can always find the other.
 */
static __noinline int enter_both(struct fp_install *one)
{
	struct fp_key back;
	struct fp_key *key = &one->key;
	struct fp_flow *flow = &one->flow, *way = &one->way;
	struct fp_flow *old;
	struct fp_stats *stats;
	__u32 zero = 0;
	struct fp_layout *l = bpf_map_lookup_elem(&layout, &zero);
	int error;

	if (!l)
		return FP_FULL;
	old = bpf_map_lookup_elem(&flows, key);
	if (old) {
		if (!(old->state & FP_CLOSED))
			return FP_EXISTS;
		forget(key, old, flow->opened);
	}
	turn_round(&back, flow, key->protocol);
	copy16(way->source, key->destination);
	copy16(way->destination, key->source);
	way->source_port = key->destination_port;
	way->destination_port = key->source_port;
	copy6(way->destination_mac, one->client_mac);
	copy6(way->source_mac, l->mac);
	way->ifindex = one->client_ifindex;
	way->state = flow->state | FP_OUTBOUND;
	way->used = way->opened = flow->opened;
	way->serial = flow->serial;
	way->virtual_server = flow->virtual_server;
	way->member = flow->member;
	way->idle_seconds = flow->idle_seconds;
	way->packets = way->bytes = 0;
	way->request = 0;

	error = bpf_map_update_elem(&flows, &back, way, BPF_NOEXIST);
	if (error == -EEXIST) {
		old = bpf_map_lookup_elem(&flows, &back);
		if (old && !(old->state & FP_CLOSED))
			return FP_TAKEN;
		if (old)
			forget(&back, old, flow->opened);
		error = bpf_map_update_elem(&flows, &back, way, BPF_NOEXIST);
	}
	if (error)
		return error == -EEXIST ? FP_TAKEN : FP_FULL;
	error = bpf_map_update_elem(&flows, key, flow, BPF_NOEXIST);
	if (error) {
		bpf_map_delete_elem(&flows, &back);
		return error == -EEXIST ? FP_EXISTS : FP_FULL;
	}
	stats = stats_of(flow->virtual_server, flow->member);
	if (stats)
		__sync_fetch_and_add(&stats->opened, 1);
	return FP_OPENED;
}

static __always_inline int enter(struct fp_install *one)
{
	struct fp_splice none = {.serial = one->flow.serial, .offset = one->flow.request};
	int result;

	if (!(one->flow.state & FP_SPLICE))
		return enter_both(one);
	result = bpf_map_update_elem(&splices, &none.serial, &none, BPF_NOEXIST);
	/* Another connection with this serial would be translated by what is meant for one of them. */
	if (result)
		return result == -EEXIST ? FP_TAKEN : FP_FULL;
	result = enter_both(one);
	if (result != FP_OPENED)
		bpf_map_delete_elem(&splices, &none.serial);
	return result;
}

#endif
