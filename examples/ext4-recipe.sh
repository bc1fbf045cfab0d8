#!/bin/sh
# For `kmend try --run`: the recipe that kills Debian's 6.1.0-55-amd64 (6.1.192-1) every time.
#
# With the page cache dropped, freeing blocks makes ext4 read its buddy bitmaps anew; that kernel's
# ext4_mb_load_buddy_gfp() takes the NULL of a cold cache for a folio. A 64 MB file system with
# 4 kB blocks is enough; 1 kB blocks do not show it. The task that oopses dies with the file
# system's locks held, so what follows runs with a limit, and nothing is unmounted after a failure.
set -eu
fail() {
    echo "$*" >&2
    exit 1
}
image=/tmp/ext4.img
place=/mnt/ext4
truncate -s 64M $image
mkfs.ext4 -q -b 4096 $image
modprobe loop
modprobe ext4
mkdir -p $place
mount -o loop $image $place
i=0
while [ $i -lt 20 ]; do
    head -c 65536 /dev/urandom
    i=$((i + 1))
done >$place/f
before=$(md5sum <$place/f)
sync
for i in 1 2 3; do
    sleep 1
    echo 3 >/proc/sys/vm/drop_caches
done
[ "$before" = "$(md5sum <$place/f)" ] || fail "the file reads back differently"
echo 3 >/proc/sys/vm/drop_caches
timeout 10 rm $place/f || fail "rm ended with status $?"
timeout 10 sync || fail "sync ended with status $?"
[ ! -e $place/f ] || fail "the file is still there"
timeout 10 umount $place || fail "umount ended with status $?"
fsck.ext4 -fn $image >/tmp/fsck.log 2>&1 || fail "fsck: $(cat /tmp/fsck.log)"
echo "created, dropped, removed, checked: ext4 is well"
