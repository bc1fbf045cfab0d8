"""The livepatch module: descriptors, klp relocations, sympos, modinfo, signature."""
