/*
 * Control of ublk devices: add, start, stop, recover, remove.
 *
 * Every function but ublk_ctrl_close may be called from any thread at any time, many at once; each blocks its
 * caller until the kernel has answered or the time is up, so call them from control threads, never from
 * a thread that serves a queue (STOP and START wait for I/O that such a thread must serve) and never with
 * the GIL held. All return 0 or a count >= 0 on success and -errno on failure. Errors of every command:
 *   -ENODEV      no such device id
 *   -EPERM       CAP_SYS_ADMIN is missing
 *   -EOPNOTSUPP  the kernel does not know the command
 *   -ETIMEDOUT   the time was up. The command was cancelled, or, if the kernel would not let go of it, is left
 *                to itself: it may still take effect. The device is in an unknown state: stop and delete it.
 *   -ENOMEM, -EMFILE...  no ring could be made
 * Times are in milliseconds; 0 stands for UBLK_CTRL_TIMEOUT_MS. Interruption by a signal is retried inside.
 */
#ifndef GLIDE_UBLK_CTRL_H
#define GLIDE_UBLK_CTRL_H

#include <stdint.h>
#include <sys/types.h>

#include "transport/ublk/ublk_uapi.h"

#define UBLK_CTRL_TIMEOUT_MS 30000u

struct ublk_ctrl;

/*
 * Opens /dev/ublk-control. -ENOENT: no driver (try `modprobe ublk_drv`); -EACCES: no permission; -ENOSYS, -EPERM:
 * io_uring is missing or forbidden. On success the caller owns *ctrl and releases it with ublk_ctrl_close.
 */
int ublk_ctrl_open(struct ublk_ctrl **ctrl);

/* Releases the handle; NULL is allowed. No call may be running. */
void ublk_ctrl_close(struct ublk_ctrl *ctrl);

/* UBLK_F_* that the kernel knows. Fails on kernels before 6.5. */
int ublk_ctrl_features(struct ublk_ctrl *ctrl, uint64_t *features);

/*
 * Creates a device. In: nr_hw_queues, queue_depth, max_io_buf_bytes, dev_id (UBLK_DEV_ID_ANY = any), flags,
 * ublksrv_flags. Out: all of *info as the kernel granted it: fewer queues and fewer flags than asked for are
 * not an error, so go by the returned values. -EEXIST: the id is taken.
 */
int ublk_ctrl_add(struct ublk_ctrl *ctrl, struct ublk_dev_info *info);

/*
 * Sets geometry and limits, before the first start only (-EACCES later: a recovered device keeps what it has).
 * len and the read-only DEVT type are taken care of. -EINVAL: refused values.
 */
int ublk_ctrl_set_params(struct ublk_ctrl *ctrl, uint32_t id, const struct ublk_params *params);

/* Reads them back, with the device numbers of ublkcN and ublkbN in params->devt. */
int ublk_ctrl_get_params(struct ublk_ctrl *ctrl, uint32_t id, struct ublk_params *params);

int ublk_ctrl_get_info(struct ublk_ctrl *ctrl, uint32_t id, struct ublk_dev_info *info);

/*
 * Makes ublkbN appear. pid is the tgid of the process that has ublkcN open. Waits until every tag of every queue
 * has been fetched, and up to 6.12 for the partition scan, whose reads the queues must serve meanwhile. After
 * a failure call ublk_ctrl_stop: it releases the fetches that did arrive. -EEXIST: started before.
 */
int ublk_ctrl_start(struct ublk_ctrl *ctrl, uint32_t id, pid_t pid, unsigned timeout_ms);

/*
 * Removes ublkbN: writes back its page cache through the server, waits for running I/O, then retires every slot
 * (-ENODEV). A device whose server is dead fails its held I/O. One way: delete the device afterwards. 0 on a device
 * that is stopped already.
 */
int ublk_ctrl_stop(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms);

/*
 * Deletes the device, stopping it if need be, and waits until its id is free: ublkcN closed, unmapped and not
 * registered in any ring (do that first), ublkbN closed by all. -ETIMEDOUT: somebody holds it; the id comes free
 * when they let go. A device that is gone already is -ENODEV.
 */
int ublk_ctrl_del(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms);

/* The same, without the wait for references (6.9). */
int ublk_ctrl_del_async(struct ublk_ctrl *ctrl, uint32_t id);

/*
 * Recovery by a new server: start_recovery, ublk_open_char, mmap, fetch every tag, end_recovery. Parameters stay as
 * they are: do not set them again. start_recovery waits for the kernel to notice that the old server is gone and
 * returns -EBUSY if that did not happen in time (something still holds ublkcN); -EINVAL: the device was made
 * without UBLK_F_USER_RECOVERY. I/O can arrive before end_recovery returns.
 */
int ublk_ctrl_start_recovery(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms);
int ublk_ctrl_end_recovery(struct ublk_ctrl *ctrl, uint32_t id, pid_t pid, unsigned timeout_ms);

/* Changes the size, in sectors of 512 bytes (UBLK_F_UPDATE_SIZE). The kernel checks nothing: round it yourself. */
int ublk_ctrl_update_size(struct ublk_ctrl *ctrl, uint32_t id, uint64_t sectors);

/*
 * Holds new I/O and retires idle slots (UBLK_F_QUIESCE), so that the server can leave without an error. Slots in the
 * server's hands are not waited for: finish and commit them, then call it again. The only way back is recovery.
 */
int ublk_ctrl_quiesce(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms);

/*
 * Opens /dev/ublkcN, O_RDWR | O_CLOEXEC; the caller owns the descriptor. Node and permissions may lag behind the
 * command that made them: ENOENT, ENXIO and EACCES are retried for three seconds. -EBUSY: another server has it.
 */
int ublk_open_char(uint32_t id);

#endif
