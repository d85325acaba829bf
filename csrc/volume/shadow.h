/*
 * Shadow verify, a debug option: every READ of a volume is compared with a
 * second source before its reply is sent. See shadow.c. All of it runs on the
 * volume's worker; without the option volume->shadow and io_req.shadow are NULL
 * and nothing here is called.
 */
#ifndef GLIDE_SHADOW_H
#define GLIDE_SHADOW_H

#include "cache/block_map.h"
#include "glide_core_internal.h"

#include <stdbool.h>

struct append_piece;
struct io_req;
struct shadow;
struct shadow_read;
struct volume;

/* Before the volume is served. config NULL: there is none. -errno. */
int shadow_open(struct volume *v, const struct glide_shadow_config *config);
void shadow_free(struct volume *v);

/* ---- a READ ---- */
/* It begins: what is written from here on may or may not be in its data. */
void shadow_begin(struct io_req *req);
/* A sector of its data comes from this log position (0, POS_ZERO too), else from the base. May be called again. */
void shadow_note(struct io_req *req, uint64_t sector, uint64_t pos, const struct base_view *base);
/* Its data is complete (err 0), or never will be. True: it waits for Python, io_finish is called again later. */
bool shadow_holds(struct io_req *req, int err);

/* ---- changes, when they are in the log map ---- */
void shadow_applied(struct volume *v, const struct io_req *req, const struct append_piece *p);
/* The volume grows; what is new is what the log and the store have of it: nothing, so zeros. */
void shadow_grown(struct volume *v, uint64_t size);

/* ---- READs that wait for Python ---- */
/* Let go, not compared where the shadow knows nothing, those with this tag; NULL = all. */
void shadow_let_go(struct volume *v, const void *tag);
/* The same for those that have waited too long. True: some still wait. */
bool shadow_tick(struct volume *v, uint64_t now);

#endif
