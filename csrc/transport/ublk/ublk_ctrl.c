/*
 * Control commands of ublk: what is sent, how long it may take, and when it is sent again. See ublk_ring.h for how.
 */
#include "transport/ublk/ublk_ctrl.h"

#include "transport/ublk/ublk_ring.h"
#include "base/util.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RECOVERY_STEP_MS 1
#define CANCEL_WORK_MS 10
#define OPEN_STEP_MS 10
#define OPEN_TIMEOUT_MS 3000

struct ublk_ctrl {
    struct ublk_rings rings;
};

static void sleep_ms(long ms)
{
    struct timespec ts = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};

    nanosleep(&ts, NULL);
}

static int64_t deadline_of(unsigned timeout_ms) { return now_ms() + (timeout_ms ? timeout_ms : UBLK_CTRL_TIMEOUT_MS); }

static int command(struct ublk_ctrl *ctrl, const struct ublk_command *c)
{
    int64_t deadline = deadline_of(c->timeout_ms);
    bool cancelled;
    int res;

    do
        res = ublk_rings_run(&ctrl->rings, c, deadline, &cancelled);
    while (res == -EINTR && !cancelled && now_ms() < deadline);
    if (res == -EINTR || res == -ECANCELED)
        return -ETIMEDOUT;
    return res;
}

static int simple_command(struct ublk_ctrl *ctrl, uint32_t op, uint32_t id, uint64_t data, unsigned timeout_ms)
{
    struct ublk_command c = {.op = op, .dev_id = id, .data = data, .timeout_ms = timeout_ms};
    int res = command(ctrl, &c);

    return res < 0 ? res : 0;
}

int ublk_ctrl_features(struct ublk_ctrl *ctrl, uint64_t *features)
{
    struct ublk_command c = {.op = UBLK_CMD_GET_FEATURES, .dev_id = UBLK_DEV_ID_ANY, .buf = features, .out = true};

    *features = 0;
    c.len = sizeof(*features);
    return command(ctrl, &c);
}

int ublk_ctrl_add(struct ublk_ctrl *ctrl, struct ublk_dev_info *info)
{
    struct ublk_command c = {.op = UBLK_CMD_ADD_DEV, .dev_id = info->dev_id, .buf = info, .out = true};

    c.len = sizeof(*info);
    return command(ctrl, &c);
}

int ublk_ctrl_set_params(struct ublk_ctrl *ctrl, uint32_t id, const struct ublk_params *params)
{
    struct ublk_params copy = *params;
    struct ublk_command c = {.op = UBLK_CMD_SET_PARAMS, .dev_id = id, .buf = &copy, .len = sizeof(copy)};

    copy.len = sizeof(copy);
    copy.types &= ~UBLK_PARAM_TYPE_DEVT;
    return command(ctrl, &c);
}

int ublk_ctrl_get_params(struct ublk_ctrl *ctrl, uint32_t id, struct ublk_params *params)
{
    struct ublk_command c = {.op = UBLK_CMD_GET_PARAMS, .dev_id = id, .buf = params, .out = true};

    memset(params, 0, sizeof(*params));
    params->len = sizeof(*params);
    c.len = sizeof(*params);
    return command(ctrl, &c);
}

int ublk_ctrl_get_info(struct ublk_ctrl *ctrl, uint32_t id, struct ublk_dev_info *info)
{
    struct ublk_command c = {.op = UBLK_CMD_GET_DEV_INFO, .dev_id = id, .buf = info, .out = true};

    memset(info, 0, sizeof(*info));
    c.len = sizeof(*info);
    return command(ctrl, &c);
}

int ublk_ctrl_start(struct ublk_ctrl *ctrl, uint32_t id, pid_t pid, unsigned timeout_ms)
{
    return simple_command(ctrl, UBLK_CMD_START_DEV, id, (uint64_t)pid, timeout_ms);
}

int ublk_ctrl_stop(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms)
{
    return simple_command(ctrl, UBLK_CMD_STOP_DEV, id, 0, timeout_ms);
}

int ublk_ctrl_del(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms)
{
    struct ublk_command c = {.op = UBLK_CMD_DEL_DEV, .dev_id = id, .timeout_ms = timeout_ms};
    int64_t deadline = deadline_of(timeout_ms);
    bool cancelled, repeated = false;
    int res;

    /* An interrupted DEL_DEV goes on in the kernel, so the repetition may find nothing left to delete. */
    for (;;) {
        res = ublk_rings_run(&ctrl->rings, &c, deadline, &cancelled);
        if (res != -EINTR || cancelled || now_ms() >= deadline)
            break;
        repeated = true;
    }
    if (res == -ENODEV && repeated)
        return 0;
    if (res == -EINTR || res == -ECANCELED)
        return -ETIMEDOUT;
    return res < 0 ? res : 0;
}

int ublk_ctrl_del_async(struct ublk_ctrl *ctrl, uint32_t id)
{
    return simple_command(ctrl, UBLK_CMD_DEL_DEV_ASYNC, id, 0, 0);
}

/*
 * Up to Linux 6.14 a work item of the driver marks the device QUIESCED, lets its lock go, and then cancels the
 * commands of the dead server once more. A recovery that begins in between gets its own commands cancelled, or the
 * kernel oopses; whoever waits for the lock begins just then. So the state is watched without the lock, and the work
 * item gets time to end: nothing tells when it has.
 */
static int wait_quiesced(struct ublk_ctrl *ctrl, uint32_t id, int64_t deadline)
{
    struct ublk_dev_info info;
    uint64_t features = 0;
    int err = ublk_ctrl_get_info(ctrl, id, &info);

    while (!err && info.state == UBLK_S_DEV_LIVE) {
        if (now_ms() >= deadline)
            return -EBUSY;
        sleep_ms(RECOVERY_STEP_MS);
        err = ublk_ctrl_get_info(ctrl, id, &info);
    }
    if (!err && (ublk_ctrl_features(ctrl, &features) || !(features & UBLK_F_QUIESCE)))
        sleep_ms(CANCEL_WORK_MS);
    return err;
}

int ublk_ctrl_start_recovery(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms)
{
    int64_t deadline = deadline_of(timeout_ms);
    int res = wait_quiesced(ctrl, id, deadline);

    if (res)
        return res;
    for (;;) {
        int64_t left = deadline - now_ms();

        res = simple_command(ctrl, UBLK_CMD_START_USER_RECOVERY, id, 0, left > 1 ? (unsigned)left : 1);
        if (res != -EBUSY || now_ms() >= deadline)
            return res;
        sleep_ms(RECOVERY_STEP_MS);
    }
}

int ublk_ctrl_end_recovery(struct ublk_ctrl *ctrl, uint32_t id, pid_t pid, unsigned timeout_ms)
{
    return simple_command(ctrl, UBLK_CMD_END_USER_RECOVERY, id, (uint64_t)pid, timeout_ms);
}

int ublk_ctrl_update_size(struct ublk_ctrl *ctrl, uint32_t id, uint64_t sectors)
{
    return simple_command(ctrl, UBLK_CMD_UPDATE_SIZE, id, sectors, 0);
}

int ublk_ctrl_quiesce(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms)
{
    if (!timeout_ms)
        timeout_ms = UBLK_CTRL_TIMEOUT_MS;
    /* The kernel has its own limit; ours is the later one, for a kernel that does not keep to it. */
    return simple_command(ctrl, UBLK_CMD_QUIESCE_DEV, id, timeout_ms, timeout_ms + UBLK_CANCEL_GRACE_MS);
}

/* ---- handle and character device ---- */

int ublk_ctrl_open(struct ublk_ctrl **out)
{
    struct ublk_ctrl *ctrl = calloc(1, sizeof(*ctrl));
    int err = ctrl ? ublk_rings_open(&ctrl->rings) : -ENOMEM;

    if (err) {
        free(ctrl);
        return err;
    }
    *out = ctrl;
    return 0;
}

void ublk_ctrl_close(struct ublk_ctrl *ctrl)
{
    if (!ctrl)
        return;
    ublk_rings_close(&ctrl->rings);
    free(ctrl);
}

int ublk_open_char(uint32_t id)
{
    int64_t deadline = now_ms() + OPEN_TIMEOUT_MS;
    char path[32];

    snprintf(path, sizeof(path), "/dev/ublkc%u", id);
    for (;;) {
        int fd = open(path, O_RDWR | O_CLOEXEC), err = errno;

        if (fd >= 0)
            return fd;
        if (err == EINTR)
            continue;
        if ((err != ENOENT && err != ENXIO && err != EACCES) || now_ms() >= deadline)
            return -err;
        sleep_ms(OPEN_STEP_MS);
    }
}
