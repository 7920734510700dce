"""Autoencoders: images to latents and back, and how they are trained."""
