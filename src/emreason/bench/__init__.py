"""`make bench`: the E-step and the M-step beside what one would use instead, on the same work."""
