"""The config of a run: its keys, what may be combined, YAML in and out, and messages for what is wrong.

Imports quant.common and models.blocks.groups, and no torch. `load` is what others call; it imports `rules` and
`errors`, and these `sections`, `schema` and `yaml_text`.
"""
