"""Probes: small tasks, each asking for exactly one thing that a design claims to do."""
