"""Operations: each folder has `reference.py`, which defines the numbers, and `api.py`, which picks an implementation."""
