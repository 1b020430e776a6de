"""A small trained Stable Diffusion pipeline in the box, the classifier that judges it, and the
demo.

from thg_engine.demo import load_pipeline
pipe = load_pipeline()
pipe("a photo of a red sneaker").images[0]
"""

from .classifier import load_classifier
from .pipeline_loader import load_pipeline

__all__ = ["load_classifier", "load_pipeline"]
