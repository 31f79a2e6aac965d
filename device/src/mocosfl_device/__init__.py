"""A client of a mocosfl run for small devices, and what a server shares with it: protocol, codecs, random numbers,
augmentation. Needs neither PyTorch nor mocosfl."""

__version__ = "0.1.0"
