"""From a class to tokens to a picture."""
