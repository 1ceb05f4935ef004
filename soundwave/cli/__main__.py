"""`python -m soundwave.cli`: the same command as the console script `soundwave`."""

from soundwave.provenance import refuse_hidden_kernels

if __name__ == "__main__":
    from soundwave.cli import main

    refuse_hidden_kernels()
    main()
