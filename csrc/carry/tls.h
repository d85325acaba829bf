/*
 * TLS of a connection to a store: who the server must be, and bytes over a non-blocking socket. Certificates are
 * verified as Python's ssl does by default: the chain to a bundle of CAs, and the name.
 */
#ifndef GLIDE_TLS_H
#define GLIDE_TLS_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

struct tls; /* one connection */

/* Contexts by bundle of CAs, for all connections of a carrier; they stay until tls_pool_free. */
struct tls_pool {
    pthread_mutex_t lock;
    struct tls_context *first;
};
void tls_pool_init(struct tls_pool *pool);
void tls_pool_free(struct tls_pool *pool);

/*
 * A connection over `fd`, which is connected and non-blocking, to `server`: a name or the text of an address. `ca` is
 * the file with the CAs; empty: whoever answers is believed. The first call for a bundle reads it. NULL = no memory, or
 * a bundle that cannot be read.
 */
struct tls *tls_new(struct tls_pool *pool, int fd, const char *server, const char *ca);
void tls_free(struct tls *t);

enum tls_want { TLS_READ = -10001, TLS_WRITE = -10002 }; /* no errno: poll for it, and call again */
/* 0, a tls_want, or another negative errno: -EPROTO for a server that is not believed. */
int tls_shake(struct tls *t);
/* Bytes, 0 at the end of the stream, a tls_want, or another negative errno. */
int tls_read(struct tls *t, void *to, size_t room);
/* All of it is sent (0), or a negative errno: requests are short, and the connection has room for one. */
int tls_write(struct tls *t, const void *data, size_t length);
/* Whether something was received that nobody has read. */
int tls_pending(const struct tls *t);

#endif
