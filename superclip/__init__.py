"""SuperCLIP and its rivals: a compact, exact trainer for contrastive image-text models."""

__version__ = "0.1.0"
