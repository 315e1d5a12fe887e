"""What `bench_training.py` is made of: pieces of a run, its parts alone, the verdict."""
