/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The fast path: forwards what belongs to a known connection, opens connections to virtual servers that need no
 * controller, hands queries to the agent, and leads everything else, untouched, into the switch.
 *
 * Programs: wire (TC ingress of a wire-side interface), again (the same for a frame that the agent sends once
 * more), out (TC ingress of the inner interface: what the switch sends), install and sweep (run by the agent).
 * The walk of a packet, and who owns what, is told in docs/fastpath.md.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "fastpath.h"

#define ETH 14
#define HEADERS (ETH + 40 + 8 + 20)
#define FRAGMENT_TICKS 4096
#define ATTEMPTS 4
#define EEXIST 17

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };
enum { WHOLE, FIRST, LATER };

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2097152);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct fp_key);
	__type(value, struct fp_flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct fp_service_key);
	__type(value, struct fp_service);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct fp_target);
} targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fp_fragment_key);
	__type(value, struct fp_fragment);
} fragments SEC(".maps");

/* A wire-side interface -> the inner one in front of the switch; 0: the switch reads the wire itself. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u32);
} inner SEC(".maps");

/* The way back: an inner interface -> its wire. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u32);
} outer SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct fp_stats_key);
	__type(value, struct fp_stats);
} service_stats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, FP_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} closed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} queries SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FP_INSTALLS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct fp_install);
} installs SEC(".maps");

/* Where a connection is put together that is opened here: it would not fit on the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fp_install);
} decisions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct fp_wanted);
} wanted SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fp_sweep);
} sweeping SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fp_layout);
} layout SEC(".maps");

/* ------------------------------------------------------------------ small things */

#define barrier() asm volatile("" ::: "memory")

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

/* Where a program run by the agent may be interrupted by a packet. */
static __always_inline void count_at_once(__u32 counter, __u64 many)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		__sync_fetch_and_add(value, many);
}

/* Not for programs of the type "syscall". */
static __always_inline __u32 ticks(void)
{
	return bpf_ktime_get_coarse_ns() >> FP_TICK_SHIFT;
}

static __always_inline void copy16(__u8 *to, const __u8 *from)
{
	__u32 *t = (__u32 *)to;
	const __u32 *f = (const __u32 *)from;

	t[0] = f[0];
	t[1] = f[1];
	t[2] = f[2];
	t[3] = f[3];
}

static __always_inline void copy6(__u8 *to, const __u8 *from)
{
	__u16 *t = (__u16 *)to;
	const __u16 *f = (const __u16 *)from;

	t[0] = f[0];
	t[1] = f[1];
	t[2] = f[2];
}

static __always_inline int zero6(const __u8 *mac)
{
	const __u16 *m = (const __u16 *)mac;

	return !(m[0] | m[1] | m[2]);
}

static __always_inline int zero16(const __u8 *address)
{
	const __u32 *a = (const __u32 *)address;

	return !(a[0] | a[1] | a[2] | a[3]);
}

static __always_inline int same16(const __u8 *one, const __u8 *other)
{
	const __u32 *a = (const __u32 *)one, *b = (const __u32 *)other;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline int mapped(const __u8 *address)
{
	const __u32 *a = (const __u32 *)address;

	return !(a[0] | a[1]) && a[2] == bpf_htonl(0xffff);
}

static __always_inline void map_address(__u8 *to, __u32 address)
{
	__u32 *t = (__u32 *)to;

	t[0] = 0;
	t[1] = 0;
	t[2] = bpf_htonl(0xffff);
	t[3] = address;
}

static __always_inline __u32 fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

static __always_inline __u16 fold16(__u64 sum)
{
	sum = fold32(sum);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* ones' complement sum of what is new and of the complement of what is old, as bpf_csum_diff */
static __always_inline __u64 difference(const __u8 *from, const __u8 *to, int ipv6)
{
	const __u32 *f = (const __u32 *)from, *t = (const __u32 *)to;
	__u64 sum = (__u64)(__u32)~f[3] + t[3];

	if (ipv6)
		sum += (__u64)(__u32)~f[0] + t[0] + (__u32)~f[1] + t[1] + (__u32)~f[2] + t[2];
	return sum;
}

/* Ticks from then to now; another processor, or a finer clock, may have been a moment later. */
static __always_inline __u32 silence(__u32 now, __u32 used)
{
	return (__s32)(now - used) < 0 ? 0 : now - used;
}

/* ------------------------------------------------------------------ keyed hash: SipHash-1-3 */

struct sip {
	__u64 a, b, c, d;
};

static __always_inline __u64 rotate(__u64 value, int bits)
{
	return value << bits | value >> (64 - bits);
}

static __always_inline void sip_round(struct sip *s)
{
	s->a += s->b;
	s->b = rotate(s->b, 13) ^ s->a;
	s->a = rotate(s->a, 32);
	s->c += s->d;
	s->d = rotate(s->d, 16) ^ s->c;
	s->a += s->d;
	s->d = rotate(s->d, 21) ^ s->a;
	s->c += s->b;
	s->b = rotate(s->b, 17) ^ s->c;
	s->c = rotate(s->c, 32);
}

static __always_inline void sip_word(struct sip *s, __u64 word)
{
	s->d ^= word;
	sip_round(s);
	s->a ^= word;
}

static __always_inline __u64 two(const __u8 *from)
{
	const __u32 *f = (const __u32 *)from;

	return f[0] | (__u64)f[1] << 32;
}

/* The client's address, or all of the key. */
static __noinline __u64 keyed_hash(const struct fp_key *key, int whole)
{
	__u32 zero = 0;
	struct fp_layout *l = bpf_map_lookup_elem(&layout, &zero);
	struct sip s;

	if (!l)
		return 0;
	s.a = l->seed[0] ^ 0x736f6d6570736575ULL;
	s.b = l->seed[1] ^ 0x646f72616e646f6dULL;
	s.c = l->seed[0] ^ 0x6c7967656e657261ULL;
	s.d = l->seed[1] ^ 0x7465646279746573ULL;
	sip_word(&s, two(key->source));
	sip_word(&s, two(key->source + 8));
	if (whole) {
		sip_word(&s, two(key->destination));
		sip_word(&s, two(key->destination + 8));
		sip_word(&s, two((const __u8 *)&key->source_port));
	}
	sip_word(&s, (__u64)(whole ? sizeof(*key) : 16) << 56);
	s.c ^= 0xff;
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	return s.a ^ s.b ^ s.c ^ s.d;
}

/* ------------------------------------------------------------------ connections */

static __always_inline struct fp_stats *stats_of(__u32 virtual_server, __u32 member)
{
	struct fp_stats_key key = {virtual_server, member};
	struct fp_stats *stats = bpf_map_lookup_elem(&service_stats, &key);

	if (!stats) {
		struct fp_stats none = {};

		bpf_map_update_elem(&service_stats, &key, &none, BPF_NOEXIST);
		stats = bpf_map_lookup_elem(&service_stats, &key);
	}
	return stats;
}

/* The key of the other direction: what comes back is addressed from where this one goes. */
static __always_inline void turn_round(struct fp_key *back, const struct fp_flow *flow, __u8 protocol)
{
	copy16(back->source, flow->destination);
	copy16(back->destination, flow->source);
	back->source_port = flow->destination_port;
	back->destination_port = flow->source_port;
	back->protocol = protocol;
	back->pad[0] = back->pad[1] = back->pad[2] = 0;
}

/*
 * Tell of a connection's end, once. False where the ring has no room: then nothing has happened.
 * in and out are its two directions; out may be missing.
 */
static __noinline int report(const struct fp_key *key, struct fp_flow *in, struct fp_flow *out, __u32 reason, __u32 now)
{
	struct fp_closed *record;
	struct fp_stats *stats;

	if (in->state & FP_REPORTED)
		return 1;
	record = bpf_ringbuf_reserve(&closed, sizeof(*record), 0);
	if (!record)
		return 0;
	if (reason != FP_ALIVE && __sync_fetch_and_or(&in->state, FP_REPORTED) & FP_REPORTED) {
		bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);
		return 1;
	}
	record->key = *key;
	record->virtual_server = in->virtual_server;
	record->member = in->member;
	record->serial = in->serial;
	record->reason = reason;
	record->state = in->state;
	record->duration = silence(now, in->opened);
	record->packets_in = in->packets;
	record->bytes_in = in->bytes;
	record->packets_out = out ? out->packets : 0;
	record->bytes_out = out ? out->bytes : 0;
	if (reason != FP_ALIVE) {
		count_at_once(FP_CLOSED_COUNT, 1);
		stats = stats_of(record->virtual_server, record->member);
		if (stats) {
			__sync_fetch_and_add(&stats->closed, 1);
			__sync_fetch_and_add(&stats->packets_in, record->packets_in);
			__sync_fetch_and_add(&stats->bytes_in, record->bytes_in);
			__sync_fetch_and_add(&stats->packets_out, record->packets_out);
			__sync_fetch_and_add(&stats->bytes_out, record->bytes_out);
		}
	}
	/* The agent looks every now and then: waking it for each would cost more than the packet. */
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return 1;
}

/* A closed connection makes room for one that wants the same tuple. */
static __noinline void forget(const struct fp_key *key, struct fp_flow *flow, __u32 now)
{
	struct fp_key back;
	struct fp_flow *other;

	turn_round(&back, flow, key->protocol);
	other = bpf_map_lookup_elem(&flows, &back);
	if (flow->state & FP_OUTBOUND) {
		if (other && !report(&back, other, flow, FP_SHUTDOWN, now))
			count_at_once(FP_CLOSED_LOST, 1);
	} else if (!report(key, flow, other, FP_SHUTDOWN, now)) {
		count_at_once(FP_CLOSED_LOST, 1);
	}
	bpf_map_delete_elem(&flows, key);
	bpf_map_delete_elem(&flows, &back);
}

/* FIN or RST in one direction, bits of fp_state. Both FINs, or an RST, end the connection: told once. */
static __noinline void follow(const struct fp_key *key, struct fp_flow *flow, __u32 bits, __u32 now)
{
	struct fp_key back;
	struct fp_flow *other;
	__u32 state;
	int over;

	turn_round(&back, flow, key->protocol);
	other = bpf_map_lookup_elem(&flows, &back);
	state = __sync_fetch_and_or(&flow->state, bits);
	over = bits & FP_RST || state & FP_PEER_FIN;
	if (other && bits & FP_FIN && __sync_fetch_and_or(&other->state, FP_PEER_FIN) & FP_FIN)
		over = 1;
	if (!over)
		return;
	/* Both directions may come to this at once: the first one tells. The way back says it first, the way there last. */
	if (flow->state & FP_OUTBOUND) {
		__sync_fetch_and_or(&flow->state, FP_CLOSED);
		if (other && !(__sync_fetch_and_or(&other->state, FP_CLOSED | (bits & FP_RST)) & FP_CLOSED))
			report(&back, other, flow, FP_SHUTDOWN, now);
	} else {
		if (other)
			__sync_fetch_and_or(&other->state, FP_CLOSED | (bits & FP_RST));
		if (!(__sync_fetch_and_or(&flow->state, FP_CLOSED) & FP_CLOSED))
			report(key, flow, other, FP_SHUTDOWN, now);
	}
}

/*
 * Enter both directions of a connection, or none. flow is the way there; the way back follows from it, so that
 * each direction can always find the other.
 */
static __noinline int enter(struct fp_install *one)
{
	struct fp_key back;
	struct fp_key *key = &one->key;
	struct fp_flow *flow = &one->flow, *way = &one->way;
	struct fp_flow *old;
	struct fp_stats *stats;
	__u32 zero = 0;
	struct fp_layout *l = bpf_map_lookup_elem(&layout, &zero);
	int error;

	if (!l)
		return FP_FULL;
	old = bpf_map_lookup_elem(&flows, key);
	if (old) {
		if (!(old->state & FP_CLOSED))
			return FP_EXISTS;
		forget(key, old, flow->opened);
	}
	turn_round(&back, flow, key->protocol);
	copy16(way->source, key->destination);
	copy16(way->destination, key->source);
	way->source_port = key->destination_port;
	way->destination_port = key->source_port;
	copy6(way->destination_mac, one->client_mac);
	copy6(way->source_mac, l->mac);
	way->ifindex = one->client_ifindex;
	way->state = flow->state | FP_OUTBOUND;
	way->used = way->opened = flow->opened;
	way->serial = flow->serial;
	way->virtual_server = flow->virtual_server;
	way->member = flow->member;
	way->idle_seconds = flow->idle_seconds;
	way->packets = way->bytes = 0;
	way->pad = 0;

	error = bpf_map_update_elem(&flows, &back, way, BPF_NOEXIST);
	if (error == -EEXIST) {
		old = bpf_map_lookup_elem(&flows, &back);
		if (old && !(old->state & FP_CLOSED))
			return FP_TAKEN;
		if (old)
			forget(&back, old, flow->opened);
		error = bpf_map_update_elem(&flows, &back, way, BPF_NOEXIST);
	}
	if (error)
		return error == -EEXIST ? FP_TAKEN : FP_FULL;
	error = bpf_map_update_elem(&flows, key, flow, BPF_NOEXIST);
	if (error) {
		bpf_map_delete_elem(&flows, &back);
		return error == -EEXIST ? FP_EXISTS : FP_FULL;
	}
	stats = stats_of(flow->virtual_server, flow->member);
	if (stats)
		__sync_fetch_and_add(&stats->opened, 1);
	return FP_OPENED;
}

/* ------------------------------------------------------------------ one packet */

struct packet {
	__u32 ifindex;          /* the wire it came in on */
	__u32 l4;               /* where TCP or UDP begins */
	__u32 identification;
	__u8 ipv6;
	__u8 part;
	__u8 more;
	__u8 tcp_flags;
};

/* Read the headers. Returns 0, or the counter of why this packet is not ours to forward. */
static __always_inline int parse(struct __sk_buff *skb, struct fp_key *key, struct packet *packet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth;
	__u32 length, offset = 0, minimum;

	if (skb->vlan_present)
		return FP_MISS_VLAN;
	if (data + HEADERS > end && skb->len > (__u32)(end - data)) {
		if (bpf_skb_pull_data(skb, skb->len < HEADERS ? skb->len : HEADERS))
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
	struct fp_query *query;
	__u32 length = skb->len;

	/* The client sends it again, and its later fragments would not wait for the answer. */
	if (packet->part != WHOLE)
		return -FP_MISS_FRAGMENT;
	if (length - 1 < FP_FRAME_SMALL) {
		query = bpf_ringbuf_reserve(&queries, sizeof(*query) + FP_FRAME_SMALL, 0);
		if (!query)
			return -FP_MISS_QUERY;
		if (bpf_skb_load_bytes(skb, 0, query->frame, length)) {
			bpf_ringbuf_discard(query, 0);
			return -FP_MISS_QUERY;
		}
	} else if (length - 1 < FP_FRAME) {
		query = bpf_ringbuf_reserve(&queries, sizeof(*query) + FP_FRAME, 0);
		if (!query)
			return -FP_MISS_QUERY;
		if (bpf_skb_load_bytes(skb, 0, query->frame, length)) {
			bpf_ringbuf_discard(query, 0);
			return -FP_MISS_QUERY;
		}
	} else {
		return -FP_MISS_QUERY;
	}
	query->ifindex = packet->ifindex;
	query->virtual_server = virtual_server;
	query->length = length;
	query->pad = 0;
	bpf_ringbuf_submit(query, 0);
	count(FP_QUERIES);
	return TC_ACT_SHOT;
}

/* A packet of no known connection. 0: now it is one's; positive: what becomes of it; negative: why it is a miss. */
static __always_inline int begin(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet)
{
	struct fp_service_key wanted_service;
	struct fp_service *service;

	if (key->protocol == IPPROTO_TCP
	    && (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) != TCP_SYN)
		return -FP_MISS_FLOW;
	copy16(wanted_service.address, key->destination);
	wanted_service.port = key->destination_port;
	wanted_service.protocol = key->protocol;
	wanted_service.pad = 0;
	service = bpf_map_lookup_elem(&services, &wanted_service);
	if (!service)
		return -FP_MISS_SERVICE;
	if (same16(key->source, key->destination))
		return -FP_MISS_MALFORMED;
	if (service->mode == FP_DECIDE)
		return decide(skb, key, service, packet->ifindex);
	if (service->mode == FP_PUNT)
		return punt(skb, packet, service->number);
	return -FP_MISS_PASS;
}

/* ------------------------------------------------------------------ the walk */

/*
 * Whether the entry that was just read is still the key's. One deleted by another processor may be a different
 * connection's already: the memory is used again at once. The key lies in front of the value, and is written first.
 */
static __noinline int still(const struct fp_key *key, struct fp_flow *flow)
{
	struct fp_key own;

	barrier();
	return !bpf_probe_read_kernel(&own, sizeof(own), (void *)flow - sizeof(own))
	       && same16(own.source, key->source) && same16(own.destination, key->destination)
	       && two((__u8 *)&own.source_port) == two((__u8 *)&key->source_port);
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
	now = ticks();
	if (flow->used != now)
		flow->used = now;
	__sync_fetch_and_add(&flow->packets, 1);
	__sync_fetch_and_add(&flow->bytes, skb->len);
	if (key.protocol == IPPROTO_TCP) {
		if (!(to.state & FP_ESTABLISHED) && !(packet.tcp_flags & TCP_SYN))
			__sync_fetch_and_or(&flow->state, FP_ESTABLISHED);
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

/* A frame that the agent sends once more; its mark says which wire it came in on. */
SEC("tc")
int again(struct __sk_buff *skb)
{
	__u32 ifindex = skb->mark;

	skb->mark = 0;
	return walk(skb, ifindex);
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

static long install_one(__u32 index, void *context)
{
	struct fp_install *one = bpf_map_lookup_elem(&installs, &index);

	if (!one)
		return 1;
	one->result = enter(one);
	if (one->result == FP_OPENED)
		*(__u32 *)context += 1;
	return 0;
}

SEC("syscall")
int install(struct fp_install_context *context)
{
	__u32 opened = 0;

	if (context->count > FP_INSTALLS)
		return -1;
	bpf_loop(context->count, install_one, &opened, 0);
	context->opened = opened;
	count_at_once(FP_OPENED_INSTALLED, opened);
	return 0;
}

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

static long sweep_one(void *map, const struct fp_key *key, struct fp_flow *flow, void *context)
{
	__u32 zero = 0;
	struct fp_sweep *sweep = bpf_map_lookup_elem(&sweeping, &zero);
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
	turn_round(&back, flow, key->protocol);
	other = bpf_map_lookup_elem(&flows, &back);
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

/* Says nothing and is told nothing but in "sweeping". */
SEC("syscall")
int sweep(void *context)
{
	__u32 zero = 0;
	struct fp_sweep *state = bpf_map_lookup_elem(&sweeping, &zero);

	if (!state)
		return -1;
	state->now = bpf_ktime_get_ns() >> FP_TICK_SHIFT;
	bpf_for_each_map_elem(&flows, sweep_one, 0, 0);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
