"""sovit: which width, depth and MLP dimension should a vision transformer have, and how sure are we?

An implementation of "Getting ViT in Shape" (SoViT, arXiv 2305.13035). See docs/design.md for the map of the package.
"""

__version__ = "0.1.0"
