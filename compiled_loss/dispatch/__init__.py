"""Dispatch from the arguments of a loss to the engine: checked, a rank's own, cast, normalised, planned."""
