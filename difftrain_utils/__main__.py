"""`python -m difftrain_utils` is `difftrain`."""

from difftrain_utils.commands.main import main

main()
