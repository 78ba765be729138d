"""What every package uses and none is about: the error that users read, files that are whole or absent, words.

Imports the standard library (and rich, inside a function), nothing of nibble.
"""
