"""`python -m soundwave`: the same command as the console script `soundwave`. In a checkout's root it refuses to run."""

from soundwave.provenance import refuse_hidden_kernels

if __name__ == "__main__":
    refuse_hidden_kernels()  # before the command is imported: it needs packages that may be hidden or missing
    from soundwave.cli import main

    main()
