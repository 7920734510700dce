"""Pictures in, batches out: sources that read by index and Grain pipelines over them."""
