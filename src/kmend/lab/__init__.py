"""QEMU guests: boot, snapshot, agent, outcome."""
