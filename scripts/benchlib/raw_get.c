/*
 * The most that a server and this machine give: ranged GETs over kept connections, nothing done with what comes.
 *
 *   raw_get PORT CONNECTIONS LENGTH SECONDS random|sequential < TARGETS
 *
 * TARGETS has lines "SIZE TARGET": bytes of an object, and path and query to GET it by, signed if need be. Sequential
 * reads all of it once. Prints GETs, seconds, CPU seconds. One thread per connection.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static struct {
    long long size;
    char *target;
} objects[65536];
static size_t object_count, at_object;
static long long at_offset;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int port, sequential;
static long length;
static double seconds;
static atomic_long gets;
static double began;

static double now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* The next range; 0 at the end. */
static long next(unsigned *seed, const char **target, long long *offset)
{
    if (!sequential) {
        size_t i = (size_t)rand_r(seed) % object_count;
        *target = objects[i].target;
        *offset = objects[i].size > length ? (long long)rand_r(seed) * 4096 % (objects[i].size - length) : 0;
        return now() - began < seconds ? (objects[i].size < length ? (long)objects[i].size : length) : 0;
    }
    long got = 0;
    pthread_mutex_lock(&lock);
    if (at_object < object_count && at_offset >= objects[at_object].size) {
        at_object++;
        at_offset = 0;
    }
    if (at_object < object_count) {
        long long left = objects[at_object].size - at_offset;
        got = left < length ? (long)left : length;
        *target = objects[at_object].target;
        *offset = at_offset;
        at_offset += got;
    }
    pthread_mutex_unlock(&lock);
    return got;
}

static int get(int fd, const char *target, long long offset, long bytes, char *buffer)
{
    char request[4096];
    size_t have = 0;
    char *end = NULL;
    int n = snprintf(request, sizeof(request),
                     "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nRange: bytes=%lld-%lld\r\n\r\n", target, port, offset,
                     offset + bytes - 1);

    if (send(fd, request, (size_t)n, MSG_NOSIGNAL) != n)
        return -1;
    while (!end) {
        ssize_t got = recv(fd, buffer + have, 4096, 0);
        if (got <= 0)
            return -1;
        have += (size_t)got;
        buffer[have] = 0;
        end = strstr(buffer, "\r\n\r\n");
    }
    if (strncmp(buffer, "HTTP/1.1 206", 12)) {
        fprintf(stderr, "%.40s\n", buffer);
        return -1;
    }
    long left = bytes - (long)(have - (size_t)(end + 4 - buffer));
    return left && recv(fd, buffer, (size_t)left, MSG_WAITALL) != left ? -1 : 0;
}

static void *run(void *arg)
{
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    unsigned seed = (unsigned)(long)arg * 7919u + 1;
    char *buffer = malloc((size_t)length + 65536);
    const char *target;
    long long offset;
    long bytes;

    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (connect(fd, (struct sockaddr *)&where, sizeof(where)))
        exit(1);
    while ((bytes = next(&seed, &target, &offset))) {
        if (get(fd, target, offset, bytes, buffer))
            exit(1);
        atomic_fetch_add(&gets, 1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static char line[8192], target[8192];
    struct rusage usage;

    if (argc < 6)
        return 2;
    port = atoi(argv[1]);
    long connections = atol(argv[2]);
    length = atol(argv[3]);
    seconds = atof(argv[4]);
    sequential = argv[5][0] == 's';
    while (object_count < 65536 && fgets(line, sizeof(line), stdin) &&
           sscanf(line, "%lld %8191s", &objects[object_count].size, target) == 2)
        objects[object_count++].target = strdup(target);
    if (!object_count || connections < 1)
        return 2;
    pthread_t *threads = calloc((size_t)connections, sizeof(*threads));
    began = now();
    for (long i = 0; i < connections; i++)
        pthread_create(&threads[i], NULL, run, (void *)i);
    for (long i = 0; i < connections; i++)
        pthread_join(threads[i], NULL);
    double took = now() - began;
    getrusage(RUSAGE_SELF, &usage);
    printf("%ld %.3f %.3f\n", atomic_load(&gets), took,
           (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
               (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
    return 0;
}
