#!/kmend/bin/sh
# The guest's side of a channel: runs what the host sends over one virtio-serial port.
#
#   host:  run ID SCRIPT-BYTES STDIN-BYTES \n  script  stdin
#   guest: done ID STATUS STDOUT-BYTES STDERR-BYTES \n  stdout  stderr
#
# Lengths make the stream safe for any bytes. The command's process group is its
# own, so that the other channel can end it with everything that it started.
# Output goes to files of its own per command: what a command leaves running in
# the background can neither hold the channel nor spoil the next answer.
PATH=/kmend/bin
name=$1
work=/kmend/run/$name
mkdir -p "$work"
device=
for port in /sys/class/virtio-ports/*; do
    [ -r "$port/name" ] && read -r found <"$port/name"
    if [ "$found" = "$name" ]; then
        device=/dev/${port##*/}
    fi
done
if [ -z "$device" ]; then
    echo "kmend: there is no port $name"
    sleep 5
    exit 1
fi
exec 3<>"$device"
# the agent must outlive whatever the script does to the memory; commands start at 0 again
echo -1000 >/proc/self/oom_score_adj

answer() { # ID STATUS
    set -- "$1" "$2" $(stat -c %s "$work/$1.out" "$work/$1.err")
    echo "done $1 $2 $3 $4" >&3
    if [ "$3" -gt 0 ]; then head -c "$3" "$work/$1.out" >&3; fi
    if [ "$4" -gt 0 ]; then head -c "$4" "$work/$1.err" >&3; fi
    rm -f "$work/$1".* "$work/current"
}

# an agent before this one was killed by the command that it ran, or together with it
if [ -e "$work/current" ]; then
    read -r id <"$work/current"
    read -r pid <"$work/pid"
    kill -KILL -"$pid" 2>/dev/null
    answer "$id" 137
fi
while read -r word id script input <&3; do
    [ "$word" = run ] || continue
    base=$work/$id
    dd bs="$script" count=1 iflag=fullblock <&3 >"$base.sh" 2>"$base.err"
    source=/dev/null
    if [ "$input" -gt 0 ]; then
        dd bs=65536 count="$input" iflag=fullblock,count_bytes <&3 >"$base.in" 2>"$base.err"
        source=$base.in
    fi
    : >"$base.out"
    setsid sh "$base.sh" <"$source" >"$base.out" 2>"$base.err" 3>&- &
    echo $! >"$work/pid"
    echo "$id" >"$work/current"
    wait $!
    answer "$id" $?
done
