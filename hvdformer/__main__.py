"""`python -m hvdformer` is `hvdformer`."""

from hvdformer.cli import main

main()
