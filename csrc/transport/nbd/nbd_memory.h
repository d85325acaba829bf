/*
 * Memory of NBD connections: one budget for those of all exports, so that clients which ask and do not read, or
 * send and do not finish, cannot take more memory of the host than that.
 *
 * There are three accounts. REPLIES are buffers of READs from their start until their last byte is sent, and the send
 * buffers of sockets; PAYLOADS are those of WRITEs; both may grow to the configured size. What is charged to these
 * two is released in time, or its connection is cut. PIPELINE is what was received behind a request that has to wait:
 * a quarter of that; when it runs out, less is received at once.
 *
 * Shares: a connection that holds something gets an eighth of what is free, at most, so that each one that takes its
 * share leaves seven eighths of the rest to others. The last eighth is for those that hold nothing. No connection
 * waits for its own memory: one that holds nothing gets its request as soon as that fits at all.
 */
#ifndef GLIDE_NBD_MEMORY_H
#define GLIDE_NBD_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct nbd_conn;

enum nbd_account { NBD_REPLIES, NBD_PAYLOADS, NBD_PIPELINE, NBD_ACCOUNTS };

/* Of the engine; any thread. */
struct nbd_memory {
    uint64_t limit; /* bytes, of REPLIES and of PAYLOADS */
    _Atomic uint64_t used[NBD_ACCOUNTS];
    _Atomic uint64_t sockets; /* of REPLIES: send buffers */
};

/* Whether the connection may have `bytes` more now. */
bool nbd_memory_fits(const struct nbd_conn *c, enum nbd_account account, uint64_t bytes);
/* Take them, if so. */
bool nbd_memory_take(struct nbd_conn *c, enum nbd_account account, uint64_t bytes);
/* Take them in any case: what another process or the receive buffer had already. */
void nbd_memory_add(struct nbd_conn *c, enum nbd_account account, uint64_t bytes);
void nbd_memory_give(struct nbd_conn *c, enum nbd_account account, uint64_t bytes);
/* How many bytes to receive at once, at most `most`. */
uint64_t nbd_memory_window(const struct nbd_conn *c, uint64_t most);
/* For a send buffer of that size: at most half of REPLIES is for those. Any thread. */
bool nbd_memory_socket(struct nbd_memory *m, uint64_t bytes);
void nbd_memory_socket_closed(struct nbd_memory *m, uint64_t bytes);

#endif
