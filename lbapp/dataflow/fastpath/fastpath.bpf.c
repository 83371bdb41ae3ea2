/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The fast path: forwards what belongs to a known connection, opens connections to virtual servers that need no
 * controller, hands queries to the agent, and leads everything else, untouched, into the switch.
 *
 * Programs: wire (TC ingress of a wire-side interface), again (the same for a frame that the agent sends once
 * more), out (TC ingress of the inner interface: what the switch sends), install, finish, revoke and sweep
 * (run by the agent).
 * The walk of a packet, and who owns what, is told in docs/fastpath.md.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "connections.bpf.h"
#include "departures.bpf.h"
#include "fastpath.h"
#include "handshake.bpf.h"
#include "limits.bpf.h"
#include "maps.bpf.h"
#include "packet.bpf.h"
#include "splice.bpf.h"
#include "sweep.bpf.h"

#define ATTEMPTS 4
#define LOOPBACK 1

/* ------------------------------------------------------------------ new connections */

/* Select a member and enter the connection. Returns 0, or the negative counter of why not. */
static __noinline int decide(struct __sk_buff *skb, const struct fp_key *key, struct fp_service *service, __u32 ifindex)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 zero = 0, first, i;
	struct fp_layout *l = bpf_map_lookup_elem(&layout, &zero);
	struct fp_install *one = bpf_map_lookup_elem(&decisions, &zero);
	struct fp_flow *flow;
	int reason = -FP_MISS_TARGET;

	if (!l || !one || !service->slot_count)
		return reason;
	if (data + ETH > end)
		return -FP_MISS_MALFORMED;
	one->key = *key;
	copy6(one->client_mac, data + 6);
	one->client_ifindex = ifindex;
	flow = &one->flow;
	if (service->hash == FP_TURN)
		first = __sync_fetch_and_add(&service->next, 1);
	else
		first = keyed_hash(key, service->hash == FP_FLOW) >> 32;
	/* The way back may be another connection's, of another virtual server: then the next slots are tried. */
	for (i = 0; i < ATTEMPTS; i++) {
		__u32 slot = (first + i) % service->slot_count, id;
		struct fp_target *target;
		int result;

		if (slot >= FP_SLOTS)
			return reason;
		id = service->slots[slot];
		target = bpf_map_lookup_elem(&targets, &id);
		if (!target || !target->ifindex)
			continue;
		__builtin_memset(flow, 0, sizeof(*flow));
		copy16(flow->source, key->source);
		copy16(flow->destination, zero16(target->address) ? key->destination : target->address);
		if (mapped(flow->destination) != mapped(key->destination))
			continue;
		flow->source_port = key->source_port;
		flow->destination_port = target->port ? target->port : key->destination_port;
		copy6(flow->destination_mac, target->mac);
		flow->state = FP_DECIDED;
		if (target->flags & FP_TARGET_ROUTED) {
			copy6(flow->source_mac, l->mac);
			flow->state |= FP_ROUTED;
		}
		flow->ifindex = target->ifindex;
		flow->used = flow->opened = ticks();
		flow->serial = bpf_get_prandom_u32() | 0x80000000;
		flow->virtual_server = service->number;
		flow->member = target->member;
		flow->idle_seconds = service->idle_seconds;
		result = enter(one);
		if (result == FP_OPENED) {
			count(FP_OPENED_HERE);
			return 0;
		}
		if (result == FP_EXISTS) /* another processor was quicker */
			return 0;
		if (result == FP_FULL)
			return -FP_MISS_FULL;
		reason = -FP_MISS_TAKEN;
	}
	return reason;
}

/* Hand the whole frame to the agent, which asks the control segment (003, QUERY). */
static __always_inline int punt(struct __sk_buff *skb, const struct packet *packet, __u32 virtual_server)
{
	/* The client sends it again, and its later fragments would not wait for the answer. */
	if (packet->part != WHOLE)
		return -FP_MISS_FRAGMENT;
	if (!ask(skb, packet, virtual_server, FP_ASK_FIRST, 0))
		return -FP_MISS_QUERY;
	count(FP_QUERIES);
	return TC_ACT_SHOT;
}

/* From somebody who cannot be answered: a group, or nobody. */
static __always_inline int strange(struct __sk_buff *skb, const struct fp_key *key)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	return data + ETH > end || ((__u8 *)data)[6] & 1 || key->source[0] == 0xff
	       || (mapped(key->source) && (key->source[12] >= 224 || key->source[12] == 0)) || zero16(key->source);
}

/*
 * Beyond a limit. A SYN is answered, with no more bytes than it had: an honest client knows at once, and nobody else
 * is told more than a closed port would tell.
 */
static __noinline int turn_away(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet)
{
	struct tcphdr tcp;
	int verdict;

	if (key->protocol != IPPROTO_TCP || packet->part != WHOLE || strange(skb, key)
	    || bpf_skb_load_bytes(skb, packet->l4, &tcp, sizeof(tcp)))
		return TC_ACT_SHOT;
	verdict = reply(skb, packet, 0, bpf_ntohl(tcp.seq) + 1, TCP_RST | TCP_ACK);
	if (verdict > 0)
		count(FP_RESET_SENT);
	return verdict;
}

/* A packet of no known connection. 0: now it is one's; positive: what becomes of it; negative: why it is a miss. */
static __always_inline int begin(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet)
{
	struct fp_service_key wanted_service;
	struct fp_service *service;
	struct fp_cookies *keys = 0;
	__u32 zero = 0;
	int first = 1, rationed = 0, verdict;

	if (key->protocol == IPPROTO_TCP) {
		first = (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
		keys = bpf_map_lookup_elem(&cookies, &zero);
		/* Nobody can be in mid-stream with a virtual server where no cookies are made. */
		if (!first && !(keys && keys->valid))
			return -FP_MISS_FLOW;
	}
	copy16(wanted_service.address, key->destination);
	wanted_service.port = key->destination_port;
	wanted_service.protocol = key->protocol;
	wanted_service.pad = 0;
	service = bpf_map_lookup_elem(&services, &wanted_service);
	if (!first && !(service && service->mode == FP_PROXY))
		return -FP_MISS_FLOW;
	if (!service)
		return -FP_MISS_SERVICE;
	if (same16(key->source, key->destination))
		return -FP_MISS_MALFORMED;
	if (service->mode == FP_PROXY && keys && keys->valid >> (keys->current & 1) & 1) {
		/* Later fragments would not wait for the answer. */
		if (packet->part != WHOLE)
			return -FP_MISS_FRAGMENT;
		/* In the switch it would be a message to the controller. */
		if (strange(skb, key))
			return -FP_SHOT;
		return first ? greet(skb, key, packet, service, keys) : listen(skb, key, packet, service, keys);
	}
	if (service->mode != FP_DECIDE && service->mode != FP_PUNT)
		return -FP_MISS_PASS;
	if (limited(service)) {
		rationed = ration(key, service);
		if (rationed < 0)
			return turn_away(skb, key, packet);
	}
	verdict = service->mode == FP_DECIDE ? decide(skb, key, service, packet->ifindex)
					     : punt(skb, packet, service->number);
	/* The switch has it now, and whoever decides there has buckets of its own. */
	if (verdict < 0 && rationed)
		give_back(key, service);
	return verdict;
}

/* ------------------------------------------------------------------ the walk */

/*
 * A SYN for a connection that is not over: its client has vanished, and its port is used again. A member that still has
 * the connection says so, and the client ends it. One that has forgotten it begins another one: where a client has to be
 * read before it has a member, that must not be. Then the connection is over, and the client, who repeats its SYN, is
 * shaken hands with. 0: the packet goes on.
 */
static __noinline int anew(const struct fp_key *key, struct fp_flow *flow, __u32 flags)
{
	struct fp_service_key where = {.port = key->destination_port, .protocol = key->protocol};
	struct fp_service *service;
	struct fp_flow *other;
	struct fp_key back;

	if (flow->state & FP_OUTBOUND) {
		if (!(flow->state & FP_ANEW) || !(flags & TCP_ACK))
			return 0;
		follow(key, flow, FP_RST, ticks());
		return TC_ACT_SHOT;
	}
	copy16(where.address, key->destination);
	service = bpf_map_lookup_elem(&services, &where);
	/* Of what the controller has shaken hands for (hybrid), the virtual server is not ours. */
	if (flags & TCP_ACK || !((service && service->mode == FP_PROXY) || flow->state & FP_SPLICE))
		return 0;
	other = other_of(flow, key->protocol, &back);
	/* A member that has not got beyond its SYN-ACK may repeat that. */
	if (other && other->state & FP_ESTABLISHED)
		__sync_fetch_and_or(&other->state, FP_ANEW);
	return 0;
}

/* A TC action, or the negative counter of why the packet is a miss. */
static __always_inline int forward(struct __sk_buff *skb, __u32 ifindex)
{
	struct fp_key key;
	struct packet packet;
	struct rewrite to;
	struct fp_flow *flow;
	__u32 now, bits;
	int reason;

	packet.ifindex = ifindex;
	reason = parse(skb, &key, &packet);
	if (reason)
		return -reason;
	if (packet.part == LATER)
		return send_fragment(skb, &key, &packet);
	flow = bpf_map_lookup_elem(&flows, &key);
	if (flow && flow->state & FP_CLOSED && (packet.tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN) {
		/* The client uses its port again. */
		forget(&key, flow, ticks());
		flow = 0;
	}
	if (!flow) {
		reason = begin(skb, &key, &packet);
		if (!reason) {
			flow = bpf_map_lookup_elem(&flows, &key);
			reason = -FP_MISS_FULL;
		}
		if (!flow) {
			dismiss(&key, &packet);
			return reason;
		}
	}
	copy16(to.source, flow->source);
	copy16(to.destination, flow->destination);
	to.source_port = flow->source_port;
	to.destination_port = flow->destination_port;
	copy6(to.destination_mac, flow->destination_mac);
	copy6(to.source_mac, flow->source_mac);
	to.ifindex = flow->ifindex;
	to.state = flow->state;
	if (!still(&key, flow)) {
		dismiss(&key, &packet);
		return -FP_MISS_FLOW;
	}
	if (to.state & FP_ROUTED && !hops_left(skb, &packet)) {
		dismiss(&key, &packet);
		return -FP_MISS_TTL;
	}
	if (packet.tcp_flags & TCP_SYN && flow->state & FP_ESTABLISHED) {
		reason = anew(&key, flow, packet.tcp_flags);
		if (reason)
			return reason;
	}
	if (to.state & (FP_SPLICE | FP_HELD)) {
		reason = splice(skb, &key, &packet, flow, to.state & FP_OUTBOUND);
		if (reason)
			return reason;
	}
	now = ticks();
	if (flow->used != now)
		flow->used = now;
	__sync_fetch_and_add(&flow->packets, 1);
	__sync_fetch_and_add(&flow->bytes, skb->len);
	if (key.protocol == IPPROTO_TCP) {
		if (!(to.state & FP_ESTABLISHED) && !(packet.tcp_flags & TCP_SYN))
			__sync_fetch_and_or(&flow->state, FP_ESTABLISHED);
		if (packet.says && (to.state & (FP_OUTBOUND | FP_ANSWERED)) == FP_OUTBOUND)
			__sync_fetch_and_or(&flow->state, FP_ANSWERED);
		bits = packet.tcp_flags & TCP_RST ? FP_RST : packet.tcp_flags & TCP_FIN ? FP_FIN : 0;
		if (bits & ~to.state)
			follow(&key, flow, bits, now);
	}
	if (packet.more)
		remember(&key, &packet, &to, now);
	count(FP_HITS);
	return send(skb, &key, &packet, &to, 1);
}

static __always_inline int walk(struct __sk_buff *skb, __u32 ifindex)
{
	int action = forward(skb, ifindex);
	__u32 *next;

	if (action > 0)
		return action;
	count(-action);
	if (action == -FP_SHOT)
		return TC_ACT_SHOT;
	next = bpf_map_lookup_elem(&inner, &ifindex);
	if (!next) {
		/* Being set up or taken down: nobody must see it but the switch. */
		count(FP_SHOT);
		return TC_ACT_SHOT;
	}
	return *next ? bpf_redirect(*next, 0) : TC_ACT_OK;
}

SEC("tc")
int wire(struct __sk_buff *skb)
{
	return walk(skb, skb->ifindex);
}

/* A frame that the agent sends; its mark says which wire it came in on, or (FP_OUT_MARK) is to leave by. */
SEC("tc")
int again(struct __sk_buff *skb)
{
	__u32 mark = skb->mark;

	skb->mark = 0;
	if (mark & FP_OUT_MARK)
		return bpf_redirect(mark & ~FP_OUT_MARK, 0);
	return walk(skb, mark);
}

SEC("tc")
int out(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	__u32 *next = bpf_map_lookup_elem(&outer, &ifindex);

	if (!next) {
		count(FP_SHOT);
		return TC_ACT_SHOT;
	}
	return bpf_redirect(*next, 0);
}

/* ------------------------------------------------------------------ for the agent */

struct installing {
	struct __sk_buff *skb;
	__u32 door;
	__u32 opened;
	__u32 gone;
};

/* Who has finished (FP_FIN: the client, FP_PEER_FIN: its member) of a connection; 0: it is not here. */
static __noinline int finish_sides(const struct fp_install *one, __u32 finished)
{
	struct fp_flow *flow = bpf_map_lookup_elem(&flows, &one->key), *other;
	struct fp_key back;

	if (!flow || flow->serial != one->flow.serial || flow->state & FP_OUTBOUND)
		return 0;
	other = other_of(flow, one->key.protocol, &back);
	if (finished & FP_FIN)
		follow(&one->key, flow, FP_FIN, one->flow.opened);
	if (finished & FP_PEER_FIN && other)
		follow(&back, other, FP_FIN, one->flow.opened);
	return 1;
}

static long install_one(__u32 index, struct installing *all)
{
	struct fp_install *one = bpf_map_lookup_elem(&installs, &index);
	__u32 finished;

	if (!one)
		return 1;
	finished = one->flow.state & (FP_FIN | FP_PEER_FIN);
	one->flow.state &= ~finished;
	if (finished && finish_sides(one, finished)) {
		one->result = FP_EXISTS;
		return 0;
	}
	one->result = enter(one);
	if (one->result != FP_OPENED)
		return 0;
	if (finished)
		finish_sides(one, finished);
	all->opened++;
	if (all->door && depart(all->skb, index, one, all->door)) {
		one->result = FP_GONE;
		all->gone++;
	}
	return 0;
}

/*
 * The mark says how many are to be entered. The packet is nothing; its interface is the door by which departures leave,
 * or the loopback one, and none does. Returns how many were entered, and of how many what was to go has gone (<< 16).
 */
SEC("tc")
int install(struct __sk_buff *skb)
{
	struct installing all = {.skb = skb, .door = skb->ifindex};
	__u32 count = skb->mark;

	if (count > FP_INSTALLS)
		return 0;
	if (all.door == LOOPBACK)
		all.door = 0;
	bpf_loop(count, install_one, &all, 0);
	count_at_once(FP_OPENED_INSTALLED, all.opened);
	return all.opened | all.gone << 16;
}

/* Closes a connection, by its key. Returns 1, or 0 where there is none. */
SEC("syscall")
int finish(struct fp_key *context)
{
	struct fp_key key = *context, back;
	struct fp_flow *flow = bpf_map_lookup_elem(&flows, &key), *other;

	if (!flow || flow->state & (FP_OUTBOUND | FP_CLOSED))
		return 0;
	other = other_of(flow, key.protocol, &back);
	if (other)
		__sync_fetch_and_or(&other->state, FP_CLOSED);
	if (!(__sync_fetch_and_or(&flow->state, FP_CLOSED) & FP_CLOSED))
		report(&key, flow, other, FP_SHUTDOWN, bpf_ktime_get_ns() >> FP_TICK_SHIFT);
	return 1;
}

/* Takes a request back, by its index. Returns what it was: WAITING, if it is taken back; TAKEN and GIVEN stay. */
SEC("syscall")
int revoke(__u32 *context)
{
	__u32 index = *context;
	struct fp_request *kept = bpf_map_lookup_elem(&requests, &index);

	return kept ? __sync_val_compare_and_swap(&kept->state, FP_REQUEST_WAITING, FP_REQUEST_NONE) : FP_REQUEST_NONE;
}

/* Is told where in "sweeping" to look, and says everything there. */
SEC("syscall")
int sweep(__u32 *context)
{
	__u32 which = *context;
	struct fp_sweep *state = bpf_map_lookup_elem(&sweeping, &which);

	if (!state)
		return -1;
	state->now = bpf_ktime_get_ns() >> FP_TICK_SHIFT;
	bpf_for_each_map_elem(&flows, sweep_one, &which, 0);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
