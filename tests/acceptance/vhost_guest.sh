#!/bin/bash
# What runs in the VM for test_vhost_guest.py: an ordinary Linux guest with a disk over vhost-user-blk.
#
# Says what it came to by files in GLIDEFS_VM_SHARE, and waits there for the host.
set -euo pipefail
share=$GLIDEFS_VM_SHARE
disk=${GLIDEFS_VM_DISKS##* }
name=${disk#/dev/}

say() { printf '%s\n' "${2:-}" >"$share/.new" && mv "$share/.new" "$share/$1"; }
await() { until [[ -e $share/$1 ]]; do sleep 0.2; done; }

say facts "$(ls "/sys/block/$name/mq" | wc -l) $(cat "/sys/block/$name/queue/write_cache" | tr ' ' -) \
$(cat "/sys/block/$name/queue/discard_max_bytes") $(cat "/sys/block/$name/queue/write_zeroes_max_bytes") \
$(blockdev --getsize64 "$disk")"

mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$disk"
mkdir -p /mnt/disk
mount -o discard "$disk" /mnt/disk
tar -C /usr/share -cf - doc/libc6 doc/coreutils misc perl5 2>/dev/null | tar -C /mnt/disk -xf - || true
sync
say written "$(find /mnt/disk -type f | wc -l)"

await resized-on-host
for ((i = 0; i < 600; i++)); do
    size=$(blockdev --getsize64 "$disk")
    [[ $size == "$(cat "$share/resized-on-host")" ]] && break
    sleep 0.2
done
resize2fs "$disk" >/dev/null 2>&1
say resized "$size"

# Written, read back and compared all the while the daemons come and go.
fio --name=verify --filename=/mnt/disk/fio --size=24M --rw=randwrite --bs=4k --iodepth=8 --ioengine=libaio --direct=1 \
    --verify=crc32c --verify_backlog=256 --time_based --runtime="$FIO_SECONDS" --output="$share/fio.txt" &
fio=$!
say moving
await moved
kill -0 $fio || say too-fast
wait $fio
say verified

rm /mnt/disk/fio
sync
fstrim /mnt/disk
(cd /mnt/disk && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1) >/tmp/files
umount /mnt/disk
e2fsck -fn "$disk" >/dev/null 2>&1
say files "$(cat /tmp/files)"
say whole "$(sha256sum "$disk" | cut -d' ' -f1)"
! dmesg | grep -E "I/O error|Buffer I/O" >"$share/errors"
