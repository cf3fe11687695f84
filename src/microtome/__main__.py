"""`python -m microtome`, which is how `torchrun -m microtome` begins."""

from microtome.cli import main

main()
