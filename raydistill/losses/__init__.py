"""Distillation losses: pure functions of already selected completion tokens, and the one normalisation.

Order of use: `reduction` selects the rows, `objective` turns them into one loss per token (through `targets` and
`divergence`), `reduction` turns those into the scalar that is backpropagated.
"""
