"""Files: checkpoints, run and model directories, images."""
