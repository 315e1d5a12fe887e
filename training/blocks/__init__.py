"""Parts that two methods or more are made of. One idea per file, and nothing that nobody uses."""
