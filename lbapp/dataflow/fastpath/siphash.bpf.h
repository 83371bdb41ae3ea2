/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * SipHash-1-3 of whole words of 64 bits (Aumasson, Bernstein: "SipHash: a fast short-input PRF").
 */
#ifndef SIPHASH_BPF_H
#define SIPHASH_BPF_H

#include <linux/types.h>
#include <bpf/bpf_helpers.h>

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

static __always_inline void sip_begin(struct sip *s, const __u64 key[2])
{
	s->a = key[0] ^ 0x736f6d6570736575ULL;
	s->b = key[1] ^ 0x646f72616e646f6dULL;
	s->c = key[0] ^ 0x6c7967656e657261ULL;
	s->d = key[1] ^ 0x7465646279746573ULL;
}

/* length: of what was hashed, in bytes; a multiple of 8. */
static __always_inline __u64 sip_end(struct sip *s, __u64 length)
{
	sip_word(s, length << 56);
	s->c ^= 0xff;
	sip_round(s);
	sip_round(s);
	sip_round(s);
	return s->a ^ s->b ^ s->c ^ s->d;
}

/* Two words from what is aligned to one. */
static __always_inline __u64 two(const __u8 *from)
{
	const __u32 *f = (const __u32 *)from;

	return f[0] | (__u64)f[1] << 32;
}

#endif
