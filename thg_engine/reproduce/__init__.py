"""``thg-engine reproduce``: the paper's tables, for people who have the weights and the data.

`tables` holds what was published, `methods` says how a row is run, `generation` makes its samples,
`metrics` scores them, `report` prints published numbers beside measured ones. docs/reproduce.md.
"""
