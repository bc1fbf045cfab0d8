"""The live machine: what it runs, what is patched, what a transition waits for; and acting on it."""
