"""Plans fitted to a model: converged runs, optimal grids, least-squares rows, and the file of them.

Nothing here knows diffusers: a model is an `Engine`, a `NoiseSchedule` and batches of conditioning.
"""
