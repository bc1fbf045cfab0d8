"""Original x patched object: twins, changed and new functions, data, special sections, closure."""
