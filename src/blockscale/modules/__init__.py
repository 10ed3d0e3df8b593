"""Layers that hold a plan and a prepared weight; their forward decides nothing."""
