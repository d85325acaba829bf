/*
 * NBD clients for stress.c: they ask, leave in the middle, and come again. What they hear is framed as it must be;
 * whether the data is right is for others to check.
 */
#ifndef STRESS_NBD_H
#define STRESS_NBD_H

#include "stress_common.h"

#include <endian.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define STRESS_REQUESTS 20

struct stress_request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    union {
        uint32_t length;
        uint64_t length64; /* with an extended header */
    };
} __attribute__((packed));

static void stress_ask(int fd, bool extended, uint16_t type, uint16_t flags, uint32_t cookie, uint64_t offset,
                       uint32_t length)
{
    struct stress_request r = {.magic = htobe32(extended ? 0x21e41c71 : 0x25609513), .cookie = cookie};
    ssize_t bytes = extended ? 32 : 28;

    r.type = htobe16(type);
    r.flags = htobe16(flags);
    r.offset = htobe64(offset);
    if (extended)
        r.length64 = htobe64(length);
    else
        r.length = htobe32(length);
    if (write(fd, &r, (size_t)bytes) != bytes)
        abort();
}

static void stress_receive(int fd, void *buf, uint64_t length)
{
    for (uint64_t got = 0; got < length;) {
        ssize_t n = read(fd, (uint8_t *)buf + got, length - got);
        if (n <= 0)
            abort();
        got += (uint64_t)n;
    }
}

/* The volume ends it, or the client. */
static int stress_leave(glide_volume *volume, int fd, uint64_t id, uint64_t *seed)
{
    int err = stress_draw(seed) % 2 ? glide_nbd_detach(volume, id) : 0;

    close(fd);
    return err;
}

/* READs with simple replies. 0 or what the core says. */
static int stress_nbd_plain(glide_volume *volume, uint64_t sectors, uint64_t id, uint64_t *seed)
{
    static __thread uint8_t sink[STRESS_REQUESTS * (16384 + 16)];
    int fds[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds))
        abort();
    int err = glide_nbd_attach(volume, fds[0], id, &(struct glide_nbd_handshake){.modes = GLIDE_NBD_READ_ONLY});
    if (err)
        return err;
    for (uint32_t i = 0; i < STRESS_REQUESTS; i++)
        stress_ask(fds[1], false, 0, 0, i, stress_draw(seed) % (sectors - 4) * GLIDE_SECTOR, 16384);
    stress_receive(fds[1], sink, stress_draw(seed) % 2 ? sizeof(sink) : 30000);
    return stress_leave(volume, fds[1], id, seed);
}

/* One simple reply without data, or one chunk. True: it is the last of its request. */
static bool stress_hear(int fd)
{
    static __thread uint8_t sink[65536];
    uint8_t head[32];
    uint32_t magic, length;
    uint16_t flags;

    stress_receive(fd, head, 16);
    memcpy(&magic, head, 4);
    magic = be32toh(magic);
    if (magic == 0x67446698)
        return true;
    uint64_t more = magic == 0x6e8a278c ? 16 : 4; /* an extended one: offset and 64 bits of length */
    stress_receive(fd, head + 16, more);
    memcpy(&flags, head + 4, 2);
    memcpy(&length, head + 12 + more, 4);
    if ((magic != 0x668e33ef && more == 4) || be32toh(length) > sizeof(sink))
        abort();
    stress_receive(fd, sink, be32toh(length));
    return be16toh(flags) & 1;
}

/* READ, CACHE and BLOCK_STATUS of several contexts, with structured replies or extended headers. 0 or what the core
 * says. */
static int stress_nbd_sparse(glide_volume *volume, uint64_t sectors, uint64_t id, uint64_t *seed)
{
    static const uint16_t types[] = {0, 0, 5, 7}, flags[] = {0, 4, 0, 8};
    bool extended = stress_draw(seed) % 2;
    struct glide_nbd_handshake shake = {.modes = GLIDE_NBD_STRUCTURED | GLIDE_NBD_ALLOCATION |
                                                 (extended ? GLIDE_NBD_EXTENDED : 0),
                                        .snapshots = (uint32_t)(stress_draw(seed) % 3),
                                        .changed = {1, 2}};
    int fds[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds))
        abort();
    int err = glide_nbd_attach(volume, fds[0], id, &shake);
    if (err)
        return err;
    for (uint32_t i = 0; i < STRESS_REQUESTS; i++) {
        uint64_t which = stress_draw(seed) % 4, at = stress_draw(seed) % (sectors - 12) * GLIDE_SECTOR;
        stress_ask(fds[1], extended, types[which], stress_draw(seed) % 2 ? flags[which] : 0, i, at, 49152);
    }
    for (uint32_t want = stress_draw(seed) % 2 ? STRESS_REQUESTS : 7; want;)
        want -= stress_hear(fds[1]);
    return stress_leave(volume, fds[1], id, seed);
}

#endif
