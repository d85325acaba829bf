/* The data of a READ against the second source. */
#ifndef GLIDE_SHADOW_COMPARE_H
#define GLIDE_SHADOW_COMPARE_H

#include "shadow/shadow_state.h"

/*
 * Compare those sectors of the READ that the second source knows and that nobody wrote since it began. Differences are
 * counted, and the first of a volume are described to Python. When the file fails, the shadow gives up.
 */
void shadow_compare(struct volume *v, const struct shadow_read *r);

#endif
