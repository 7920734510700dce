"""How good samples are: figures that need no pretrained network, for small labelled data sets."""
