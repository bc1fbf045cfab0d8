"""The kernel's livepatch core as an executable specification: pure values and functions, no I/O.

The files follow the kernel's own (``kernel/livepatch/``), and so do the names. All functions take the
kernel as a value (:class:`kmend.klp.structs.Kernel`, the kernel's global variables) and change it.
"""
