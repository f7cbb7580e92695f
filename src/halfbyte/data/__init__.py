"""From a data file to packed batches, with every problem named by file and line."""
