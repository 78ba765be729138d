"""Damaged and hostile files, drawn at random: what reads them answers with a message, in time and within memory.

In the suite with a few inputs each (tests/test_properties.py); by hand with many: python -m tests.fuzz --minutes 10
"""
