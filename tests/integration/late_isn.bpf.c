/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * A server whose initial sequence numbers are all the same one: what its kernel chose is moved on the way out, and what
 * is acknowledged moved back on the way in. No SACK. Tests only.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#ifndef ISN
#define ISN 0
#endif
#ifndef PORT
#define PORT 0
#endif
#define SYN_ACK 0x12
#define ACK 0x10

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u16);
	__type(value, __u32);
} moved SEC(".maps");

/* The offset of the TCP header; 0: not of this server. */
static __always_inline __u32 header(struct __sk_buff *skb, __u32 own, __u16 *peer, __u8 *flags)
{
	__u32 at = skb->protocol == bpf_htons(ETH_P_IP) ? 34 : skb->protocol == bpf_htons(ETH_P_IPV6) ? 54 : 0;
	__u16 ports[2];
	__u8 protocol;

	if (!at || bpf_skb_load_bytes(skb, at == 34 ? 23 : 20, &protocol, 1) || protocol != 6)
		return 0;
	if (bpf_skb_load_bytes(skb, at, ports, 4) || bpf_skb_load_bytes(skb, at + 13, flags, 1))
		return 0;
	*peer = ports[!own];
	return ports[own] == bpf_htons(PORT) ? at : 0;
}

static __always_inline void add(struct __sk_buff *skb, __u32 at, __u32 field, __u32 by)
{
	__be32 old, new;

	if (bpf_skb_load_bytes(skb, at + field, &old, 4))
		return;
	new = bpf_htonl(bpf_ntohl(old) + by);
	bpf_l4_csum_replace(skb, at + 16, old, new, 4);
	bpf_skb_store_bytes(skb, at + field, &new, 4, 0);
}

SEC("tc")
int on_the_way_out(struct __sk_buff *skb)
{
	__u16 peer;
	__u8 flags;
	__u32 at = header(skb, 0, &peer, &flags), *by, first;
	__be32 seq;

	if (!at)
		return TC_ACT_UNSPEC;
	if ((flags & SYN_ACK) == SYN_ACK && !bpf_skb_load_bytes(skb, at + 4, &seq, 4)) {
		first = ISN - bpf_ntohl(seq);
		bpf_map_update_elem(&moved, &peer, &first, BPF_ANY);
	}
	by = bpf_map_lookup_elem(&moved, &peer);
	if (by)
		add(skb, at, 4, *by);
	return TC_ACT_UNSPEC;
}

SEC("tc")
int on_the_way_in(struct __sk_buff *skb)
{
	__u16 peer;
	__u8 flags;
	__u32 at = header(skb, 1, &peer, &flags), *by;

	by = at && (flags & ACK) ? bpf_map_lookup_elem(&moved, &peer) : 0;
	if (by)
		add(skb, at, 8, -*by);
	return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "GPL";
