/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Limits on new connections: a token of the virtual server's bucket, and one of the client's network's. Nothing here
 * is run for a packet of a known connection, or for a virtual server without limits. Part of fastpath.bpf.c.
 */
#ifndef LIMITS_BPF_H
#define LIMITS_BPF_H

#include <linux/pkt_cls.h>

#include "answer.bpf.h"
#include "bucket.bpf.h"

#define LATELY_TICKS 2861   /* 3 s */

static __always_inline int limited(const struct fp_service *service)
{
	return (service->cost | service->client_cost) != 0;
}

static __always_inline void network_of(struct fp_client_key *to, const struct fp_key *key,
				       const struct fp_service *service)
{
	const __u32 *source = (const __u32 *)key->source, *mask = (const __u32 *)service->client_mask;
	__u32 *network = (__u32 *)to->network;

	to->virtual_server = service->number;
	network[0] = source[0] & mask[0];
	network[1] = source[1] & mask[1];
	network[2] = source[2] & mask[2];
	network[3] = source[3] & mask[3];
}

/* Put back what admit() took. */
static __noinline int give_back(const struct fp_key *key, const struct fp_service *service)
{
	__u32 number = service->number;
	struct fp_client_key network;
	struct fp_rate *rate;
	__u64 *full;

	if (service->cost) {
		rate = bpf_map_lookup_elem(&rates, &number);
		if (rate)
			bucket_return(&rate->full, service->cost);
	}
	if (service->client_cost) {
		network_of(&network, key, service);
		full = bpf_map_lookup_elem(&clients, &network);
		if (full)
			bucket_return(full, service->client_cost);
	}
	if (key->protocol == IPPROTO_UDP)
		bpf_map_delete_elem(&lately, key);
	return 0;
}

/*
 * Whether there are tokens for a new connection; they are taken. The client's first: what one network is refused
 * costs the others nothing.
 */
static __noinline int admit(const struct fp_key *key, const struct fp_service *service)
{
	__u64 now = bpf_ktime_get_ns() << BUCKET_SHIFT, none = 0, *full = 0;
	__u32 number = service->number;
	struct fp_rate *rate = bpf_map_lookup_elem(&rates, &number);
	struct fp_client_key network;

	if (!rate)
		return 1;
	if (service->client_cost) {
		network_of(&network, key, service);
		full = bpf_map_lookup_elem(&clients, &network);
		if (!full) {
			bpf_map_update_elem(&clients, &network, &none, BPF_NOEXIST);
			full = bpf_map_lookup_elem(&clients, &network);
		}
		/*
		 * Its memory may be another network's by now, which then pays for this one; and where there was none,
		 * this one goes by the virtual server's bucket alone.
		 */
		if (full && !bucket_take(full, now, service->client_cost, service->client_depth)) {
			__sync_fetch_and_add(&rate->over_client, 1);
			count(FP_OVER_CLIENT);
			return 0;
		}
	}
	if (service->cost && !bucket_take(&rate->full, now, service->cost, service->depth)) {
		if (full)
			bucket_return(full, service->client_cost);
		__sync_fetch_and_add(&rate->over, 1);
		count(FP_OVER_RATE);
		return 0;
	}
	return 1;
}

/*
 * Tokens for the first packet of a connection to a virtual server without proxied handshakes: 1: taken; 0: none is
 * needed; -1: there are none. UDP has no first packet: those that come before the answer to a query are of the flow
 * that has had its token.
 */
static __noinline int ration(const struct fp_key *key, const struct fp_service *service)
{
	int asking = service->mode == FP_PUNT && key->protocol == IPPROTO_UDP;
	__u32 now = ticks(), *since;

	if (asking) {
		since = bpf_map_lookup_elem(&lately, key);
		if (since && silence(now, *since) < LATELY_TICKS)
			return 0;
	}
	if (!admit(key, service))
		return -1;
	if (asking)
		bpf_map_update_elem(&lately, key, &now, BPF_ANY);
	return 1;
}

#endif
