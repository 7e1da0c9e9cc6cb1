"""`make coverage`: which architectures run captured, and equal to the hook engine."""
