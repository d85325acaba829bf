#include "log/sector_sums.h"

#include "base/data_hash.h"
#include "base/util.h"

#include <stdlib.h>
#include <string.h>

enum sum_kind {
    SUM_NONE,   /* nothing was written there */
    SUM_SECTOR, /* `sum` is of the sector */
    SUM_RECORD, /* `sum` is of the record that begins here */
    SUM_MORE    /* a further sector of that one */
};

void sums_free(struct sector_sums *s)
{
    free(s->sum);
    free(s->kind);
    memset(s, 0, sizeof(*s));
}

int sums_reserve(struct sector_sums *s, uint32_t end)
{
    uint32_t capacity = s->capacity ? s->capacity : 64;

    if (end <= s->capacity)
        return 0;
    while (capacity < end)
        capacity *= 2;
    uint64_t *sum = realloc(s->sum, capacity * sizeof(*sum));
    if (!sum)
        return -ENOMEM;
    s->sum = sum;
    uint8_t *kind = realloc(s->kind, capacity);
    if (!kind)
        return -ENOMEM;
    memset(kind + s->capacity, SUM_NONE, capacity - s->capacity);
    s->kind = kind;
    s->capacity = capacity;
    return 0;
}

void sums_set(struct sector_sums *s, uint32_t index, const uint64_t *sums, uint32_t count)
{
    memcpy(s->sum + index, sums, count * sizeof(*sums));
    memset(s->kind + index, SUM_SECTOR, count);
}

int sums_copy(struct sector_sums *to, const struct sector_sums *from, uint32_t end)
{
    uint32_t known = (uint32_t)min_u64(end, from->capacity);
    int err = end ? sums_reserve(to, end) : 0;

    if (err || !known)
        return err;
    memcpy(to->sum, from->sum, known * sizeof(*to->sum));
    memcpy(to->kind, from->kind, known);
    return 0;
}

int sums_vouch(const struct sector_sums *s, uint32_t index, uint32_t count, uint64_t hash)
{
    if (index >= s->capacity || count > s->capacity - index)
        return 0;
    for (uint32_t i = index; i < index + count; i++) {
        if (s->kind[i] != SUM_SECTOR)
            return 0;
    }
    return sums_hash(s->sum + index, count) == hash ? 1 : -EUCLEAN;
}

int sums_from_journal(struct sector_sums *s, const struct segment_journal *j)
{
    int err = j->records ? sums_reserve(s, j->end) : 0;

    for (uint32_t i = 0; j->records && !err && i < j->end; i++) {
        const struct segment_record *r = &j->records[i];
        if (r->op != RECORD_WRITE)
            continue;
        s->sum[i] = r->hash;
        s->kind[i] = r->count == 1 ? SUM_SECTOR : SUM_RECORD;
        memset(s->kind + i + 1, SUM_MORE, r->count - 1);
    }
    return err;
}

void sums_extend(const struct sector_sums *s, uint32_t *index, uint32_t *end)
{
    while (*index && *index < s->capacity && s->kind[*index] == SUM_MORE)
        (*index)--;
    while (*end < s->capacity && s->kind[*end] == SUM_MORE)
        (*end)++;
}

static bool check_record(struct sector_sums *s, uint32_t index, uint32_t end, const uint8_t *data, uint32_t *count)
{
    uint64_t sums[RECORD_MAX_SECTORS];
    uint32_t n = 1;

    while (index + n < end && n < RECORD_MAX_SECTORS && s->kind[index + n] == SUM_MORE)
        n++;
    if (record_hash(data, n, sums) != s->sum[index])
        return false;
    sums_set(s, index, sums, n);
    *count = n;
    return true;
}

bool sums_check(struct sector_sums *s, uint32_t index, uint32_t end, const uint8_t *data)
{
    for (uint32_t n; index < end; index += n, data += (uint64_t)n * SECTOR) {
        n = 1;
        if (index >= s->capacity)
            return false;
        if (s->kind[index] == SUM_RECORD) {
            if (!check_record(s, index, end, data, &n))
                return false;
        } else if (s->kind[index] != SUM_SECTOR || data_hash(data, SECTOR) != s->sum[index]) {
            return false;
        }
    }
    return true;
}
