"""What `make_masks.py` is made of: hand-crafted measures of saliency, and a network."""
