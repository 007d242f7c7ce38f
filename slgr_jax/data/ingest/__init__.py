"""Raw files of any layout -> a dataset directory."""
