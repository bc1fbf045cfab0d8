# Once per guest: the base module, and the livepatch core's debug lines as the selftests have them.
cd /root
a=$(sed -n 's/^\([0-9a-f]*\) . klp_ops$/\1/p' /proc/kallsyms)
m=$(sed -n 's/^\([0-9a-f]*\) . klp_mutex$/\1/p' /proc/kallsyms)
/usr/sbin/insmod kd_base.ko ops=0x$a mutex=0x$m || exit
mount -t debugfs none /sys/kernel/debug 2>/dev/null
c=/sys/kernel/debug/dynamic_debug/control; [ -e $c ] || c=/proc/dynamic_debug/control
echo 'file kernel/livepatch/* +p' >$c && echo 'func klp_try_switch_task -p' >$c
