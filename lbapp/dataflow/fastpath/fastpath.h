/* SPDX-FileCopyrightText: The lbapp authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * What the eBPF programs and layout.py share: every struct that lies in a map, a ring buffer or a context.
 * The only definition. layout.py says the same to Python, and a test compares both with the object's BTF.
 *
 * Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d. Ports are in network byte order, all else in the host's.
 * A tick is 2^20 ns of CLOCK_MONOTONIC (1.05 ms), taken without a division; it wraps after 52 days, so only
 * differences mean something.
 */
#ifndef FASTPATH_H
#define FASTPATH_H

#include <linux/types.h>

#define FP_VERSION 3
#define FP_TICK_SHIFT 20
#define FP_SLOTS 1021
#define FP_FRAME 2048
#define FP_FRAME_SMALL 104
#define FP_FRAME_MIDDLE 512
#define FP_FRAME_LARGE 16384
#define FP_WINDOW 14600
#define FP_OUT_MARK 0x80000000
#define FP_INSTALLS 1024
#define FP_DEPARTURE 1514
#define FP_OPTIONS 40
#define FP_SWEEPS 2
#define FP_HISTOGRAM 32
#define FP_REQUESTS 4096
#define FP_REQUEST 1460

/* Bits of fp_flow.state. */
enum fp_state {
	FP_OUTBOUND = 1,     /* member to client (003, FIGURE 7) */
	FP_ROUTED = 2,       /* the balancer is a router on the way: it decrements the TTL */
	FP_ESTABLISHED = 4,  /* the client has sent more than its SYN */
	FP_FIN = 8,          /* this direction has finished */
	FP_PEER_FIN = 16,    /* the other one has */
	FP_RST = 32,
	FP_CLOSED = 64,      /* over; still translated until nothing has used it for a while */
	FP_REPORTED = 128,   /* its fp_closed has been delivered */
	FP_DECIDED = 256,    /* selected here, not by the control segment */
	FP_TRACKED = 512,    /* the control segment counts it */
	FP_SPLICE = 1024,    /* the member counts its bytes from elsewhere: see fp_splice */
	FP_ANSWERED = 2048,  /* of member to client: a segment had data */
	FP_HELD = 4096,      /* handed over, and its member has said nothing yet: see splice() */
	FP_ANEW = 8192,      /* of member to client: its client has sent a SYN since, see anew() */
};

enum fp_mode { FP_PASS, FP_DECIDE, FP_PUNT, FP_PROXY };
enum fp_hash { FP_SOURCE, FP_FLOW, FP_TURN };
enum fp_reason { FP_SHUTDOWN, FP_IDLE, FP_OVERFLOW, FP_DELETED, FP_ALIVE };

/* fp_target.flags. */
enum fp_target_flag { FP_TARGET_ROUTED = 1 };

/* fp_install.result. */
enum fp_result { FP_OPENED, FP_EXISTS, FP_TAKEN, FP_FULL, FP_GONE };

/* fp_query.kind. */
enum fp_ask {
	FP_ASK_FIRST,        /* a connection's first packet */
	FP_ASK_DATA,         /* from a client whose handshake was answered here */
	FP_ASK_MEMBER,       /* from the member of a splice that is not ready */
	FP_ASK_LATER,        /* as FP_ASK_DATA, but not the client's first: its sequence number is not the cookie's */
};

/* fp_request.state. Only programs leave WAITING: for TAKEN and then GIVEN, or ("revoke") for NONE. */
enum fp_request_state { FP_REQUEST_NONE, FP_REQUEST_WAITING, FP_REQUEST_TAKEN, FP_REQUEST_GIVEN };

/* What a packet that is not forwarded here was, and what else is counted. */
enum fp_counter {
	FP_HITS,
	FP_MISS_OTHER,       /* neither IPv4 nor IPv6, neither TCP nor UDP, group addresses */
	FP_MISS_VLAN,
	FP_MISS_OPTIONS,     /* IPv4 options, IPv6 extension headers */
	FP_MISS_MALFORMED,   /* lengths that do not agree, port 0, a source that is the destination */
	FP_MISS_FRAGMENT,    /* a later fragment whose first one was not seen */
	FP_MISS_FLOW,        /* TCP without a flow, and no SYN */
	FP_MISS_SERVICE,     /* a new flow to nothing that is a virtual server here */
	FP_MISS_PASS,        /* a virtual server that the switch and the controller decide */
	FP_MISS_TARGET,      /* no member, or one whose place is unknown */
	FP_MISS_TTL,
	FP_MISS_TAKEN,       /* the way back is another connection's */
	FP_MISS_FULL,        /* the table of flows is full */
	FP_MISS_QUERY,       /* the ring of queries was full, or the frame does not fit: query lost to the agent */
	FP_OPENED_HERE,
	FP_OPENED_INSTALLED,
	FP_QUERIES,
	FP_CLOSED_COUNT,
	FP_CLOSED_LOST,      /* closed connections of which nobody was told: the ring was full */
	FP_SHOT,             /* dropped: an interface without a counterpart, a frame that could not be rewritten, what
				nobody sent who could be answered */
	FP_GREETED,          /* a SYN was answered with a cookie */
	FP_GREETED_ACK,      /* a segment without data of a client that has said nothing yet: it stayed here */
	FP_COOKIE_BAD,       /* to a proxied virtual server, of no connection, and without a cookie of ours */
	FP_RESET_SENT,
	FP_ASKED_DATA,       /* by the ring "queries", see fp_ask */
	FP_ASKED_MEMBER,
	FP_ASK_LOST,         /* the ring was full, or the segment longer than the window we offered: dropped */
	FP_SPLICE_WAIT,      /* came before the splice was ready */
	FP_OVER_RATE,        /* new connections refused: beyond what the virtual server may have */
	FP_OVER_CLIENT,      /* beyond what the client's network may have */
	FP_GIVEN,            /* a member's SYN-ACK that became the client's first data */
	FP_COUNTERS,
};

struct fp_key {
	__u8 source[16];
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 pad[3];
};

/* One direction of a connection. A million of connections have to fit: with its key it must not pass 136 bytes. */
struct fp_flow {
	__u8 source[16];        /* as after translation */
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port;
	__u8 destination_mac[6];
	__u8 source_mac[6];     /* zero: keep */
	__u32 ifindex;          /* out of this wire */
	__u32 state;
	__u32 used;             /* ticks */
	__u32 opened;
	__u64 packets;
	__u64 bytes;
	__u32 serial;
	__u32 virtual_server;
	__u32 member;
	__u16 idle_seconds;
	__u16 request;          /* FP_SPLICE, as it is entered: what its member gets first, see fp_splice */
};

struct fp_service_key {
	__u8 address[16];
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

/* Replaced whole, so number, mode and table change at once (004, configuration tables A and B). */
struct fp_service {
	__u32 number;
	__u32 mode;
	__u32 hash;
	__u32 next;             /* FP_TURN: whose turn it is */
	__u16 idle_seconds;
	__u16 slot_count;
	__u16 mss;              /* FP_PROXY: what all its members take, offered to clients */
	__u8 window_scale;      /* 15: none */
	__u8 sack;
	__u64 cost;             /* of its bucket (bucket.bpf.h); 0: as many new connections as there are */
	__u64 depth;
	__u64 client_cost;      /* of each client network's */
	__u64 client_depth;
	__u8 client_mask[16];   /* what of a client's address is its network's */
	__u32 slots[FP_SLOTS];  /* keys of targets */
};

/* Hash "rates", by number: what outlives a change of a virtual server with limits. */
struct fp_rate {
	__u64 full;             /* its bucket */
	__u64 over;             /* refused by it */
	__u64 over_client;      /* refused by those of clients' networks */
};

/* LRU hash "clients": the buckets of clients' networks. */
struct fp_client_key {
	__u32 virtual_server;
	__u8 network[16];
};

struct fp_target {
	__u8 address[16];       /* zero: do not translate */
	__be16 port;            /* zero: do not translate */
	__u8 mac[6];
	__u32 ifindex;
	__u32 member;
	__u32 flags;
};

/* What a first fragment got, for the ones behind it. */
struct fp_fragment_key {
	__u8 source[16];
	__u8 destination[16];
	__u32 identification;
	__u8 protocol;
	__u8 pad[3];
};

struct fp_fragment {
	__u8 source[16];
	__u8 destination[16];
	__u8 destination_mac[6];
	__u8 source_mac[6];
	__u32 ifindex;
	__u32 state;
	__u32 seen;
};

struct fp_stats_key {
	__u32 virtual_server;
	__u32 member;
};

/* Bytes and packets are those of closed connections. */
struct fp_stats {
	__u64 opened;
	__u64 closed;
	__u64 packets_in;
	__u64 bytes_in;
	__u64 packets_out;
	__u64 bytes_out;
};

/* Ring buffer "closed": the end of a connection, or FP_ALIVE in answer to a question. */
struct fp_closed {
	struct fp_key key;      /* as the client sent it */
	__u32 virtual_server;
	__u32 member;
	__u32 serial;
	__u32 reason;
	__u32 state;
	__u32 duration;         /* ticks */
	__u64 packets_in;
	__u64 bytes_in;
	__u64 packets_out;
	__u64 bytes_out;
};

/* Ring buffer "queries": a packet for the agent, see fp_ask. Its checksum may be partial. */
struct fp_query {
	__u32 ifindex;
	__u32 virtual_server;
	__u32 length;
	__u8 kind;
	__u8 pad;
	__u16 options;          /* FP_ASK_DATA: the cookie's bits 31..23 (cookie.bpf.h) */
	__u8 frame[];
};

/* Array "cookies": the keys of cookies. */
struct fp_cookies {
	__u64 keys[2][2];
	__u32 current;          /* which of them new cookies are made with */
	__u32 valid;            /* bit 0: the first one is one; bit 1: the second */
};

/* LRU hash "pending": the two initial sequence numbers of a client whose first data is with the agent. */
struct fp_pending {
	__u32 isn;
	__u32 cookie;
};

/*
 * Hash "splices", by serial. Made with the connection's entries and deleted with them; ready once the agent, or the
 * member's SYN-ACK, has filled it in. The serial comes first: see "Memory used again" in docs/fastpath.md.
 */
struct fp_splice {
	__u32 serial;
	__u32 offset;           /* the member's initial sequence number less the cookie; before: a request, from 1; 0: none */
	__s8 shift;             /* the member's window, in what the client takes it for: left so many bits */
	__s8 shift_in;          /* the client's, in what the member takes it for */
	__u16 ready;
};

/*
 * Array "requests": what clients have said whose members were sent a SYN. The agent fills one in; the SYN-ACK takes
 * its place, and is the member's first data.
 */
struct fp_request {
	__u32 state;
	__u32 serial;
	__u32 isn;              /* the client's */
	__u32 cookie;
	__u32 sum;              /* ones' complement sum of the payload, in the host's byte order */
	__u16 window;
	__u16 length;
	__u8 scale;             /* the window scale that the client was told; 15: none */
	__u8 flags;
	__u8 own;               /* the client's window scale */
	__u8 pad;
	__u8 payload[FP_REQUEST];
};

/* A connection to be entered. Array "installs": the first of them, as many as the program "install" is told. */
struct fp_install {
	struct fp_key key;      /* as the client sends it */
	struct fp_flow flow;
	struct fp_flow way;     /* the way back: filled in */
	__u8 client_mac[6];
	__u16 pad;
	__u32 client_ifindex;
	__u32 result;
};

/* fp_departure.kind */
enum fp_departs { FP_NOTHING, FP_FRAME_GOES, FP_SYN_GOES };

/*
 * Array "departures": what goes, once the connection at the same place of "installs" is entered (FP_GONE): a frame, or
 * a SYN to its member.
 */
struct fp_departure {
	__u32 ifindex;          /* of a frame: the wire that it came in on */
	__u32 isn;              /* of a SYN */
	__u16 length;           /* of the frame, or of the SYN's options */
	__u8 kind;
	__u8 pad;
	__u8 options[FP_OPTIONS];       /* of a SYN, with zeros behind them */
	__u8 pad2[2];           /* what follows the Ethernet header lies at a multiple of four */
	__u8 frame[FP_DEPARTURE];       /* of a SYN: room for it */
};

/* Hash "wanted", by serial: what the next sweep does with a flow (003: REAP, TIMEOUT). */
struct fp_wanted {
	__u32 final;            /* delete it, alive or not */
	__u32 idle_seconds;     /* not 0: give it this idle time-out */
	__u32 found;
};

/* fp_sweep.match: delete what is the same in all of these. */
enum fp_match { FP_MATCH_VIRTUAL_SERVER = 1, FP_MATCH_MEMBER = 2, FP_MATCH_IFINDEX = 4, FP_MATCH_ALL = 8 };

/* Array "sweeping": what the program "sweep" is to do, and what it did; of each walk, for two may be under way. */
struct fp_sweep {
	__u32 linger;           /* ticks that a closed connection goes on being translated */
	__u32 handshake;        /* ticks that a client may take for its second packet */
	__u32 half_closed;      /* ticks of silence when one side has finished */
	__u32 evict;            /* not 0: ticks of silence after which anything goes */
	__u32 evict_most;       /* but not more than these */
	__u32 match;
	__u32 virtual_server;
	__u32 member;
	__u32 ifindex;
	__u32 wanted;           /* not 0: look into "wanted" */
	__u32 relocate;         /* not 0: what matches is not deleted, its member is now at mac and place */
	__u32 place;
	__u8 mac[6];
	__u16 pad;
	__u32 now;              /* results from here on */
	__u32 live;
	__u32 lingering;
	__u32 kept;             /* not 0: the ring was full, and the walk ended there */
	__u32 shutdown;
	__u32 idle;
	__u32 overflow;
	__u32 deleted;
	__u32 relocated;
	__u32 histogram[FP_HISTOGRAM]; /* of live: log2 of the ticks since the client's last packet */
};

/* Array "layout": what a pinned set of maps was made by, and its secret. */
struct fp_layout {
	__u32 version;
	__u32 flow_size;
	__u32 service_size;
	__u32 target_size;
	__u64 seed[2];          /* of the hashes: clients must not choose their slots */
	__u8 mac[6];            /* the balancer's */
	__u16 pad;
};

#endif
