"""Train image classifiers from WebDataset shards on S3, on machines that may vanish at any moment."""
