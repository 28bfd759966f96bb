"""`gradfast bench`: clip and step timed against torch's, in interleaved pairs, after a check that both do the same.

`workloads` says what is stepped, `contenders` who steps, `same_update` that they agree with float64; `timing`,
`memory` and `launches` measure; `measure` runs one process of it, `run` several; `summary` makes one number of many,
`report` and `chart` show them.
"""
