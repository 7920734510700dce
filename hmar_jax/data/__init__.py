"""Data: sources that read images by index, transforms, loaders, and encoded data sets on disk."""
