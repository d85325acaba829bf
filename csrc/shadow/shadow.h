/*
 * Shadow verify, a debug option: a filter that compares every READ of a volume with a
 * second source before its reply is sent. See shadow.c.
 */
#ifndef GLIDE_SHADOW_H
#define GLIDE_SHADOW_H

#include "volume/volume.h"

/* Give the volume, which is not served yet, the filter of this configuration. NULL: none. -errno. */
int shadow_open(struct volume *v, const struct glide_volume_config *config);

#endif
