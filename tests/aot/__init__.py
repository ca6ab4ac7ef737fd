"""Ahead-of-time compilation of every launch configuration, without a GPU: see matrix.py."""
