"""HMAR (arXiv 2506.04421), with VAR (arXiv 2404.02905) as a mask pattern of the same network."""
