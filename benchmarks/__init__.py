"""Subcommands of bench.py in files of their own."""
