"""The author's input: unified diffs, line control, which units a change reaches."""
