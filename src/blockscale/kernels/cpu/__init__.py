"""CPU code: a C++ kernel built once per machine, and its torch-facing functions."""
