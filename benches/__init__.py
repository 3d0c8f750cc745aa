"""Farthing beside its peers, measured interleaved in one run."""
