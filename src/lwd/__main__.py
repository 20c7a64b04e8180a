"""`python -m lwd`, for where the script is not on the PATH."""

from lwd.cli import main

main()
