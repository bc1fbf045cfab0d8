"""Values that the stages share. Standard library only; imports nothing else of kmend."""
