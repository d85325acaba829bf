/*
 * A store that is far away: HTTP/1.1 in front of an S3 server, each request answered DELAY_MS later.
 *
 *   far_store PORT UPSTREAM_PORT DELAY_MS [PACKS]
 *
 * With PACKS, a directory, ranged GETs of objects whose last name is a file there are answered from it, so that the
 * server behind is not what is measured; everything else goes to 127.0.0.1:UPSTREAM_PORT. One thread per connection,
 * for loopback only; for the bench, not for anything that matters.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define HEAD_MAX 16384

static int upstream_port, packs = -1;
static long delay_ns;

struct stream {
    int fd;
    size_t have;
    char data[HEAD_MAX + 1];
};

static int send_all(int fd, const char *data, size_t length)
{
    while (length) {
        ssize_t n = send(fd, data, length, MSG_NOSIGNAL);
        if (n <= 0)
            return -1;
        data += n;
        length -= (size_t)n;
    }
    return 0;
}

/* The length of the head at the start of the stream, 0 at its end. */
static size_t read_head(struct stream *s)
{
    for (;;) {
        s->data[s->have] = 0;
        char *end = strstr(s->data, "\r\n\r\n");
        if (end)
            return (size_t)(end - s->data) + 4;
        if (s->have == HEAD_MAX)
            return 0;
        ssize_t n = recv(s->fd, s->data + s->have, HEAD_MAX - s->have, 0);
        if (n <= 0)
            return 0;
        s->have += (size_t)n;
    }
}

static const char *header(const char *head, size_t length, const char *name)
{
    for (const char *at = head; (at = memchr(at, '\n', (size_t)(head + length - at))); ) {
        at++;
        if (!strncasecmp(at, name, strlen(name)) && at[strlen(name)] == ':') {
            for (at += strlen(name) + 1; *at == ' '; at++)
                ;
            return at;
        }
    }
    return NULL;
}

static void take(struct stream *s, size_t length)
{
    memmove(s->data, s->data + length, s->have - length);
    s->have -= length;
}

/* Pass on `length` bytes, or all that come. */
static int pass(struct stream *from, int to, long long length)
{
    char buffer[65536];

    while (length) {
        size_t most = length > 0 && length < (long long)sizeof(buffer) ? (size_t)length : sizeof(buffer);
        ssize_t n = (ssize_t)(from->have < most ? from->have : most);
        if (n) {
            memcpy(buffer, from->data, (size_t)n);
            take(from, (size_t)n);
        } else if ((n = recv(from->fd, buffer, most, 0)) <= 0) {
            return -1;
        }
        if (send_all(to, buffer, (size_t)n))
            return -1;
        if (length > 0)
            length -= n;
    }
    return 0;
}

/* A range of a pack that is here: 1 = answered, 0 = not ours, -1 = the connection is gone. */
static int answer(struct stream *client, size_t head_length)
{
    char target[2048], head[512];
    long long first, last;
    struct stat st;
    const char *range = header(client->data, head_length, "range");

    if (packs < 0 || !range || sscanf(range, "bytes=%lld-%lld", &first, &last) != 2 || first > last)
        return 0;
    if (sscanf(client->data, "GET %2047[^? ]", target) != 1)
        return 0;
    int fd = openat(packs, strrchr(target, '/') ? strrchr(target, '/') + 1 : target, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    fstat(fd, &st);
    int n = snprintf(head, sizeof(head),
                     "HTTP/1.1 206 Partial Content\r\nContent-Length: %lld\r\nContent-Range: bytes %lld-%lld/%lld\r\n"
                     "ETag: \"x\"\r\n\r\n",
                     last - first + 1, first, last, (long long)st.st_size);
    static __thread char buffer[256 << 10]; /* not sendfile: it holds the last segment back for a while */
    int err = send(client->fd, head, (size_t)n, MSG_NOSIGNAL | MSG_MORE) != n;
    for (long long at = first; !err && at <= last;) {
        size_t most = (size_t)(last + 1 - at) < sizeof(buffer) ? (size_t)(last + 1 - at) : sizeof(buffer);
        ssize_t got = pread(fd, buffer, most, (off_t)at);
        err = got <= 0 || send_all(client->fd, buffer, (size_t)got);
        at += got;
    }
    close(fd);
    take(client, head_length);
    return err ? -1 : 1;
}

static int connect_upstream(void)
{
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((uint16_t)upstream_port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (!connect(fd, (struct sockaddr *)&where, sizeof(where)))
        return fd;
    close(fd);
    return -1;
}

static int forward(struct stream *client, struct stream *up, size_t head_length)
{
    const char *stated = header(client->data, head_length, "content-length");
    const char *expects = header(client->data, head_length, "expect");
    long long body = stated ? atoll(stated) : 0;
    int is_head = !strncmp(client->data, "HEAD", 4);

    if (expects && send_all(client->fd, "HTTP/1.1 100 Continue\r\n\r\n", 25))
        return -1;
    if (pass(client, up->fd, (long long)head_length) || pass(client, up->fd, body))
        return -1;
    for (;;) {
        head_length = read_head(up);
        if (!head_length)
            return -1;
        int status = atoi(up->data + 9);
        if (status == 100) {
            take(up, head_length);
            continue;
        }
        stated = header(up->data, head_length, "content-length");
        body = is_head || status == 204 || status == 304 ? 0 : stated ? atoll(stated) : -1;
        return pass(up, client->fd, (long long)head_length) || pass(up, client->fd, body) || body < 0 ? -1 : 0;
    }
}

static void *serve(void *arg)
{
    struct stream *client = calloc(1, sizeof(*client)), *up = calloc(1, sizeof(*up));
    size_t head_length;

    client->fd = (int)(long)arg;
    up->fd = -1;
    while ((head_length = read_head(client))) {
        struct timespec pause = {delay_ns / 1000000000, delay_ns % 1000000000};
        if (delay_ns)
            nanosleep(&pause, NULL);
        int done = answer(client, head_length);
        if (!done && up->fd < 0)
            up->fd = connect_upstream();
        if (done < 0 || (!done && forward(client, up, head_length)))
            break;
    }
    close(client->fd);
    if (up->fd >= 0)
        close(up->fd);
    free(client);
    free(up);
    return NULL;
}

int main(int argc, char **argv)
{
    struct sockaddr_in where = {.sin_family = AF_INET};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    pthread_attr_t small;

    if (argc < 4)
        return 2;
    where.sin_port = htons((uint16_t)atoi(argv[1]));
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    upstream_port = atoi(argv[2]);
    delay_ns = (long)(atof(argv[3]) * 1e6);
    if (argc > 4 && (packs = open(argv[4], O_DIRECTORY | O_RDONLY)) < 0)
        return 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(listener, (struct sockaddr *)&where, sizeof(where)) || listen(listener, 1024))
        return 1;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 20);
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    for (;;) {
        pthread_t thread;
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        if (pthread_create(&thread, &small, serve, (void *)(long)fd))
            close(fd);
    }
}
