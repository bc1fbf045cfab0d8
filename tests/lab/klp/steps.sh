# The steps of a scenario in the guest: each prints one line "R RESULT".
cd /root
S=/sys/kernel/livepatch
# a patch in transition
moving() {
    for d in $S/*; do read -r t 2>/dev/null <$d/transition && [ "$t" = 1 ] && echo $d && return; done
    return 1
}
# a patch whose folder is about to go
going() {
    for d in $S/*; do read -r e 2>/dev/null <$d/enabled && [ "$e" = 0 ] && return; done
    return 1
}
# until no transition is going on, or the only tasks behind are our sleepers
quiesce() {
    n=0
    while [ $((n+=1)) -lt 400 ]; do
        if d=$(moving); then
            read -r target 2>/dev/null <$d/enabled || continue
            behind=$(grep -l "^$((1 - target))" /proc/[0-9]*/patch_state 2>/dev/null | sed 's,/proc/,,;s,/.*,,')
            others=
            for pid in $behind; do case " $pids " in *" $pid "*) ;; *) others=1;; esac; done
            if [ -n "$behind" ] && [ -z "$others" ]; then
                [ -n "$hold" ] || return
                # a reversed transition looks at stacks with its next retry only
                hold=; usleep 2500000; continue
            fi
        else
            going || { usleep 20000; return; }
        fi
        usleep 30000
    done
    echo "R stuck"
}
load() { t=$(/usr/sbin/insmod $1 2>&1) && echo "R 0" || echo "R $t"; }
unload() { t=$(rmmod $1 2>&1) && echo "R 0" || echo "R $t"; }
put() {
    [ -e $S/$1 ] || { echo "R No such file or directory"; return; }
    t=$( (echo $2 >$S/$1) 2>&1) && echo "R 0" || { echo "R $t"; return; }
    case $1 in */enabled) hold=1;; esac
}
slot() { read -r s0 s1 s2 </proc/kd/slots; eval echo \$s$1; }
callf() { [ -e $1 ] || { echo "R No such file or directory"; return; }; read -r v rest <$1; echo "R $v"; }
enter() {
    [ -e $2 ] || { echo "R No such file or directory"; return; }
    cat $2 >/root/out.$1 & eval pid$1=$!; pids="$pids $!"
    i=0; while [ "$(slot $1)" = - ] && [ $((i+=1)) -lt 300 ]; do usleep 10000; done
    echo "R $(slot $1)"
}
leave() {
    eval p=\$pid$1; [ -n "$p" ] || { echo "R No such file or directory"; return; }
    echo $1 >/proc/kd/release; wait $p; eval pid$1=; pids=" $(echo "$pids" | sed "s/ $p\b//") "
    echo "R $(cat /root/out.$1)"
}
hold=; pids=; pid0=; pid1=; pid2=
