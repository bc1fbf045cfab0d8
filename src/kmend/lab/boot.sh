#!/kmend/bin/sh
# First and only boot script of the guest: everything that a snapshot may hold.
# A mounted 9p share forbids snapshots (QEMU blocks the migration), so shares come after the restore.
PATH=/kmend/bin
/kmend/bin/busybox --install -s /kmend/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mount -t securityfs securityfs /sys/kernel/security
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
while read -r module; do
    insmod "/kmend/modules/$module" || echo "kmend: $module cannot be loaded"
done </kmend/modules/order
hostname kmend
ip link set lo up
# Every kernel message goes to the console from here on: the host reads it there when the guest dies.
echo 8 >/proc/sys/kernel/printk
# A printk that a script provokes in numbers must not be thinned out: the verdict reads the log.
echo 0 >/proc/sys/kernel/printk_ratelimit
