"""`python -m sftprep.cli`."""

from sftprep.cli.entry import main

if __name__ == "__main__":  # worker processes import the module that started them
    main()
