/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The cookie that is the initial sequence number of a proxied handshake: all that is known of the client until it
 * sends data. cookies.py says the same to Python. Needs nothing but fastpath.h: a server's program checks it too.
 *
 *     31   30..28   27..24         23     22..0
 *     key  MSS      window scale   SACK   low bits of SipHash-1-3(key; client's address, port, ISN, bits 31..23)
 *
 * The destination is not in it, for translation changes it. No clock: a cookie holds until its key is replaced.
 */
#ifndef COOKIE_BPF_H
#define COOKIE_BPF_H

#include "fastpath.h"
#include "siphash.bpf.h"

#define COOKIE_SHIFT 23
#define COOKIE_NO_SCALE 15
#define COOKIE_SCALE_MOST 14 /* RFC 7323 */

/* The index of the largest one that is not larger. */
static __always_inline __u32 cookie_mss(__u32 mss)
{
	return mss >= 8960 ? 7 : mss >= 1460 ? 6 : mss >= 1440 ? 5 : mss >= 1400 ? 4 : mss >= 1360 ? 3 : mss >= 1280 ? 2
	       : mss >= 1220 ? 1 : 0;
}

/* What a client offered, as the bits 30..23 of its cookie. scale: COOKIE_NO_SCALE where it offered none. */
static __always_inline __u32 cookie_options(__u32 mss, __u32 scale, int sack)
{
	if (scale != COOKIE_NO_SCALE && scale > COOKIE_SCALE_MOST)
		scale = COOKIE_SCALE_MOST;
	return cookie_mss(mss) << 5 | scale << 1 | (sack ? 1 : 0);
}

/* What it was: of bits 31..23, as cookie_check() returns them. */
static __always_inline __u32 cookie_mss_of(__u32 top)
{
	switch (top >> 5 & 7) {
	case 0: return 536;
	case 1: return 1220;
	case 2: return 1280;
	case 3: return 1360;
	case 4: return 1400;
	case 5: return 1440;
	case 6: return 1460;
	default: return 8960;
	}
}

static __always_inline __u32 cookie_scale_of(__u32 top)
{
	return top >> 1 & 15;
}

static __always_inline int cookie_sack_of(__u32 top)
{
	return top & 1;
}

/* port: as a number of this host. top: bits 31..23. */
static __always_inline __u32 cookie_hash(const struct fp_cookies *keys, const __u8 *address, __u16 port, __u32 isn,
					 __u32 top)
{
	struct sip s;

	sip_begin(&s, keys->keys[top >> 8 & 1]);
	sip_word(&s, two(address));
	sip_word(&s, two(address + 8));
	sip_word(&s, (__u64)isn << 32 | top << 16 | port);
	return sip_end(&s, 24) & ((1U << COOKIE_SHIFT) - 1);
}

/* The current key's cookie. address: 16 bytes; options: see cookie_options(). */
static __always_inline __u32 cookie_make(const struct fp_cookies *keys, const __u8 *address, __u16 port, __u32 isn,
					 __u32 options)
{
	__u32 top = (keys->current & 1) << 8 | (options & 0xff);

	return top << COOKIE_SHIFT | cookie_hash(keys, address, port, isn, top);
}

/* Bits 31..23 of a cookie that was made for this client with a key that is still there; -1 for any other number. */
static __always_inline int cookie_check(const struct fp_cookies *keys, const __u8 *address, __u16 port, __u32 isn,
					__u32 cookie)
{
	__u32 top = cookie >> COOKIE_SHIFT;

	if (!(keys->valid >> (top >> 8) & 1))
		return -1;
	return cookie_hash(keys, address, port, isn, top) == (cookie & ((1U << COOKIE_SHIFT) - 1)) ? (int)top : -1;
}

#endif
