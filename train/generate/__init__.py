"""Talking to a model: a prompt, a chat, a file of prompts. The command: `python -m train.generate`.

Imports models and train.data.
"""
