/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * A wire that loses, repeats, delays or damages some of what a host sends; shares in parts of 1024. Tests only.
 * "bad" sits at the egress of the host's interface. What it delays goes through a slow pair of interfaces, and from its
 * other end ("late", ingress) out on the wire, behind packets that were sent later.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#ifndef LOSS
#define LOSS 0
#endif
#ifndef TWICE
#define TWICE 0
#endif
#ifndef ORDER
#define ORDER 0
#endif
#ifndef DAMAGE
#define DAMAGE 0
#endif
#ifndef SLOW
#define SLOW 0
#endif
#ifndef WIRE
#define WIRE 0
#endif
#define DONE 0x62616421
#define SPOIL 0x62616422

static __always_inline int chance(__u32 share)
{
	return share && (bpf_get_prandom_u32() & 1023) < share;
}

SEC("tc/bad")
int bad_wire(struct __sk_buff *skb)
{
	/* ARP and neighbour solicitations are not what is tested. */
	if (skb->mark == DONE || skb->mark == SPOIL || skb->len < 60)
		return TC_ACT_OK;
	skb->mark = DONE;
	if (chance(LOSS))
		return TC_ACT_SHOT;
	if (chance(TWICE))
		bpf_clone_redirect(skb, WIRE, 0);
	if (chance(DAMAGE)) {
		/* Not yet: its checksum is computed only when it leaves an interface. */
		skb->mark = SPOIL;
		return bpf_redirect(SLOW, 0);
	}
	return chance(ORDER) ? bpf_redirect(SLOW, 0) : TC_ACT_OK;
}

SEC("tc/late")
int late_wire(struct __sk_buff *skb)
{
	__u8 byte;
	__u32 at;

	if (skb->mark == SPOIL && skb->len > 54) {
		at = 54 + (bpf_get_prandom_u32() & 1023) % (skb->len - 54);
		if (!bpf_skb_load_bytes(skb, at, &byte, 1)) {
			byte ^= 1 << (bpf_get_prandom_u32() & 7);
			bpf_skb_store_bytes(skb, at, &byte, 1, 0);
		}
	}
	skb->mark = DONE;
	return bpf_redirect(WIRE, 0);
}

char LICENSE[] SEC("license") = "GPL";
