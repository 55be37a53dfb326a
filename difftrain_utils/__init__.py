"""Helpers of the difftrain scripts: each module is one subject."""

import os

# transformers warns of torchvision, which nothing here needs. Set before its import; the user's own setting wins.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
