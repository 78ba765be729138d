"""Runs that are killed, and files that are damaged under them: what a user finds afterwards. make faults"""
