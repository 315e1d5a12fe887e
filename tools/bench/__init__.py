"""What the three benchmarks are made of, a folder each; and the machine under them."""
