"""The shared parts; each file is a noun of the field. A part knows no variant."""
