/*
 * glide_core.h and glide_packs.h for C: they hold bare declarations because cffi reads them, so the include guard and
 * the types they rely on are here.
 */
#ifndef GLIDE_CORE_INTERNAL_H
#define GLIDE_CORE_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "glide_core.h"
#include "glide_packs.h"

#endif
