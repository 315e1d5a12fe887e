"""How an encoder is judged: one file per protocol, found by its name."""
