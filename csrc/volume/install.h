/*
 * Answers from threads that do not keep the volume open: it is found by its cookie, and one that is closed, or was
 * handed over, has nothing to answer (-ESHUTDOWN).
 */
#ifndef GLIDE_INSTALL_H
#define GLIDE_INSTALL_H

#include "volume/engine.h"

/* As glide_volume_install; the pins of slots are taken over in any case. Any thread. */
int install_by_cookie(struct engine *e, uint64_t cookie, uint64_t stamp, const struct glide_install *list,
                      uint32_t count);
/* Give a block to who waits for it, and keep it nowhere. Any thread. */
int lend_by_cookie(struct engine *e, uint64_t cookie, uint64_t stamp, const struct glide_fill *fill);

#endif
