"""What `bench_methods.py` is made of: its jobs, their processes, the rows that they leave."""
