/*
 * A filter sees the requests of a volume pass, and may hold back the replies of READs. Shadow verify is one; request
 * code and volume know no more about it than this. All of it runs on the volume's worker. Without one volume->filter
 * is NULL and nothing here is called.
 */
#ifndef GLIDE_FILTER_H
#define GLIDE_FILTER_H

#include "cache/block_map.h"

#include <stdbool.h>

struct append_piece;
struct io_req;
struct volume;

struct filter_ops {
    /* ---- a READ ---- */
    /* It begins. What is not NULL in req->filtered afterwards is the filter's, and the next two are called for it. */
    void (*begin)(struct io_req *req);
    /* A sector of its data comes from this log position (0, POS_ZERO too), else from the base. May come again. */
    void (*note)(struct io_req *req, uint64_t sector, uint64_t pos, const struct base_view *base);
    /* Its data is complete (err 0), or never will be. True: it is held, and io_finish is called again later. */
    bool (*holds)(struct io_req *req, int err);
    /* Let go of held READs with this tag; NULL = all. */
    void (*let_go)(struct volume *v, const void *tag);
    /* 10 times a second while something waits. True: again. */
    bool (*tick)(struct volume *v, uint64_t now);

    /* ---- changes, when they are in the log map ---- */
    void (*applied)(struct volume *v, const struct io_req *req, const struct append_piece *p);
    /* To this size, in bytes; what is new reads as zeros. */
    void (*grown)(struct volume *v, uint64_t size);

    void (*free)(struct volume *v);
};

struct filter {
    const struct filter_ops *ops;
};

#endif
