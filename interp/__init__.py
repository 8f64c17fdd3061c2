"""A mechanistic interpretability workbench for the vision tower of CLIP models."""
