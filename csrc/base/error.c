#include "glide_core_internal.h"
#include "base/util.h"

#include <stdarg.h>
#include <stdio.h>

static __thread char error_text[512];

const char *glide_error(void) { return error_text; }

int fail(int err, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(error_text, sizeof(error_text), format, args);
    va_end(args);
    return err;
}
