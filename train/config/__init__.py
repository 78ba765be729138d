"""The config of a run: its keys, what may be combined, YAML in and out, and what is said when it is wrong.

Imports quant.common and models.blocks.groups, and no torch. `load` is what others call; below it lie `rules` and
`errors`, then `sections`, `schema` and `yaml_text`.
"""
