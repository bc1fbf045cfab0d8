"""The target on disk: packages, source tree, compile commands, image, kallsyms, modules."""
