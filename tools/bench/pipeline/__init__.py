"""What `bench_pipeline.py` is made of: rows, engines and peers, clocks, tables."""
