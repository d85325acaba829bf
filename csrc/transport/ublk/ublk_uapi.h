/*
 * The kernel's ublk interface, as far as GlideFS uses it (include/uapi/linux/ublk_cmd.h, Linux 6.12 to 7.3).
 *
 * Our own copy, for two reasons: distributions ship headers older than the kernels that run, and every
 * layout is asserted here. Never include <linux/ublk_cmd.h> beside it. Only ioctl-encoded opcodes are used;
 * they exist since 6.4. Which features a kernel has is asked at run time (GET_FEATURES); which of them a
 * device has is in the flags that ADD_DEV returns: unknown flags are dropped there without an error.
 */
#ifndef GLIDE_UBLK_UAPI_H
#define GLIDE_UBLK_UAPI_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* ---- control commands: SQE128 to /dev/ublk-control, struct ublk_ctrl_cmd at byte 48 of the SQE ---- */

struct ublk_ctrl_cmd {
    uint32_t dev_id;
    uint16_t queue_id; /* 0xffff unless the command names a queue */
    uint16_t len;      /* bytes at addr */
    uint64_t addr;
    uint64_t data;
    uint16_t dev_path_len; /* unprivileged devices only */
    uint16_t pad;
    uint32_t reserved;
};
static_assert(sizeof(struct ublk_ctrl_cmd) == 32, "ublk_ctrl_cmd");
static_assert(offsetof(struct ublk_ctrl_cmd, addr) == 8, "ublk_ctrl_cmd.addr");
static_assert(offsetof(struct ublk_ctrl_cmd, data) == 16, "ublk_ctrl_cmd.data");
static_assert(offsetof(struct ublk_ctrl_cmd, dev_path_len) == 24, "ublk_ctrl_cmd.dev_path_len");

#define UBLK_CMD_GET_QUEUE_AFFINITY _IOR('u', 0x01, struct ublk_ctrl_cmd)
#define UBLK_CMD_GET_DEV_INFO _IOR('u', 0x02, struct ublk_ctrl_cmd)
#define UBLK_CMD_ADD_DEV _IOWR('u', 0x04, struct ublk_ctrl_cmd)
#define UBLK_CMD_DEL_DEV _IOWR('u', 0x05, struct ublk_ctrl_cmd)
#define UBLK_CMD_START_DEV _IOWR('u', 0x06, struct ublk_ctrl_cmd)
#define UBLK_CMD_STOP_DEV _IOWR('u', 0x07, struct ublk_ctrl_cmd)
#define UBLK_CMD_SET_PARAMS _IOWR('u', 0x08, struct ublk_ctrl_cmd)
#define UBLK_CMD_GET_PARAMS _IOR('u', 0x09, struct ublk_ctrl_cmd)
#define UBLK_CMD_START_USER_RECOVERY _IOWR('u', 0x10, struct ublk_ctrl_cmd)
#define UBLK_CMD_END_USER_RECOVERY _IOWR('u', 0x11, struct ublk_ctrl_cmd)
#define UBLK_CMD_GET_FEATURES _IOR('u', 0x13, struct ublk_ctrl_cmd)  /* 6.5 */
#define UBLK_CMD_DEL_DEV_ASYNC _IOR('u', 0x14, struct ublk_ctrl_cmd) /* 6.9 */
#define UBLK_CMD_UPDATE_SIZE _IOWR('u', 0x15, struct ublk_ctrl_cmd)  /* 6.16 */
#define UBLK_CMD_QUIESCE_DEV _IOWR('u', 0x16, struct ublk_ctrl_cmd)  /* 6.16 */
#define UBLK_CMD_TRY_STOP_DEV _IOWR('u', 0x17, struct ublk_ctrl_cmd) /* 7.0 */

static_assert(UBLK_CMD_GET_DEV_INFO == 0x80207502u, "GET_DEV_INFO");
static_assert(UBLK_CMD_ADD_DEV == 0xc0207504u, "ADD_DEV");
static_assert(UBLK_CMD_GET_PARAMS == 0x80207509u, "GET_PARAMS");
static_assert(UBLK_CMD_END_USER_RECOVERY == 0xc0207511u, "END_USER_RECOVERY");
static_assert(UBLK_CMD_GET_FEATURES == 0x80207513u, "GET_FEATURES");
static_assert(UBLK_CMD_DEL_DEV_ASYNC == 0x80207514u, "DEL_DEV_ASYNC");
static_assert(UBLK_CMD_QUIESCE_DEV == 0xc0207516u, "QUIESCE_DEV");

/* ---- feature flags: GET_FEATURES, and ublk_dev_info.flags ---- */

#define UBLK_F_SUPPORT_ZERO_COPY (1ULL << 0)
#define UBLK_F_URING_CMD_COMP_IN_TASK (1ULL << 1)
#define UBLK_F_NEED_GET_DATA (1ULL << 2)
#define UBLK_F_USER_RECOVERY (1ULL << 3)
#define UBLK_F_USER_RECOVERY_REISSUE (1ULL << 4)
#define UBLK_F_UNPRIVILEGED_DEV (1ULL << 5)
#define UBLK_F_CMD_IOCTL_ENCODE (1ULL << 6)
#define UBLK_F_USER_COPY (1ULL << 7)
#define UBLK_F_ZONED (1ULL << 8)
#define UBLK_F_USER_RECOVERY_FAIL_IO (1ULL << 9) /* 6.13 */
#define UBLK_F_UPDATE_SIZE (1ULL << 10)          /* 6.16 */
#define UBLK_F_AUTO_BUF_REG (1ULL << 11)         /* 6.16 */
#define UBLK_F_QUIESCE (1ULL << 12)              /* 6.16; must be set at ADD_DEV */
#define UBLK_F_PER_IO_DAEMON (1ULL << 13)        /* 6.16; set by the driver */
#define UBLK_F_BUF_REG_OFF_DAEMON (1ULL << 14)   /* 6.17; set by the driver */
#define UBLK_F_BATCH_IO (1ULL << 15)             /* 7.0 */
#define UBLK_F_INTEGRITY (1ULL << 16)            /* 7.0 */
#define UBLK_F_SAFE_STOP_DEV (1ULL << 17)        /* 7.0; TRY_STOP_DEV exists */
#define UBLK_F_NO_AUTO_PART_SCAN (1ULL << 18)    /* 7.0 */
#define UBLK_F_SHMEM_ZC (1ULL << 19)             /* 7.1 */

/* ---- device ---- */

enum ublk_dev_state {
    UBLK_S_DEV_DEAD = 0, /* no disk: not started yet, or stopped */
    UBLK_S_DEV_LIVE = 1,
    UBLK_S_DEV_QUIESCED = 2, /* server gone, I/O held */
    UBLK_S_DEV_FAIL_IO = 3,  /* server gone, I/O fails */
};

#define UBLK_DEV_ID_ANY 0xffffffffu /* ADD_DEV: let the kernel choose */
#define UBLK_MAX_QUEUE_DEPTH 4096u

struct ublk_dev_info {
    uint16_t nr_hw_queues;
    uint16_t queue_depth;
    uint16_t state; /* enum ublk_dev_state */
    uint16_t pad0;
    uint32_t max_io_buf_bytes;
    uint32_t dev_id;
    int32_t ublksrv_pid; /* server's tgid in the caller's pid namespace; -1: none */
    uint32_t pad1;
    uint64_t flags;         /* UBLK_F_* */
    uint64_t ublksrv_flags; /* ours: opaque to the kernel, kept with the device */
    uint32_t owner_uid;
    uint32_t owner_gid;
    uint64_t reserved1;
    uint64_t reserved2;
};
static_assert(sizeof(struct ublk_dev_info) == 64, "ublk_dev_info");
static_assert(offsetof(struct ublk_dev_info, max_io_buf_bytes) == 8, "ublk_dev_info.max_io_buf_bytes");
static_assert(offsetof(struct ublk_dev_info, ublksrv_pid) == 16, "ublk_dev_info.ublksrv_pid");
static_assert(offsetof(struct ublk_dev_info, flags) == 24, "ublk_dev_info.flags");
static_assert(offsetof(struct ublk_dev_info, ublksrv_flags) == 32, "ublk_dev_info.ublksrv_flags");
static_assert(offsetof(struct ublk_dev_info, owner_uid) == 40, "ublk_dev_info.owner_uid");

/* ---- parameters ---- */

#define UBLK_ATTR_READ_ONLY (1u << 0)
#define UBLK_ATTR_ROTATIONAL (1u << 1)
#define UBLK_ATTR_VOLATILE_CACHE (1u << 2) /* FLUSH requests arrive */
#define UBLK_ATTR_FUA (1u << 3)            /* only with VOLATILE_CACHE */

struct ublk_param_basic {
    uint32_t attrs;
    uint8_t logical_bs_shift;
    uint8_t physical_bs_shift;
    uint8_t io_opt_shift;
    uint8_t io_min_shift;
    uint32_t max_sectors;
    uint32_t chunk_sectors;
    uint64_t dev_sectors; /* of 512 bytes */
    uint64_t virt_boundary_mask;
};

struct ublk_param_discard {
    uint32_t discard_alignment;
    uint32_t discard_granularity; /* never 0 */
    uint32_t max_discard_sectors; /* 0: discard is not offered */
    uint32_t max_write_zeroes_sectors;
    uint16_t max_discard_segments; /* 1, when discard is offered */
    uint16_t reserved0;
};

struct ublk_param_devt {
    uint32_t char_major;
    uint32_t char_minor;
    uint32_t disk_major; /* 0 until the device has been started */
    uint32_t disk_minor;
};

struct ublk_param_zoned {
    uint32_t max_open_zones;
    uint32_t max_active_zones;
    uint32_t max_zone_append_sectors;
    uint8_t reserved[20];
};

struct ublk_param_dma_align {
    uint32_t alignment; /* a mask */
    uint8_t pad[4];
};

struct ublk_param_segment {
    uint64_t seg_boundary_mask;
    uint32_t max_segment_size;
    uint16_t max_segments;
    uint8_t pad[2];
};

#define UBLK_PARAM_TYPE_BASIC (1u << 0)
#define UBLK_PARAM_TYPE_DISCARD (1u << 1)
#define UBLK_PARAM_TYPE_DEVT (1u << 2) /* GET_PARAMS sets it, SET_PARAMS refuses it */
#define UBLK_PARAM_TYPE_ZONED (1u << 3)
#define UBLK_PARAM_TYPE_DMA_ALIGN (1u << 4) /* 6.15 */
#define UBLK_PARAM_TYPE_SEGMENT (1u << 5)   /* 6.15 */

struct ublk_params {
    uint32_t len; /* sizeof(struct ublk_params); ublk_ctrl sets it */
    uint32_t types;
    struct ublk_param_basic basic;
    struct ublk_param_discard discard;
    struct ublk_param_devt devt;
    struct ublk_param_zoned zoned;
    struct ublk_param_dma_align dma;
    struct ublk_param_segment seg;
};
static_assert(sizeof(struct ublk_param_basic) == 32, "ublk_param_basic");
static_assert(offsetof(struct ublk_param_basic, max_sectors) == 8, "ublk_param_basic.max_sectors");
static_assert(offsetof(struct ublk_param_basic, dev_sectors) == 16, "ublk_param_basic.dev_sectors");
static_assert(offsetof(struct ublk_params, basic) == 8, "ublk_params.basic");
static_assert(offsetof(struct ublk_params, discard) == 40, "ublk_params.discard");
static_assert(offsetof(struct ublk_params, devt) == 60, "ublk_params.devt");
static_assert(offsetof(struct ublk_params, zoned) == 76, "ublk_params.zoned");
static_assert(offsetof(struct ublk_params, dma) == 108, "ublk_params.dma");
static_assert(offsetof(struct ublk_params, seg) == 120, "ublk_params.seg");
static_assert(sizeof(struct ublk_params) == 136, "ublk_params");

/* ---- I/O commands: SQE to /dev/ublkcN, struct ublk_io_cmd at byte 48 of the SQE ---- */

struct ublk_io_cmd {
    uint16_t q_id;
    uint16_t tag;
    int32_t result; /* bytes done, or -errno; COMMIT only */
    uint64_t addr;  /* 0 with user copy */
};
static_assert(sizeof(struct ublk_io_cmd) == 16, "ublk_io_cmd");
static_assert(offsetof(struct ublk_io_cmd, result) == 4, "ublk_io_cmd.result");
static_assert(offsetof(struct ublk_io_cmd, addr) == 8, "ublk_io_cmd.addr");

#define UBLK_IO_FETCH_REQ _IOWR('u', 0x20, struct ublk_io_cmd)
#define UBLK_IO_COMMIT_AND_FETCH_REQ _IOWR('u', 0x21, struct ublk_io_cmd)
#define UBLK_IO_REGISTER_IO_BUF _IOWR('u', 0x23, struct ublk_io_cmd)
#define UBLK_IO_UNREGISTER_IO_BUF _IOWR('u', 0x24, struct ublk_io_cmd)
static_assert(UBLK_IO_FETCH_REQ == 0xc0107520u, "FETCH_REQ");
static_assert(UBLK_IO_COMMIT_AND_FETCH_REQ == 0xc0107521u, "COMMIT_AND_FETCH_REQ");

/* The CQE of a FETCH or COMMIT: 0 = a request is in the slot; -ENODEV = slot retired, never fetch again. */
#define UBLK_IO_RES_OK 0

struct ublk_io_desc {
    uint32_t op_flags; /* operation in the low 8 bits, UBLK_IO_F_* above */
    uint32_t nr_sectors;
    uint64_t start_sector;
    uint64_t addr;
};
static_assert(sizeof(struct ublk_io_desc) == 24, "ublk_io_desc");
static_assert(offsetof(struct ublk_io_desc, start_sector) == 8, "ublk_io_desc.start_sector");

#define UBLK_IO_OP(desc) ((desc)->op_flags & 0xffu)
enum ublk_io_op {
    UBLK_IO_OP_READ = 0,
    UBLK_IO_OP_WRITE = 1,
    UBLK_IO_OP_FLUSH = 2,
    UBLK_IO_OP_DISCARD = 3,
    UBLK_IO_OP_WRITE_ZEROES = 5,
};

/* To be tested against op_flags as it is, without a shift. */
#define UBLK_IO_F_META (1u << 11)
#define UBLK_IO_F_FUA (1u << 13)
#define UBLK_IO_F_NOUNMAP (1u << 15)
#define UBLK_IO_F_NEED_REG_BUF (1u << 17)

/* The address word of automatic buffer registration, for sqe->addr of FETCH and COMMIT. */
#define UBLK_AUTO_BUF_REG_FALLBACK (1u << 0)
#define UBLK_AUTO_BUF_REG_ADDR(index, flags) ((uint64_t)(uint16_t)(index) | (uint64_t)(uint8_t)(flags) << 16)

/* Descriptors of queue q: mmap(ublkcN, PROT_READ, MAP_SHARED) of exactly this size at exactly this offset. */
static inline size_t ublk_desc_bytes(unsigned depth, size_t page)
{
    return (depth * sizeof(struct ublk_io_desc) + page - 1) / page * page;
}

static inline uint64_t ublk_desc_offset(unsigned q_id, size_t page)
{
    return (uint64_t)q_id * ublk_desc_bytes(UBLK_MAX_QUEUE_DEPTH, page);
}

/*
 * User copy: file position on ublkcN of byte `off` of the request in slot (q_id, tag). pread takes the data of a
 * WRITE, pwrite gives the data of a READ. `off` has 25 bits, hence UBLK_MAX_REQUEST_BYTES.
 */
#define UBLK_MAX_REQUEST_BYTES (32u << 20)
#define UBLK_USER_COPY_POS(q_id, tag, off)                                                                             \
    (0x80000000ULL + ((uint64_t)(q_id) << 41 | (uint64_t)(tag) << 25 | (uint64_t)(off)))
static_assert(UBLK_USER_COPY_POS(1, 1, 512) == 0x80000000ULL + (1ULL << 41) + (1ULL << 25) + 512, "position");

#endif
