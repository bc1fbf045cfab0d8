"""Functions that tracers and BPF programs commonly attach to, and what a live patch means for them.

What happens (kernel/trace/ftrace.c, kernel/kprobes.c, kernel/bpf/trampoline.c, kernel/livepatch/patch.c):

- A kprobe or kretprobe at the function's entry goes on to work: it does not change the instruction
  pointer (``kprobe_ftrace_ops``), so it fires whichever version of the function runs then.
- A kprobe with a post handler wants to change it (``kprobe_ipmodify_ops``), as the patch does, and ftrace
  allows one of them: ``__ftrace_hash_update_ipmodify()`` returns ``-EBUSY`` to the one that comes second.
- A kprobe in the middle of the function stays in the old code and never fires again.
- A BPF trampoline (fentry, fexit, fmod_ret, LSM) shares the function with the patch since 53cd885bc5c3
  "ftrace: Allow IPMODIFY and DIRECT ops on the same function" and 00963a2e75a8 "bpf: Support
  bpf_trampoline on functions with IPMODIFY (e.g. livepatch)", 6.0; before, the second one got ``-EBUSY``. Its
  arguments are read by the type of the *old* function.
- New code calls new code directly. Where a function is replaced together with its caller, that call does
  not pass the old entry, and what is attached there does not see it.
"""

from __future__ import annotations

import re

#: Name -> who attaches there, after what these tools' own programs name: bcc (tools/ and libbpf-tools/),
#: Tetragon, libbpf-bootstrap. A list of what is common; it need not be complete to be of use.
HOOKED: dict[str, str] = {
    "tcp_v4_connect": "bcc tcpconnect, tcptracer",
    "tcp_v6_connect": "bcc tcpconnect, tcptracer",
    "tcp_connect": "Tetragon",
    "tcp_sendmsg": "bcc tcptop, Tetragon",
    "tcp_cleanup_rbuf": "bcc tcptop",
    "tcp_set_state": "bcc tcplife, tcpstates of older versions",
    "tcp_rcv_state_process": "bcc tcpconnlat",
    "tcp_rcv_established": "bcc tcprtt",
    "tcp_drop": "bcc tcpdrop",
    "tcp_retransmit_skb": "bcc tcpretrans",
    "tcp_send_loss_probe": "bcc tcpretrans",
    "tcp_close": "Tetragon",
    "inet_csk_accept": "bcc tcpaccept, tcptracer",
    "inet_listen": "bcc solisten",
    "inet_bind": "bcc bindsnoop",
    "inet6_bind": "bcc bindsnoop",
    "vfs_read": "bcc vfsstat, filetop",
    "vfs_write": "bcc vfsstat, filetop",
    "vfs_open": "bcc vfsstat, filelife",
    "vfs_create": "bcc vfsstat, filelife",
    "vfs_unlink": "bcc filelife",
    "vfs_fsync": "bcc vfsstat",
    "vfs_fsync_range": "bcc vfsstat",
    "do_unlinkat": "libbpf's examples, file monitors",
    "do_sys_openat2": "file-open monitors",
    "lookup_fast": "bcc dcstat, dcsnoop",
    "d_lookup": "bcc dcstat, dcsnoop",
    "fd_install": "Tetragon",
    "mark_page_accessed": "bcc cachestat",
    "mark_buffer_dirty": "bcc cachestat",
    "add_to_page_cache_lru": "bcc cachestat",
    "filemap_add_folio": "bcc cachestat",
    "folio_account_dirtied": "bcc cachestat",
    "do_page_cache_ra": "bcc readahead",
    "oom_kill_process": "bcc oomkill",
    "finish_task_switch": "bcc offcputime, cpudist",
    "try_to_wake_up": "bcc wakeuptime",
    "mutex_lock": "bcc klockstat",
    "mutex_unlock": "bcc klockstat",
    "cap_capable": "bcc capable",
    "acct_process": "Tetragon",
    "disassociate_ctty": "Tetragon",
    "folio_mark_accessed": "bcc cachestat",
    "ext4_sync_file": "bcc ext4slower, ext4dist",
    "wake_up_new_task": "Tetragon",
    "commit_creds": "Tetragon, privilege monitors",
    "blk_mq_start_request": "bcc biosnoop, biolatency",
    "swap_readpage": "bcc swapin",
}
_FAMILIES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"security_\w+"), "security monitors (Tetragon, Falco, BPF LSM loaders)"),
    (re.compile(r"bpf_lsm_\w+"), "BPF LSM programs, systemd's RestrictFileSystems= among them"),
    (re.compile(r"(__x64_|__ia32_|__do_|__se_)?sys_\w+"), "system call tracers (bcc, Falco, Tetragon)"),
    (re.compile(r"__ia32_compat_sys_\w+"), "system call tracers (bcc, Falco, Tetragon)"),
    (re.compile(r"_*blk_account_io_(start|done|merge_\w+|completion)"), "bcc biosnoop, biotop, biolatency"),
    (
        re.compile(r"(ext4|btrfs|xfs|nfs)_file_(read_iter|write_iter|open|fsync)"),
        "bcc ext4slower and the like",
    ),
    (re.compile(r"xfs_file_\w+"), "bcc xfsslower"),
)


def who_hooks(name: str) -> str | None:
    """Who commonly attaches to a function of that name; None: nobody known."""
    found = HOOKED.get(name)
    if found is not None:
        return found
    return next((who for pattern, who in _FAMILIES if pattern.fullmatch(name)), None)
