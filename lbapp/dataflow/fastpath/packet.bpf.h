/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * One packet: read, compared with what it claims, rewritten and sent; fragments. Part of fastpath.bpf.c.
 */
#ifndef PACKET_BPF_H
#define PACKET_BPF_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "maps.bpf.h"

#define ETH 14
#define HEADERS (ETH + 40 + 8 + 20)
#define HEADERS_IPV4 (ETH + 20 + 20)
#define FRAGMENT_TICKS 4096

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };
enum { WHOLE, FIRST, LATER };

struct packet {
	__u32 ifindex;          /* the wire it came in on; what the agent sends is elsewhere now */
	__u32 l4;               /* where TCP or UDP begins */
	__u32 identification;
	__u8 ipv6;
	__u8 part;
	__u8 more : 1;
	__u8 says : 1;          /* a TCP segment with data; there is no room on the stack for another byte */
	__u8 tcp_flags;
};

/* Read the headers. Returns 0, or the counter of why this packet is not ours to forward. */
static __always_inline int parse(struct __sk_buff *skb, struct fp_key *key, struct packet *packet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth;
	__u32 length, offset = 0, minimum, headers = HEADERS_IPV4;

	if (skb->vlan_present)
		return FP_MISS_VLAN;
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		headers = HEADERS;
	if (data + headers > end && skb->len > (__u32)(end - data)) {
		if (bpf_skb_pull_data(skb, skb->len < headers ? skb->len : headers))
			return FP_MISS_MALFORMED;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}
	eth = data;
	if ((void *)(eth + 1) > end)
		return FP_MISS_OTHER;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
	packet->part = WHOLE;
	packet->more = 0;
	packet->tcp_flags = 0;
	packet->says = 0;
	packet->identification = 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH;
		__u16 fragment;

		if ((void *)(ip + 1) > end)
			return FP_MISS_MALFORMED;
		if (*(__u8 *)ip != 0x45)
			return FP_MISS_OPTIONS;
		length = bpf_ntohs(ip->tot_len);
		if (length < sizeof(*ip) || length > skb->len - ETH)
			return FP_MISS_MALFORMED;
		length -= sizeof(*ip);
		map_address(key->source, ip->saddr);
		map_address(key->destination, ip->daddr);
		key->protocol = ip->protocol;
		packet->ipv6 = 0;
		packet->l4 = ETH + sizeof(*ip);
		fragment = bpf_ntohs(ip->frag_off);
		if (fragment & 0x3fff) {
			offset = (fragment & 0x1fff) << 3;
			packet->part = offset ? LATER : FIRST;
			packet->more = fragment & 0x2000 ? 1 : 0;
			packet->identification = ip->id;
		}
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH;

		if ((void *)(ip + 1) > end || *(__u8 *)ip >> 4 != 6)
			return FP_MISS_MALFORMED;
		length = bpf_ntohs(ip->payload_len);
		if (length + sizeof(*ip) > skb->len - ETH)
			return FP_MISS_MALFORMED;
		copy16(key->source, (__u8 *)&ip->saddr);
		copy16(key->destination, (__u8 *)&ip->daddr);
		key->protocol = ip->nexthdr;
		packet->ipv6 = 1;
		packet->l4 = ETH + sizeof(*ip);
		if (ip->nexthdr == 44) {
			struct {
				__u8 next, reserved;
				__be16 offset;
				__u32 identification;
			} *fragment = (void *)(ip + 1);

			if ((void *)(fragment + 1) > end || length < sizeof(*fragment))
				return FP_MISS_MALFORMED;
			length -= sizeof(*fragment);
			key->protocol = fragment->next;
			packet->l4 += sizeof(*fragment);
			offset = bpf_ntohs(fragment->offset) & 0xfff8;
			packet->part = offset ? LATER : FIRST;
			packet->more = bpf_ntohs(fragment->offset) & 1;
			packet->identification = fragment->identification;
		}
		/* Mapped addresses mean nothing on a wire, and here they mean IPv4. */
		if (mapped(key->source) || mapped(key->destination))
			return FP_MISS_OTHER;
		if (key->protocol != IPPROTO_TCP && key->protocol != IPPROTO_UDP && key->protocol != IPPROTO_ICMPV6)
			return FP_MISS_OPTIONS;
	} else {
		return FP_MISS_OTHER;
	}
	if ((key->protocol != IPPROTO_TCP && key->protocol != IPPROTO_UDP) || eth->h_dest[0] & 1)
		return FP_MISS_OTHER;
	minimum = key->protocol == IPPROTO_TCP ? sizeof(struct tcphdr) : sizeof(struct udphdr);
	if (packet->part == LATER) {
		key->source_port = key->destination_port = 0;
		/* One that overlaps the header is made to slip past somebody who has read the first (RFC 1858). */
		return offset < minimum ? FP_MISS_MALFORMED : 0;
	}
	if (length < minimum)
		return FP_MISS_MALFORMED;
	if (key->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = data + packet->l4;

		if ((void *)(tcp + 1) > end)
			return FP_MISS_MALFORMED;
		if (tcp->doff < 5 || tcp->doff * 4 > length)
			return FP_MISS_MALFORMED;
		key->source_port = tcp->source;
		key->destination_port = tcp->dest;
		packet->tcp_flags = ((__u8 *)tcp)[13];
		packet->says = tcp->doff * 4 < length;
	} else {
		struct udphdr *udp = data + packet->l4;
		__u32 own;

		if ((void *)(udp + 1) > end)
			return FP_MISS_MALFORMED;
		own = bpf_ntohs(udp->len);
		if (packet->more ? own <= length : own != length)
			return FP_MISS_MALFORMED;
		key->source_port = udp->source;
		key->destination_port = udp->dest;
	}
	if (!key->source_port || !key->destination_port)
		return FP_MISS_MALFORMED;
	return 0;
}

/* What to write, on the stack: what is in the map may be another connection's the next moment. */
struct rewrite {
	__u8 source[16];
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port;
	__u8 destination_mac[6];
	__u8 source_mac[6];
	__u32 ifindex;
	__u32 state;
};

/*
 * Write it, and send the packet out. Right for any checksum: whole ones are corrected by the difference, partial
 * ones hold the pseudo-header's sum alone (BPF_F_PSEUDO_HDR), and one taken by the card over all of the packet
 * (CHECKSUM_COMPLETE) stays true: an IPv4 header sums up to the same as before, an IPv6 header does not.
 */
static __always_inline int send(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet,
				const struct rewrite *to, const int ports_too)
{
	__u64 addresses, ports, hops = 0;
	void *data, *end;
	struct ethhdr *eth;

	addresses = difference(key->source, to->source, packet->ipv6)
		  + difference(key->destination, to->destination, packet->ipv6);
	if (ports_too) {
		__u32 tcp = key->protocol == IPPROTO_TCP;
		__u32 field = packet->l4 + (tcp ? 16 : 6);
		__u64 flags = tcp ? 0 : BPF_F_MARK_MANGLED_0;

		if (bpf_l4_csum_replace(skb, field, 0, fold32(addresses), flags | BPF_F_PSEUDO_HDR))
			return -FP_SHOT;
		ports = (__u64)(__u16)~key->source_port + to->source_port
		      + (__u16)~key->destination_port + to->destination_port;
		if ((key->source_port != to->source_port || key->destination_port != to->destination_port)
		    && bpf_l4_csum_replace(skb, field, 0, fold32(ports), flags))
			return -FP_SHOT;
	}
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	eth = data;
	if (ports_too) {
		/* Says to the verifier what parse() knows: it is 62 at most. */
		__be16 *written = data + (packet->l4 & 0x7f);

		if ((void *)(written + 2) > end)
			return -FP_SHOT;
		written[0] = to->source_port;
		written[1] = to->destination_port;
	}
	if (packet->ipv6) {
		struct ipv6hdr *ip = data + ETH;

		if ((void *)(ip + 1) > end)
			return -FP_SHOT;
		copy16((__u8 *)&ip->saddr, to->source);
		copy16((__u8 *)&ip->daddr, to->destination);
		if (to->state & FP_ROUTED) {
			hops = (__u16)~((__u16 *)ip)[3];
			ip->hop_limit--;
			hops += ((__u16 *)ip)[3];
		}
	} else {
		struct iphdr *ip = data + ETH;
		__u64 sum;

		if ((void *)(ip + 1) > end)
			return -FP_SHOT;
		sum = (__u16)~ip->check + addresses;
		if (to->state & FP_ROUTED) {
			sum += (__u16)~((__u16 *)ip)[4];
			ip->ttl--;
			sum += ((__u16 *)ip)[4];
		}
		ip->check = ~fold16(sum);
		ip->saddr = ((__u32 *)to->source)[3];
		ip->daddr = ((__u32 *)to->destination)[3];
	}
	copy6(eth->h_dest, to->destination_mac);
	if (!zero6(to->source_mac))
		copy6(eth->h_source, to->source_mac);
	if (packet->ipv6)
		bpf_csum_update(skb, fold32(addresses + hops));
	return bpf_redirect(to->ifindex, 0);
}

static __always_inline int hops_left(struct __sk_buff *skb, const struct packet *packet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + ETH + 20 > end)
		return 0;
	return ((__u8 *)data)[packet->ipv6 ? ETH + 7 : ETH + 8] > 1;
}

static __always_inline void fragment_key(struct fp_fragment_key *of, const struct fp_key *key,
					 const struct packet *packet)
{
	copy16(of->source, key->source);
	copy16(of->destination, key->destination);
	of->identification = packet->identification;
	of->protocol = key->protocol;
	of->pad[0] = of->pad[1] = of->pad[2] = 0;
}

static __noinline void remember(const struct fp_key *key, const struct packet *packet, const struct rewrite *to,
				     __u32 now)
{
	struct fp_fragment_key of;
	struct fp_fragment fragment;

	fragment_key(&of, key, packet);
	copy16(fragment.source, to->source);
	copy16(fragment.destination, to->destination);
	copy6(fragment.destination_mac, to->destination_mac);
	copy6(fragment.source_mac, to->source_mac);
	fragment.ifindex = to->ifindex;
	fragment.state = to->state;
	fragment.seen = now;
	bpf_map_update_elem(&fragments, &of, &fragment, BPF_ANY);
}

/* A first fragment that is not forwarded here: nor must be any behind it, on account of an older one. */
static __noinline void dismiss(const struct fp_key *key, const struct packet *packet)
{
	struct fp_fragment_key of;

	if (packet->part != FIRST)
		return;
	fragment_key(&of, key, packet);
	bpf_map_delete_elem(&fragments, &of);
}

static __noinline int send_fragment(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet)
{
	struct fp_fragment_key of;
	struct fp_fragment *fragment;
	struct rewrite to = {};

	fragment_key(&of, key, packet);
	fragment = bpf_map_lookup_elem(&fragments, &of);
	if (!fragment || ticks() - fragment->seen > FRAGMENT_TICKS)
		return -FP_MISS_FRAGMENT;
	copy16(to.source, fragment->source);
	copy16(to.destination, fragment->destination);
	copy6(to.destination_mac, fragment->destination_mac);
	copy6(to.source_mac, fragment->source_mac);
	to.ifindex = fragment->ifindex;
	to.state = fragment->state;
	if (to.state & FP_ROUTED && !hops_left(skb, packet))
		return -FP_MISS_TTL;
	count(FP_HITS);
	return send(skb, key, packet, &to, 0);
}

#endif
