"""Infrastructure that every other package builds on.

configuration   validated config dataclasses, their command-line flags, errors for the user
devices         device and floating-point precision by name
files           atomic file writes, file locks
logs            reading training logs, smoothing curves
prefetching     preparing items ahead in a background thread
process         the peak memory of this process
"""
