/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * A token bucket in one word: the time at which it will be full again (ITU-T I.371, Annex A, "virtual scheduling").
 * lbapp/control/buckets.py says the same to Python. Needs nothing but types: a test compiles it by itself.
 *
 * Times are in sixteenths of a nanosecond. A token costs the time in which one is made; all of them together are
 * the depth. A bucket of which nobody has taken anything is 0.
 *
 * One word can be exchanged as a whole, so two processors never get the same token.
 */
#ifndef BUCKET_BPF_H
#define BUCKET_BPF_H

#include <linux/types.h>

#define BUCKET_SHIFT 4
#define BUCKET_TRIES 8
/*
 * A bucket that is emptier than empty by more than this was deeper once, and is only empty. By less: another
 * processor's clock was a moment ahead, and nothing is put back for that.
 */
#define BUCKET_SLACK 16000000000ULL

/*
 * Take a token. False where there is none, or others were quicker BUCKET_TRIES times: then as many have been taken
 * meanwhile, and one too few is handed out rather than one too many.
 */
static __inline __attribute__((always_inline)) int bucket_take(__u64 *full, __u64 now, __u64 cost, __u64 depth)
{
	__u64 old, next;
	int tries, taken, deeper;

	for (tries = 0; tries < BUCKET_TRIES; tries++) {
		old = *(volatile __u64 *)full;
		deeper = old > now + depth + BUCKET_SLACK;
		next = deeper ? now + depth : old < now ? now : old;
		taken = next + cost <= now + depth;
		if (taken)
			next += cost;
		else if (!deeper)
			return 0;
		if (__sync_val_compare_and_swap(full, old, next) == old)
			return taken;
	}
	return 0;
}

/* What a token was taken for did not come about. */
static __inline __attribute__((always_inline)) void bucket_return(__u64 *full, __u64 cost)
{
	__sync_fetch_and_add(full, -cost);
}

#endif
