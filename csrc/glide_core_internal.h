/*
 * glide_core.h, glide_packs.h and glide_vhost.h for C: they hold bare declarations because cffi reads them, so the
 * include guard and the types they rely on are here.
 */
#ifndef GLIDE_CORE_INTERNAL_H
#define GLIDE_CORE_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "glide_core.h"
#include "glide_packs.h"
#include "glide_vhost.h"

#endif
