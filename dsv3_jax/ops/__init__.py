"""Operations: in each folder `reference.py` defines the numbers and `api.py` picks an implementation."""
