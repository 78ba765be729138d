"""What is in a folder, a checkpoint or an adapter, and in what two of them differ: python -m models.inspect PATH

A report is an object for `json.dumps`; the text of the command is made from it.
"""
