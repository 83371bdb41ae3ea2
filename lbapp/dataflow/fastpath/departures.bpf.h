/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * What goes as soon as a connection is entered: a frame that waited for that, or a SYN to its member. Part of
 * fastpath.bpf.c.
 */
#ifndef DEPARTURES_BPF_H
#define DEPARTURES_BPF_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

#include "packet.bpf.h"

#define SYN_WINDOW 64240

/* The SYN that opens a connection to its member, as its client sent it but for its addresses. Returns its length. */
static __noinline __u32 make_syn(struct fp_departure *it, const struct fp_install *one)
{
	const struct fp_flow *flow = &one->flow;
	__u32 size = it->length, whole;
	struct ethhdr *eth = (struct ethhdr *)it->frame;
	struct tcphdr *tcp;
	__u64 sum;

	if (size > FP_OPTIONS)
		return 0;
	whole = sizeof(*tcp) + size;
	copy6(eth->h_dest, flow->destination_mac);
	copy6(eth->h_source, zero6(flow->source_mac) ? one->client_mac : flow->source_mac);
	if (mapped(flow->source)) {
		struct iphdr *ip = (struct iphdr *)(eth + 1);
		__u32 *words = (__u32 *)ip;
		__u16 check;

		eth->h_proto = bpf_htons(ETH_P_IP);
		words[0] = bpf_htonl(0x45000000 | (sizeof(*ip) + whole));
		words[1] = bpf_htonl(0x4000);
		words[3] = *(__u32 *)&flow->source[12];
		words[4] = *(__u32 *)&flow->destination[12];
		sum = (__u64)words[3] + words[4];
		words[2] = bpf_htonl(64 << 24 | IPPROTO_TCP << 16);
		check = ~fold16(sum + words[0] + words[1] + words[2]);
		words[2] |= bpf_htonl(bpf_ntohs(check));
		tcp = (struct tcphdr *)(ip + 1);
	} else {
		struct ipv6hdr *ip = (struct ipv6hdr *)(eth + 1);
		__u32 *words = (__u32 *)ip;

		eth->h_proto = bpf_htons(ETH_P_IPV6);
		words[0] = bpf_htonl(6U << 28);
		words[1] = bpf_htonl(whole << 16 | IPPROTO_TCP << 8 | 64);
		copy16((__u8 *)&ip->saddr, flow->source);
		copy16((__u8 *)&ip->daddr, flow->destination);
		sum = (__u32)bpf_csum_diff(0, 0, (__be32 *)&ip->saddr, 32, 0);
		tcp = (struct tcphdr *)(ip + 1);
	}
	tcp->source = flow->source_port;
	tcp->dest = flow->destination_port;
	tcp->seq = bpf_htonl(it->isn);
	tcp->ack_seq = 0;
	((__u8 *)tcp)[12] = whole << 2;
	((__u8 *)tcp)[13] = TCP_SYN;
	tcp->window = bpf_htons(SYN_WINDOW);
	tcp->check = 0;
	tcp->urg_ptr = 0;
	__builtin_memcpy(tcp + 1, it->options, FP_OPTIONS);
	/* The zeros behind the options add nothing. */
	sum += (__u32)bpf_csum_diff(0, 0, (__be32 *)tcp, sizeof(*tcp) + FP_OPTIONS, 0);
	tcp->check = ~fold16(sum + bpf_htons(IPPROTO_TCP) + bpf_htons(whole));
	return (__u8 *)tcp - it->frame + whole;
}

/* Send what is to go with a connection by the door. False if there is nothing, or it could not go.
 * Not static: so it is verified once, rather than after every way by which a connection may be entered. */
__noinline int depart(struct __sk_buff *skb, __u32 index, const struct fp_install *one, __u32 door)
{
	struct fp_departure *it = bpf_map_lookup_elem(&departures, &index);
	__u32 length, mark;

	if (!it || !one || it->kind == FP_NOTHING)
		return 0;
	if (it->kind == FP_SYN_GOES) {
		length = make_syn(it, one);
		mark = one->flow.ifindex | FP_OUT_MARK;
	} else {
		length = it->length;
		mark = it->ifindex;
	}
	if (length < ETH)
		return 0;
	known_again(length);
	if (length > FP_DEPARTURE)
		return 0;
	if (bpf_skb_change_tail(skb, length, 0) || bpf_skb_store_bytes(skb, 0, it->frame, length, 0))
		return 0;
	skb->mark = mark;
	return !bpf_clone_redirect(skb, door, 0);
}

#endif
