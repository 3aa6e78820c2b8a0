"""Sweeps of one design choice each: declarations (`*.yaml`) to read, copy and edit."""
