"""`python -m soundwave`: the same command as the console script `soundwave`, but not from a checkout's own folder."""

from soundwave.provenance import refuse_hidden_kernels

if __name__ == "__main__":
    refuse_hidden_kernels()  # before the command is imported: it needs packages that may be hidden or missing
    from soundwave.cli import main

    main()
