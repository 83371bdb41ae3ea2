/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * What a sweep does with one connection. Part of fastpath.bpf.c.
 */
#ifndef SWEEP_BPF_H
#define SWEEP_BPF_H

#include <linux/in.h>

#include "connections.bpf.h"

static __always_inline __u32 logarithm(__u32 value)
{
	__u32 result = 0;

	if (value >= 1 << 16) { value >>= 16; result += 16; }
	if (value >= 1 << 8) { value >>= 8; result += 8; }
	if (value >= 1 << 4) { value >>= 4; result += 4; }
	if (value >= 1 << 2) { value >>= 2; result += 2; }
	return result + (value >= 2);
}

static __always_inline __u32 patience(const struct fp_sweep *sweep, const struct fp_flow *flow, __u8 protocol)
{
	__u32 state = flow->state;
	/* 1000 ms are 953.67 ticks */
	__u32 limit = flow->idle_seconds * 61035U >> 6;

	if (state & FP_CLOSED)
		return sweep->linger;
	if (protocol != IPPROTO_TCP)
		return limit;
	if (!(state & FP_ESTABLISHED) && sweep->handshake < limit)
		return sweep->handshake;
	if (state & (FP_FIN | FP_PEER_FIN) && sweep->half_closed < limit)
		return sweep->half_closed;
	return limit;
}

static __always_inline int matches(const struct fp_sweep *sweep, const struct fp_flow *in, const struct fp_flow *out)
{
	__u32 match = sweep->match;

	if (match & FP_MATCH_VIRTUAL_SERVER && in->virtual_server != sweep->virtual_server)
		return 0;
	if (match & FP_MATCH_MEMBER && in->member != sweep->member)
		return 0;
	if (match & FP_MATCH_IFINDEX && in->ifindex != sweep->ifindex && (!out || out->ifindex != sweep->ifindex))
		return 0;
	return match != 0;
}

static long sweep_one(void *map, const struct fp_key *key, struct fp_flow *flow, __u32 *which)
{
	struct fp_sweep *sweep = bpf_map_lookup_elem(&sweeping, which);
	struct fp_flow *other;
	struct fp_wanted *asked = 0;
	struct fp_key back;
	__u32 now, idle, limit, reason;

	if (!sweep || flow->state & FP_OUTBOUND)
		return 0;
	now = sweep->now;
	idle = silence(now, flow->used);
	limit = patience(sweep, flow, key->protocol);
	if (sweep->wanted) {
		__u32 serial = flow->serial;

		asked = bpf_map_lookup_elem(&wanted, &serial);
	}
	/* Nearly all are left alone, without a look at their other direction. */
	if (!asked && !sweep->match && idle <= limit && (!sweep->evict || idle <= sweep->evict))
		goto live;
	other = other_of(flow, key->protocol, &back);
	if (other && silence(now, other->used) < idle)
		idle = silence(now, other->used);
	if (asked) {
		asked->found = 1;
		if (asked->idle_seconds) {
			flow->idle_seconds = asked->idle_seconds;
			limit = patience(sweep, flow, key->protocol);
		}
	}
	if (sweep->relocate && matches(sweep, flow, other)) {
		copy6(flow->destination_mac, sweep->mac);
		flow->ifindex = sweep->place;
		sweep->relocated++;
		goto live;
	}
	if (matches(sweep, flow, other) || (asked && asked->final))
		reason = FP_DELETED;
	else if (flow->state & FP_CLOSED && (idle > limit || asked))
		reason = FP_SHUTDOWN;
	else if (idle > limit)
		reason = FP_IDLE;
	else if (sweep->evict && idle > sweep->evict && sweep->overflow < sweep->evict_most)
		reason = FP_OVERFLOW;
	else {
		if (asked && !asked->idle_seconds && !report(key, flow, other, FP_ALIVE, now))
			asked->found = 0;
		goto live;
	}
	if (!report(key, flow, other, reason, now)) {
		/* The agent has to read first; what is behind would cost the same, and stay as well. */
		sweep->kept++;
		return 1;
	}
	if (reason == FP_DELETED)
		sweep->deleted++;
	else if (reason == FP_SHUTDOWN)
		sweep->shutdown++;
	else if (reason == FP_IDLE)
		sweep->idle++;
	else
		sweep->overflow++;
	forget_splice(flow);
	if (other)
		bpf_map_delete_elem(&flows, &back);
	bpf_map_delete_elem(&flows, key);
	return 0;
live:
	if (flow->state & FP_CLOSED) {
		sweep->lingering++;
	} else {
		sweep->live++;
		sweep->histogram[logarithm(idle) & (FP_HISTOGRAM - 1)]++;
	}
	return 0;
}

#endif
