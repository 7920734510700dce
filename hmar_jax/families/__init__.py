"""Model families and the registry of them."""
