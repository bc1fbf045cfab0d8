"""ELF64 relocatable files: read, write, relocation rows."""
