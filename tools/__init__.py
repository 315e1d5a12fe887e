"""Scripts over the packages, and what they share; no package imports them."""
