"""Readers of published problem sets, one module per family, and their conversion into our JSONL.

A package and not files beside the others: each module knows one publisher's format and is used by
`convert.py`, which is the only door for the rest of rlef.
"""
