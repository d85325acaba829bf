/*
 * glide_core.h for C: it holds bare declarations because cffi reads it, so the
 * include guard and the types it relies on are here.
 */
#ifndef GLIDE_CORE_INTERNAL_H
#define GLIDE_CORE_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "glide_core.h"

#endif
