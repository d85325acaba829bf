/*
 * A guest on vhost-user for stress.c: it owns a stripe of its volume as the other clients do, and reaches it through a
 * ring. It leaves while requests run and comes again with the same memory: the record has them, and they are answered
 * then. One thread has it.
 */
#ifndef STRESS_VHOST_H
#define STRESS_VHOST_H

#include "stress_common.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define GUEST_SLOTS 8 /* requests at once; each has three descriptors */
#define GUEST_NUM 32  /* entries of the ring */
#define GUEST_USER 0x700000000000ull
#define GUEST_DESCRIPTORS 0u
#define GUEST_AVAILABLE 4096u
#define GUEST_USED 8192u
#define GUEST_HEADERS 12288u
#define GUEST_STATUS 16384u
#define GUEST_DATA 65536u
#define GUEST_DATA_BYTES (4 * GLIDE_SECTOR)
#define GUEST_MEMORY (GUEST_DATA + GUEST_SLOTS * GUEST_DATA_BYTES)
#define GUEST_PATIENCE 600000 /* looks of 100 us for an answer */

struct stress_descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next; /* 1: there is a next one; 2: the device writes it */
};

struct stress_asked {
    bool write;
    uint64_t sector;
    uint32_t count;
};

struct stress_guest {
    uint64_t *written;               /* generations, as of struct volume_state */
    uint64_t first, step, positions; /* its groups of 8 sectors */
    uint64_t seed, id;
    uint8_t *memory;
    int memory_fd, record_fd, kick, call;
    uint16_t available;
    uint32_t asked; /* requests that were not looked at since */
    struct stress_asked slots[GUEST_SLOTS];
};

static void stress_guest_begin(struct stress_guest *g)
{
    uint64_t record = glide_vhost_inflight_bytes(GUEST_NUM);

    g->memory_fd = memfd_create("guest", MFD_CLOEXEC);
    g->record_fd = memfd_create("record", MFD_CLOEXEC);
    g->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    g->call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ftruncate(g->memory_fd, GUEST_MEMORY) || ftruncate(g->record_fd, (off_t)record))
        abort();
    g->memory = mmap(NULL, GUEST_MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, g->memory_fd, 0);
    if (g->memory == MAP_FAILED)
        abort();
}

static void stress_guest_end(struct stress_guest *g)
{
    munmap(g->memory, GUEST_MEMORY);
    for (int *fd = (int[]){g->memory_fd, g->record_fd, g->kick, g->call, -1}; *fd >= 0; fd++)
        close(*fd);
}

static uint16_t stress_guest_used(const struct stress_guest *g)
{
    return __atomic_load_n((uint16_t *)(void *)(g->memory + GUEST_USED + 2), __ATOMIC_ACQUIRE);
}

static void stress_guest_share(const struct stress_guest *g, glide_vhost *device)
{
    struct glide_vhost_region all = {.size = GUEST_MEMORY, .user = GUEST_USER, .fd = g->memory_fd};

    MUST(glide_vhost_memory(device, &all, 1));
}

static void stress_guest_ring(const struct stress_guest *g, glide_vhost *device, uint16_t base)
{
    struct glide_vhost_ring ring = {.descriptors = GUEST_USER + GUEST_DESCRIPTORS,
                                    .available = GUEST_USER + GUEST_AVAILABLE,
                                    .used = GUEST_USER + GUEST_USED,
                                    .num = GUEST_NUM,
                                    .base = base,
                                    .kick = g->kick,
                                    .call = g->call,
                                    .enabled = 1};

    MUST(glide_vhost_ring_start(device, 0, &ring));
}

static glide_vhost *stress_guest_connect(struct stress_guest *g, glide_volume *volume)
{
    struct glide_vhost_config config = {.id = ++g->id, .serial = "stress"};
    glide_vhost *device;

    MUST(glide_vhost_open(volume, &config, &device));
    MUST(glide_vhost_features(device, 1ull << 28, 1)); /* indirect descriptors; its writes wait for a flush */
    stress_guest_share(g, device);
    MUST(glide_vhost_inflight(device, g->record_fd, 0, 1, GUEST_NUM));
    stress_guest_ring(g, device, stress_guest_used(g));
    return device;
}

/* Offer a request in a slot that is free: a read, or a write of the next generation. */
static void stress_guest_ask(struct stress_guest *g, uint32_t slot)
{
    struct stress_descriptor *d = (struct stress_descriptor *)(void *)g->memory + slot * 3;
    uint16_t *available = (uint16_t *)(void *)(g->memory + GUEST_AVAILABLE);
    struct stress_asked *a = &g->slots[slot];
    uint32_t data = GUEST_DATA + slot * GUEST_DATA_BYTES;

    *a = (struct stress_asked){.write = stress_draw(&g->seed) % 2, .count = 1 + (uint32_t)(stress_draw(&g->seed) % 4)};
    /* No two requests of a batch have a sector in common. */
    uint64_t position = stress_draw(&g->seed) % (g->positions / GUEST_SLOTS) * GUEST_SLOTS + slot;
    a->sector = (position * g->step + g->first) * 8 + stress_draw(&g->seed) % 4;
    for (uint32_t i = 0; a->write && i < a->count; i++)
        stress_fill(g->memory + data + i * GLIDE_SECTOR, a->sector + i, g->written[a->sector + i] + 1);

    uint64_t header[2] = {a->write, a->sector * (GLIDE_SECTOR / 512)};
    memcpy(g->memory + GUEST_HEADERS + slot * 16, header, sizeof(header));
    g->memory[GUEST_STATUS + slot] = 0xff;
    d[0] = (struct stress_descriptor){GUEST_HEADERS + slot * 16, 16, 1, (uint16_t)(slot * 3 + 1)};
    d[1] = (struct stress_descriptor){data, a->count * GLIDE_SECTOR, a->write ? 1 : 3, (uint16_t)(slot * 3 + 2)};
    d[2] = (struct stress_descriptor){GUEST_STATUS + slot, 1, 2, 0};
    available[2 + g->available % GUEST_NUM] = (uint16_t)(slot * 3);
    __atomic_store_n(&available[1], ++g->available, __ATOMIC_RELEASE);
    g->asked++;
}

static void stress_guest_hear(struct stress_guest *g)
{
    for (int looks = 0; stress_guest_used(g) != g->available; looks++) {
        if (looks == GUEST_PATIENCE)
            abort();
        usleep(100);
    }
    for (uint32_t slot = 0; slot < g->asked; slot++) {
        const struct stress_asked *a = &g->slots[slot];
        if (g->memory[GUEST_STATUS + slot])
            abort();
        for (uint32_t i = 0; i < a->count; i++)
            if (a->write)
                g->written[a->sector + i]++;
            else
                stress_check(g->memory + GUEST_DATA + slot * GUEST_DATA_BYTES + i * GLIDE_SECTOR, a->sector + i,
                             g->written[a->sector + i]);
    }
    g->asked = 0;
}

/* What a front-end may do to a device that serves. */
static void stress_guest_shake(struct stress_guest *g, glide_vhost *device)
{
    switch (stress_draw(&g->seed) % 8) {
    case 0:
        stress_guest_share(g, device);
        break;
    case 1:
        MUST(glide_vhost_ring_call(device, 0, stress_draw(&g->seed) % 2 ? g->call : -1));
        break;
    case 2: {
        int64_t base = glide_vhost_ring_stop(device, 0, 1);
        MUST(base);
        stress_guest_ring(g, device, (uint16_t)base);
        break;
    }
    default:
        break;
    }
}

/* One connection. The device is returned, with requests that run: the caller closes it. */
static glide_vhost *stress_guest_visit(struct stress_guest *g, glide_volume *volume)
{
    glide_vhost *device = stress_guest_connect(g, volume);

    for (uint64_t rounds = 1 + stress_draw(&g->seed) % 6; rounds--;) {
        stress_guest_hear(g);
        for (uint32_t slot = 0; slot < GUEST_SLOTS; slot++)
            stress_guest_ask(g, slot);
        eventfd_write(g->kick, 1);
        stress_guest_shake(g, device);
    }
    return device;
}

#endif
