"""Research on speculative decoding: draft, verify, accept, commit."""

__version__ = "0.1.0"
