/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The member's half of handoff: at TC ingress of a server's interfaces it has the kernel take over connections whose
 * handshake a fast path did by cookie. The client's first data says all that is needed: seq - 1 and ack - 1 are the
 * two initial sequence numbers, and the second one is a cookie with what the client offered. Never answers anybody.
 *
 *   SYN, RST, or no ACK                        passes: ordinary connections, and spliced ones, begin as ever
 *   a connection of the kernel's               passes; if it is an earlier one of the same client's, it is ended first
 *   first data with a cookie of ours           a listener: is adopted by it; none: passes, and the kernel refuses
 *   another segment that meets a listener      may have overtaken the first one: is dropped for PATIENCE, passes later
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "../dataflow/fastpath/cookie.bpf.h"

#define ETH 14
#define TCP 20
#define CORE __attribute__((preserve_access_index))
#define PATIENCE 3000000000ULL  /* ns: what was lost is repeated by then */
#define LEAST_MSS_IPV6 1220     /* the kernel wants no less, and IPv6 has no less */

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };
enum { ESTABLISHED = 1, TIME_WAIT = 6, LISTEN = 10, NEW_SYN_RECV = 12 };

/* Counters; adopt.py names them in this order. */
enum {
	ADOPTED,        /* connections given to a listener */
	REFUSED,        /* those the kernel would not take: see adopt.py */
	EARLY,          /* segments that may have overtaken the first one, dropped */
	NO_LISTENER,    /* first data to a port where nobody listens any more */
	RECYCLED,       /* earlier connections of the same client's port that were ended first */
	TIME_WAITS,     /* first data dropped for such an earlier one that could not be ended */
	COUNTERS,
};

/* Where connections are adopted. An address of zeros is any. */
struct listener {
	__u8 address[16];
	__u16 port;             /* as a number of this host */
	__u16 pad;
};

/* Array "settings". */
struct settings {
	__u32 window_scale;     /* what fast paths offer */
	__u32 pad;
};

/* Who says what, for a while. */
struct conversation {
	__u8 address[16];       /* the client's */
	__u32 number;           /* its ISN, or what it acknowledges */
	__u16 port;
	__u16 local;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct listener);
	__type(value, __u32);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fp_cookies);
} cookies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* When a conversation of which nobody knew the beginning was first met. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct conversation);
	__type(value, __u64);
} overtaking SEC(".maps");

/* Conversations before which another one was ended. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct conversation);
	__type(value, __u64);
} recycled SEC(".maps");

/* What is read of the kernel's own; libbpf finds out where it is. */
struct sock {
	int sk_err;
} CORE;

struct tcp_sock {
	__u32 rcv_nxt;
	__u64 bytes_received;
} CORE;

struct sock_common {
	__u32 skc_tw_rcv_nxt;
} CORE;

struct inet_timewait_sock {
	struct sock_common __tw_common;
} CORE;

struct tcp_timewait_sock {
	struct inet_timewait_sock tw_sk;
} CORE;

struct bpf_tcp_req_attrs {
	__u32 rcv_tsval;
	__u32 rcv_tsecr;
	__u16 mss;
	__u8 rcv_wscale;
	__u8 snd_wscale;
	__u8 ecn_ok;
	__u8 wscale_ok;
	__u8 sack_ok;
	__u8 tstamp_ok;
	__u8 usec_ts_ok;
	__u8 reserved[3];
};

extern int bpf_sk_assign_tcp_reqsk(struct __sk_buff *s, struct sock *sk, struct bpf_tcp_req_attrs *attrs,
				   int attrs__sz) __ksym;

struct segment {
	struct conversation who;
	__u32 l4;
	__u32 seq, ack;
	__u32 data;             /* bytes; FIN is none */
	__u32 syn_cookie;       /* the kernel itself made it */
	int top;                /* bits 31..23 of our cookie, if it is the first one; or -1 */
	__u8 ipv6;
};

static __always_inline void count(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &which);

	if (value)
		*value += 1;
}

static __always_inline __u16 folded(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Make the frame a RST that ends what waits for this number, and send what it was in by the same door again after it. */
static __noinline int end_earlier(struct __sk_buff *skb, const struct segment *s, __u32 expected)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 l4, sum;
	__u16 length;
	struct tcphdr tcp = {};

	if (!s)
		return TC_ACT_SHOT;
	l4 = s->l4;
	/* Once: what does not go by that does not go. */
	if (bpf_map_update_elem(&recycled, &s->who, &now, BPF_NOEXIST)) {
		count(TIME_WAITS);
		return TC_ACT_SHOT;
	}
	if (bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS) || bpf_skb_change_tail(skb, l4 + TCP, 0)) {
		count(TIME_WAITS);
		return TC_ACT_SHOT;
	}
	if (bpf_skb_load_bytes(skb, l4, &tcp, 4))
		return TC_ACT_SHOT;
	tcp.seq = bpf_htonl(expected);
	tcp.doff = TCP / 4;
	tcp.rst = 1;
	if (s->ipv6) {
		__be32 both[8];
		__be32 rest[2] = {bpf_htonl(TCP), bpf_htonl(IPPROTO_TCP)};

		length = bpf_htons(TCP);
		if (bpf_skb_load_bytes(skb, ETH + offsetof(struct ipv6hdr, saddr), both, sizeof(both)))
			return TC_ACT_SHOT;
		sum = bpf_csum_diff(0, 0, both, sizeof(both), 0);
		sum = bpf_csum_diff(0, 0, rest, sizeof(rest), sum);
		sum = bpf_csum_diff(0, 0, (__be32 *)&tcp, sizeof(tcp), sum);
		tcp.check = folded(sum);
		if (bpf_skb_store_bytes(skb, ETH + offsetof(struct ipv6hdr, payload_len), &length, 2,
					BPF_F_RECOMPUTE_CSUM))
			return TC_ACT_SHOT;
	} else {
		struct iphdr ip;
		__be32 rest = bpf_htonl(IPPROTO_TCP << 16 | TCP);

		if (bpf_skb_load_bytes(skb, ETH, &ip, sizeof(ip)))
			return TC_ACT_SHOT;
		ip.tot_len = bpf_htons(sizeof(ip) + TCP);
		ip.check = 0;
		ip.check = folded(bpf_csum_diff(0, 0, (__be32 *)&ip, sizeof(ip), 0));
		sum = bpf_csum_diff(0, 0, &ip.saddr, 8, 0);
		sum = bpf_csum_diff(0, 0, &rest, sizeof(rest), sum);
		sum = bpf_csum_diff(0, 0, (__be32 *)&tcp, sizeof(tcp), sum);
		tcp.check = folded(sum);
		if (bpf_skb_store_bytes(skb, ETH, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM))
			return TC_ACT_SHOT;
	}
	if (bpf_skb_store_bytes(skb, l4, &tcp, sizeof(tcp), BPF_F_RECOMPUTE_CSUM))
		return TC_ACT_SHOT;
	count(RECYCLED);
	return TC_ACT_UNSPEC;
}

/* A segment that meets a listener, and is no first data: the first one may still come, or be repeated. */
static __noinline int overtook(const struct segment *s)
{
	__u64 now = bpf_ktime_get_ns(), *since;

	if (!s)
		return TC_ACT_UNSPEC;
	since = bpf_map_lookup_elem(&overtaking, &s->who);
	if (!since)
		bpf_map_update_elem(&overtaking, &s->who, &now, BPF_ANY);
	else if (now - *since > PATIENCE)
		return TC_ACT_UNSPEC;
	count(EARLY);
	return TC_ACT_SHOT;
}

static __always_inline int adopt(struct __sk_buff *skb, const struct segment *s, struct bpf_sock *found,
				 const struct settings *offered)
{
	struct sock *sk = (struct sock *)bpf_skc_to_tcp_sock(found);
	struct bpf_tcp_req_attrs what = {};
	__u32 scale = cookie_scale_of(s->top);

	what.mss = cookie_mss_of(s->top);
	if (s->ipv6 && what.mss < LEAST_MSS_IPV6)
		what.mss = LEAST_MSS_IPV6;
	what.sack_ok = cookie_sack_of(s->top);
	if (scale != COOKIE_NO_SCALE) {
		what.wscale_ok = 1;
		what.snd_wscale = scale;
		what.rcv_wscale = offered->window_scale;
	}
	if (!sk || bpf_sk_assign_tcp_reqsk(skb, sk, &what, sizeof(what))) {
		count(REFUSED);
		return TC_ACT_SHOT;
	}
	count(ADOPTED);
	return TC_ACT_UNSPEC;
}

/* Everything about the segment that takes no socket. False: it is none of ours. */
static __always_inline int read_segment(struct __sk_buff *skb, struct segment *s, struct bpf_sock_tuple *tuple,
					const struct fp_cookies *keys)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 headers = skb->protocol == bpf_htons(ETH_P_IPV6) ? ETH + 40 + TCP : ETH + 20 + TCP, length;
	struct listener where = {};
	struct tcphdr *tcp;
	__u8 flags;

	if (data + headers > end) {
		if (skb->len < headers || bpf_skb_pull_data(skb, headers))
			return 0;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH;

		if ((void *)(ip + 1) > end || *(__u8 *)ip != 0x45 || ip->protocol != IPPROTO_TCP)
			return 0;
		if (ip->frag_off & bpf_htons(0x3fff))
			return 0;
		length = bpf_ntohs(ip->tot_len) - sizeof(*ip);
		s->l4 = ETH + sizeof(*ip);
		*(__u32 *)(where.address + 8) = *(__u32 *)(s->who.address + 8) = bpf_htonl(0xffff);
		*(__u32 *)(where.address + 12) = tuple->ipv4.daddr = ip->daddr;
		*(__u32 *)(s->who.address + 12) = tuple->ipv4.saddr = ip->saddr;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH;

		if ((void *)(ip + 1) > end || ip->nexthdr != IPPROTO_TCP)
			return 0;
		length = bpf_ntohs(ip->payload_len);
		s->l4 = ETH + sizeof(*ip);
		s->ipv6 = 1;
		__builtin_memcpy(where.address, &ip->daddr, 16);
		__builtin_memcpy(tuple->ipv6.daddr, &ip->daddr, 16);
		__builtin_memcpy(s->who.address, &ip->saddr, 16);
		__builtin_memcpy(tuple->ipv6.saddr, &ip->saddr, 16);
	} else {
		return 0;
	}
	tcp = data + s->l4;
	if ((void *)(tcp + 1) > end)
		return 0;
	flags = ((__u8 *)tcp)[13];
	if ((flags & (TCP_ACK | TCP_SYN | TCP_RST)) != TCP_ACK || tcp->doff < 5 || tcp->doff * 4 > length)
		return 0;
	s->data = length - tcp->doff * 4;
	where.port = s->who.local = bpf_ntohs(tcp->dest);
	if (!bpf_map_lookup_elem(&listeners, &where)) {
		__builtin_memset(where.address, 0, sizeof(where.address));
		if (!bpf_map_lookup_elem(&listeners, &where))
			return 0;
	}
	if (s->ipv6) {
		tuple->ipv6.sport = tcp->source;
		tuple->ipv6.dport = tcp->dest;
	} else {
		tuple->ipv4.sport = tcp->source;
		tuple->ipv4.dport = tcp->dest;
	}
	s->who.port = bpf_ntohs(tcp->source);
	s->seq = bpf_ntohl(tcp->seq);
	s->ack = bpf_ntohl(tcp->ack_seq);
	s->who.number = s->ack;
	s->top = -1;
	if (s->data)
		s->top = cookie_check(keys, s->who.address, s->who.port, s->seq - 1, s->ack - 1);
	return 1;
}

/* Whether the kernel answered this client's SYN with a cookie of its own. */
static __always_inline int kernels_own(struct __sk_buff *skb, const struct segment *s, struct bpf_sock *listener)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct tcphdr *tcp;

	if (s->ipv6) {
		tcp = data + ETH + 40;
		if ((void *)(tcp + 1) > end)
			return 0;
		return !bpf_tcp_check_syncookie(listener, data + ETH, 40, tcp, TCP);
	}
	tcp = data + ETH + 20;
	if ((void *)(tcp + 1) > end)
		return 0;
	return !bpf_tcp_check_syncookie(listener, data + ETH, 20, tcp, TCP);
}

SEC("tc")
int adopt_cookies(struct __sk_buff *skb)
{
	__u32 zero = 0, state;
	struct fp_cookies *keys = bpf_map_lookup_elem(&cookies, &zero);
	struct settings *offered = bpf_map_lookup_elem(&settings, &zero);
	struct bpf_sock_tuple tuple = {};
	struct segment s = {};
	struct bpf_sock *found;
	int verdict = TC_ACT_UNSPEC;
	__u32 expected = 0;
	int earlier = 0;

	if (!keys || !offered || !keys->valid || !read_segment(skb, &s, &tuple, keys))
		return TC_ACT_UNSPEC;
	found = bpf_skc_lookup_tcp(skb, &tuple, s.ipv6 ? sizeof(tuple.ipv6) : sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!found) {
		if (s.top >= 0)
			count(NO_LISTENER);
		return TC_ACT_UNSPEC;
	}
	state = found->state;
	if (state == LISTEN) {
		if (s.top >= 0)
			verdict = adopt(skb, &s, found, offered);
		else if (keys->valid >> ((s.ack - 1) >> 31) & 1 && !kernels_own(skb, &s, found))
			verdict = overtook(&s);
	} else if (s.top >= 0 && state == TIME_WAIT) {
		struct tcp_timewait_sock *old = (void *)bpf_skc_to_tcp_timewait_sock(found);

		if (old) {
			expected = old->tw_sk.__tw_common.skc_tw_rcv_nxt;
			/* As the kernel has it for a SYN: only numbers that the earlier one had not reached yet. */
			earlier = (__s32)(s.seq - 1 - expected) > 0 ? 1 : -1;
		}
	} else if (s.top >= 0 && state != NEW_SYN_RECV) {
		struct tcp_sock *old = (void *)bpf_skc_to_tcp_sock(found);

		if (old) {
			/* Its own first data, repeated? A FIN counts as one. */
			expected = old->rcv_nxt;
			earlier = expected - (__u32)old->bytes_received - s.seq > 1;
		}
	}
	bpf_sk_release(found);
	if (earlier > 0) {
		s.who.number = s.seq;
		verdict = end_earlier(skb, &s, expected);
	} else if (earlier < 0) {
		count(TIME_WAITS);
		verdict = TC_ACT_SHOT;
	}
	return verdict;
}

char LICENSE[] SEC("license") = "GPL";
