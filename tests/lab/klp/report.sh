# At the end of a scenario: what is compared, then everything is taken back. DIRTY: not all could be.
echo SYSFS
for f in $(find $S | sort); do
    case $f in */force) echo "$f -";; *) [ -d $f ] && echo "$f" || echo "$f $(cat $f)";; esac
done
echo STACKS
cat /proc/kd/stacks
echo MODULES
sed -n 's/^\(p[123]\|kd_late\) [0-9]* \([0-9]*\) .*/\1 \2/p' /proc/modules
echo END
for i in 0 1 2; do eval p=\$pid$i; [ -n "$p" ] && echo $i >/proc/kd/release && wait $p; done
pids=
quiesce >/dev/null
for n in 1 2 3; do for p in p3 p2 p1; do
    [ -e $S/$p ] && echo 0 >$S/$p/enabled 2>/dev/null; quiesce >/dev/null; rmmod $p 2>/dev/null
done; done
rmmod kd_late 2>/dev/null
grep -q '^p[123] \|^kd_late ' /proc/modules && echo DIRTY
exit 0
