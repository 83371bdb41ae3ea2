/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Spliced connections: the member has the client's sequence numbers, the client those that follow the cookie. Part of
 * fastpath.bpf.c.
 */
#ifndef SPLICE_BPF_H
#define SPLICE_BPF_H

#include <linux/pkt_cls.h>

#include "connections.bpf.h"
#include "handshake.bpf.h"

#define SACK 5
#define HELD_TICKS 96 /* 100 ms: what was sent so long ago is not overtaken, or lost */

struct sacks {
	__u8 bytes[TCP_OPTIONS + 8]; /* what is read behind the end is 0 */
	__u32 length;
	__u32 at;
	__u32 offset;
	__u32 edges;
	__u32 changed;
};

/* One option, or one edge of a block: nobody aligns them. */
static long shift_sack(__u32 index, struct sacks *s)
{
	__u32 at = s->at;
	__u8 kind, size;

	if (at >= s->length || at >= TCP_OPTIONS)
		return 1;
	if (s->edges) {
		__u8 *edge = &s->bytes[at];
		__u32 value = ((__u32)edge[0] << 24 | edge[1] << 16 | edge[2] << 8 | edge[3]) + s->offset;

		edge[0] = value >> 24;
		edge[1] = value >> 16;
		edge[2] = value >> 8;
		edge[3] = value;
		s->edges--;
		s->at = at + 4;
		return 0;
	}
	kind = s->bytes[at];
	if (kind == 0)
		return 1;
	if (kind == 1) {
		s->at = at + 1;
		return 0;
	}
	size = s->bytes[at + 1];
	if (size < 2 || at + size > s->length)
		return 1;
	if (kind == SACK && (size & 7) == 2) {
		s->edges = size >> 2;
		s->changed = 1;
		s->at = at + 2;
	} else {
		s->at = at + size;
	}
	return 0;
}

/* The edges of a client's SACK blocks. False if the packet could not be written. */
static __noinline int translate_sacks(struct __sk_buff *skb, __u32 l4, __u32 length, __u32 offset)
{
	struct sacks s = {.offset = offset, .length = length};
	__u32 old[TCP_OPTIONS / 4] = {};

	length &= 0x3c;
	if (length - 4 > TCP_OPTIONS - 4)
		return 0;
	if (bpf_skb_load_bytes(skb, l4 + TCP_HEADER, old, length)
	    || bpf_skb_load_bytes(skb, l4 + TCP_HEADER, s.bytes, length))
		return 0;
	bpf_loop(TCP_OPTIONS, shift_sack, &s, 0);
	if (!s.changed)
		return 1;
	return !bpf_skb_store_bytes(skb, l4 + TCP_HEADER, s.bytes, length, 0)
	       && !bpf_l4_csum_replace(skb, l4 + 16, 0,
				       bpf_csum_diff(old, TCP_OPTIONS, (__be32 *)s.bytes, TCP_OPTIONS, 0), 0);
}

/* A window, in units of another scale. */
static __always_inline __be16 scaled(__be16 window, __s8 shift)
{
	__u32 value = bpf_ntohs(window);

	if (shift >= 0)
		value <<= shift & 15;
	else
		value >>= -shift & 15;
	return bpf_htons(value > 0xffff ? 0xffff : value);
}

/* Whether a segment's checksum is right, or partial, as offloading leaves it. */
static __noinline int sound(struct __sk_buff *skb, const struct packet *packet, __u32 check, __u32 length)
{
	struct scratch *here = scratch();
	__u64 pseudo;

	if (!here)
		return 0;
	__builtin_memset(here->chunk, 0, CHUNK);
	if (packet->ipv6 ? bpf_skb_load_bytes(skb, ETH + 8, here->chunk, 32) : bpf_skb_load_bytes(skb, ETH + 12, here->chunk, 8))
		return 0;
	pseudo = (__u32)bpf_csum_diff(0, 0, here->chunk, CHUNK, 0);
	pseudo += (__u32)bpf_htons(IPPROTO_TCP) + bpf_htons(length);
	return fold16(pseudo) == check || fold16(pseudo + fold32(sum_of(skb, packet->l4 & 0x7f, length))) == 0xffff;
}

/*
 * A member's SYN-ACK to a splice that is not ready: now it is, and the SYN-ACK becomes the client's first data, where
 * that is kept for it. 0: it is not.
 */
static __noinline int give(struct __sk_buff *skb, const struct packet *packet, const struct fp_flow *flow, __u32 serial,
			   __u32 index)
{
	struct fp_request *kept = bpf_map_lookup_elem(&requests, &index);
	struct fp_splice ready = {.serial = serial};
	struct scratch *here = scratch();
	struct fp_flow *other;
	struct tcphdr tcp;
	__u32 l4 = packet->l4 & 0x7f, length;
	int verdict = 0;

	if (!kept || !here || bpf_skb_load_bytes(skb, l4, &tcp, sizeof(tcp)) || kept->serial != serial
	    || bpf_ntohl(tcp.ack_seq) != kept->isn + 1 || !sound(skb, packet, tcp.check, segment_length(skb, packet))
	    || __sync_val_compare_and_swap(&kept->state, FP_REQUEST_WAITING, FP_REQUEST_TAKEN) != FP_REQUEST_WAITING)
		return 0;
	/* Given to somebody else, and used again, since the first look: it is none of ours. */
	if (*(volatile __u32 *)&kept->serial != serial) {
		*(volatile __u32 *)&kept->state = FP_REQUEST_WAITING;
		return 0;
	}
	turn_round(&here->back, flow, IPPROTO_TCP);
	length = kept->length;
	if (length < 1 || length > FP_REQUEST || !read_offer(skb, l4, &tcp))
		goto out;
	ready.offset = bpf_ntohl(tcp.seq) - kept->cookie;
	if (kept->scale != COOKIE_NO_SCALE) {
		if (here->offer.scale == COOKIE_NO_SCALE) {
			ready.shift = -kept->scale;
			ready.shift_in = kept->own; /* the member takes windows literally */
		} else {
			ready.shift = here->offer.scale - kept->scale;
		}
	}
	ready.ready = 1;
	/* Replaced, or not at all: the memory of one that was looked up may be another connection's by now. */
	if (bpf_map_update_elem(&splices, &ready.serial, &ready, BPF_EXIST))
		goto out;
	plain(here, kept->isn + 1, bpf_ntohl(tcp.seq) + 1, kept->flags,
	      bpf_ntohs(scaled(bpf_htons(kept->window), ready.shift_in)));
	here->answer.data = length;
	here->answer.sum = kept->sum;
	/* From here on it is given: should this packet be lost, the client repeats it, and that is translated. */
	verdict = answer(skb, packet, &here->answer, segment_length(skb, packet));
	if (verdict <= 0)
		goto out;
	known_again(length);
	if (length < 1 || length > FP_REQUEST || bpf_skb_store_bytes(skb, l4 + TCP_HEADER, kept->payload, length, 0)) {
		verdict = -FP_SHOT;
		goto out;
	}
	count(FP_GIVEN);
	other = bpf_map_lookup_elem(&flows, &here->back);
	if (other && other->serial == serial) {
		__sync_fetch_and_add(&other->packets, 1);
		__sync_fetch_and_add(&other->bytes, skb->len);
		__sync_fetch_and_or(&other->state, FP_ESTABLISHED);
	}
out:
	/* From now on it may be another connection's. */
	barrier();
	*(volatile __u32 *)&kept->state = verdict ? FP_REQUEST_GIVEN : FP_REQUEST_NONE;
	return verdict;
}

/* It is held no longer: in both directions. */
static __noinline int let_go(const struct fp_key *key, struct fp_flow *flow)
{
	struct fp_flow *other;
	struct fp_key back;

	other = other_of(flow, key->protocol, &back);
	if (other)
		__sync_fetch_and_and(&other->state, ~FP_HELD);
	__sync_fetch_and_and(&flow->state, ~FP_HELD);
	return 0;
}

/* Not yet: everything goes to the agent, but for what says nothing. */
static __always_inline int wait(struct __sk_buff *skb, const struct packet *packet, __u32 virtual_server, __u32 member,
				const struct tcphdr *tcp)
{
	__u32 kind = member ? FP_ASK_MEMBER : FP_ASK_LATER;

	/* Later fragments would not wait. The client sends it again. */
	if (packet->part != WHOLE)
		return TC_ACT_SHOT;
	if (!member && !(packet->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST))
	    && segment_length(skb, packet) == (((__u8 *)tcp)[12] >> 4) * 4U)
		return TC_ACT_SHOT;
	ask_or_drop(skb, packet, virtual_server, kind, member ? 0 : (bpf_ntohl(tcp->ack_seq) - 1) >> COOKIE_SHIFT);
	return TC_ACT_SHOT;
}

/*
 * Of a splice, translate what is counted in bytes; hold a connection that is handed over. 0: it may go on; positive: the
 * packet ends here; negative: it could not be.
 *
 * Held (FP_HELD): the member knows of the connection by the client's first data, which the agent sends. What the client
 * says meanwhile must not overtake that, and takes the same way, until the member has said something. That the first has
 * passed here is not enough: it may wait in the queue of one processor, and the next one's may be empty.
 *
 * Translated are client to member: ack and SACK; member to client: seq; and the windows of both.
 */
static __noinline int splice(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet,
			     struct fp_flow *flow, __u32 member)
{
	__u32 serial = flow->serial, virtual_server = flow->virtual_server, l4 = packet->l4 & 0x7f, offset = 0, old, new;
	struct fp_splice *found;
	struct tcphdr tcp, *written;
	void *data, *end;
	__s8 shift = 0;
	__u64 sum = 0;
	__u16 ready = 0;

	if (bpf_skb_load_bytes(skb, l4, &tcp, sizeof(tcp)) || !still(key, flow))
		return -FP_SHOT;
	if (flow->state & FP_HELD) {
		if (!member && packet->ifindex != skb->ifindex)
			return 0;
		if (!member && silence(ticks(), flow->used) < HELD_TICKS)
			return wait(skb, packet, virtual_server, 0, &tcp);
		let_go(key, flow);
	}
	if (!(flow->state & FP_SPLICE))
		return 0; /* let go, by this packet or by another one since this one's state was read */
	found = bpf_map_lookup_elem(&splices, &serial);
	if (found) {
		offset = found->offset;
		shift = member ? found->shift : found->shift_in;
		ready = found->ready;
		barrier();
		if (*(volatile __u32 *)&found->serial != serial)
			ready = offset = 0;
	}
	if (!ready) {
		if (member && offset && packet->part == WHOLE
		    && (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == (TCP_SYN | TCP_ACK)) {
			int verdict = give(skb, packet, flow, serial, offset - 1);

			if (verdict)
				return verdict;
		}
		count(FP_SPLICE_WAIT);
		return wait(skb, packet, virtual_server, member, &tcp);
	}
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	written = data + l4;
	if ((void *)(written + 1) > end)
		return -FP_SHOT;
	if (member) {
		old = tcp.seq;
		new = bpf_htonl(bpf_ntohl(old) - offset);
		written->seq = new;
		sum = (__u64)(__u32)~old + new;
	} else if (packet->tcp_flags & TCP_ACK) {
		old = tcp.ack_seq;
		new = bpf_htonl(bpf_ntohl(old) + offset);
		written->ack_seq = new;
		sum = (__u64)(__u32)~old + new;
	}
	if (shift && !(packet->tcp_flags & TCP_SYN)) {
		__be16 window = scaled(tcp.window, shift);

		written->window = window;
		sum += (__u64)(__u16)~tcp.window + window;
	}
	if (sum && bpf_l4_csum_replace(skb, l4 + 16, 0, fold32(sum), 0))
		return -FP_SHOT;
	if (!member && packet->tcp_flags & TCP_ACK && ((__u8 *)&tcp)[12] > 5 << 4
	    && !translate_sacks(skb, l4, (((__u8 *)&tcp)[12] >> 4) * 4U - TCP_HEADER, offset))
		return -FP_SHOT;
	return 0;
}

#endif
