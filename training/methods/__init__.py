"""One file per method, found by its file name: `--method dino` is dino.py. See ../method.py."""
