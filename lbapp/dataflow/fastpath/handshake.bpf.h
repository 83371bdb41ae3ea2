/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Virtual servers whose handshakes are proxied: a SYN is answered with a cookie, and nothing is remembered of it. The
 * client's first data goes to the agent. Part of fastpath.bpf.c.
 */
#ifndef HANDSHAKE_BPF_H
#define HANDSHAKE_BPF_H

#include <linux/pkt_cls.h>

#include "answer.bpf.h"
#include "cookie.bpf.h"
#include "limits.bpf.h"

#define REACH 0x20000       /* how far a client may be from where it began while its first data is being read */
#define DOUBT_TICKS 2861    /* 3 s */
#define DOUBT_OVER 57220    /* 60 s */

/* ------------------------------------------------------------------ to the agent */

/* Hand a whole frame to the agent. False where there is no room for it, or it is too long. */
static __noinline int ask(struct __sk_buff *skb, const struct packet *packet, __u32 virtual_server, __u32 kind,
			  __u32 options)
{
	struct fp_query *query;
	__u32 length = skb->len;
	long error;

	/* The size of a record has to be known when this is compiled. */
	if (length - 1 < FP_FRAME_SMALL) {
		query = bpf_ringbuf_reserve(&queries, sizeof(*query) + FP_FRAME_SMALL, 0);
		if (!query)
			return 0;
		error = bpf_skb_load_bytes(skb, 0, query->frame, length);
	} else if (length - 1 < FP_FRAME_MIDDLE) {
		query = bpf_ringbuf_reserve(&queries, sizeof(*query) + FP_FRAME_MIDDLE, 0);
		if (!query)
			return 0;
		error = bpf_skb_load_bytes(skb, 0, query->frame, length);
	} else if (length - 1 < FP_FRAME) {
		query = bpf_ringbuf_reserve(&queries, sizeof(*query) + FP_FRAME, 0);
		if (!query)
			return 0;
		error = bpf_skb_load_bytes(skb, 0, query->frame, length);
	} else if (kind != FP_ASK_FIRST && length - 1 < FP_FRAME_LARGE) {
		query = bpf_ringbuf_reserve(&queries, sizeof(*query) + FP_FRAME_LARGE, 0);
		if (!query)
			return 0;
		error = bpf_skb_load_bytes(skb, 0, query->frame, length);
	} else {
		return 0;
	}
	if (error) {
		bpf_ringbuf_discard(query, 0);
		return 0;
	}
	query->ifindex = packet->ifindex;
	query->virtual_server = virtual_server;
	query->length = length;
	query->kind = kind;
	query->pad = 0;
	query->options = options;
	bpf_ringbuf_submit(query, 0);
	return 1;
}

/* The same for what nobody but the agent must see: what it has no room for is dropped, and its sender repeats it. */
static __always_inline int ask_or_drop(struct __sk_buff *skb, const struct packet *packet, __u32 virtual_server,
				       __u32 kind, __u32 options)
{
	int asked = ask(skb, packet, virtual_server, kind, options);

	count(!asked ? FP_ASK_LOST : kind == FP_ASK_MEMBER ? FP_ASKED_MEMBER : FP_ASKED_DATA);
	return asked;
}

/* ------------------------------------------------------------------ what a client offers */

static long read_option(__u32 index, struct offer **of)
{
	struct offer *o = *of;
	__u32 at = o->at;
	__u8 kind, size;

	if (at >= o->length || at >= TCP_OPTIONS)
		return 1;
	kind = o->bytes[at];
	if (kind == 0)
		return 1;
	if (kind == 1) {
		o->at = at + 1;
		return 0;
	}
	size = o->bytes[at + 1];
	if (size < 2 || at + size > o->length)
		return 1;
	if (kind == 2 && size == 4)
		o->mss = o->bytes[at + 2] << 8 | o->bytes[at + 3];
	else if (kind == 3 && size == 3)
		o->scale = o->bytes[at + 2] > COOKIE_SCALE_MOST ? COOKIE_SCALE_MOST : o->bytes[at + 2];
	else if (kind == 4 && size == 2)
		o->sack = 1;
	o->at = at + size;
	return 0;
}

/* What a SYN or SYN-ACK offers, in the scratch's "offer". False if it could not be read. */
static __noinline int read_offer(struct __sk_buff *skb, __u32 l4, const struct tcphdr *tcp)
{
	struct scratch *here = scratch();
	struct offer *offer;
	__u32 length;

	if (!here || !tcp)
		return 0;
	offer = &here->offer;
	__builtin_memset(offer, 0, sizeof(*offer));
	offer->mss = 536;
	offer->scale = COOKIE_NO_SCALE;
	length = (((__u8 *)tcp)[12] >> 4) * 4U - TCP_HEADER;
	if (length - 1 < TCP_OPTIONS) {
		if (bpf_skb_load_bytes(skb, l4 + TCP_HEADER, offer->bytes, length))
			return 0;
		offer->length = length;
		bpf_loop(TCP_OPTIONS, read_option, &offer, 0);
	}
	return 1;
}

/* Answer a SYN. What came before it on this port is forgotten, but not for a SYN that is repeated. */
static __noinline int greet(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet,
			    const struct fp_service *service, const struct fp_cookies *keys)
{
	struct fp_pending *known = bpf_map_lookup_elem(&pending, key);
	struct scratch *here = scratch();
	struct answer *what;
	struct offer *offer;
	__u32 mss = service->mss ? service->mss : 536, isn;
	struct tcphdr tcp;
	int verdict;

	if (!here || bpf_skb_load_bytes(skb, packet->l4, &tcp, sizeof(tcp)) || !read_offer(skb, packet->l4, &tcp))
		return -FP_SHOT;
	what = &here->answer;
	offer = &here->offer;
	__builtin_memset(what, 0, sizeof(*what));
	isn = bpf_ntohl(tcp.seq);
	if (known && known->isn == isn) {
		what->sequence = known->cookie;
	} else {
		if (known)
			bpf_map_delete_elem(&pending, key);
		what->sequence = cookie_make(keys, key->source, bpf_ntohs(key->source_port), isn,
					    cookie_options(offer->mss, offer->scale, offer->sack));
	}
	what->acknowledgment = isn + 1;
	what->window = FP_WINDOW;
	what->flags = TCP_SYN | TCP_ACK;
	what->words = 1;
	what->options[0] = bpf_htonl(2U << 24 | 4U << 16 | mss);
	if (offer->sack && service->sack) {
		what->options[1] = bpf_htonl(0x01010402);
		what->words = 2;
	}
	if (offer->scale != COOKIE_NO_SCALE && service->window_scale <= COOKIE_SCALE_MOST) {
		__be32 scale = bpf_htonl(0x01030300U | service->window_scale);

		if (what->words == 2)
			what->options[2] = scale;
		else
			what->options[1] = scale;
		what->words++;
	}
	verdict = answer(skb, packet, what, segment_length(skb, packet));
	if (verdict > 0)
		count(FP_GREETED);
	return verdict;
}

/* ------------------------------------------------------------------ what a client says */

/* What a segment without options says, in the scratch's "answer". */
static __always_inline void plain(struct scratch *here, __u32 sequence, __u32 acknowledgment, __u32 flags, __u16 window)
{
	here->answer.sequence = sequence;
	here->answer.acknowledgment = acknowledgment;
	here->answer.flags = flags;
	here->answer.window = window;
	here->answer.words = 0;
	here->answer.options[0] = here->answer.options[1] = here->answer.options[2] = 0;
	here->answer.data = here->answer.sum = 0;
}

/* A segment without options; with TCP_ACK, of what we have heard and the window that we offered. */
static __noinline int reply(struct __sk_buff *skb, const struct packet *packet, __u32 sequence, __u32 acknowledgment,
			    __u32 flags)
{
	struct scratch *here = scratch();

	if (!here)
		return -FP_SHOT;
	plain(here, sequence, acknowledgment, flags,
	      (flags & (TCP_ACK | TCP_RST)) == TCP_ACK ? FP_WINDOW >> (flags >> 8 & 15) : 0);
	return answer(skb, packet, &here->answer, segment_length(skb, packet));
}

static __always_inline int reset(struct __sk_buff *skb, const struct packet *packet, __u32 acknowledgment)
{
	int verdict = reply(skb, packet, acknowledgment, 0, TCP_RST);

	if (verdict > 0)
		count(FP_RESET_SENT);
	return verdict;
}

/*
 * A segment of no connection. It may have come before the client's first data, which alone has the cookie's other
 * half: so it is dropped, and who goes on like that for seconds is reset.
 */
static __always_inline int doubt(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet,
				 __u32 acknowledgment)
{
	struct doubt *first = bpf_map_lookup_elem(&doubts, key), anew = {.acknowledgment = acknowledgment};
	__u32 age = DOUBT_OVER;

	count(FP_COOKIE_BAD);
	anew.since = ticks();
	/* Another connection of the same ports acknowledges another cookie. */
	if (first && first->acknowledgment == acknowledgment)
		age = anew.since - first->since;
	if (age >= DOUBT_OVER)
		bpf_map_update_elem(&doubts, key, &anew, BPF_ANY);
	else if (age >= DOUBT_TICKS)
		return reset(skb, packet, acknowledgment);
	return TC_ACT_SHOT;
}

static __noinline int checked(const struct fp_cookies *keys, const struct fp_key *key, __u32 isn, __u32 cookie)
{
	return cookie_check(keys, key->source, bpf_ntohs(key->source_port), isn, cookie);
}

/* Not a SYN, to a virtual server whose handshakes are proxied. What becomes of it, or why it is a miss (negative). */
static __noinline int listen(struct __sk_buff *skb, const struct fp_key *key, const struct packet *packet,
			    const struct fp_service *service, const struct fp_cookies *keys)
{
	__u32 flags = packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_FIN | TCP_RST);
	__u32 length = segment_length(skb, packet), header, isn, cookie;
	struct fp_pending *known, entry;
	struct tcphdr tcp;
	int top;

	if (bpf_skb_load_bytes(skb, packet->l4, &tcp, sizeof(tcp)))
		return -FP_SHOT;
	header = (((__u8 *)&tcp)[12] >> 4) * 4U;
	isn = bpf_ntohl(tcp.seq) - 1;
	cookie = bpf_ntohl(tcp.ack_seq) - 1;
	known = bpf_map_lookup_elem(&pending, key);
	if (known && !(flags & TCP_SYN)) {
		entry = *known;
		if (isn - entry.isn <= REACH && (flags & TCP_RST || (flags & TCP_ACK && cookie - entry.cookie <= REACH))) {
			if (!(flags & (TCP_FIN | TCP_RST)) && length == header) {
				count(FP_GREETED_ACK);
				return TC_ACT_SHOT;
			}
			__u32 kind = isn == entry.isn && cookie == entry.cookie ? FP_ASK_DATA : FP_ASK_LATER;

			/* The entry may be left of a connection that has gone: it begins none when the cookie is void. */
			if (kind == FP_ASK_DATA && !(flags & TCP_RST) && checked(keys, key, isn, cookie) < 0)
				return doubt(skb, key, packet, cookie + 1);
			if (ask_or_drop(skb, packet, service->number, kind, entry.cookie >> COOKIE_SHIFT)
			    && flags & TCP_RST)
				bpf_map_delete_elem(&pending, key);
			return TC_ACT_SHOT;
		}
	}
	if (flags & TCP_RST || !(flags & TCP_ACK)) {
		count(FP_COOKIE_BAD);
		return TC_ACT_SHOT;
	}
	if (flags & TCP_SYN)
		return doubt(skb, key, packet, cookie + 1);
	top = checked(keys, key, isn, cookie);
	if (top < 0) {
		/* Somebody who has waited for long before saying anything asks whether we are still there. */
		if (length == header && !(flags & TCP_FIN)
		    && checked(keys, key, isn + 1, cookie) >= 0) {
			__u32 scale = 0;

			if (service->window_scale <= COOKIE_SCALE_MOST && (cookie >> 24 & 15) != COOKIE_NO_SCALE)
				scale = service->window_scale;
			count(FP_GREETED_ACK);
			return reply(skb, packet, cookie + 1, isn + 2, TCP_ACK | scale << 8);
		}
		return doubt(skb, key, packet, cookie + 1);
	}
	if (length == header) {
		/* Whoever leaves without a word gets one: there is no connection that could be closed in order. */
		if (flags & TCP_FIN)
			return reset(skb, packet, cookie + 1);
		count(FP_GREETED_ACK);
		return TC_ACT_SHOT;
	}
	/* Only here, where nobody can pretend to be somebody else: what is forged costs no client its token. */
	if (limited(service) && !admit(key, service))
		return reset(skb, packet, cookie + 1);
	/* First the entry: the agent may have forgotten it again before this goes on. */
	entry.isn = isn;
	entry.cookie = cookie;
	bpf_map_update_elem(&pending, key, &entry, BPF_ANY);
	if (!ask_or_drop(skb, packet, service->number, FP_ASK_DATA, top)) {
		bpf_map_delete_elem(&pending, key);
		if (limited(service))
			give_back(key, service);
	}
	return TC_ACT_SHOT;
}

#endif
