"""Other people's frameworks: their objects in, ours out, nothing decided here."""
