"""Sequences of bases, one token each."""
