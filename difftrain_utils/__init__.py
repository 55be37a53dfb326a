"""Helpers of the difftrain scripts: each module is one subject."""
