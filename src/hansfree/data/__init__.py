"""What ``hansfree data`` does: get data sets, check folders of the user's own, and write benchmarks to disk."""
