/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * A TCP segment turned round in place: the answer goes out where the question came in. Part of fastpath.bpf.c.
 */
#ifndef ANSWER_BPF_H
#define ANSWER_BPF_H

#include "packet.bpf.h"

#define TCP_HEADER 20
#define TCP_OPTIONS 40
#define CHUNK 64
#define ANSWER_OPTIONS 3 /* words */

struct answer {
	__u32 sequence;
	__u32 acknowledgment;
	__u16 window;
	__u8 flags;
	__u8 words;
	__be32 options[ANSWER_OPTIONS];
	__u32 data;             /* bytes behind the header, which whoever answers writes afterwards */
	__u32 sum;              /* of them */
};

struct offer {
	__u8 bytes[TCP_OPTIONS + 8]; /* what is read behind the end is 0 */
	__u32 length;
	__u32 at;
	__u16 mss;
	__u8 scale;
	__u8 sack;
};

/* What would not fit on the stack. */
struct scratch {
	struct offer offer;
	struct answer answer;
	struct fp_key back;
	__u32 header[TCP_HEADER / 4 + ANSWER_OPTIONS];
	__u32 chunk[CHUNK / 4];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} answers SEC(".maps");

static __always_inline struct scratch *scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&answers, &zero);
}

struct summing {
	struct __sk_buff *skb;
	__u32 at;
	__u32 left;
	__u64 sum;
};

static long sum_chunk(__u32 index, struct summing *s)
{
	struct scratch *here = scratch();
	__u32 length = s->left < CHUNK ? s->left : CHUNK;

	if (!here)
		return 1;
	known_again(length);
	if (length < 1 || length > CHUNK)
		return 1;
	__builtin_memset(here->chunk, 0, CHUNK);
	if (bpf_skb_load_bytes(s->skb, s->at, here->chunk, length))
		return 1;
	s->sum = bpf_csum_diff(0, 0, here->chunk, CHUNK, s->sum);
	s->at += length;
	s->left -= length;
	return s->left == 0;
}

/* Ones' complement sum of a packet's bytes; at is even. */
static __noinline __u64 sum_of(struct __sk_buff *skb, __u32 at, __u32 length)
{
	struct summing s = {.skb = skb, .at = at, .left = length, .sum = 0};

	if (length)
		bpf_loop(0x10000 / CHUNK, sum_chunk, &s, 0);
	return s.sum;
}

/* How long the segment is, header and all; of a packet that parse() took and that is no fragment. */
static __always_inline __u32 segment_length(struct __sk_buff *skb, const struct packet *packet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + ETH + 20 > end)
		return 0;
	if (packet->ipv6)
		return bpf_ntohs(((struct ipv6hdr *)(data + ETH))->payload_len);
	return bpf_ntohs(((struct iphdr *)(data + ETH))->tot_len) - sizeof(struct iphdr);
}

/*
 * Answer a segment of so many bytes. As in send(): checksums are corrected by the difference, so a wrong one stays
 * wrong, a partial one partial, and a card's sum over all of it true (or the kernel has dropped it, for the length
 * has changed).
 */
static __noinline int answer(struct __sk_buff *skb, const struct packet *packet, const struct answer *what,
			     __u32 length)
{
	__u32 l4 = packet->l4 & 0x7f, size = TCP_HEADER + what->words * 4U, whole = size + what->data;
	struct scratch *here = scratch();
	struct tcphdr *tcp;
	__u32 *header;
	__u64 before = 0, hops = 0, sum;
	void *data, *end;
	struct ethhdr *eth;
	__u8 mac[6];

	if (!here || length < TCP_HEADER || size < TCP_HEADER || size > sizeof(here->header))
		return -FP_SHOT;
	header = here->header;
	tcp = (struct tcphdr *)header;
	/* A segment that is to be cut up has a partial checksum, which does not hold its bytes. */
	if (!skb->gso_size)
		before = sum_of(skb, l4, length);
	if (skb->len != l4 + whole && bpf_skb_change_tail(skb, l4 + whole, 0))
		return -FP_SHOT;
	if (bpf_skb_pull_data(skb, l4 + size))
		return -FP_SHOT;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	eth = data;
	if (data + l4 + TCP_HEADER > end || data + ETH + 40 > end)
		return -FP_SHOT;
	copy6(mac, eth->h_dest);
	copy6(eth->h_dest, eth->h_source);
	copy6(eth->h_source, mac);
	if (packet->ipv6) {
		struct ipv6hdr *ip = data + ETH;
		__u32 *words = (__u32 *)ip, address[4];

		hops = (__u64)(__u32)~words[0] + (__u32)~words[1];
		words[0] = bpf_htonl(6U << 28);
		ip->payload_len = bpf_htons(whole);
		ip->hop_limit = 64;
		hops += (__u64)words[0] + words[1];
		copy16((__u8 *)address, (__u8 *)&ip->saddr);
		copy16((__u8 *)&ip->saddr, (__u8 *)&ip->daddr);
		copy16((__u8 *)&ip->daddr, (__u8 *)address);
	} else {
		struct iphdr *ip = data + ETH;
		__u16 *words = (__u16 *)ip;
		__u32 address = ip->saddr;

		sum = (__u64)(__u16)~ip->check + (__u16)~words[0] + (__u16)~words[1] + (__u16)~words[2]
		    + (__u16)~words[3] + (__u16)~words[4];
		ip->tos = 0;
		ip->tot_len = bpf_htons(sizeof(*ip) + whole);
		ip->id = 0;
		ip->frag_off = bpf_htons(0x4000);
		ip->ttl = 64;
		sum += (__u64)words[0] + words[1] + words[2] + words[3] + words[4];
		ip->check = ~fold16(sum);
		ip->saddr = ip->daddr;
		ip->daddr = address;
	}
	{
		struct tcphdr *old = data + l4;
		__u16 check = old->check;

		tcp->source = old->dest;
		tcp->dest = old->source;
		tcp->seq = bpf_htonl(what->sequence);
		tcp->ack_seq = bpf_htonl(what->acknowledgment);
		tcp->check = 0;
		tcp->urg_ptr = 0;
		((__u8 *)tcp)[12] = size << 2;
		((__u8 *)tcp)[13] = what->flags;
		tcp->window = bpf_htons(what->window);
		header[5] = what->options[0];
		header[6] = what->options[1];
		header[7] = what->options[2];
		/* Addresses and ports have only changed places. */
		sum = bpf_csum_diff(0, 0, header, sizeof(here->header), 0);
		sum += (__u64)(__u32)~fold32(before) + check + what->sum;
		tcp->check = check;
	}
	known_again(size);
	if (size < TCP_HEADER || size > sizeof(here->header))
		return -FP_SHOT;
	if (bpf_skb_store_bytes(skb, l4, header, size, 0)
	    || bpf_l4_csum_replace(skb, l4 + 16, 0, fold32(sum), 0)
	    || bpf_l4_csum_replace(skb, l4 + 16, 0, (__u32)bpf_htons(whole) + (__u16)~bpf_htons(length),
				   BPF_F_PSEUDO_HDR))
		return -FP_SHOT;
	if (packet->ipv6)
		bpf_csum_update(skb, fold32(hops));
	return bpf_redirect(packet->ifindex, 0);
}

#endif
