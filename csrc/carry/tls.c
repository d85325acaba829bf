#include "carry/tls.h"

#include <arpa/inet.h>
#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdlib.h>
#include <string.h>

struct tls_context {
    struct tls_context *next;
    SSL_CTX *ssl;
    char ca[];
};

struct tls {
    SSL *ssl;
};

void tls_pool_init(struct tls_pool *pool)
{
    pthread_mutex_init(&pool->lock, NULL);
    pool->first = NULL;
}

void tls_pool_free(struct tls_pool *pool)
{
    for (struct tls_context *c = pool->first, *next; c; c = next) {
        next = c->next;
        SSL_CTX_free(c->ssl);
        free(c);
    }
    pthread_mutex_destroy(&pool->lock);
}

static struct tls_context *make_context(const char *ca)
{
    struct tls_context *c = calloc(1, sizeof(*c) + strlen(ca) + 1);
    SSL_CTX *ssl = c ? SSL_CTX_new(TLS_client_method()) : NULL;

    if (!ssl || !SSL_CTX_set_min_proto_version(ssl, TLS1_2_VERSION) ||
        (*ca && SSL_CTX_load_verify_locations(ssl, ca, NULL) != 1)) {
        ERR_clear_error();
        SSL_CTX_free(ssl);
        free(c);
        return NULL;
    }
    strcpy(c->ca, ca);
    SSL_CTX_set_verify(ssl, *ca ? SSL_VERIFY_PEER : SSL_VERIFY_NONE, NULL);
    SSL_CTX_set_mode(ssl, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_RELEASE_BUFFERS);
    /* Many servers just close: what is missing shows by the length that was promised. */
    SSL_CTX_set_options(ssl, SSL_OP_IGNORE_UNEXPECTED_EOF);
    SSL_CTX_set_session_cache_mode(ssl, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_read_ahead(ssl, 1); /* records are 16 KiB: a few of them in one call */
    SSL_CTX_set_default_read_buffer_len(ssl, 64u << 10);
    c->ssl = ssl;
    return c;
}

static SSL_CTX *context_of(struct tls_pool *pool, const char *ca)
{
    struct tls_context *c;

    pthread_mutex_lock(&pool->lock);
    for (c = pool->first; c && strcmp(c->ca, ca) != 0; c = c->next)
        ;
    if (!c && (c = make_context(ca))) {
        c->next = pool->first;
        pool->first = c;
    }
    pthread_mutex_unlock(&pool->lock);
    return c ? c->ssl : NULL;
}

/* The name is for the server's choice of a certificate, and for ours whether to believe it; an address only for that.
 */
static int set_server(SSL *ssl, const char *server)
{
    uint8_t address[16];

    if (inet_pton(AF_INET, server, address) == 1 || inet_pton(AF_INET6, server, address) == 1)
        return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), server);
    SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return SSL_set1_host(ssl, server) && SSL_set_tlsext_host_name(ssl, server);
}

struct tls *tls_new(struct tls_pool *pool, int fd, const char *server, const char *ca)
{
    SSL_CTX *context = context_of(pool, ca);
    struct tls *t = context ? calloc(1, sizeof(*t)) : NULL;

    if (t && (t->ssl = SSL_new(context)) && SSL_set_fd(t->ssl, fd) && set_server(t->ssl, server))
        return t;
    ERR_clear_error();
    tls_free(t);
    return NULL;
}

void tls_free(struct tls *t)
{
    if (!t)
        return;
    SSL_free(t->ssl);
    free(t);
}

/* What a call of OpenSSL came to that returned `n`, at most 0. */
static int what_is_wrong(const struct tls *t, int n)
{
    int why = SSL_get_error(t->ssl, n), err = errno;

    ERR_clear_error();
    switch (why) {
    case SSL_ERROR_WANT_READ:
        return TLS_READ;
    case SSL_ERROR_WANT_WRITE:
        return TLS_WRITE;
    case SSL_ERROR_ZERO_RETURN:
        return 0;
    case SSL_ERROR_SYSCALL:
        return -err; /* 0: the stream ended without a word */
    default:
        return -EPROTO;
    }
}

int tls_shake(struct tls *t)
{
    errno = 0;
    int n = SSL_connect(t->ssl);

    if (n == 1)
        return 0;
    n = what_is_wrong(t, n);
    return n ? n : -ECONNRESET;
}

int tls_read(struct tls *t, void *to, size_t room)
{
    errno = 0;
    int n = SSL_read(t->ssl, to, room > INT32_MAX ? INT32_MAX : (int)room);

    return n > 0 ? n : what_is_wrong(t, n);
}

int tls_write(struct tls *t, const void *data, size_t length)
{
    errno = 0;
    int n = SSL_write(t->ssl, data, (int)length);

    if (n == (int)length)
        return 0;
    n = n > 0 ? -EIO : what_is_wrong(t, n);
    return n == TLS_READ || n == TLS_WRITE ? -EIO : n ? n : -EPIPE;
}

int tls_pending(const struct tls *t) { return SSL_has_pending(t->ssl); }
