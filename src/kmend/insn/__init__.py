"""Instruction boundaries and operands (x86-64)."""
