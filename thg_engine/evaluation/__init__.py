"""``thg-engine evaluate``: work-precision curves and quality against training-free baselines.

A `Method` prepares a real pipeline (scheduler, compilation, cache), is called with given noise, and
leaves the pipeline as it was; a `Bench` measures it; docs/evaluation.md says what every column is.
"""
