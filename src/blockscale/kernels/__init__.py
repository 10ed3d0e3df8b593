"""Kernels by the machine they run on; they decide nothing."""
