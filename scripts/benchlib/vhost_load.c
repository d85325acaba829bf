/*
 * A front-end that does nothing but load, to measure back-ends with: random or sequential requests at a depth, one
 * thread for each queue, which sleeps until the back-end calls.
 *
 *   vhost_load SOCKET read|write RANGE_BYTES BLOCK_BYTES DEPTH QUEUES SECONDS
 *
 * Prints requests per second, and the median and 99th percentile of their latency in microseconds.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vhost.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NUM 128u
#define QUEUE_BYTES (64u << 20) /* of memory, for each */
#define RING_BYTES 65536u
#define MAX_QUEUES 16
#define SAMPLES (1u << 20)
#define USER 0x500000000000ull
#define PROTOCOL_FEATURES (1ull << 30)

#define MUST(x)                                                                                                        \
    do {                                                                                                               \
        if (!(x)) {                                                                                                    \
            fprintf(stderr, "line %d: %s: %s\n", __LINE__, #x, strerror(errno));                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

struct message {
    uint32_t request, flags, size;
    uint8_t payload[64];
} __attribute__((packed));

struct queue {
    pthread_t thread;
    uint8_t *memory; /* rings, then a header, a status and data for each slot */
    uint64_t guest;
    int kick, call;
    uint16_t available, used;
    uint64_t began[NUM], done, errors, state;
    uint32_t *samples, sampled;
};

static int sock, memory_fd;
static uint8_t *memory;
static struct queue queues[MAX_QUEUES];
static uint32_t block, depth, queue_count;
static uint64_t range, until;
static bool writes;

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the protocol ------------------------------------------------------------------------------------ */

static void send_message(uint32_t request, const void *payload, uint32_t size, int fd)
{
    struct message m = {request, 1, size, {0}};
    struct iovec iov = {&m, 12 + size};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};

    memcpy(m.payload, payload, size);
    if (fd >= 0) {
        header.msg_control = control.bytes;
        header.msg_controllen = sizeof(control.bytes);
        struct cmsghdr *c = CMSG_FIRSTHDR(&header);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(int));
    }
    MUST(sendmsg(sock, &header, 0) == (ssize_t)(12 + size));
}

static uint64_t ask(uint32_t request)
{
    struct message m;
    uint64_t value;

    send_message(request, "", 0, -1);
    MUST(recv(sock, &m, 20, MSG_WAITALL) == 20);
    memcpy(&value, m.payload, 8);
    return value;
}

static void say_number(uint32_t request, uint64_t number, int fd) { send_message(request, &number, 8, fd); }

static void say_state(uint32_t request, uint32_t index, uint32_t number)
{
    uint32_t state[2] = {index, number};

    send_message(request, state, 8, -1);
}

static void start_queue(uint32_t index)
{
    struct queue *q = &queues[index];
    uint64_t at = USER + q->guest;
    struct vhost_vring_addr address = {
        .index = index, .desc_user_addr = at, .avail_user_addr = at + 4096, .used_user_addr = at + 8192};

    say_state(8, index, NUM);
    say_state(10, index, 0);
    send_message(9, &address, sizeof(address), -1);
    say_number(13, index, q->call);
    say_number(12, index, q->kick);
    say_state(18, index, 1);
}

static void begin(const char *path)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    uint64_t table[5] = {1, 0, (uint64_t)QUEUE_BYTES * queue_count, USER, 0};

    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    strncpy(to.sun_path, path, sizeof(to.sun_path) - 1);
    MUST(!connect(sock, (struct sockaddr *)&to, sizeof(to)));
    uint64_t features = ask(1) & (1ull << VIRTIO_RING_F_EVENT_IDX | 1ull << VIRTIO_RING_F_INDIRECT_DESC |
                                  PROTOCOL_FEATURES | 1ull << 32 | 1ull << VIRTIO_BLK_F_FLUSH);
    MUST(features & PROTOCOL_FEATURES);
    say_number(16, ask(15) & 1, -1);
    MUST(ask(17) >= queue_count);
    send_message(3, "", 0, -1);
    say_number(2, features, -1);
    send_message(5, table, sizeof(table), memory_fd);
    for (uint32_t i = 0; i < queue_count; i++)
        start_queue(i);
}

/* ---- requests ----------------------------------------------------------------------------------------- */

static uint64_t random_of(struct queue *q)
{
    q->state ^= q->state << 13;
    q->state ^= q->state >> 7;
    q->state ^= q->state << 17;
    return q->state;
}

/* Descriptors of a slot are its own: only the sector changes. */
static void make_slot(struct queue *q, uint32_t slot)
{
    struct vring_desc *d = (struct vring_desc *)(void *)q->memory + slot * 3;
    uint64_t small = RING_BYTES + slot * 64, data = RING_BYTES + NUM * 64 + (uint64_t)slot * block;

    d[0] = (struct vring_desc){q->guest + small, 16, VRING_DESC_F_NEXT, (uint16_t)(slot * 3 + 1)};
    d[1] = (struct vring_desc){q->guest + data, block,
                               (uint16_t)(VRING_DESC_F_NEXT | (writes ? 0 : VRING_DESC_F_WRITE)),
                               (uint16_t)(slot * 3 + 2)};
    d[2] = (struct vring_desc){q->guest + small + 32, 1, VRING_DESC_F_WRITE, 0};
    memset(q->memory + data, (int)slot, block);
}

static void offer(struct queue *q, uint32_t slot)
{
    struct virtio_blk_outhdr h = {.type = writes ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN,
                                  .sector = random_of(q) % (range / block) * (block / 512)};
    uint16_t *ring = (uint16_t *)(void *)(q->memory + 4096);

    memcpy(q->memory + RING_BYTES + slot * 64, &h, sizeof(h));
    ring[2 + q->available % NUM] = (uint16_t)(slot * 3);
    q->began[slot] = now();
    q->available++;
    __atomic_store_n(&ring[1], q->available, __ATOMIC_RELEASE);
}

static uint16_t peek(const struct queue *q, uint32_t at)
{
    return __atomic_load_n((uint16_t *)(void *)(q->memory + at), __ATOMIC_ACQUIRE);
}

static void collect(struct queue *q, bool again)
{
    while (q->used != peek(q, 8192 + 2)) {
        uint32_t head;
        memcpy(&head, q->memory + 8192 + 4 + 8 * (q->used % NUM), 4);
        uint32_t slot = head / 3;
        q->errors += q->memory[RING_BYTES + slot * 64 + 32] != VIRTIO_BLK_S_OK;
        q->samples[q->sampled++ % SAMPLES] = (uint32_t)(now() - q->began[slot]);
        q->done++;
        q->used++;
        if (again)
            offer(q, slot);
    }
}

static void *drive(void *arg)
{
    struct queue *q = arg;
    uint16_t *event = (uint16_t *)(void *)(q->memory + 4096 + 4 + 2 * NUM);
    uint64_t value;

    for (uint32_t slot = 0; slot < depth; slot++)
        make_slot(q, slot);
    for (uint32_t slot = 0; slot < depth; slot++)
        offer(q, slot);
    eventfd_write(q->kick, 1);
    while (now() < until) {
        uint16_t old = q->available;
        collect(q, true);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (old != q->available && vring_need_event(peek(q, 8192 + 4 + 8 * NUM), q->available, old))
            eventfd_write(q->kick, 1);
        *event = q->used;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (q->used != peek(q, 8192 + 2))
            continue;
        struct pollfd p = {q->call, POLLIN, 0};
        if (poll(&p, 1, 1000) == 1)
            MUST(read(q->call, &value, 8) == 8);
    }
    return NULL;
}

static int by_size(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
    MUST(argc == 8);
    writes = !strcmp(argv[2], "write");
    range = strtoull(argv[3], NULL, 10);
    block = (uint32_t)strtoul(argv[4], NULL, 10);
    depth = (uint32_t)strtoul(argv[5], NULL, 10);
    queue_count = (uint32_t)strtoul(argv[6], NULL, 10);
    MUST(depth && depth <= NUM / 3 && queue_count && queue_count <= MAX_QUEUES && block >= 512 &&
         (uint64_t)depth * block < QUEUE_BYTES / 2);
    memory_fd = memfd_create("guest", MFD_CLOEXEC);
    MUST(!ftruncate(memory_fd, (off_t)QUEUE_BYTES * queue_count));
    memory = mmap(NULL, (size_t)QUEUE_BYTES * queue_count, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    MUST(memory != MAP_FAILED);
    for (uint32_t i = 0; i < queue_count; i++)
        queues[i] = (struct queue){.memory = memory + (size_t)QUEUE_BYTES * i,
                                   .guest = (uint64_t)QUEUE_BYTES * i,
                                   .kick = eventfd(0, EFD_NONBLOCK),
                                   .call = eventfd(0, EFD_NONBLOCK),
                                   .state = now() | 1,
                                   .samples = calloc(SAMPLES, sizeof(uint32_t))};
    begin(argv[1]);
    uint64_t began = now(), done = 0, errors = 0;
    uint32_t sampled = 0, *all = calloc((size_t)SAMPLES * queue_count, sizeof(*all));
    until = began + (uint64_t)(strtod(argv[7], NULL) * 1e9);
    for (uint32_t i = 0; i < queue_count; i++)
        pthread_create(&queues[i].thread, NULL, drive, &queues[i]);
    for (uint32_t i = 0; i < queue_count; i++) {
        struct queue *q = &queues[i];
        pthread_join(q->thread, NULL);
        done += q->done;
        errors += q->errors;
        uint32_t n = q->sampled < SAMPLES ? q->sampled : SAMPLES;
        memcpy(all + sampled, q->samples, n * sizeof(*all));
        sampled += n;
    }
    double seconds = (double)(now() - began) / 1e9;
    qsort(all, sampled, sizeof(*all), by_size);
    MUST(sampled);
    printf("%.0f %.1f %.1f\n", (double)done / seconds, all[sampled / 2] / 1e3, all[(uint64_t)sampled * 99 / 100] / 1e3);
    MUST(!errors);
    return 0;
}
