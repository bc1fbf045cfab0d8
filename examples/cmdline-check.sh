#!/bin/sh
# For `kmend try --run`: passes when /proc/cmdline shows the text of examples/cmdline.patch
# while that patch is loaded, and only then. KMEND_PHASE is stock, patched or restored.
line=$(cat /proc/cmdline)
echo "$KMEND_PHASE: $line"
case "$KMEND_PHASE $line" in
patched*' kmend=1') exit 0 ;;
patched*) echo "the patch is loaded, but /proc/cmdline does not show it" >&2 ;;
*' kmend=1') echo "/proc/cmdline shows the patch although it is not loaded" >&2 ;;
*) exit 0 ;;
esac
exit 1
