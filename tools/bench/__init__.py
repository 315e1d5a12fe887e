"""What `bench_pipeline.py` and `bench_training.py` are made of: rows, peers, clocks, tables."""
