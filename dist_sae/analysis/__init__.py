"""Questions to trained dictionaries, a file each: from index, checkpoint and rows to findings."""
