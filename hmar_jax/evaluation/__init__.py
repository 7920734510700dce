"""Evaluation of samples: a classifier report and distances that need no pretrained network."""
