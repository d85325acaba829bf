#include "glide_core_internal.h"
#include "base/util.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* struct sched_attr of sched_setattr(2), which only new C libraries declare. */
struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};
_Static_assert(sizeof(struct attributes) == 48, "the first version of struct sched_attr");

#define SLICE_NS 400000u

int glide_lower_priority(int nice)
{
    /* Of a thread of policy 0, runtime is the length of its turns from Linux 6.12 on, and nothing before. */
    struct attributes wanted = {.size = sizeof(wanted), .nice = nice, .runtime = SLICE_NS};

    if (!syscall(SYS_sched_setattr, 0, &wanted, 0))
        return 0;
    return setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), nice) ? -errno : 0; /* a sandbox without the call */
}
