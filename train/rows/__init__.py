"""Rows of text: files of them, which columns are used, and what one row means.

Imports train.config and quant.common.
"""
