"""Pure functions over frozen values: no torch, no environment, no clock, no machine."""
