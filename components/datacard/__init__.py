"""The page of a data set: what is in a version, how it looks and sounds, and what was set aside."""
