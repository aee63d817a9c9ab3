"""A waterfall in the formats of other programs."""
